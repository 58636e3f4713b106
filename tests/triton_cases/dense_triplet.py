import torch

from fastreid_vi.kernels import dense_triplet
from tests.triton_aot import Budget, Case, features


def triplet(*shape: int, dtype: torch.dtype, weighting: str = "batch", last: bool = True) -> None:
    maps = [features(*shape, dtype, last=last) for _ in range(3)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.empty(shape[0], shape[2] * shape[3], dtype=wide)
    loss, slopes = dense_triplet.dense_triplet_loss(*maps, weight, 0.3, weighting)
    dense_triplet.dense_triplet_loss_backward(loss, *maps, slopes)


CASES = {
    "LbA, layer 4": Case(call=lambda: triplet(64, 2048, 18, 9, dtype=torch.bfloat16)),
    "float32": Case(call=lambda: triplet(64, 1024, 18, 9, dtype=torch.float32, weighting="sample")),
    "NCHW": Case(call=lambda: triplet(32, 1024, 24, 16, dtype=torch.float16, last=False)),
    "float64": Case(call=lambda: triplet(8, 512, 18, 9, dtype=torch.float64)),
}

BUDGETS = {
    "_square_distances_kernel": Budget(registers=255, shared=8192),
    "_triplet_gradient_kernel": Budget(registers=144, shared=8192, wide_stores=True),
    "_hinge_kernel": Budget(registers=168, shared=4096, wide_loads=False),
    "_mean_kernel": Budget(registers=64, shared=1024, wide_loads=False),
}
