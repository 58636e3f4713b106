"""Centre cluster loss: rows near the centre of their identity, centres apart.

Identities take slots in the order of their first rows; the host never learns how many there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import OPTIONS, accumulator, accumulator_kind, block
from fastreid_vi.kernels.centres import CHUNK, centres_of, first_rows, place, squared_radii
from fastreid_vi.kernels.pairs import ROOMY, SMALL, dense, last_arrival, pair_parts, root

GAPS = 2**25  # numbers that the parts of the squared gaps may take


@triton.jit
def _centre_gaps(
    centres_ptr, gaps_ptr, k, slots, identities, size, more,
    TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """gaps[p, q] (+)= sum over components k of (c_p - c_q)^2, all pairs of identities."""
    for p0 in range(0, identities, TILE):
        p = p0 + tl.arange(0, TILE)
        row = centres_ptr + p[:, None].to(tl.int64) * size + k[None, :]
        a = tl.load(row, mask=(p[:, None] < identities) & (k[None, :] < size), other=0.0)
        for q0 in range(0, p0 + TILE, TILE):
            q = q0 + tl.arange(0, TILE)
            row = centres_ptr + q[:, None].to(tl.int64) * size + k[None, :]
            b = tl.load(row, mask=(q[:, None] < identities) & (k[None, :] < size), other=0.0)
            d = a[:, None, :] - b[None, :, :]
            tile = tl.sum(d * d, axis=2)
            at, inside = p[:, None] * slots + q[None, :], q[None, :] < p[:, None]
            inside = inside & (p[:, None] < identities)
            if more:
                tile += tl.load(gaps_ptr + at, mask=inside, other=0.0)
            tl.store(gaps_ptr + at, tile, mask=inside)
            tl.store(gaps_ptr + q[None, :] * slots + p[:, None], tile, mask=inside)


@triton.jit
def _cluster_parts_kernel(
    x_ptr, labels_ptr, first_ptr, counters_ptr, centres_ptr, gaps_ptr, radius_ptr,
    rows, size, each, stride,
    FORWARD: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Centres [slot, D], and for each part of the components: squared gaps of centres, of rows.

    A program owns `each` components of all rows and picks one identity after the other. Means are
    taken about the first row of the identity: equal rows have exactly that centre.
    """
    part = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ROWS)
    label = tl.load(labels_ptr + i, mask=i < rows, other=0)
    first = tl.zeros([ROWS], dtype=tl.int32)
    square = tl.zeros([ROWS, DEPTH], dtype=ACC)
    begin = tl.program_id(0) * each
    for at in range(begin, tl.minimum(begin + each, size), DEPTH):
        k = at + tl.arange(0, DEPTH)
        inside = (i[:, None] < rows) & (k[None, :] < size)
        row = x_ptr + i[:, None].to(tl.int64) * stride + k[None, :]
        x = tl.load(row, mask=inside, other=0.0).to(ACC)
        left = i < rows
        slot = tl.full([], 0, tl.int32)
        head = tl.full([], 0, tl.int32)
        while head < rows:
            mine = left & (label == tl.load(labels_ptr + head))
            base = x_ptr + head.to(tl.int64) * stride + k
            base = tl.load(base, mask=k < size, other=0.0).to(ACC)
            count = tl.sum(mine.to(tl.int32), axis=0)
            offset = tl.where(mine[:, None], x - base[None, :], 0.0)
            centre = base + tl.sum(offset, axis=0) / count.to(ACC)
            tl.store(centres_ptr + slot.to(tl.int64) * size + k, centre, mask=k < size)
            if FORWARD:
                d = x - centre[None, :]
                square += tl.where(mine[:, None] & inside, d * d, 0.0)
                first = tl.where(mine, head, first)
            left = left & (mine == 0)
            slot += 1
            head = tl.min(tl.where(left, i, rows), axis=0)
        tl.debug_barrier()  # the centres are read by other threads than those that wrote them
        gaps = gaps_ptr + part * rows * rows
        _centre_gaps(centres_ptr, gaps, k, rows, slot, size, at > begin, TILE, ACC)
        if tl.program_id(0) == 0:
            tl.store(counters_ptr + 1, slot)
    if FORWARD:
        tl.store(radius_ptr + part * rows + i, tl.sum(square, axis=1), mask=i < rows)
        if tl.program_id(0) == 0:
            tl.store(counters_ptr, 0)
            tl.store(first_ptr + i, first.to(tl.int64), mask=i < rows)


@triton.jit
def _column_sum(parts_ptr, at, inside, parts, plane, PARTS: tl.constexpr, ACC: tl.constexpr):
    """Sum of many parts at some places, PARTS of them at a time."""
    total = tl.zeros(at.shape, dtype=ACC)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        place = parts_ptr + part.to(tl.int64) * plane + at[None, :]
        known = (part < parts) & inside[None, :]
        total += tl.sum(tl.load(place, mask=known, other=0.0).to(ACC), axis=0)
    return total


@triton.jit
def _cluster_kernel(
    gaps_ptr, squares_ptr, counters_ptr, terms_ptr, radius_ptr, loss_ptr, pull_ptr, push_ptr,
    begin, rows, strip, parts, square_parts,
    margin: tl.constexpr,  # a float argument would arrive as float32
    PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Radius of row i, and the hinges of slot i with the slots before it; one program per row.

    The parts of the gaps hold the slots from `begin` on. The last program adds everything.
    """
    i = begin + tl.program_id(0)
    identities = tl.load(counters_ptr + 1)
    lane = tl.arange(0, PARTS)
    square = tl.zeros([PARTS], dtype=ACC)
    for first in range(0, square_parts, PARTS):
        at = squares_ptr + (first + lane).to(tl.int64) * rows + i
        square += tl.load(at, mask=first + lane < square_parts, other=0.0)
    tl.store(radius_ptr + i, tl.sqrt(tl.sum(square, axis=0)))
    hinges = tl.zeros([BLOCK], dtype=ACC)
    if i < identities:
        row = gaps_ptr + tl.program_id(0).to(tl.int64) * rows
        for first in range(0, i, BLOCK):
            q = first + tl.arange(0, BLOCK)
            plane = tl.cast(strip, tl.int64) * rows
            d = root(_column_sum(row, q, q < i, parts, plane, PARTS, ACC))
            hinge = margin - d
            hinges += tl.where((q >= i) | (hinge <= 0.0), 0.0, hinge)
    tl.store(terms_ptr + i, tl.sum(hinges, axis=0))
    if last_arrival(counters_ptr, rows):
        pull, push = tl.zeros([BLOCK], dtype=ACC), tl.zeros([BLOCK], dtype=ACC)
        for first in range(0, rows, BLOCK):
            j = first + tl.arange(0, BLOCK)
            pull += tl.load(radius_ptr + j, mask=j < rows, other=0.0)
            push += tl.load(terms_ptr + j, mask=j < rows, other=0.0)
        pairs = tl.maximum(identities * (identities - 1) // 2, 1)
        mean_pull, mean_push = tl.sum(pull, axis=0) / rows, tl.sum(push, axis=0) / pairs.to(ACC)
        tl.store(pull_ptr, mean_pull)
        tl.store(push_ptr, mean_push)
        tl.store(loss_ptr, mean_pull + mean_push)


@triton.jit
def _away(x_ptr, j, k, c, radius_ptr, size, stride, ACC: tl.constexpr):
    """(x_j - c) / radius_j, zero where the row is its centre."""
    radius = tl.load(radius_ptr + j).to(ACC)
    x = tl.load(x_ptr + j.to(tl.int64) * stride + k, mask=k < size, other=0.0).to(ACC)
    return tl.where(radius > 0.0, (x - c) / tl.where(radius > 0.0, radius, 1.0), 0.0)


@triton.jit
def _pushed(
    centres_ptr, row_ptr, c, k, slot, identities, slots, size, parts, plane,
    margin: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of (c_p - c_q) / |c_p - c_q| over the slots q that are nearer than the margin."""
    total = tl.zeros(k.shape, dtype=ACC)
    for first in range(0, identities, BLOCK):
        q = first + tl.arange(0, BLOCK)
        pair = (q < identities) & (q != slot)
        square = _column_sum(row_ptr, q, pair, parts, plane, PARTS, ACC)
        d = root(square)
        active = pair & ((d < margin) | (d != d)) & ((square > 1e-12) | (d != d))
        at = tl.min(tl.where(active, q, identities), axis=0)
        while at < identities:
            distance = tl.sum(tl.where(q == at, d, 0.0), axis=0)
            row = centres_ptr + at.to(tl.int64) * size
            other = tl.load(row + k, mask=k < size, other=0.0)
            total += (c - other) / distance
            at = tl.min(tl.where(active & (q > at), q, identities), axis=0)
    return total


@triton.jit
def _cluster_gradient_kernel(
    grad_pull_ptr, grad_push_ptr, x_ptr, first_ptr, radius_ptr, centres_ptr, gaps_ptr, dx_ptr,
    begin, rows, strip, size, parts, stride,
    margin: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_i = e_i + dc / K of the rows of an identity; a program owns CHUNK components of them.

    Programs of rows that are not the first of their identity have nothing to do. The parts of the
    gaps hold the slots from `begin` on.
    """
    head = tl.program_id(0)
    if tl.load(first_ptr + head) != head:
        return
    slot, identities, count = place(first_ptr, head, rows, BLOCK)
    if (slot < begin) | (slot >= begin + strip):
        return
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    row = centres_ptr + slot.to(tl.int64) * size
    c = tl.load(row + k, mask=k < size, other=0.0)
    pull = tl.load(grad_pull_ptr).to(ACC) / rows
    pairs = tl.maximum(identities * (identities - 1), 1)
    push = tl.load(grad_push_ptr).to(ACC) * 2.0 / pairs.to(ACC)
    plane = tl.cast(strip, tl.int64) * rows
    row = gaps_ptr + (slot - begin).to(tl.int64) * rows
    change = -push * _pushed(
        centres_ptr, row, c, k, slot, identities, rows, size, parts, plane,
        margin, PARTS, BLOCK, ACC,
    )  # fmt: skip
    for start in range(0, rows, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mine = tl.load(first_ptr + j, mask=j < rows, other=-1) == head
        at = tl.min(tl.where(mine, j, rows), axis=0)
        while at < rows:
            change -= pull * _away(x_ptr, at, k, c, radius_ptr, size, stride, ACC)
            at = tl.min(tl.where(mine & (j > at), j, rows), axis=0)
    change = change / count.to(ACC)
    for start in range(0, rows, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mine = tl.load(first_ptr + j, mask=j < rows, other=-1) == head
        at = tl.min(tl.where(mine, j, rows), axis=0)
        while at < rows:
            dx = change + pull * _away(x_ptr, at, k, c, radius_ptr, size, stride, ACC)
            out = dx_ptr + at.to(tl.int64) * size + k
            tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=k < size)
            at = tl.min(tl.where(mine & (j > at), j, rows), axis=0)


def _parts(
    x: Tensor, labels: Tensor, first: Tensor, counters: Tensor, forward: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Centres, parts of the squared gaps [parts, rows, rows] and radii [parts, rows], parts."""
    rows, size = x.shape
    tall = block(rows, SMALL)
    depth = 32 if tall <= 128 else 16
    if x.element_size() == 8:
        depth //= 2
    parts = max(1, min(triton.cdiv(size, depth), GAPS // rows**2))
    each = depth * triton.cdiv(triton.cdiv(size, parts), depth)
    parts = triton.cdiv(size, each)
    kind = accumulator(x.dtype)
    centres = x.new_empty(rows, size, dtype=kind)
    gaps = x.new_empty(parts, rows, rows, dtype=kind)
    squares = x.new_empty(parts, rows, dtype=kind) if forward else gaps
    _cluster_parts_kernel[(parts,)](
        x, labels, first, counters, centres, gaps, squares, rows, size, each, x.stride(0),
        FORWARD=forward, ROWS=tall, DEPTH=depth, TILE=8, ACC=accumulator_kind(x.dtype),
        num_warps=8, **ROOMY,
    )  # fmt: skip
    return centres, gaps, squares, parts


def _strip_of_gaps(centres: Tensor, counters: Tensor, begin: int) -> tuple[Tensor, int]:
    """Parts of the squared gaps [parts, strip, rows] of the slots from `begin` on, their number."""
    strip = centres[begin : begin + SMALL]
    pairs = pair_parts(strip, centres, "euclidean", limit=counters[1:], begin=begin)
    return pairs.parts, pairs.count


def center_cluster_loss(
    embeddings: Tensor, labels: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, pull, push, and per row: first row of its identity, distance to its centre."""
    x, labels, rows = dense(embeddings), labels.contiguous(), embeddings.shape[0]
    loss, pull, push = (x.new_empty((), dtype=accumulator(x.dtype)) for _ in range(3))
    first, radius = labels.new_empty(rows), x.new_empty(rows, dtype=loss.dtype)
    outputs = loss, pull, push, first, radius
    if rows == 0:
        return tuple(output.zero_() for output in outputs)
    counters = torch.empty(2, dtype=torch.int32, device=x.device)  # ticket, identities
    terms = torch.empty_like(radius)
    if rows <= SMALL:
        centres, gaps, squares, parts = _parts(x, labels, first, counters, True)
        square_parts = parts
    else:
        first_rows(labels, first, counters)
        centres = centres_of(x, first, counters)
        squares, square_parts = squared_radii(x, first, centres), 1
    for begin in range(0, rows, SMALL):
        strip = min(rows - begin, SMALL)
        if rows > SMALL:
            gaps, parts = _strip_of_gaps(centres, counters, begin)
        _cluster_kernel[(strip,)](
            gaps, squares, counters, terms, radius, loss, pull, push,
            begin, rows, strip, parts, square_parts, margin=margin,
            PARTS=32, BLOCK=block(rows, 128), ACC=accumulator_kind(x.dtype), **OPTIONS,
        )  # fmt: skip
    return outputs


def center_cluster_loss_backward(
    grad_pull: Tensor,
    grad_push: Tensor,
    embeddings: Tensor,
    first: Tensor,
    radius: Tensor,
    margin: float,
) -> Tensor:
    """Gradient of the embeddings; the centres are taken again."""
    x, first, (rows, size) = dense(embeddings), first.contiguous(), embeddings.shape
    dx = x.new_empty(rows, size)
    if rows == 0:
        return dx
    counters, radius = torch.empty(2, dtype=torch.int32, device=x.device), radius.contiguous()
    if rows <= SMALL:
        centres, gaps, _, parts = _parts(x, first, first, counters, False)
    else:
        centres = centres_of(x, first, counters)
    chunk = block(size, CHUNK)
    for begin in range(0, rows, SMALL):
        strip = min(rows - begin, SMALL)
        if rows > SMALL:
            gaps, parts = _strip_of_gaps(centres, counters, begin)
        _cluster_gradient_kernel[(rows, triton.cdiv(size, chunk))](
            grad_pull, grad_push, x, first, radius, centres, gaps, dx,
            begin, rows, strip, size, parts, x.stride(0), margin=margin,
            PARTS=32, BLOCK=block(rows, 128), CHUNK=chunk, ACC=accumulator_kind(x.dtype),
            **ROOMY,
        )  # fmt: skip
    return dx
