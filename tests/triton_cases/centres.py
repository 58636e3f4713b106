import torch

from fastreid_vi.kernels import centres
from tests.triton_aot import Budget, Case


def centres_and_radii(rows: int, size: int, dtype: torch.dtype) -> None:
    x, labels = torch.empty(rows, size, dtype=dtype), torch.empty(rows, dtype=torch.int64)
    counters = torch.empty(2, dtype=torch.int32)
    first = torch.empty_like(labels)
    centres.first_rows(labels, first, counters)
    centres.squared_radii(x, first, centres.centres_of(x, first, counters))


CASES = {
    "large batch": Case(call=lambda: centres_and_radii(4096, 2048, torch.float32)),
    "bfloat16": Case(call=lambda: centres_and_radii(4096, 2048, torch.bfloat16)),
    "float64": Case(call=lambda: centres_and_radii(1024, 2048, torch.float64)),
}

BUDGETS = {
    "_first_rows_kernel": Budget(registers=40, shared=1024),
    "_centres_kernel": Budget(registers=96, shared=8192, wide_stores=True),
    "_radii_kernel": Budget(registers=96, shared=1024),
}
