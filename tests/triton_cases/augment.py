import torch

from fastreid_vi.augment import level_table, plain_plan
from fastreid_vi.kernels import augment
from tests.triton_aot import Budget, Case


def batch(
    height: int, width: int, *, dtype: torch.dtype, last: bool = True, mix: bool = False
) -> None:
    images = torch.empty(1024, height, width, 3, dtype=torch.uint8)
    plan = plain_plan(torch.arange(128), levels=level_table())
    if mix:
        plan = plan._replace(channel_mix=torch.empty(128, 5))
    augment.augment(images, *plan, dtype, last)


CASES = {
    "augment, MCJA": Case(call=lambda: batch(384, 192, dtype=torch.bfloat16)),
    "augment, MPANet": Case(call=lambda: batch(384, 128, dtype=torch.float16)),
    "augment, LbA": Case(call=lambda: batch(288, 144, dtype=torch.float32, mix=True)),
    "augment, NCHW": Case(call=lambda: batch(384, 192, dtype=torch.bfloat16, last=False)),
    "augment, bytes": Case(call=lambda: batch(384, 192, dtype=torch.uint8)),
}

# Bytes are gathered one by one, wherever flips and crops put them; levels and results are vectors.
# Triton 3.6 takes up to 168 registers where 3.9 takes 96.
BUDGETS = {
    "_augment_kernel": Budget(registers=176, shared=4096, wide_loads=False, wide_stores=True),
    "_moments_kernel": Budget(registers=112, shared=1024, wide_loads=False),
}
