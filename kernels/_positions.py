"""The dense triplet loss over squared distances, shared by the loss on maps and the whole block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import OPTIONS, block


@triton.jit
def _distance(part_ptr, at, inside, parts, stride, known):
    """Root of `known`, or where that is negative of the sum of the parts; float64."""
    square = tl.where(known < 0, 0.0, known)
    for k in range(0, parts):
        v = tl.load(part_ptr + k * stride + at, mask=inside & (known < 0), other=0.0)
        square += tl.where(known < 0, v.to(tl.float64), 0.0)
    return tl.sqrt(square)


@triton.jit
def _hinge_kernel(
    near_ptr, far_ptr, known_ptr, weight_ptr, slope_ptr, loss_ptr,
    batches, positions, near_parts, far_parts,
    margin: tl.constexpr, OVER_BATCH: tl.constexpr, HAS_KNOWN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Hinge and slopes of BLOCK_S positions of all samples; their weighted sum goes to loss[pid].

    slope[0] = w / count / near and slope[1] = -w / count / far where the hinge is active.
    """
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    lanes = tl.arange(0, BLOCK_B)[:, None]
    count = batches.to(tl.int64) * positions
    shared = tl.zeros([BLOCK_B, BLOCK_S], dtype=tl.float64)
    if OVER_BATCH:
        for first in range(0, batches, BLOCK_B):
            inside = (first + lanes < batches) & (s < positions)
            at = (first + lanes).to(tl.int64) * positions + s
            shared += tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float64)
        mean = tl.sum(shared, axis=0, keep_dims=True) / batches
        shared = tl.broadcast_to(mean, [BLOCK_B, BLOCK_S])
    loss = tl.zeros([BLOCK_B, BLOCK_S], dtype=tl.float64)
    for first in range(0, batches, BLOCK_B):
        inside = (first + lanes < batches) & (s < positions)
        at = (first + lanes).to(tl.int64) * positions + s
        none = tl.full([BLOCK_B, BLOCK_S], -1.0, dtype=tl.float64)
        near = _distance(near_ptr, at, inside, near_parts, count, none)
        if HAS_KNOWN:
            none = tl.load(known_ptr + at, mask=inside, other=0.0).to(tl.float64)
        far = _distance(far_ptr, at, inside, far_parts, count, none)
        weight = shared
        if not OVER_BATCH:
            weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float64)
        hinge = near - far + margin
        # NaN counts in the loss.
        loss += tl.where(inside & ((hinge > 0) | (hinge != hinge)), weight * hinge, 0.0)
        slope = tl.where(hinge > 0, weight / count, 0.0)
        kind = slope_ptr.dtype.element_ty
        pull = tl.where(near > 0, slope / tl.where(near > 0, near, 1.0), 0.0)
        push = tl.where(far > 0, -slope / tl.where(far > 0, far, 1.0), 0.0)
        tl.store(slope_ptr + at, pull.to(kind), mask=inside)
        tl.store(slope_ptr + count + at, push.to(kind), mask=inside)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.sum(loss, axis=1), axis=0))


@triton.jit
def _mean_kernel(sum_ptr, out_ptr, sums, count, BLOCK: tl.constexpr):
    """Sum of all sums over `count`; one program."""
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, sums, BLOCK):
        k = first + tl.arange(0, BLOCK)
        total += tl.load(sum_ptr + k, mask=k < sums, other=0.0)
    tl.store(out_ptr, (tl.sum(total, axis=0) / count).to(out_ptr.dtype.element_ty))


def position_losses(
    near: Tensor,
    far: Tensor,
    weight: Tensor,
    margin: float,
    weighting: str,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss, and the slopes of both distances over the distances, [2, B, S].

    near, far: [parts, B, S], squared distances in parts over the channels. known: [B, S], squared
    distances that stand in the place of `far` where they are not negative.
    """
    batches, positions = weight.shape
    loss, slopes = weight.new_empty(()), weight.new_empty(2, batches, positions)
    if batches == 0:
        return loss.zero_(), slopes
    tile = {"BLOCK_B": block(batches, 64), "BLOCK_S": 16}
    programs = triton.cdiv(positions, tile["BLOCK_S"])
    sums = weight.new_empty(programs, dtype=torch.float64)
    _hinge_kernel[(programs,)](
        near, far, weight if known is None else known, weight.contiguous(), slopes, sums,
        batches, positions, len(near), len(far),
        margin=margin, OVER_BATCH=weighting == "batch", HAS_KNOWN=known is not None,
        **tile, **OPTIONS,
    )  # fmt: skip
    size = block(programs, 256)
    _mean_kernel[(1,)](sums, loss, programs, batches * positions, BLOCK=size, **OPTIONS)
    return loss, slopes
