import torch

from fastreid_vi.kernels import gram
from tests.triton_aot import Budget, Case


def squares(rows: int, size: int, metric: str, dtype: torch.dtype, columns: int = 0) -> None:
    x = torch.empty(rows, size, dtype=dtype)
    y = torch.empty(columns, size, dtype=dtype) if columns else x
    ticket = torch.empty(1, dtype=torch.int32)
    gram.gram_strip(x, y, gram.centred(x, y, metric), metric, 0, 512, ticket)


CASES = {
    "float32": Case(call=lambda: squares(4096, 2048, "euclidean", torch.float32), matrix=True),
    "bfloat16": Case(call=lambda: squares(4096, 2048, "sqeuclidean", torch.bfloat16), matrix=True),
    "cosine": Case(
        call=lambda: squares(4096, 2048, "cosine", torch.float32, columns=8192), matrix=True
    ),
}

BUDGETS = {
    "_mean_row_kernel": Budget(registers=72, shared=1024),
    "_centred_rows_kernel": Budget(registers=64, shared=8192, wide_stores=True),
    "_gram_kernel": Budget(registers=232, shared=98304, matrix=True, wide_stores=True),
}
