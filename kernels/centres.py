"""Centres of identities in batches of any size, one launch per step."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import OPTIONS, accumulator, accumulator_kind, block
from fastreid_vi.kernels.pairs import ROOMY, SMALL

CHUNK = 1024  # components of a row that a program holds at once


@triton.jit
def place(first_ptr, head, rows, BLOCK: tl.constexpr):
    """Slot of the identity whose first row is `head`, number of identities, rows of this one."""
    slot, identities, count = 0, 0, 0
    for start in range(0, rows, BLOCK):
        j = start + tl.arange(0, BLOCK)
        first = tl.load(first_ptr + j, mask=j < rows, other=-1)
        slot += tl.sum(((first == j) & (j < head)).to(tl.int32), axis=0)
        identities += tl.sum((first == j).to(tl.int32), axis=0)
        count += tl.sum((first == head).to(tl.int32), axis=0)
    return slot, identities, count


@triton.jit
def _first_rows_kernel(labels_ptr, first_ptr, counters_ptr, rows, BLOCK: tl.constexpr):
    """First row with the label of row i; one program per row. Clears the ticket."""
    i = tl.program_id(0)
    if i == 0:
        tl.store(counters_ptr, 0)
    label = tl.load(labels_ptr + i)
    first = tl.full([], 0, tl.int32) + rows
    for start in range(0, rows, BLOCK):
        j = start + tl.arange(0, BLOCK)
        same = (tl.load(labels_ptr + j, mask=j < rows, other=0) == label) & (j < rows)
        first = tl.minimum(first, tl.min(tl.where(same, j, rows), axis=0))
    tl.store(first_ptr + i, first.to(tl.int64))


@triton.jit
def _centres_kernel(
    x_ptr, first_ptr, counters_ptr, centres_ptr, rows, size, stride,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean of the rows of an identity, about its first row, in its slot.

    A program owns CHUNK components; rows that are not the first of their identity have none.
    """
    head = tl.program_id(0)
    if tl.load(first_ptr + head) != head:
        return
    slot, identities, count = place(first_ptr, head, rows, BLOCK)
    if head + tl.program_id(1) == 0:
        tl.store(counters_ptr + 1, identities)
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    row = x_ptr + head.to(tl.int64) * stride
    base = tl.load(row + k, mask=k < size, other=0.0).to(ACC)
    total = tl.zeros([CHUNK], dtype=ACC)
    for start in range(0, rows, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mine = tl.load(first_ptr + j, mask=j < rows, other=-1) == head
        at = tl.min(tl.where(mine, j, rows), axis=0)
        while at < rows:
            row = x_ptr + at.to(tl.int64) * stride
            total += tl.load(row + k, mask=k < size, other=0.0).to(ACC) - base
            at = tl.min(tl.where(mine & (j > at), j, rows), axis=0)
    centre = base + total / count.to(ACC)
    tl.store(centres_ptr + slot.to(tl.int64) * size + k, centre, mask=k < size)


@triton.jit
def _radii_kernel(
    x_ptr, first_ptr, centres_ptr, squares_ptr, rows, size, stride,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Squared distance of a row to its centre; one program per row."""
    i = tl.program_id(0)
    slot = place(first_ptr, tl.load(first_ptr + i), rows, BLOCK)[0]
    row, centre = x_ptr + i.to(tl.int64) * stride, centres_ptr + slot.to(tl.int64) * size
    total = tl.zeros([CHUNK], dtype=ACC)
    for start in range(0, size, CHUNK):
        k = start + tl.arange(0, CHUNK)
        d = tl.load(row + k, mask=k < size, other=0.0).to(ACC)
        d -= tl.load(centre + k, mask=k < size, other=0.0)
        total += d * d
    tl.store(squares_ptr + i, tl.sum(total, axis=0))


def first_rows(labels: Tensor, first: Tensor, counters: Tensor) -> None:
    """Fill `first`; counters [2] are a ticket, cleared here, and the number of identities."""
    rows = labels.shape[0]
    _first_rows_kernel[(rows,)](labels, first, counters, rows, BLOCK=block(rows, SMALL), **OPTIONS)


def centres_of(x: Tensor, first: Tensor, counters: Tensor) -> Tensor:
    """Centres [rows, D], of which as many as there are identities are filled."""
    rows, size = x.shape
    centres, chunk = x.new_empty(rows, size, dtype=accumulator(x.dtype)), block(size, CHUNK)
    _centres_kernel[(rows, triton.cdiv(size, chunk))](
        x, first, counters, centres, rows, size, x.stride(0),
        BLOCK=block(rows, SMALL), CHUNK=chunk, ACC=accumulator_kind(x.dtype),
        **ROOMY,
    )  # fmt: skip
    return centres


def squared_radii(x: Tensor, first: Tensor, centres: Tensor) -> Tensor:
    """Squared distance of every row to its centre [rows]."""
    rows, size = x.shape
    squares = centres.new_empty(rows)
    _radii_kernel[(rows,)](
        x, first, centres, squares, rows, size, x.stride(0),
        BLOCK=block(rows, SMALL), CHUNK=block(size, CHUNK), ACC=accumulator_kind(x.dtype),
        **OPTIONS,
    )  # fmt: skip
    return squares
