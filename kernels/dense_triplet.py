"""Dense triplet loss of three maps: one walk over them forward, one backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import (
    OPTIONS,
    Rows,
    accumulator,
    accumulator_kind,
    block,
    map_grid,
    map_like,
    map_tile,
    rows,
)
from fastreid_vi.kernels._positions import position_losses

EPS = 1e-6  # added to every channel of a difference, as published
CHUNK = 512  # channels that a program sums


@triton.jit
def _square_distances_kernel(
    x_ptr, p_ptr, n_ptr, near_ptr, far_ptr, batches, channels, positions,
    x_b, x_c, x_s, p_b, p_c, p_s, n_b, n_c, n_s, chunks, blocks,
    eps: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """near[k, b, s] = sum over CHUNK channels of (x - p + eps)^2, far likewise of (x - n + eps)^2.

    A program owns BLOCK_S positions of a chunk of channels.
    """
    b = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    chunk = (tl.program_id(0) // blocks % chunks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    at = s[:, None].to(tl.int64)
    x_row = x_ptr + b * x_b + at * x_s
    p_row = p_ptr + b * p_b + at * p_s
    n_row = n_ptr + b * n_b + at * n_s
    near = tl.zeros([BLOCK_S, BLOCK_C], dtype=ACC)
    far = tl.zeros([BLOCK_S, BLOCK_C], dtype=ACC)
    for first in range(0, CHUNK, BLOCK_C):
        c = chunk * CHUNK + first + tl.arange(0, BLOCK_C)[None, :]
        inside = (s[:, None] < positions) & (c < channels)
        x = tl.load(x_row + c * x_c, mask=inside, other=0.0).to(ACC)
        d = x - tl.load(p_row + c * p_c, mask=inside, other=0.0).to(ACC) + eps
        near += tl.where(inside, d * d, 0.0)
        d = x - tl.load(n_row + c * n_c, mask=inside, other=0.0).to(ACC) + eps
        far += tl.where(inside, d * d, 0.0)
    out = (chunk * batches + b) * positions + s
    tl.store(near_ptr + out, tl.sum(near, axis=1), mask=s < positions)
    tl.store(far_ptr + out, tl.sum(far, axis=1), mask=s < positions)


@triton.jit
def _triplet_gradient_kernel(
    grad_ptr, x_ptr, p_ptr, n_ptr, slope_ptr, dx_ptr, dp_ptr, dn_ptr,
    batches, channels, positions, x_b, x_c, x_s, p_b, p_c, p_s, n_b, n_c, n_s,
    dx_b, dx_c, dx_s, dp_b, dp_c, dp_s, dn_b, dn_c, dn_s,
    eps: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """All three gradients of a piece of a sample; every element written once."""
    across = tl.cdiv(channels, BLOCK_C)
    down = tl.cdiv(positions, BLOCK_S)
    b = (tl.program_id(0) // (across * down)).to(tl.int64)
    s = tl.program_id(0) // across % down * BLOCK_S + tl.arange(0, BLOCK_S)
    c = (tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]).to(tl.int64)
    known, at = s < positions, s[:, None].to(tl.int64)
    inside = known[:, None] & (c < channels)
    grad = tl.load(grad_ptr)
    slope = slope_ptr + b * positions + s
    pull = (grad * tl.load(slope, mask=known, other=0.0))[:, None]
    slope += batches.to(tl.int64) * positions
    push = (grad * tl.load(slope, mask=known, other=0.0))[:, None]
    x = tl.load(x_ptr + b * x_b + at * x_s + c * x_c, mask=inside, other=0.0).to(ACC)
    p = tl.load(p_ptr + b * p_b + at * p_s + c * p_c, mask=inside, other=0.0).to(ACC)
    n = tl.load(n_ptr + b * n_b + at * n_s + c * n_c, mask=inside, other=0.0).to(ACC)
    near, far = pull * (x - p + eps), push * (x - n + eps)
    kind = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + b * dx_b + at * dx_s + c * dx_c, (near + far).to(kind), mask=inside)
    tl.store(dp_ptr + b * dp_b + at * dp_s + c * dp_c, (-near).to(kind), mask=inside)
    tl.store(dn_ptr + b * dn_b + at * dn_s + c * dn_c, (-far).to(kind), mask=inside)


def _tile(map: Rows) -> dict[str, int]:
    """16-byte loads along the dense axis, of which the sum is over channels."""
    if map.channel == 1:
        return {"BLOCK_S": 16, "BLOCK_C": block(map.channels, 128)}
    return {"BLOCK_S": block(map.positions, 128), "BLOCK_C": 16}


def dense_triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    weight: Tensor,
    margin: float,
    weighting: str,
) -> tuple[Tensor, Tensor]:
    """Loss, and the slopes of both distances over the distances, [2, B, S]."""
    x, p, n = rows(anchor), rows(positive), rows(negative)
    chunks = triton.cdiv(x.channels, CHUNK)
    kind = accumulator(anchor.dtype)
    near, far = torch.empty(
        2, chunks, x.batches, x.positions, dtype=kind, device=anchor.device
    ).unbind()
    if x.batches > 0:
        tile = _tile(x)
        blocks = triton.cdiv(x.positions, tile["BLOCK_S"])
        _square_distances_kernel[(x.batches * chunks * blocks,)](
            x.tensor, p.tensor, n.tensor, near, far, *x[1:4], *x[4:], *p[4:], *n[4:],
            chunks, blocks, eps=EPS, CHUNK=CHUNK, ACC=accumulator_kind(kind), **tile, **OPTIONS,
        )  # fmt: skip
    return position_losses(near, far, weight, margin, weighting)


def dense_triplet_loss_backward(
    grad: Tensor, anchor: Tensor, positive: Tensor, negative: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three maps, each in its memory format."""
    outs = tuple(map_like(map) for map in (anchor, positive, negative))
    if len(anchor) > 0:
        maps = [rows(map) for map in (anchor, positive, negative)]
        to = [rows(out) for out in outs]
        tile = map_tile(maps[0])
        _triplet_gradient_kernel[map_grid(maps[0], tile)](
            grad, *(m.tensor for m in maps), slopes.contiguous(), *outs, *maps[0][1:4],
            *(stride for m in (*maps, *to) for stride in m[4:]),
            eps=EPS, ACC=accumulator_kind(anchor.dtype), **tile, **OPTIONS,
        )  # fmt: skip
    return outs[0], outs[1], outs[2]
