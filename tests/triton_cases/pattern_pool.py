import torch

from fastreid_vi.kernels import pattern_pool
from tests.triton_aot import Budget, Case, features


def pattern(
    *shape: int,
    dtype: torch.dtype,
    maps: int = 6,
    activation: str = "sigmoid",
    last: bool = True,
) -> None:
    x = features(*shape, dtype, last=last)
    weight = x.new_empty(maps, shape[1], 1, 1)
    pooled, attention = pattern_pool.pattern_pool(x, weight, x.new_empty(maps), activation)
    pattern_pool.pattern_pool_backward(pooled, attention, x, weight, attention, activation)


CASES = {
    "MPANet": Case(call=lambda: pattern(128, 2048, 24, 8, dtype=torch.bfloat16), matrix=True),
    "MPANet, float32": Case(call=lambda: pattern(128, 2048, 24, 8, dtype=torch.float32)),
    "MPANet, NCHW": Case(
        call=lambda: pattern(128, 2048, 24, 8, dtype=torch.bfloat16, last=False), matrix=True
    ),
    "MCJA": Case(
        call=lambda: pattern(128, 512, 48, 24, dtype=torch.float16, maps=12, activation="softmax"),
        matrix=True,
    ),
    "float64": Case(call=lambda: pattern(16, 2048, 24, 8, dtype=torch.float64), matrix=True),
}

BUDGETS = {
    "_pattern_maps_kernel": Budget(registers=184, shared=65536, matrix=True, wide_stores=True),
    "_pattern_softmax_kernel": Budget(registers=64, shared=1024, wide_stores=True),
    "_pattern_pool_kernel": Budget(registers=96, shared=49152, matrix=True, wide_stores=True),
    "_pattern_logit_gradient_kernel": Budget(registers=184, shared=65536, matrix=True),
    "_pattern_softmax_gradient_kernel": Budget(registers=64, shared=8192, wide_stores=True),
    "_pattern_map_gradient_kernel": Budget(
        registers=128, shared=49152, matrix=True, wide_stores=True
    ),
}
