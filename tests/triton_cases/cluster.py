import torch

from fastreid_vi.kernels import cluster
from tests.triton_aot import Budget, Case


def center_cluster(rows: int, size: int, dtype: torch.dtype) -> None:
    x, labels = torch.empty(rows, size, dtype=dtype), torch.empty(rows, dtype=torch.int64)
    loss, _, _, first, radius = cluster.center_cluster_loss(x, labels, 0.7)
    cluster.center_cluster_loss_backward(loss, loss, x, first, radius, 0.7)


CASES = {
    "MPANet": Case(call=lambda: center_cluster(128, 14336, torch.float32)),
    "small": Case(call=lambda: center_cluster(64, 2048, torch.float32)),
    "bfloat16": Case(call=lambda: center_cluster(128, 2048, torch.bfloat16)),
    "large batch": Case(call=lambda: center_cluster(512, 2048, torch.float32)),
    "float64": Case(call=lambda: center_cluster(64, 2048, torch.float64)),
}

BUDGETS = {
    "_cluster_parts_kernel": Budget(registers=224, shared=4096),
    "_cluster_kernel": Budget(registers=96, shared=4096, wide_loads=False),
    "_cluster_gradient_kernel": Budget(registers=128, shared=4096, wide_stores=True),
}
