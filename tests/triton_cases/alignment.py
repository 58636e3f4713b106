import torch

from fastreid_vi.kernels import alignment
from tests.triton_aot import Budget, Case, features


def aligned(*shape: int, dtype: torch.dtype) -> None:
    x, index = features(*shape, dtype), torch.empty(shape[0], dtype=torch.int64)
    mask = torch.empty(shape[0], shape[2] * shape[3])
    _, _, p, lse = alignment.align_features(x, index, mask, 50.0)
    alignment.align_features_backward(x, x, index, mask, p, lse, 50.0)


CASES = {
    "LbA, layer 4": Case(call=lambda: aligned(64, 2048, 18, 9, dtype=torch.bfloat16), matrix=True),
    "float32": Case(call=lambda: aligned(64, 2048, 18, 9, dtype=torch.float32)),
}

BUDGETS: dict[str, Budget] = {}  # the kernels are those of correspondences
