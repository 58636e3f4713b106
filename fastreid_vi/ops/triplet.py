"""Triplet losses on embeddings: batch-hard, and weighted regularised (AGW)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._checks import Metric
from fastreid_vi._dispatch import register
from fastreid_vi.ops._shared import accumulator
from fastreid_vi.ops.distance import SQUARE_FLOOR, distance_matrix, weighted_differences

WEIGHT_EPS = 1e-6
"""Added to the denominators of the weights of `weighted_triplet_loss`, as published."""
INFINITY = float("inf")


class TripletLoss(NamedTuple):
    """Result of a triplet loss."""

    loss: Tensor  # scalar
    correct: Tensor  # scalar int64, anchors whose negative is at least as far as their positive


def batch_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.3,
    metric: Metric = "euclidean",
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
) -> TripletLoss:
    """Hinge between the farthest positive and the nearest negative of every anchor.

    L = mean over anchors i of max(0, margin + max_{y_j = y_i} d_ij - min_{y_j != y_i} d_ij)

    Positives and negatives are mined in `references` when given, else in `embeddings`, where an
    anchor is a positive of itself. An anchor without a positive or without a negative is left out
    of the sum; the mean is over all N, as published. The choice of the pair is not differentiated.
    Ties take the first index. Distances below 1e-6 (euclidean) are clamped and get no gradient.

    Args:
        embeddings: [N, D], floating, D >= 1.
        labels: [N], int64.
        margin: hinge offset, in units of the distance.
        metric: "euclidean", "sqeuclidean" or "cosine".
        references: [M, D], dtype of `embeddings`, or None.
        reference_labels: [M], int64; given exactly when `references` is.
    Returns:
        `TripletLoss(loss, correct)`: float32 scalar (float64 for float64) and the int64 count of
        anchors whose negative is at least as far as their positive.
    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
        NonFiniteError: a NaN or infinity in the embeddings leaves no loss (a ValueError; on CUDA
            tensors only with FASTREID_VI_CHECK_VALUES=1, else the loss is NaN).

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [3.0]])
    >>> round(batch_hard_triplet_loss(x, torch.tensor([0, 0, 1]), margin=3.0).loss.item(), 3)
    1.333

    Spec: lba 3 (L_tri), aligngan 3.3. Golden: lba/triplet, mpanet/center_cluster,
    aligngan/triplet. Backends: cpu, triton, cuda.
    """
    _checks.embeddings("embeddings", embeddings)
    _checks.labels_of("labels", labels, embeddings.shape[0], embeddings.device)
    _checks.choice("metric", metric, Metric)
    if margin != margin:
        raise ValueError("margin: expected a number, got nan")
    if (references is None) != (reference_labels is None):
        raise ValueError("references, reference_labels: expected both or none")
    if references is not None and reference_labels is not None:
        _checks.floating("references", references, "M, D")
        shape = (references.shape[0], embeddings.shape[1])
        _checks.shaped_like("references", references, shape, embeddings)
        _checks.labels_of("reference_labels", reference_labels, shape[0], embeddings.device)
    outputs = _batch_hard(embeddings, labels, references, reference_labels, margin, metric)
    return TripletLoss(*outputs[:2])


def weighted_triplet_loss(
    embeddings: Tensor, labels: Tensor, *, stable: bool = False
) -> TripletLoss:
    """Weighted regularised triplet loss: softly weighted distances in place of the hardest.

    L = mean over anchors i of log(1 + exp(f+_i - f-_i))
    f+_i = sum over positives j (i among them) of w_ij d_ij,  w ~ exp(d_ij - m+_i)
    f-_i = sum over negatives j of w_ij d_ij,                 w ~ exp(-d_ij - m-_i)

    d is the euclidean distance; the weights are divided by their sum + 1e-6; m+ is the largest
    positive distance. In the published form m- is zero, so that distances beyond about 14 vanish
    against the 1e-6 and f- falls to zero: normalise the embeddings first, or shift by the nearest
    negative (`stable`). The gradient passes through the weights, as published. An anchor without a
    negative adds zero.

    Args:
        embeddings: [N, D], floating, D >= 1.
        labels: [N], int64.
        stable: m- is minus the smallest negative distance instead of zero.
    Returns:
        `TripletLoss(loss, correct)`: float32 scalar (float64 for float64) and the int64 count of
        anchors with f- >= f+.
    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
        NonFiniteError: a NaN or infinity in the embeddings leaves no loss (as for
            `batch_hard_triplet_loss`).

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [3.0]])
    >>> round(weighted_triplet_loss(x, torch.tensor([0, 0, 1])).loss.item(), 3)
    0.148

    Spec: lba 3 (weighted triplet, L15). Golden: lba/triplet. Backends: cpu, triton, cuda.
    """
    _checks.embeddings("embeddings", embeddings)
    _checks.labels_of("labels", labels, embeddings.shape[0], embeddings.device)
    return TripletLoss(*_weighted(embeddings, labels, bool(stable))[:2])


# Reference: batch-hard.


def _mined_distance(rows: Tensor, picked: Tensor, metric: str) -> Tensor:
    """Distance row by row, from differences: exact for near-equal vectors."""
    if metric == "cosine":
        return 1.0 - torch.nn.functional.cosine_similarity(rows, picked, dim=1, eps=1e-12)
    square = (rows - picked).square().sum(1)
    return square if metric == "sqeuclidean" else square.clamp_min(SQUARE_FLOOR).sqrt()


def _mined_gradient(
    grad: Tensor, rows: Tensor, picked: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    """Gradient of `_mined_distance` for both sides."""
    if metric == "cosine":
        u_norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)
        v_norm = torch.linalg.vector_norm(picked, dim=1, keepdim=True).clamp_min(1e-12)
        u, v = rows / u_norm, picked / v_norm
        cosine = (u * v).sum(1, keepdim=True)
        g = -grad[:, None]
        return g * (v - cosine * u) / u_norm, g * (u - cosine * v) / v_norm
    difference = rows - picked
    if metric == "sqeuclidean":
        scale = 2.0 * grad
    else:
        square = difference.square().sum(1)
        clamped = square <= SQUARE_FLOOR
        scale = torch.where(clamped, 0.0, grad * square.clamp_min(SQUARE_FLOOR).rsqrt())
    side = scale[:, None] * difference
    return side, -side


def _batch_hard_reference(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    margin: float,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, correct, and per anchor: positive, negative, weight of its hinge (0 or 1/N)."""
    kind = accumulator(embeddings.dtype)
    x = embeddings.to(kind)
    r, other = (x, labels) if references is None else (references.to(kind), reference_labels)
    assert other is not None  # the two come together
    if x.shape[0] == 0 or r.shape[0] == 0:
        none = labels.new_zeros(x.shape[0])
        return x.new_zeros(()), labels.new_zeros(()), none, none.clone(), x.new_zeros(x.shape[0])
    distance = distance_matrix(x, r, metric)
    same = labels[:, None] == other[None, :]
    positive = distance.masked_fill(~same, -INFINITY).argmax(dim=1)
    negative = distance.masked_fill(same, INFINITY).argmin(dim=1)
    near = _mined_distance(x, r[positive], metric)
    far = _mined_distance(x, r[negative], metric)
    valid = same.any(dim=1) & ~same.all(dim=1)
    hinge = torch.where(valid, near - far + margin, 0.0)
    correct = (valid & (far >= near)).sum()
    weight = (valid & (hinge > 0.0)).to(kind) / len(x)
    return hinge.clamp_min(0.0).mean(), correct, positive, negative, weight


def _batch_hard_backward_reference(
    grad: Tensor,
    embeddings: Tensor,
    references: Tensor | None,
    positive: Tensor,
    negative: Tensor,
    weight: Tensor,
    metric: str,
) -> tuple[Tensor, Tensor]:
    x = embeddings.to(weight.dtype)
    r = x if references is None else references.to(weight.dtype)
    if x.shape[0] == 0 or r.shape[0] == 0:
        dx, dr = torch.zeros_like(x), torch.zeros_like(r)
    else:
        g = grad * weight
        x_near, dr_near = _mined_gradient(g, x, r[positive], metric)
        x_far, dr_far = _mined_gradient(-g, x, r[negative], metric)
        dx, dr = x_near + x_far, torch.zeros_like(r)
        dr.index_add_(0, positive, dr_near).index_add_(0, negative, dr_far)
    if references is None:
        return (dx + dr).to(embeddings.dtype), embeddings.new_empty(0)
    return dx.to(embeddings.dtype), dr.to(references.dtype)


# Reference: weighted regularised.


def _soft_extreme(distance: Tensor, exponent: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """1 / (sum of the weights + eps) and the weighted distance of each row, `among` those."""
    e = torch.where(among, exponent.exp(), 0.0)
    inverse = 1.0 / (e.sum(1) + WEIGHT_EPS)
    return inverse, torch.where(among, e * distance, 0.0).sum(1) * inverse


def _weighted_reference(
    embeddings: Tensor, labels: Tensor, stable: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, correct, farthest positive, nearest negative, dL/d(f+ - f-), statistics of each row."""
    x = embeddings.to(accumulator(embeddings.dtype))
    rows = x.shape[0]
    if rows == 0:
        none = labels.new_zeros(0)
        zero, stats = x.new_zeros(()), x.new_zeros(0, 6)
        return zero, labels.new_zeros(()), none, none.clone(), x.new_zeros(0), stats
    distance = distance_matrix(x, x, "euclidean")
    same = labels[:, None] == labels[None, :]
    valid = ~same.all(1)
    positive = distance.masked_fill(~same, -INFINITY).argmax(dim=1)
    negative = distance.masked_fill(same, INFINITY).argmin(dim=1)
    m_pos = distance.gather(1, positive[:, None])[:, 0]
    m_neg = torch.where(valid & stable, -distance.gather(1, negative[:, None])[:, 0], 0.0)
    inv_pos, f_pos = _soft_extreme(distance, distance - m_pos[:, None], same)
    inv_neg, f_neg = _soft_extreme(distance, -distance - m_neg[:, None], ~same)
    gap = f_pos - f_neg
    loss = torch.where(valid, torch.logaddexp(gap, torch.zeros_like(gap)), 0.0).mean()
    stats = torch.stack([m_pos, inv_pos, f_pos, m_neg, inv_neg * valid, f_neg], dim=1)
    slope = torch.where(valid, gap.sigmoid() / rows, 0.0)
    return loss, (valid & (gap <= 0)).sum(), positive, negative, slope, stats


def _weighted_backward_reference(
    grad: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    positive: Tensor,
    negative: Tensor,
    slope: Tensor,
    stats: Tensor,
    stable: bool,
) -> Tensor:
    x = embeddings.to(slope.dtype)
    if x.shape[0] == 0:
        return torch.zeros_like(embeddings)
    distance = distance_matrix(x, x, "euclidean")
    same = labels[:, None] == labels[None, :]
    m_pos, inv_pos, f_pos, m_neg, inv_neg, f_neg = stats[:, :, None].unbind(1)  # [N, 1] each
    pull = (distance - m_pos).exp() * inv_pos * (1.0 + distance - f_pos)
    push = (-distance - m_neg).exp() * inv_neg * (1.0 - distance + f_neg)
    # The eps in the denominators lets a little of the gradient pass through the shift.
    column = torch.arange(x.shape[0], device=x.device)
    pull = pull - torch.where(column == positive[:, None], f_pos * WEIGHT_EPS * inv_pos, 0.0)
    if stable:
        push = push + torch.where(column == negative[:, None], f_neg * WEIGHT_EPS * inv_neg, 0.0)
    c = torch.where(slope[:, None] > 0, torch.where(same, pull, -push), 0.0)
    c = c * (grad * slope)[:, None]
    c = torch.where(distance > SQUARE_FLOOR**0.5, (c + c.t()) / distance, 0.0)
    return weighted_differences(c, x, x).to(embeddings.dtype)


# Value checks.


def _batch_hard_verify(result: tuple[Tensor, ...], *args: Any) -> None:
    embeddings, _, references = args[:3]
    _checks.explain_nan(result[0], "embeddings", embeddings)
    if references is not None:
        _checks.explain_nan(result[0], "references", references)


def _weighted_verify(result: tuple[Tensor, ...], embeddings: Tensor, *_: Any) -> None:
    _checks.explain_nan(result[0], "embeddings", embeddings)


# Fakes.


def _batch_hard_fake(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    margin: float,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kind, rows = accumulator(embeddings.dtype), embeddings.shape[0]
    return (
        embeddings.new_empty((), dtype=kind),
        labels.new_empty(()),
        labels.new_empty(rows),
        labels.new_empty(rows),
        embeddings.new_empty(rows, dtype=kind),
    )


def _batch_hard_backward_fake(
    grad: Tensor, embeddings: Tensor, references: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    shape = (0,) if references is None else references.shape
    return embeddings.new_empty(embeddings.shape), embeddings.new_empty(shape)


def _weighted_fake(
    embeddings: Tensor, labels: Tensor, stable: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kind, rows = accumulator(embeddings.dtype), embeddings.shape[0]
    return (
        embeddings.new_empty((), dtype=kind),
        labels.new_empty(()),
        labels.new_empty(rows),
        labels.new_empty(rows),
        embeddings.new_empty(rows, dtype=kind),
        embeddings.new_empty(rows, 6, dtype=kind),
    )


# Gradients.


def _batch_hard_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, _, references, _, _, ctx.metric = inputs
    ctx.save_for_backward(embeddings, references, *output[2:])


def _batch_hard_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    dx, dr = _batch_hard_backward(grad, *ctx.saved_tensors, ctx.metric)
    return dx, None, None if ctx.saved_tensors[1] is None else dr, None, None, None


def _weighted_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, labels, ctx.stable = inputs
    ctx.save_for_backward(embeddings, labels, *output[2:])


def _weighted_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return _weighted_backward(grad, *ctx.saved_tensors, ctx.stable), None, None


# Registration.

ROOMS = ("cpu", "triton", "cuda")
_batch_hard = register(
    "batch_hard_triplet_loss",
    "(Tensor embeddings, Tensor labels, Tensor? references, Tensor? reference_labels,"
    " float margin, str metric) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_batch_hard_reference,
    fake=_batch_hard_fake,
    backends=ROOMS,
    verify=_batch_hard_verify,
    setup_context=_batch_hard_save,
    backward=_batch_hard_gradient,
    autocast=torch.float32,
)
_batch_hard_backward = register(
    "batch_hard_triplet_loss_backward",
    "(Tensor grad, Tensor embeddings, Tensor? references, Tensor positive, Tensor negative,"
    " Tensor weight, str metric) -> (Tensor, Tensor)",
    reference=_batch_hard_backward_reference,
    fake=_batch_hard_backward_fake,
    backends=ROOMS,
)
_weighted = register(
    "weighted_triplet_loss",
    "(Tensor embeddings, Tensor labels, bool stable)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_weighted_reference,
    fake=_weighted_fake,
    backends=ROOMS,
    verify=_weighted_verify,
    setup_context=_weighted_save,
    backward=_weighted_gradient,
    autocast=torch.float32,
)
_weighted_backward = register(
    "weighted_triplet_loss_backward",
    "(Tensor grad, Tensor embeddings, Tensor labels, Tensor positive, Tensor negative,"
    " Tensor slope, Tensor stats, bool stable) -> Tensor",
    reference=_weighted_backward_reference,
    fake=lambda grad, embeddings, *_: embeddings.new_empty(embeddings.shape),
    backends=ROOMS,
)
