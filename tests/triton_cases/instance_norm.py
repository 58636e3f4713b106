import torch

from fastreid_vi.kernels import instance_norm
from tests.triton_aot import Budget, Case, features


def norm_act(*shape: int, dtype: torch.dtype, last: bool = True, residual: bool = False) -> None:
    x, vector = features(*shape, dtype, last=last), torch.empty(shape[1])
    options = ("none" if residual else "relu", 0.2, 1e-5)
    added = x if residual else None
    out, *statistics = instance_norm.instance_norm_act(
        x, vector, vector, added, None, None, *options
    )
    instance_norm.instance_norm_act_backward(out, x, vector, vector, *statistics, *options, False)


CASES = {
    "instance_norm_act, first layer": Case(
        call=lambda: norm_act(16, 64, 128, 128, dtype=torch.bfloat16)
    ),
    "instance_norm_act, residual": Case(
        call=lambda: norm_act(16, 256, 32, 32, dtype=torch.bfloat16, residual=True)
    ),
    "instance_norm_act, NCHW": Case(
        call=lambda: norm_act(16, 256, 32, 32, dtype=torch.float32, last=False)
    ),
}

BUDGETS = {
    "_norm_act_kernel": Budget(registers=96, shared=4096, wide_stores=True),
    "_norm_act_sums_kernel": Budget(registers=128, shared=8192),
    "_norm_act_gradient_kernel": Budget(registers=128, shared=4096, wide_stores=True),
    "_combine_statistics_kernel": Budget(registers=48, shared=0, wide_loads=False),
}
