import torch

from fastreid_vi.kernels import triplet
from tests.triton_aot import Budget, Case


def batch_hard(
    rows: int, size: int, dtype: torch.dtype, metric: str = "euclidean", columns: int = 0
) -> None:
    x, labels = torch.empty(rows, size, dtype=dtype), torch.empty(rows, dtype=torch.int64)
    other = torch.empty(columns, size, dtype=dtype) if columns else None
    other_labels = torch.empty(columns, dtype=torch.int64) if columns else None
    loss, _, *saved = triplet.batch_hard_triplet_loss(x, labels, other, other_labels, 0.3, metric)
    triplet.batch_hard_triplet_loss_backward(loss, x, other, *saved, metric)


CASES = {
    "LbA": Case(call=lambda: batch_hard(64, 2048, torch.float32)),
    "MPANet": Case(call=lambda: batch_hard(128, 14336, torch.float32)),
    "AlignGAN": Case(call=lambda: batch_hard(64, 2048, torch.float32, "cosine", columns=64)),
    "strips": Case(call=lambda: batch_hard(640, 2048, torch.bfloat16), matrix=True),
    "float64": Case(call=lambda: batch_hard(64, 2048, torch.float64)),
}

BUDGETS = {
    "_hardest_kernel": Budget(registers=72, shared=1024, wide_loads=False),
    "_mined_slopes_kernel": Budget(registers=64, shared=1024),
    "_mined_gradient_kernel": Budget(registers=96, shared=1024, wide_stores=True),
}
