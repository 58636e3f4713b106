"""Squared differences of all pairs of rows, in parts, and what the losses on pairs share."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import OPTIONS, accumulator, accumulator_kind

SMALL = 512  # rows up to which all pairs are held at once; beyond, they come in strips
TILES = {2: (16, 64), 4: (32, 16), 8: (32, 8)}  # by bytes: rows, and components for 16-byte loads
PROGRAMS = 396  # that share the pairs: three on each of 132 processors
# Left to itself, ptxas aims at many programs per processor and spills a few registers.
ROOMY: dict[str, Any] = {**OPTIONS, "maxnreg": 255}


@triton.jit
def root(square):
    """sqrt(max(square, 1e-12)), NaN for NaN; the same rounding on every device."""
    square = tl.where(square < 1e-12, square * 0 + 1e-12, square)
    if square.dtype == tl.float64:
        return tl.sqrt(square)
    else:
        return tl.sqrt_rn(square)


@triton.jit
def added(parts_ptr, at, inside, parts, plane, ACC: tl.constexpr):
    """Sum of the parts at some places, in their order; four loads are under way at a time."""
    total = tl.load(parts_ptr + at, mask=inside, other=0.0).to(ACC)
    for begin in range(1, parts, 4):
        for ahead in tl.static_range(4):
            # Of the shape of `at`: the interpreter takes no mask with a scalar in it.
            part = tl.full(at.shape, begin + ahead, tl.int64)
            place = parts_ptr + part * plane + at
            total += tl.load(place, mask=inside & (part < parts), other=0.0).to(ACC)
    return total


@triton.jit
def farthest(best, index, d, among, j, end, ACC: tl.constexpr):
    """Largest of `best` and the d `among` those, and its first index; `end` where there is none.

    NaN is larger than any number.
    """
    broken = tl.min(tl.where(among & (d != d), j, end), axis=0)
    low = tl.full([], float("-inf"), ACC)
    new = tl.max(tl.where(among & (d == d), d, low), axis=0)
    at = tl.min(tl.where(among & (d == new), j, end), axis=0)
    new = tl.where(broken < end, tl.full([], float("nan"), ACC), new)
    at = tl.where(broken < end, broken, at)
    take = (index >= end) | (new > best) | ((new != new) & (best == best))
    return tl.where(take, new, best), tl.where(take, at, index)


@triton.jit
def last_arrival(ticket_ptr, programs):
    """Whether all other programs have stored what they owe; the stores before it count."""
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return arrived == programs - 1


@triton.jit
def total_terms(
    terms_ptr, loss_ptr, correct_ptr, anchors, share, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """`share` times all losses, and the number of correct anchors; terms are [2, anchors]."""
    loss, correct = tl.zeros([BLOCK], dtype=ACC), tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, anchors, BLOCK):
        i = first + tl.arange(0, BLOCK)
        loss += tl.load(terms_ptr + i, mask=i < anchors, other=0.0)
        correct += tl.load(terms_ptr + anchors + i, mask=i < anchors, other=0.0).to(tl.int32)
    tl.store(loss_ptr, tl.sum(loss, axis=0) * share)
    tl.store(correct_ptr, tl.sum(correct, axis=0).to(tl.int64))


@triton.jit
def _pair_parts_kernel(
    x_ptr, y_ptr, parts_ptr, norms_ptr, ticket_ptr, limit_ptr,
    rows, columns, size, each, stride_x, stride_y, tiles, begin,
    SYMMETRIC: tl.constexpr, COSINE: tl.constexpr, CLEAR: tl.constexpr, LIMITED: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts[k, i, j] = sum of (x_i - y_j)^2 over the `each` components of part k.

    COSINE: of x_i y_j, and norms[k, j] = |y_j|^2. A program owns a tile of pairs and a part. Where
    y is x, tiles below the diagonal are the mirrored ones above. LIMITED: only *limit_ptr rows of
    y exist, of which x are those from `begin` on.
    """
    part = tl.program_id(1).to(tl.int64)
    if CLEAR and tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(ticket_ptr, 0)
    ti, tj = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if SYMMETRIC and ti > tj:
        return
    if LIMITED:
        limit = tl.load(limit_ptr)
        if (begin + ti * TILE >= limit) | (tj * TILE >= limit):
            return
    i, j = ti * TILE + tl.arange(0, TILE), tj * TILE + tl.arange(0, TILE)
    lane = tl.arange(0, DEPTH)
    # Rows beyond the end repeat the last one: only the store needs a mask.
    x_row = x_ptr + tl.minimum(i, rows - 1).to(tl.int64)[:, None] * stride_x
    y_row = y_ptr + tl.minimum(j, columns - 1).to(tl.int64)[:, None] * stride_y
    total = tl.zeros([TILE, TILE, DEPTH], dtype=ACC)
    y_norm = tl.zeros([TILE, DEPTH], dtype=ACC)
    start = tl.program_id(1) * each
    # Two stages: the next slices are on their way to shared memory while these are subtracted.
    for first in tl.range(start, tl.minimum(start + each, size), DEPTH, num_stages=2):
        k = (first + lane)[None, :]
        x = tl.load(x_row + k, mask=k < size, other=0.0).to(ACC)
        y = tl.load(y_row + k, mask=k < size, other=0.0).to(ACC)
        if COSINE:
            total += x[:, None, :] * y[None, :, :]
            y_norm += y * y
        else:
            d = x[:, None, :] - y[None, :, :]
            total += d * d
    tile = tl.sum(total, axis=2)
    out = parts_ptr + part * rows * columns
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    row, column = i[:, None].to(tl.int64), j[None, :].to(tl.int64)
    tl.store(out + row * columns + column, tile, mask=inside)
    if SYMMETRIC and ti < tj:
        tl.store(out + column * columns + row, tile, mask=inside)
    if COSINE and ti == (tj if SYMMETRIC else 0):
        tl.store(norms_ptr + part * columns + j, tl.sum(y_norm, axis=1), mask=j < columns)


class Pairs(NamedTuple):
    """Squares or dot products of pairs [parts, rows, columns], squared norms [parts, columns]."""

    parts: Tensor
    norms: Tensor
    count: int


def dense(embeddings: Tensor) -> Tensor:
    """Rows with contiguous components; a copy only where they are not."""
    return embeddings if embeddings.stride(1) == 1 else embeddings.contiguous()


def split(size: int, tiles: int) -> tuple[int, int]:
    """Components of a part, a multiple of 128, and the number of parts."""
    parts = max(1, min(triton.cdiv(size, 128), PROGRAMS // tiles))
    each = 128 * triton.cdiv(triton.cdiv(size, parts), 128)
    return each, triton.cdiv(size, each)


def pair_parts(
    x: Tensor,
    y: Tensor,
    metric: str,
    ticket: Tensor | None = None,
    limit: Tensor | None = None,
    begin: int = 0,
) -> Pairs:
    """Launch over dense rows; clears the ticket for the launch that follows.

    With a limit only so many rows of y exist, and x must be those from `begin` on.
    """
    rows, columns, size = x.shape[0], y.shape[0], x.shape[1]
    symmetric, cosine = x is y, metric == "cosine"
    tile, depth = TILES[x.element_size()]
    down, across = triton.cdiv(rows, tile), triton.cdiv(columns, tile)
    tiles = down * (down + 1) // 2 if symmetric else down * across
    each, count = split(size, tiles)
    kind = accumulator(x.dtype)
    parts = x.new_empty(count, rows, columns, dtype=kind)
    norms = x.new_empty(count, columns, dtype=kind) if cosine else parts
    _pair_parts_kernel[(down * across, count)](
        x, y, parts, norms, parts if ticket is None else ticket, parts if limit is None else limit,
        rows, columns, size, each, x.stride(0), y.stride(0), across, begin,
        SYMMETRIC=symmetric, COSINE=cosine, CLEAR=ticket is not None, LIMITED=limit is not None,
        TILE=tile, DEPTH=depth, ACC=accumulator_kind(x.dtype), **OPTIONS,
    )  # fmt: skip
    return Pairs(parts, norms, count)
