import torch

from fastreid_vi.kernels import weighted
from tests.triton_aot import Budget, Case


def weighted_triplet(rows: int, size: int, dtype: torch.dtype, stable: bool = False) -> None:
    x, labels = torch.empty(rows, size, dtype=dtype), torch.empty(rows, dtype=torch.int64)
    loss, _, *saved = weighted.weighted_triplet_loss(x, labels, stable)
    weighted.weighted_triplet_loss_backward(loss, x, labels, *saved, stable)


CASES = {
    "LbA": Case(call=lambda: weighted_triplet(64, 2048, torch.float32)),
    "stable": Case(call=lambda: weighted_triplet(128, 2048, torch.float32, stable=True)),
    "bfloat16": Case(call=lambda: weighted_triplet(128, 2048, torch.bfloat16)),
    "strips": Case(call=lambda: weighted_triplet(640, 2048, torch.float32), matrix=True),
    "float64": Case(call=lambda: weighted_triplet(64, 2048, torch.float64)),
}

BUDGETS = {
    "_weighted_kernel": Budget(registers=80, shared=1024, wide_loads=False),
    "_weighted_gradient_kernel": Budget(registers=255, shared=16384, wide_stores=True),
}
