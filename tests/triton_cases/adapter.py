import torch

from fastreid_vi.kernels import adapter
from tests.triton_aot import Budget, Case, features


def distribution_adapter(
    *shape: int, maps: int, dtype: torch.dtype, last: bool = True, training: bool = True
) -> None:
    x, channels = features(*shape, dtype, last=last), shape[1]
    sc_weight, ca_weight = torch.empty(maps, channels, 1, 1), torch.empty(channels, 1, maps)
    vector, bias = torch.empty(channels), torch.empty(maps)
    running = (None if training else vector,) * 4
    out, *saved = adapter.distribution_adapter(
        x, sc_weight, bias, ca_weight, *(vector,) * 4, *running, 1e-5
    )
    adapter.distribution_adapter_backward(
        out, x, sc_weight, ca_weight, vector, vector, *saved, 1e-5, not training
    )


CASES = {
    "distribution_adapter, MCJA stage 2": Case(
        call=lambda: distribution_adapter(128, 512, 48, 24, maps=2, dtype=torch.bfloat16),
        matrix=True,
    ),
    "distribution_adapter, MCJA stage 3, RegDB": Case(
        call=lambda: distribution_adapter(128, 1024, 24, 12, maps=12, dtype=torch.float16),
        matrix=True,
    ),
    "distribution_adapter, evaluation, NCHW": Case(
        call=lambda: distribution_adapter(
            64, 512, 48, 24, maps=2, dtype=torch.bfloat16, last=False, training=False
        ),
    ),
}

BUDGETS = {
    "_adapter_apply_kernel": Budget(registers=64, shared=4096, wide_stores=True),
    "_adapter_map_gradient_kernel": Budget(
        registers=168, shared=32768, wide_stores=True, matrix=True
    ),
}
