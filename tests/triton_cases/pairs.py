import torch

from fastreid_vi.kernels import pairs
from tests.triton_aot import Budget, Case


def parts(rows: int, size: int, metric: str, dtype: torch.dtype, columns: int = 0) -> None:
    x = torch.empty(rows, size, dtype=dtype)
    y = torch.empty(columns, size, dtype=dtype) if columns else x
    pairs.pair_parts(x, y, metric, torch.empty(1, dtype=torch.int32))


CASES = {
    "MPANet": Case(call=lambda: parts(128, 14336, "euclidean", torch.float32)),
    "AlignGAN": Case(call=lambda: parts(64, 2048, "cosine", torch.float32, columns=128)),
    "cosine, one set": Case(call=lambda: parts(128, 2048, "cosine", torch.float16)),
    "float64": Case(call=lambda: parts(128, 2048, "euclidean", torch.float64)),
    "bfloat16": Case(call=lambda: parts(128, 2048, "sqeuclidean", torch.bfloat16)),
}

# 128 of the registers hold the sums of a tile: 32 x 32 pairs, 16 runs of components each.
BUDGETS = {"_pair_parts_kernel": Budget(registers=240, shared=8192)}
