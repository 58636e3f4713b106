import torch

from fastreid_vi.kernels import alignment
from tests.triton_aot import Budget, Case, features


def aligned(*shape: int, dtype: torch.dtype) -> None:
    x, index = features(*shape, dtype), torch.empty(shape[0], dtype=torch.int64)
    mask = torch.empty(shape[0], shape[2] * shape[3])
    _, _, p, lse = alignment.align_features(x, index, mask, 50.0)
    alignment.align_features_backward(x, x, index, mask, p, lse, 50.0)


def block(*shape: int, dtype: torch.dtype, last: bool = True) -> None:
    x = features(*shape, dtype, last=last)
    pairs = [torch.empty(shape[0], dtype=torch.int64) for _ in range(2)]
    aligned, loss, _, *saved = alignment.dense_alignment(x, *pairs, 50.0, 0.3, "batch", 1e-6)
    alignment.dense_alignment_backward(x, loss, x, *pairs, aligned, *saved, 50.0, 1e-6)


CASES = {
    "LbA, layer 4": Case(call=lambda: aligned(64, 2048, 18, 9, dtype=torch.bfloat16), matrix=True),
    "float32": Case(call=lambda: aligned(64, 2048, 18, 9, dtype=torch.float32)),
    "block, layer 4": Case(call=lambda: block(64, 2048, 18, 9, dtype=torch.bfloat16), matrix=True),
    "block, float32": Case(call=lambda: block(64, 1024, 18, 9, dtype=torch.float32)),
    "block, NCHW, larger map": Case(
        call=lambda: block(32, 1024, 24, 16, dtype=torch.float16, last=False), matrix=True
    ),
    "block, float64": Case(call=lambda: block(8, 512, 18, 9, dtype=torch.float64), matrix=True),
}

# The kernels of `align_features` are those of correspondences.
BUDGETS = {
    "_far_kernel": Budget(registers=255, shared=65536, wide_loads=False, matrix=True),
    "_blend_kernel": Budget(registers=255, shared=65536, matrix=True),
    "_distance_gradient_kernel": Budget(registers=255, shared=65536, wide_loads=False, matrix=True),
    "_direct_inner_kernel": Budget(registers=255, shared=65536, matrix=True),
    "_warped_gram_kernel": Budget(registers=255, shared=65536, wide_loads=False, matrix=True),
    "_dense_gather_kernel": Budget(registers=255, shared=98304, matrix=True),
    "_direct_gather_kernel": Budget(registers=255, shared=98304, matrix=True),
}
