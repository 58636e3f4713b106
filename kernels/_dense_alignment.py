"""LbA's block, forward: the distance to a warped map from inner products, and the warp itself.

With raw rows f, G = f_b f_t^T of a pairing and M = f_t f_t^T of its target: for w = P f_t,
f.w = sum of P o G and |w|^2 = sum of P o (P M). So no [S, C] matrix is formed for the negative
pairing. Where |f - w|^2 cancels, the distance is taken from the differences, tile by tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import OPTIONS, accumulator_kind, block, rows
from fastreid_vi.kernels._matching import Matched, products

CANCELLED = 1e-3  # squared distances that keep less of their terms are taken from differences
WARPS = 8  # with fewer, tiles of float32 products do not fit the registers


@triton.jit
def _smoothed(
    p_ptr, gram_ptr, row, i, j, positions,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_I, BLOCK_J] of P M: `row` are rows of P, `gram_ptr` is M of their target."""
    total = tl.zeros([BLOCK_I, BLOCK_J], dtype=ACC)
    for first in range(0, positions, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        known = (i[:, None] < positions) & (k[None, :] < positions)
        p = tl.load(p_ptr + row[:, None] * positions + k[None, :], mask=known, other=0.0).to(ACC)
        known = (k[:, None] < positions) & (j[None, :] < positions)
        at = k[:, None].to(tl.int64) * positions + j[None, :]
        m = tl.load(gram_ptr + at, mask=known, other=0.0)
        total = tl.dot(p, m, acc=total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def _far_kernel(
    p_ptr, inner_ptr, gram_ptr, sum_ptr, mask_ptr, index_ptr, far_ptr, channels, positions, targets,
    eps: tl.constexpr, CANCELLED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """far[b, i] = sum over c of (m (f - w) + eps)^2 from inner products; -1 where they cancel.

    A program owns BLOCK_I positions of a sample. Sums of products are float64.
    """
    blocks = tl.cdiv(positions, BLOCK_I)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    t = tl.minimum(tl.maximum(tl.load(index_ptr + b), 0), targets - 1)
    row, known = b * positions + i, i < positions
    gram = gram_ptr + t * positions * positions
    apart = tl.load(gram_ptr + row * positions + i, mask=known, other=0.0).to(tl.float64)
    whole = apart
    shift = tl.load(sum_ptr + row, mask=known, other=0.0).to(tl.float64)
    for first in range(0, positions, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        own = _smoothed(
            p_ptr, gram, row, i, j, positions, BLOCK_I, BLOCK_J, BLOCK_K, ACC, PRECISION
        )
        inside = known[:, None] & (j[None, :] < positions)
        at = row[:, None] * positions + j[None, :]
        p = tl.load(p_ptr + at, mask=inside, other=0.0).to(ACC).to(tl.float64)
        cross = tl.load(inner_ptr + at, mask=inside, other=0.0).to(tl.float64)
        apart += tl.sum(p * (own.to(tl.float64) - 2.0 * cross), axis=1)
        total = tl.load(sum_ptr + t * positions + j, mask=j < positions, other=0.0)
        shift -= tl.sum(p * total[None, :].to(tl.float64), axis=1)
    m = tl.load(mask_ptr + row, mask=known, other=0.0).to(tl.float64)
    square = m * m * apart + 2.0 * eps * m * shift
    square += tl.full([BLOCK_I], eps * eps, dtype=tl.float64) * channels
    square = tl.where(square < 0, 0.0, square)
    square = tl.where((m > 0) & (apart < CANCELLED * whole), -1.0, square)
    tl.store(far_ptr + row, square.to(ACC), mask=known)


@triton.jit
def _blend_kernel(
    p_ptr, x_ptr, index_ptr, mask_ptr, known_ptr, out_ptr, part_ptr,
    batches, channels, positions, targets, x_b, x_c, x_s, out_b, out_c, out_s, blocks,
    eps: tl.constexpr, ALL: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With e = m (x - P k): out = x - e, and part[k, b, i] = sum of (e + eps)^2 over a block of c.

    One program owns a tile. Without ALL there is no `out`, and tiles without a negative `known`
    are left alone.
    """
    tile = tl.program_id(0)
    b = (tile // (blocks * tl.cdiv(positions, BLOCK_I))).to(tl.int64)
    i = tile // blocks % tl.cdiv(positions, BLOCK_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tile % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row = b * positions + i
    if not ALL:
        wanted = tl.load(known_ptr + row, mask=i < positions, other=0.0) < 0
        if tl.sum(wanted.to(tl.int32), axis=0) == 0:
            return
    t = tl.minimum(tl.maximum(tl.load(index_ptr + b), 0), targets - 1)
    right = x_ptr + t * x_b + c[None, :].to(tl.int64) * x_c
    total = tl.zeros([BLOCK_I, BLOCK_C], dtype=ACC)
    for first in range(0, positions, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        inside = (i[:, None] < positions) & (j[None, :] < positions)
        p = tl.load(p_ptr + row[:, None] * positions + j[None, :], mask=inside, other=0.0)
        inside = (j[:, None] < positions) & (c[None, :] < channels)
        k = tl.load(right + j[:, None].to(tl.int64) * x_s, mask=inside, other=0.0)
        total = tl.dot(p.to(DOT), k.to(DOT), acc=total, input_precision=PRECISION, out_dtype=ACC)
    inside = (i[:, None] < positions) & (c[None, :] < channels)
    m = tl.load(mask_ptr + row, mask=i < positions, other=0.0)[:, None]
    at = b * x_b + i[:, None].to(tl.int64) * x_s + c[None, :].to(tl.int64) * x_c
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)
    away = m * (x - total)
    if ALL:
        out = b * out_b + i[:, None].to(tl.int64) * out_s + c[None, :].to(tl.int64) * out_c
        tl.store(out_ptr + out, (x - away).to(out_ptr.dtype.element_ty), mask=inside)
    square = tl.where(inside, (away + eps) * (away + eps), 0.0)
    part = part_ptr + (tile % blocks).to(tl.int64) * batches * positions + row
    tl.store(part, tl.sum(square, axis=1), mask=i < positions)


def gram_products(dtype: torch.dtype) -> dict[str, Any]:
    """Types of the products of P with inner products, which narrow factors would spoil."""
    kind = accumulator_kind(dtype)
    return {"ACC": kind, "PRECISION": "ieee" if kind == tl.float64 else "tf32x3"}


def far_squares(
    pair: Matched, p: Tensor, g: Tensor, gram: Tensor, total: Tensor, mask: Tensor, eps: float
) -> Tensor:
    """Squared distances to the reconstruction that is never formed, [B, S]; -1: not known so."""
    far, size = torch.empty_like(mask), pair.q.positions
    side = block(size, 64 if far.dtype == torch.float32 else 32)
    _far_kernel[(pair.q.batches * triton.cdiv(size, side),)](
        p, g, gram, total, mask, pair.index, far, pair.q.channels, size, pair.k.batches,
        eps=eps, CANCELLED=CANCELLED, BLOCK_I=side, BLOCK_J=block(size, 32), BLOCK_K=16,
        **gram_products(p.dtype), **OPTIONS, num_warps=WARPS,
        maxnreg=255,  # left to itself, ptxas aims at 128 and spills
    )  # fmt: skip
    return far


def blended(
    pair: Matched, p: Tensor, mask: Tensor, eps: float, out: Tensor | None, known: Tensor
) -> Tensor:
    """Squared distances to the blend in parts, [parts, B, S]; the blend itself goes to `out`.

    Without `out` only where `known` is negative.
    """
    q = pair.q
    to = q if out is None else rows(out)
    side = block(q.positions, 64 if p.element_size() < 8 else 32)
    wide = block(q.channels, 64 if p.element_size() < 8 else 32)
    blocks = triton.cdiv(q.channels, wide)
    parts = mask.new_empty(blocks, *mask.shape)
    _blend_kernel[(q.batches * triton.cdiv(q.positions, side) * blocks,)](
        p, q.tensor, pair.index, mask, known, to.tensor, parts,
        *q[1:4], q.batches, *q[4:], *to[4:], blocks,
        eps=eps, ALL=out is not None, BLOCK_I=side, BLOCK_J=block(q.positions, 32), BLOCK_C=wide,
        **products(p.dtype), **OPTIONS, num_warps=WARPS,
    )  # fmt: skip
    return parts
