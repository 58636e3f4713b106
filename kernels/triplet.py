"""Batch-hard triplet loss. The weighted form is in `weighted`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import OPTIONS, accumulator, accumulator_kind, block
from fastreid_vi.kernels.gram import CHUNK, prefers_products, strips_of_pairs
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
from fastreid_vi.kernels.weighted import weighted_triplet_loss, weighted_triplet_loss_backward

__all__ = [
    "batch_hard_triplet_loss",
    "batch_hard_triplet_loss_backward",
    "weighted_triplet_loss",
    "weighted_triplet_loss_backward",
]


@triton.jit
def _length(square):
    """Norm, not below 1e-12, and (1 - |u|^2) / 2 of a unit row that this leaves short."""
    norm = tl.sqrt(square)
    norm = tl.where(norm < 1e-12, norm * 0 + 1e-12, norm)
    unit = square / (norm * norm)
    return norm, tl.where(unit < 0.5, (1.0 - unit) / 2.0, 0.0)


@triton.jit
def _pair_distance(
    x_row, y_row, size, METRIC: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """Squared difference of two rows (of unit rows: COSINE), their distance, their norms."""
    lane = tl.arange(0, BLOCK)
    short = tl.full([], 0.0, ACC)
    x_norm, y_norm = short + 1.0, short + 1.0
    if METRIC == "cosine":
        x_square, y_square = tl.zeros([BLOCK], dtype=ACC), tl.zeros([BLOCK], dtype=ACC)
        for first in range(0, size, BLOCK):
            inside = first + lane < size
            x = tl.load(x_row + first + lane, mask=inside, other=0.0).to(ACC)
            y = tl.load(y_row + first + lane, mask=inside, other=0.0).to(ACC)
            x_square += x * x
            y_square += y * y
        x_norm, x_short = _length(tl.sum(x_square, axis=0))
        y_norm, y_short = _length(tl.sum(y_square, axis=0))
        short = x_short + y_short
    total = tl.zeros([BLOCK], dtype=ACC)
    x_scale, y_scale = 1.0 / x_norm, 1.0 / y_norm
    for first in range(0, size, BLOCK):
        inside = first + lane < size
        x = tl.load(x_row + first + lane, mask=inside, other=0.0).to(ACC)
        y = tl.load(y_row + first + lane, mask=inside, other=0.0).to(ACC)
        d = x * x_scale - y * y_scale if METRIC == "cosine" else x - y
        total += d * d
    square = tl.sum(total, axis=0)
    if METRIC == "cosine":
        distance = square / 2.0 + short
    elif METRIC == "euclidean":
        distance = root(square)
    else:
        distance = square
    return square, distance, x_norm, y_norm


@triton.jit
def _settled(
    best, row_ptr, norms_ptr, others_ptr, label, x_row, y_ptr, columns, size, stride_y,
    POSITIVE: tl.constexpr, METRIC: tl.constexpr,
    BLOCK: tl.constexpr, LENGTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Farthest positive (nearest negative) of those that rounding cannot tell from the `best`.

    Their distances are taken from the differences: ties are true ones, and the first index wins.
    """
    value, index = tl.full([], float("-inf"), ACC), tl.full([], 0, tl.int32) + columns
    for first in range(0, columns, BLOCK):
        j = first + tl.arange(0, BLOCK)
        square = tl.load(row_ptr + j, mask=j < columns, other=0.0)
        noise = (tl.abs(square) + tl.load(norms_ptr + j, mask=j < columns, other=0.0)) * 1e-5
        same = tl.load(others_ptr + j, mask=j < columns, other=0) == label
        among = (j < columns) & (same if POSITIVE else same == 0)
        reached = (square if POSITIVE else -square) >= best - noise
        close = among & (reached | (square != square))
        at = tl.min(tl.where(close, j, columns), axis=0)
        while at < columns:
            y_row = y_ptr + at.to(tl.int64) * stride_y
            d = _pair_distance(x_row, y_row, size, METRIC, LENGTH, ACC)[1]
            d = d if POSITIVE else -d
            take = (index >= columns) | (d > value) | ((d != d) & (value == value))
            value, index = tl.where(take, d, value), tl.where(take, at, index)
            at = tl.min(tl.where(close & (j > at), j, columns), axis=0)
    return value, index


@triton.jit
def _hardest_kernel(
    parts_ptr, norms_ptr, x_ptr, y_ptr, labels_ptr, others_ptr, terms_ptr, ticket_ptr,
    loss_ptr, correct_ptr, positive_ptr, negative_ptr, weight_ptr,
    begin, rows, columns, size, parts, anchors, stride_x, stride_y,
    margin: tl.constexpr,  # a float argument would arrive as float32
    METRIC: tl.constexpr, GRAM: tl.constexpr,
    BLOCK: tl.constexpr, LENGTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Farthest positive and nearest negative of an anchor, its hinge and weight: one program each.

    The parts hold the anchors from `begin` on; GRAM: squared distances (of unit rows: cosine) from
    products, good enough to find candidates. Of all programs, the last one adds the hinges.
    """
    row = tl.program_id(0)
    i = begin + row
    label = tl.load(labels_ptr + i)
    near, far = tl.full([], float("-inf"), ACC), tl.full([], float("-inf"), ACC)
    p, n = tl.full([], 0, tl.int32) + columns, tl.full([], 0, tl.int32) + columns
    for first in range(0, columns, BLOCK):
        j = first + tl.arange(0, BLOCK)
        inside = j < columns
        at = row.to(tl.int64) * columns + j
        d = added(parts_ptr, at, inside, parts, tl.cast(rows, tl.int64) * columns, ACC)
        if METRIC == "cosine" and not GRAM:  # up to the norm of the anchor, which changes no order
            d = -d / _length(added(norms_ptr, j, inside, parts, columns, ACC))[0]
        if METRIC == "euclidean" and not GRAM:
            d = root(d)
        same = tl.load(others_ptr + j, mask=inside, other=0) == label
        near, p = farthest(near, p, d, inside & same, j, columns, ACC)
        far, n = farthest(far, n, -d, inside & (same == 0), j, columns, ACC)
    x_row = x_ptr + tl.cast(i, tl.int64) * stride_x
    if GRAM:
        row_ptr = parts_ptr + row.to(tl.int64) * columns
        near, p = _settled(
            near, row_ptr, norms_ptr, others_ptr, label, x_row, y_ptr, columns, size, stride_y,
            True, METRIC, BLOCK, LENGTH, ACC,
        )  # fmt: skip
        far, n = _settled(
            far, row_ptr, norms_ptr, others_ptr, label, x_row, y_ptr, columns, size, stride_y,
            False, METRIC, BLOCK, LENGTH, ACC,
        )  # fmt: skip
    valid = (p < columns) & (n < columns)
    p, n = tl.where(p < columns, p, 0).to(tl.int64), tl.where(n < columns, n, 0).to(tl.int64)
    far = -far
    if METRIC == "cosine" and not GRAM:
        near = _pair_distance(x_row, y_ptr + p * stride_y, size, METRIC, LENGTH, ACC)[1]
        far = _pair_distance(x_row, y_ptr + n * stride_y, size, METRIC, LENGTH, ACC)[1]
    hinge = near - far + margin
    share = tl.full([], 1.0, ACC) / anchors
    tl.store(positive_ptr + i, p)
    tl.store(negative_ptr + i, n)
    tl.store(weight_ptr + i, tl.where(valid & (hinge > 0.0), share, 0.0))
    tl.store(terms_ptr + i, tl.where((valid == 0) | (hinge <= 0.0), 0.0, hinge))
    tl.store(terms_ptr + anchors + i, (valid & (far >= near)).to(ACC))
    if last_arrival(ticket_ptr, anchors):
        total_terms(terms_ptr, loss_ptr, correct_ptr, anchors, share, BLOCK, ACC)


@triton.jit
def _mined_slopes_kernel(
    grad_ptr, x_ptr, y_ptr, positive_ptr, negative_ptr, weight_ptr, slopes_ptr,
    anchors, columns, size, stride_x, stride_y,
    METRIC: tl.constexpr, LENGTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of each mined pair the c in c (x_i - y_j), its gradient; one program per pair.

    The cosine adds e_i x_i - e_j y_j: slopes are [c, e_i, e_j][positive, negative][anchor].
    """
    i = tl.program_id(0)
    negative = tl.program_id(1) == 1
    j = tl.load(tl.where(negative, negative_ptr, positive_ptr) + i)
    weight = tl.load(weight_ptr + i).to(ACC)
    c, e_i, e_j = weight * 0, weight * 0, weight * 0
    if (weight != 0) & (j >= 0) & (j < columns):
        g = tl.load(grad_ptr).to(ACC) * tl.where(negative, -weight, weight)
        x_row = x_ptr + i.to(tl.int64) * stride_x
        square, d, a, b = _pair_distance(x_row, y_ptr + j * stride_y, size, METRIC, LENGTH, ACC)
        if METRIC == "euclidean":
            c = tl.where(square <= 1e-12, 0.0, g / d)
        elif METRIC == "sqeuclidean":
            c = 2.0 * g
        else:
            c = g / (a * b)
            e_i = g / a * ((b - a) / (a * b) - d / a)
            e_j = g / b * ((a - b) / (a * b) - d / b)
    out = slopes_ptr + tl.program_id(1) * anchors + i
    tl.store(out, c)
    if METRIC == "cosine":
        tl.store(out + 2 * anchors, e_i)
        tl.store(out + 4 * anchors, e_j)


@triton.jit
def _from_own_pairs(
    total, x, i, k, y_ptr, positive_ptr, negative_ptr, slopes_ptr,
    anchors, columns, size, stride_y, METRIC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of anchor i from its positive and its negative."""
    for side in tl.static_range(2):
        index_ptr = positive_ptr if side == 0 else negative_ptr
        j = tl.load(index_ptr + i)
        c = tl.load(slopes_ptr + side * anchors + i)
        if c != 0:  # so j is in range
            y = tl.load(y_ptr + j * stride_y + k, mask=k < size, other=0.0).to(ACC)
            total += c * (x - y)
            if METRIC == "cosine":
                total += tl.load(slopes_ptr + (2 + side) * anchors + i) * x
    return total


@triton.jit
def _from_pairs_of_others(
    total, y, j, k, x_ptr, positive_ptr, negative_ptr, slopes_ptr,
    anchors, size, stride_x, METRIC: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of row j from the anchors that mined it, in their order."""
    for side in tl.static_range(2):
        index_ptr = positive_ptr if side == 0 else negative_ptr
        for first in range(0, anchors, BLOCK):
            i = first + tl.arange(0, BLOCK)
            c = tl.load(slopes_ptr + side * anchors + i, mask=i < anchors, other=0.0)
            mined = tl.load(index_ptr + i, mask=i < anchors, other=-1)
            hit = (mined == j) & (c != 0)
            at = tl.min(tl.where(hit, i, anchors), axis=0)
            while at < anchors:
                slope = tl.load(slopes_ptr + side * anchors + at)
                row = x_ptr + at.to(tl.int64) * stride_x
                total += slope * (y - tl.load(row + k, mask=k < size, other=0.0).to(ACC))
                if METRIC == "cosine":
                    total += tl.load(slopes_ptr + (4 + side) * anchors + at) * y
                at = tl.min(tl.where(hit & (i > at), i, anchors), axis=0)
    return total


@triton.jit
def _mined_gradient_kernel(
    x_ptr, y_ptr, positive_ptr, negative_ptr, slopes_ptr, dx_ptr, dy_ptr,
    anchors, columns, size, stride_x, stride_y,
    SELF: tl.constexpr, METRIC: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of a row: a program owns CHUNK components of an anchor or, after these, of a y."""
    row = tl.program_id(0)
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], dtype=ACC)
    if row < anchors:
        i = row.to(tl.int64)
        x = tl.load(x_ptr + i * stride_x + k, mask=k < size, other=0.0).to(ACC)
        total = _from_own_pairs(
            total, x, i, k, y_ptr, positive_ptr, negative_ptr, slopes_ptr,
            anchors, columns, size, stride_y, METRIC, ACC,
        )  # fmt: skip
        if SELF:
            total = _from_pairs_of_others(
                total, x, i, k, x_ptr, positive_ptr, negative_ptr, slopes_ptr,
                anchors, size, stride_x, METRIC, BLOCK, ACC,
            )  # fmt: skip
        tl.store(dx_ptr + i * size + k, total.to(dx_ptr.dtype.element_ty), mask=k < size)
    else:
        j = (row - anchors).to(tl.int64)
        y = tl.load(y_ptr + j * stride_y + k, mask=k < size, other=0.0).to(ACC)
        total = _from_pairs_of_others(
            total, y, j, k, x_ptr, positive_ptr, negative_ptr, slopes_ptr,
            anchors, size, stride_x, METRIC, BLOCK, ACC,
        )  # fmt: skip
        tl.store(dy_ptr + j * size + k, total.to(dy_ptr.dtype.element_ty), mask=k < size)


def batch_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    margin: float,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, correct, and per anchor: positive, negative, weight of its hinge."""
    kind, anchors = accumulator(embeddings.dtype), embeddings.shape[0]
    loss, correct = embeddings.new_empty((), dtype=kind), labels.new_empty(())
    positive, negative = labels.new_empty(anchors), labels.new_empty(anchors)
    weight = embeddings.new_empty(anchors, dtype=kind)
    x = dense(embeddings)
    y = x if references is None else dense(references)
    labels = labels.contiguous()
    others = labels if reference_labels is None else reference_labels.contiguous()
    outputs = loss, correct, positive, negative, weight
    if anchors == 0 or y.shape[0] == 0:
        return tuple(output.zero_() for output in outputs)
    ticket = torch.empty(1, dtype=torch.int32, device=x.device)
    terms = weight.new_empty(2, anchors)
    gram = prefers_products(x, y)
    for begin, pairs in strips_of_pairs(x, y, metric, ticket):
        strip = pairs.parts.shape[1]
        _hardest_kernel[(strip,)](
            pairs.parts, pairs.norms, x, y, labels, others, terms, ticket, *outputs,
            begin, strip, y.shape[0], x.shape[1], pairs.count, anchors,
            x.stride(0), y.stride(0), margin=margin, METRIC=metric, GRAM=gram,
            BLOCK=block(y.shape[0], SMALL), LENGTH=block(x.shape[1], CHUNK),
            ACC=accumulator_kind(x.dtype),
            **ROOMY,
        )  # fmt: skip
    return outputs


def batch_hard_triplet_loss_backward(
    grad: Tensor,
    embeddings: Tensor,
    references: Tensor | None,
    positive: Tensor,
    negative: Tensor,
    weight: Tensor,
    metric: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the embeddings and of the references; the latter empty without references."""
    x = dense(embeddings)
    y = x if references is None else dense(references)
    (anchors, size), columns = x.shape, y.shape[0]
    dx = x.new_empty(anchors, size)
    dy = x.new_empty(0 if references is None else y.shape)
    if anchors == 0 or columns == 0:
        return dx.zero_(), dy.zero_()
    slopes = weight.new_empty(6 if metric == "cosine" else 2, anchors)
    mined = positive.contiguous(), negative.contiguous()
    kind = accumulator_kind(x.dtype)
    _mined_slopes_kernel[(anchors, 2)](
        grad, x, y, *mined, weight.contiguous(), slopes,
        anchors, columns, size, x.stride(0), y.stride(0),
        METRIC=metric, LENGTH=block(size, CHUNK), ACC=kind, **OPTIONS,
    )  # fmt: skip
    chunk = block(size, CHUNK)
    grid = (anchors if references is None else anchors + columns, triton.cdiv(size, chunk))
    _mined_gradient_kernel[grid](
        x, y, *mined, slopes, dx, dy, anchors, columns, size, x.stride(0), y.stride(0),
        SELF=references is None, METRIC=metric,
        BLOCK=block(anchors, SMALL), CHUNK=chunk, ACC=kind, **ROOMY,
    )  # fmt: skip
    return dx, dy
