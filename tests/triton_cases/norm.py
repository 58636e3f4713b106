import torch

from fastreid_vi.kernels import norm
from tests.triton_aot import Budget, Case, features


def modality_alleviation(*shape: int, dtype: torch.dtype, last: bool = True) -> None:
    x, channels = features(*shape, dtype, last=last), shape[1]
    weights = torch.empty(channels // 16, channels), torch.empty(channels, channels // 16)
    out, mean, rstd, gate = norm.modality_alleviation(x, *weights, 1e-5)
    norm.modality_alleviation_backward(out, x, *weights, mean, rstd, gate)


CASES = {
    "modality_alleviation, MPANet": Case(
        call=lambda: modality_alleviation(64, 1024, 24, 8, dtype=torch.bfloat16)
    ),
    "modality_alleviation, NCHW": Case(
        call=lambda: modality_alleviation(64, 1024, 24, 8, dtype=torch.float32, last=False)
    ),
}

BUDGETS = {
    "_statistics_kernel": Budget(registers=64, shared=4096),
    "_blend_kernel": Budget(registers=64, shared=4096, wide_stores=True),
    "_gradient_sums_kernel": Budget(registers=96, shared=4096),
    "_gradient_kernel": Budget(registers=64, shared=4096, wide_stores=True),
}
