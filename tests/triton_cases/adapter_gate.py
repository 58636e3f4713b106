import torch

from fastreid_vi.kernels import adapter_gate
from tests.triton_aot import Budget, Case


def gate(batches: int, channels: int, *, fixed: bool) -> None:
    wide = torch.empty(batches, channels, dtype=torch.float64)
    narrow, vector = torch.empty(batches, channels), torch.empty(channels)
    statistics = (torch.empty(channels, dtype=torch.float64),) * 4
    opened, *_ = adapter_gate.open_gate(wide, wide, narrow, (vector,) * 4, statistics, 1e-5, fixed)
    adapter_gate.close_gate(
        wide, wide, wide, opened, (narrow, narrow), vector, statistics, 1152, 1e-5, fixed
    )


CASES = {
    "gate, training": Case(call=lambda: gate(128, 512, fixed=False)),
    "gate, evaluation": Case(call=lambda: gate(64, 1024, fixed=True)),
}

BUDGETS = {
    "_adapter_gate_kernel": Budget(registers=160, shared=16384, wide_loads=False),
    "_adapter_gate_gradient_kernel": Budget(registers=255, shared=16384, wide_loads=False),
}
