"""Launch of the soft-rank kernels, as csrc/cuda/softrank.cu does it."""

from __future__ import annotations

import ctypes
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fastreid_vi.nvrtc import compiler, runtime
from fastreid_vi.nvrtc.kernel import Kernel
from fastreid_vi.nvrtc.layout import FLOATING, WARP, blocks, c_type, check_rank, sort_padded

_SIZES: Final = compiler.constants("softrank.cuh")
_INSTANCES: Final = tuple((t,) for t in FLOATING)
_WARP = Kernel("softrank.cuh", "soft_rank_warp_kernel", _INSTANCES)
_BLOCK = Kernel("softrank.cuh", "soft_rank_block_kernel", _INSTANCES)
_BACKWARD_WARP = Kernel("softrank.cuh", "soft_rank_backward_warp_kernel", _INSTANCES)
_BACKWARD_BLOCK = Kernel("softrank.cuh", "soft_rank_backward_block_kernel", _INSTANCES)


class _Plan(NamedTuple):
    padded: int
    warps: bool  # a warp takes a row, not a block
    grid: int
    block: int
    shared_bytes: int


def soft_rank(values: Tensor, strength: float, descending: bool) -> tuple[Tensor, Tensor]:
    """Ranks, and the block of each entry."""
    check_rank("soft_rank", "values", values, 2)
    rows, n = values.shape
    ranks = values.new_empty(rows, n)
    pooled = values.new_empty(rows, n, dtype=torch.int32)
    if ranks.numel() == 0:
        return ranks, pooled
    plan = _plan("soft_rank", values)
    rowwise = values if n == 1 or values.stride(1) == 1 else values.contiguous()
    (_WARP if plan.warps else _BLOCK).launch(
        (c_type(values),),
        plan.grid,
        plan.block,
        plan.shared_bytes,
        rowwise,
        ranks,
        pooled,
        ctypes.c_int64(rows),
        ctypes.c_int64(rowwise.stride(0)),
        ctypes.c_int(n),
        ctypes.c_int(plan.padded),
        ctypes.c_double(-strength if descending else strength),
    )
    return ranks, pooled


def soft_rank_backward(grad: Tensor, blocks: Tensor, strength: float, descending: bool) -> Tensor:
    """Gradient of the values."""
    if grad.dim() != 2 or grad.shape != blocks.shape:
        raise RuntimeError("soft_rank_backward: expected grad and blocks of one shape [R, n]")
    if blocks.dtype != torch.int32:
        raise RuntimeError("soft_rank_backward: expected int32 blocks")
    rows, n = grad.shape
    dvalues = grad.new_empty(rows, n)
    if dvalues.numel() == 0:
        return dvalues
    plan = _plan("soft_rank_backward", grad)
    (_BACKWARD_WARP if plan.warps else _BACKWARD_BLOCK).launch(
        (c_type(grad),),
        plan.grid,
        plan.block,
        plan.shared_bytes,
        grad.contiguous(),
        blocks.contiguous(),
        dvalues,
        ctypes.c_int64(rows),
        ctypes.c_int(n),
        ctypes.c_int(plan.padded),
        ctypes.c_double(-strength if descending else strength),
    )
    return dvalues


def _plan(op: str, values: Tensor) -> _Plan:
    rows, n = values.shape
    slot = _SIZES["kSoftRankSlotBytes"]
    padded = sort_padded(n)
    limit = runtime.present.shared_memory_limit(values) - 1024  # the reductions take some
    if n > _SIZES["kSoftRankLongest"] or padded * slot > limit:
        raise RuntimeError(
            f"{op}: rows of {n} entries do not fit the shared memory of this device, {limit} "
            f"bytes of {slot} for each entry up to the next power of 2"
        )
    warps = n <= _SIZES["kSoftRankWarpRow"]
    per_block = _SIZES["kSoftRankWarps"] if warps else 1
    return _Plan(
        padded,
        warps,
        blocks(-(-rows // per_block)),
        per_block * WARP if warps else _SIZES["kSoftRankThreads"],
        padded * slot * per_block,
    )
