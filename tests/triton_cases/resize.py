import torch

from fastreid_vi.kernels import resize
from tests.triton_aot import Budget, Case, features

MEAN, STD = [-0.03, -0.088, -0.188], [0.458, 0.448, 0.45]


def encoder_input(*, dtype: torch.dtype, last: bool) -> None:
    images = features(72, 3, 128, 128, dtype, last=last)
    out = resize.resize_normalize(images, 384, 192, MEAN, STD)
    resize.resize_normalize_backward(out, 128, 128, STD, last)


def feature_branch() -> None:
    maps = features(16, 64, 24, 12, torch.bfloat16)
    out = resize.resize_normalize(maps, 16, 16, [0.0] * 64, [1.0] * 64)
    resize.resize_normalize_backward(out, 24, 12, [1.0] * 64, True)


CASES = {
    "resize_normalize, NCHW": Case(
        call=lambda: encoder_input(dtype=torch.float32, last=False), wide=False
    ),
    "resize_normalize, channels_last": Case(
        call=lambda: encoder_input(dtype=torch.bfloat16, last=True), wide=False
    ),
    "resize_normalize, feature branch": Case(call=feature_branch, wide=False),
}

# Neighbours are gathered; only rows of results are runs.
BUDGETS = {
    "_resize_kernel": Budget(registers=128, shared=4096, wide_loads=False),
    "_resize_gradient_kernel": Budget(registers=96, shared=4096, wide_loads=False),
}
