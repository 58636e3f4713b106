"""Weighted regularised triplet loss: softly weighted distances in place of the hardest."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import OPTIONS, accumulator, accumulator_kind, block
from fastreid_vi.kernels.gram import strips_of_pairs
from fastreid_vi.kernels.pairs import (
    ROOMY,
    SMALL,
    added,
    dense,
    farthest,
    last_arrival,
    root,
    total_terms,
)


@triton.jit
def _fade(old, new):
    """Factor of sums of exp(. - old) that turns them into sums of exp(. - new)."""
    return tl.where(old == new, 1.0, tl.exp(old - new))


@triton.jit
def _log1p_exp(gap):
    """log(1 + exp(gap)) and its derivative, both to the last place of float32."""
    wide = gap.to(tl.float64)
    small = tl.exp(tl.where(wide > 0, -wide, wide))
    one = small + 1.0
    log1p = tl.where(one == 1.0, small, tl.log(one) * (small / (one - 1.0 + (one == 1.0))))
    return (
        (tl.where(wide > 0, wide, wide * 0) + log1p).to(gap.dtype),
        (1.0 / (1.0 + tl.exp(-wide))).to(gap.dtype),
    )


@triton.jit
def _weighted_kernel(
    parts_ptr, labels_ptr, terms_ptr, ticket_ptr,
    loss_ptr, correct_ptr, positive_ptr, negative_ptr, slope_ptr, stats_ptr,
    begin, rows, anchors, parts,
    STABLE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Weighted distances f+ and f- of an anchor, what the gradient needs, and its loss.

    One program per anchor walks over the others; its sums follow the largest exponent so far. The
    parts hold the anchors from `begin` on. Of all programs, the last one adds the losses.
    """
    row = tl.program_id(0)
    i = begin + row
    label = tl.load(labels_ptr + i)
    zero, low = tl.full([], 0.0, ACC), tl.full([], float("-inf"), ACC)
    none = tl.full([], 0, tl.int32) + anchors
    far, p, far_sum, far_mean = low, none, zero, zero
    near, n, near_sum, near_mean = low, none, zero, zero
    for first in range(0, anchors, BLOCK):
        j = first + tl.arange(0, BLOCK)
        inside = j < anchors
        at = row.to(tl.int64) * anchors + j
        d = root(added(parts_ptr, at, inside, parts, tl.cast(rows, tl.int64) * anchors, ACC))
        same = tl.load(labels_ptr + j, mask=inside, other=0) == label
        before = far
        far, p = farthest(far, p, d, inside & same, j, anchors, ACC)
        e = tl.where(inside & same, tl.exp(d - far), 0.0)
        far_sum = far_sum * _fade(before, far) + tl.sum(e, axis=0)
        far_mean = far_mean * _fade(before, far) + tl.sum(e * d, axis=0)
        before = near
        near, n = farthest(near, n, -d, inside & (same == 0), j, anchors, ACC)
        e = tl.where(inside & (same == 0), tl.exp(-d - near if STABLE else -d), 0.0)
        if STABLE:
            near_sum *= _fade(before, near)
            near_mean *= _fade(before, near)
        near_sum += tl.sum(e, axis=0)
        near_mean += tl.sum(e * d, axis=0)
    valid = n < anchors
    far_scale = 1.0 / (far_sum + 1e-6)
    near_scale = tl.where(valid, 1.0 / (near_sum + 1e-6), 0.0)
    f_far, f_near = far_mean * far_scale, near_mean * near_scale
    gap = f_far - f_near
    loss, slope = _log1p_exp(gap)
    share = tl.full([], 1.0, ACC) / anchors
    tl.store(positive_ptr + i, p.to(tl.int64))
    tl.store(negative_ptr + i, tl.where(valid, n, 0).to(tl.int64))
    tl.store(slope_ptr + i, tl.where(valid, slope * share, 0.0))
    stats = stats_ptr + tl.cast(i, tl.int64) * 6
    tl.store(stats, far)
    tl.store(stats + 1, far_scale)
    tl.store(stats + 2, f_far)
    tl.store(stats + 3, tl.where(valid, near, 0.0) if STABLE else zero)
    tl.store(stats + 4, near_scale)
    tl.store(stats + 5, f_near)
    tl.store(terms_ptr + i, tl.where(valid, loss, 0.0))
    tl.store(terms_ptr + anchors + i, (valid & (gap <= 0.0)).to(ACC))
    if last_arrival(ticket_ptr, anchors):
        total_terms(terms_ptr, loss_ptr, correct_ptr, anchors, share, BLOCK, ACC)


@triton.jit
def _coefficient(
    d, same, other, a, slope_ptr, stats_ptr, positive_ptr, negative_ptr, inside,
    STABLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dL/dD of anchors `a` towards `other`. The eps of the denominators leaks into the shifts."""
    slope = tl.load(slope_ptr + a, mask=inside, other=0.0).to(ACC)
    stats = stats_ptr + a.to(tl.int64) * 6
    m_far = tl.load(stats, mask=inside, other=0.0).to(ACC)
    far_scale = tl.load(stats + 1, mask=inside, other=0.0).to(ACC)
    f_far = tl.load(stats + 2, mask=inside, other=0.0).to(ACC)
    m_near = tl.load(stats + 3, mask=inside, other=0.0).to(ACC)
    near_scale = tl.load(stats + 4, mask=inside, other=0.0).to(ACC)
    f_near = tl.load(stats + 5, mask=inside, other=0.0).to(ACC)
    e = tl.exp(tl.where(same, d - m_far, -d - m_near))
    pull = e * far_scale * (1.0 + d - f_far)
    push = e * near_scale * (1.0 - d + f_near)
    farthest = tl.load(positive_ptr + a, mask=inside, other=-1)
    pull -= tl.where(other == farthest, f_far * far_scale * 1e-6, 0.0)
    if STABLE:
        nearest = tl.load(negative_ptr + a, mask=inside, other=-1)
        push += tl.where(other == nearest, f_near * near_scale * 1e-6, 0.0)
    return slope * tl.where(slope > 0, tl.where(same, pull, -push), 0.0)


@triton.jit
def _weighted_gradient_kernel(
    grad_ptr, x_ptr, parts_ptr, labels_ptr, positive_ptr, negative_ptr, slope_ptr, stats_ptr,
    dx_ptr, begin, rows, anchors, size, parts, stride_x,
    STABLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dx_i = sum over j of (c_ij + c_ji) (x_i - x_j) / D_ij; a program owns ROWS x CHUNK of it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = begin + row[:, None]
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    known = row[:, None] < rows
    grad = tl.load(grad_ptr).to(ACC)
    there = known & (k[None, :] < size)
    x = tl.load(x_ptr + i.to(tl.int64) * stride_x + k[None, :], mask=there, other=0.0).to(ACC)
    label = tl.load(labels_ptr + i, mask=known, other=0)
    total = tl.zeros([ROWS, CHUNK], dtype=ACC)
    for first in range(0, anchors, BLOCK):
        j = first + tl.arange(0, BLOCK)[None, :]
        inside = known & (j < anchors)
        at = row[:, None].to(tl.int64) * anchors + j
        square = added(parts_ptr, at, inside, parts, tl.cast(rows, tl.int64) * anchors, ACC)
        d = root(square)
        same = tl.load(labels_ptr + j, mask=j < anchors, other=0) == label
        c = _coefficient(
            d, same, j, i, slope_ptr, stats_ptr, positive_ptr, negative_ptr, known, STABLE, ACC
        ) + _coefficient(
            d, same, i, j, slope_ptr, stats_ptr, positive_ptr, negative_ptr, j < anchors,
            STABLE, ACC,
        )  # fmt: skip
        c = tl.where(inside & ((square > 1e-12) | (square != square)), grad * c / d, 0.0)
        row_j = first + tl.arange(0, BLOCK)[:, None]
        other = x_ptr + row_j.to(tl.int64) * stride_x + k[None, :]
        y = tl.load(other, mask=(row_j < anchors) & (k[None, :] < size), other=0.0).to(ACC)
        total += tl.sum(c[:, :, None] * (x[:, None, :] - y[None, :, :]), axis=1)
    out = dx_ptr + i.to(tl.int64) * size + k[None, :]
    tl.store(out, total.to(dx_ptr.dtype.element_ty), mask=there)


def weighted_triplet_loss(
    embeddings: Tensor, labels: Tensor, stable: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, correct, farthest positive, nearest negative, slope, statistics [N, 6]."""
    x, labels, anchors = dense(embeddings), labels.contiguous(), embeddings.shape[0]
    kind = accumulator(x.dtype)
    loss, correct = x.new_empty((), dtype=kind), labels.new_empty(())
    positive, negative = labels.new_empty(anchors), labels.new_empty(anchors)
    slope, stats = x.new_empty(anchors, dtype=kind), x.new_empty(anchors, 6, dtype=kind)
    outputs = loss, correct, positive, negative, slope, stats
    if anchors == 0:
        return tuple(output.zero_() for output in outputs)
    ticket = torch.empty(1, dtype=torch.int32, device=x.device)
    terms = slope.new_empty(2, anchors)
    for begin, pairs in strips_of_pairs(x, x, "euclidean", ticket):
        strip = pairs.parts.shape[1]
        _weighted_kernel[(strip,)](
            pairs.parts, labels, terms, ticket, *outputs, begin, strip, anchors, pairs.count,
            STABLE=stable, BLOCK=block(anchors, SMALL), ACC=accumulator_kind(x.dtype), **OPTIONS,
        )  # fmt: skip
    return outputs


def weighted_triplet_loss_backward(
    grad: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    positive: Tensor,
    negative: Tensor,
    slope: Tensor,
    stats: Tensor,
    stable: bool,
) -> Tensor:
    """Gradient of the embeddings; the distances are taken again."""
    x, labels, (anchors, size) = dense(embeddings), labels.contiguous(), embeddings.shape
    dx = x.new_empty(anchors, size)
    saved = (t.contiguous() for t in (positive, negative, slope, stats))
    positive, negative, slope, stats = saved
    wide = x.element_size() == 8
    chunk = block(size, 128 if wide else 256)
    if anchors == 0:
        return dx
    for begin, pairs in strips_of_pairs(x, x, "euclidean"):
        strip = pairs.parts.shape[1]
        grid = (triton.cdiv(strip, ROWS), triton.cdiv(size, chunk))
        _weighted_gradient_kernel[grid](
            grad, x, pairs.parts, labels, positive, negative, slope, stats, dx,
            begin, strip, anchors, size, pairs.count, x.stride(0),
            STABLE=stable, ROWS=ROWS, BLOCK=8 if wide else 16, CHUNK=chunk,
            ACC=accumulator_kind(x.dtype),
            **ROOMY,
        )  # fmt: skip
    return dx


ROWS = 8  # anchors of a program of the gradient
