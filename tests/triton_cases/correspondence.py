import torch

from fastreid_vi.kernels import correspondence
from tests.triton_aot import Budget, Case, features


def pairing(*shape: int, dtype: torch.dtype, last: bool = True) -> None:
    x, y = (features(*shape, dtype, last=last) for _ in range(2))
    index = torch.empty(shape[0], dtype=torch.int64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mask = torch.empty(shape[0], shape[2] * shape[3], dtype=wide)
    correspondence.feature_mask(x)
    _, _, p, lse = correspondence.correspondence_warp(x, y, index, mask, mask, 50.0)
    correspondence.correspondence_warp_backward(x, x, y, index, p, lse, 50.0)
    correspondence.correspondence_probability_backward(p, x, y, index, p, lse, 50.0)


CASES = {
    "LbA, layer 4": Case(call=lambda: pairing(64, 2048, 18, 9, dtype=torch.bfloat16), matrix=True),
    "float32": Case(call=lambda: pairing(64, 2048, 18, 9, dtype=torch.float32)),
    "NCHW, larger map": Case(
        call=lambda: pairing(32, 1024, 24, 16, dtype=torch.float16, last=False), matrix=True
    ),
    "float64": Case(call=lambda: pairing(8, 512, 18, 9, dtype=torch.float64), matrix=True),
}

BUDGETS = {
    "_position_norms_kernel": Budget(registers=128, shared=8192),
    "_min_max_kernel": Budget(registers=128, shared=8192, wide_loads=False),
    "_inner_kernel": Budget(registers=255, shared=65536, matrix=True),
    "_match_kernel": Budget(registers=255, shared=8192, wide_loads=False),
    "_warp_kernel": Budget(registers=255, shared=65536, matrix=True),
    "_match_gradient_kernel": Budget(registers=255, shared=8192, wide_loads=False),
    "_key_radial_kernel": Budget(registers=255, shared=32768, wide_loads=False),
    "_gather_kernel": Budget(registers=255, shared=81920, matrix=True),
}
