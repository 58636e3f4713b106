import torch

from fastreid_vi.kernels import pool
from tests.triton_aot import Budget, Case, features


def gem_pool(*shape: int, dtype: torch.dtype, p: float = 3.0, last: bool = True) -> None:
    x = features(*shape, dtype, last=last)
    pooled, moment = pool.gem_pool(x, p, 1e-12)
    pool.gem_pool_backward(pooled, x, moment, p)


CASES = {
    "gem_pool, LbA": Case(call=lambda: gem_pool(64, 2048, 18, 9, dtype=torch.bfloat16)),
    "gem_pool, MCJA": Case(call=lambda: gem_pool(128, 2048, 12, 6, dtype=torch.float32)),
    "gem_pool, NCHW": Case(
        call=lambda: gem_pool(64, 2048, 24, 8, dtype=torch.bfloat16, last=False)
    ),
    "gem_pool, any exponent": Case(
        call=lambda: gem_pool(64, 2048, 18, 9, dtype=torch.float16, p=2.5)
    ),
    "gem_pool, float64": Case(call=lambda: gem_pool(64, 2048, 18, 9, dtype=torch.float64)),
}

BUDGETS = {
    "_gem_pool_forward_kernel": Budget(registers=64, shared=2048),
    "_gem_pool_backward_kernel": Budget(registers=72, shared=2048, wide_stores=True),
}
