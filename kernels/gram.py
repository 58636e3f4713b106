"""Squared distances in large batches: products on tensor cores, near pairs from differences.

|z_i|^2 + |z_j|^2 - 2 z_i . z_j of rows about their mean is exact to a few units in the last place
of the norms. Where it is much smaller than these, the pair is taken again from the differences.
Products are "tf32x3": three TF32 products have the accuracy of float32 at several times the speed
of IEEE ones, which tensor cores do not have.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import OPTIONS, block
from fastreid_vi.kernels.pairs import SMALL, Pairs, pair_parts

CHUNK = 1024  # components of a row that a program holds at once


@triton.jit
def _mean_row_kernel(
    y_ptr, mean_ptr, rows, size, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Mean of all rows; a program owns COLUMNS components."""
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, rows, ROWS):
        j = first + tl.arange(0, ROWS)[:, None]
        row = y_ptr + j.to(tl.int64) * stride
        total += tl.load(row + k, mask=(j < rows) & (k < size), other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0, keep_dims=True) / rows
    tl.store(mean_ptr + k, mean, mask=k < size)


@triton.jit
def _centred_rows_kernel(
    x_ptr, mean_ptr, z_ptr, square_ptr, size, stride, UNIT: tl.constexpr, CHUNK: tl.constexpr
):
    """z = x - mean and |z|^2, or UNIT: z = x / max(|x|, 1e-12) and 1; one program per row."""
    i = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    scale = tl.full([], 1.0, tl.float32)
    total = tl.zeros([CHUNK], dtype=tl.float32)
    if UNIT:
        for first in range(0, size, CHUNK):
            k = first + lane
            x = tl.load(x_ptr + i * stride + k, mask=k < size, other=0.0).to(tl.float32)
            total += x * x
        norm = tl.sqrt(tl.sum(total, axis=0))
        scale = 1.0 / tl.where(norm < 1e-12, 1e-12, norm)
    for first in range(0, size, CHUNK):
        k = first + lane
        z = tl.load(x_ptr + i * stride + k, mask=k < size, other=0.0).to(tl.float32)
        if UNIT:
            z *= scale
        else:
            z -= tl.load(mean_ptr + k, mask=k < size, other=0.0)
            total += z * z
        tl.store(z_ptr + i * size + k, z, mask=k < size)
    # 2 - 2 u . v is twice the distance even of a row that is too short for a direction.
    tl.store(square_ptr + i, 1.0 if UNIT else tl.sum(total, axis=0))


@triton.jit
def _difference(x_row, y_row, size, CHUNK: tl.constexpr):
    """Squared distance of two rows."""
    total = tl.zeros([CHUNK], dtype=tl.float32)
    for first in range(0, size, CHUNK):
        k = first + tl.arange(0, CHUNK)
        d = tl.load(x_row + k, mask=k < size, other=0.0).to(tl.float32)
        d -= tl.load(y_row + k, mask=k < size, other=0.0).to(tl.float32)
        total += d * d
    return tl.sum(total, axis=0)


@triton.jit
def _gram_kernel(
    u_ptr, v_ptr, u_square_ptr, v_square_ptr, x_ptr, y_ptr, out_ptr, ticket_ptr,
    begin, rows, columns, size, stride_x, stride_y,
    SELF: tl.constexpr, CLEAR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out[i, j] = |u_i - v_j|^2 of a strip of rows from `begin` on; a program owns a tile.

    u and v are the centred or unit rows of x and y. A pair nearer than 1/32 of |u|^2 + |v|^2 is
    taken from the differences of x and y, one after the other: there are few.
    """
    across = tl.cdiv(columns, COLUMNS)
    if CLEAR and tl.program_id(0) == 0:
        tl.store(ticket_ptr, 0)
    i = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, DEPTH)
    # Rows beyond the end repeat the last one: only the store needs a mask.
    u_row = u_ptr + (begin + tl.minimum(i, rows - 1)).to(tl.int64)[:, None] * size
    v_row = v_ptr + tl.minimum(j, columns - 1).to(tl.int64)[None, :] * size
    dots = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, size, DEPTH):
        k = first + lane
        u = tl.load(u_row + k[None, :], mask=k[None, :] < size, other=0.0)
        v = tl.load(v_row + k[:, None], mask=k[:, None] < size, other=0.0)
        dots = tl.dot(u, v, acc=dots, input_precision="tf32x3", out_dtype=tl.float32)
    i, j = i[:, None], j[None, :]
    inside = (i < rows) & (j < columns)
    both = tl.load(u_square_ptr + begin + i, mask=i < rows, other=0.0) + tl.load(
        v_square_ptr + j, mask=j < columns, other=0.0
    )
    square = both - 2.0 * dots
    near = inside & (square < both * 0.03125)
    if SELF:
        near = near & (begin + i != j)
        square = tl.where((begin + i == j) & (square == square), 0.0, square)
    pair = i * columns + j
    none = rows * columns
    at = tl.min(tl.min(tl.where(near, pair, none), axis=1), axis=0)
    while at < none:
        x_row = x_ptr + (begin + at // columns).to(tl.int64) * stride_x
        exact = _difference(x_row, y_ptr + (at % columns).to(tl.int64) * stride_y, size, CHUNK)
        square = tl.where(pair == at, exact, square)
        at = tl.min(tl.min(tl.where(near & (pair > at), pair, none), axis=1), axis=0)
    out = out_ptr + i.to(tl.int64) * columns + j
    tl.store(out, square, mask=inside)


def centred(x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of x and y about the mean of y (cosine: unit rows) in float32, and their squares."""
    unit, size = metric == "cosine", x.shape[1]
    chunk = block(size, CHUNK)
    mean = y.new_empty(size, dtype=torch.float32)
    if not unit:
        _mean_row_kernel[(triton.cdiv(size, 32),)](
            y, mean, y.shape[0], size, y.stride(0), ROWS=128, COLUMNS=32, **OPTIONS
        )
    done = []
    for rows in (x,) if x is y else (x, y):
        z = rows.new_empty(rows.shape, dtype=torch.float32)
        square = z.new_empty(rows.shape[0])
        _centred_rows_kernel[(rows.shape[0],)](
            rows, mean, z, square, size, rows.stride(0), UNIT=unit, CHUNK=chunk, **OPTIONS
        )
        done.append((z, square))
    (u, u_square), (v, v_square) = done[0], done[-1]
    return u, v, u_square, v_square


def gram_strip(
    x: Tensor,
    y: Tensor,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    metric: str,
    begin: int,
    end: int,
    ticket: Tensor | None = None,
) -> Tensor:
    """Squared distances [1, end - begin, M] of the centred rows; may clear a ticket."""
    u, v = rows[:2]
    strip, (columns, size) = end - begin, v.shape
    out = u.new_empty(1, strip, columns)
    if metric == "cosine":
        x, y = u, v
    grid = (triton.cdiv(strip, TILE["ROWS"]) * triton.cdiv(columns, TILE["COLUMNS"]),)
    _gram_kernel[grid](
        *rows, x, y, out, out if ticket is None else ticket,
        begin, strip, columns, size, x.stride(0), y.stride(0),
        SELF=u is v, CLEAR=ticket is not None, **TILE, CHUNK=block(size, CHUNK),
        num_warps=8, num_stages=3, **OPTIONS,
    )  # fmt: skip
    return out


def prefers_products(x: Tensor, y: Tensor) -> bool:
    """Whether the pairs come from products: in large batches, but not of float64."""
    return max(x.shape[0], y.shape[0]) > SMALL and x.dtype != torch.float64


def strips_of_pairs(
    x: Tensor, y: Tensor, metric: str, ticket: Tensor | None = None
) -> Iterator[tuple[int, Pairs]]:
    """All pairs of dense rows, in strips of x: first row and parts. The first clears the ticket."""
    products = prefers_products(x, y)
    rows = centred(x, y, metric) if products else None
    for begin in range(0, x.shape[0], SMALL):
        clear = ticket if begin == 0 else None
        end = min(begin + SMALL, x.shape[0])
        if rows is not None:
            squares = gram_strip(x, y, rows, metric, begin, end, clear)
            yield begin, Pairs(squares, rows[3], 1)
        else:
            strip = x if end == x.shape[0] and begin == 0 else x[begin:end]
            yield begin, pair_parts(strip, y, metric, clear)


TILE = {"ROWS": 64, "COLUMNS": 128, "DEPTH": 32}
