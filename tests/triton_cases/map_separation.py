import torch

from fastreid_vi.kernels import map_separation
from tests.triton_aot import Budget, Case, features


def separation(*shape: int, dtype: torch.dtype) -> None:
    maps = features(*shape, dtype, last=False)
    loss = map_separation.map_separation_loss(maps)
    map_separation.map_separation_loss_backward(loss, maps)


CASES = {"MPANet": Case(call=lambda: separation(128, 6, 24, 8, dtype=torch.bfloat16))}

# A map is 192 numbers: its row is too short for wide accesses.
BUDGETS = {
    "_map_separation_kernel": Budget(registers=64, shared=1024, wide_loads=False),
    "_map_separation_gradient_kernel": Budget(registers=64, shared=1024, wide_loads=False),
}
