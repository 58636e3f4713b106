"""Ranking losses on embeddings: batch-hard triplet and MPANet's centre cluster loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._checks import Metric
from fastreid_vi._dispatch import register
from fastreid_vi.ops._shared import accumulator
from fastreid_vi.ops.distance import SQUARE_FLOOR, distance_matrix


class TripletLoss(NamedTuple):
    """Result of a triplet loss."""

    loss: Tensor  # scalar
    correct: Tensor  # scalar int64, anchors whose negative is at least as far as their positive


class CenterCluster(NamedTuple):
    """Result of `center_cluster_loss`; loss = pull + push."""

    loss: Tensor  # scalar
    pull: Tensor  # scalar, mean distance to the own centre
    push: Tensor  # scalar, mean hinge between centres


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
    anchor is a positive of itself. Anchors without a positive or without a negative are left out;
    none left gives zero. The choice of the pair is not differentiated. Ties take the first index.
    Distances below 1e-6 (euclidean) are clamped and get no gradient.

    Args:
        embeddings: [N, D], floating.
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

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [3.0]])
    >>> round(batch_hard_triplet_loss(x, torch.tensor([0, 0, 1]), margin=3.0).loss.item(), 3)
    1.333

    Spec: lba 3 (L_tri), aligngan. Golden: lba/triplet, mpanet/center_cluster. Backends: reference.
    """
    _checks.floating("embeddings", embeddings, "N, D")
    _checks.labels_of("labels", labels, embeddings.shape[0], embeddings.device)
    _checks.choice("metric", metric, Metric)
    if margin != margin:
        raise ValueError("margin: expected a number, got nan")
    if references is None or reference_labels is None:
        if references is not None or reference_labels is not None:
            raise ValueError("references, reference_labels: expected both or none")
        references, reference_labels = embeddings, labels
    else:
        _checks.floating("references", references, "M, D")
        shape = (references.shape[0], embeddings.shape[1])
        _checks.shaped_like("references", references, shape, embeddings)
        _checks.labels_of("reference_labels", reference_labels, shape[0], embeddings.device)
    return TripletLoss(
        *_batch_hard(embeddings, labels, references, reference_labels, margin, metric)[:2]
    )


def center_cluster_loss(
    embeddings: Tensor, labels: Tensor, *, margin: float = 0.7
) -> CenterCluster:
    """MPANet's centre cluster loss: rows near their centre, centres apart.

    c_y = mean of the rows with label y; the gradient flows through the centres
    pull = mean over rows i of |x_i - c_{y_i}|
    push = mean over identity pairs p < q of max(0, margin - |c_p - c_q|)

    The identities may come in any order and number of rows. A row that equals its centre gets the
    zero gradient. A single identity has push = 0; an empty batch has loss 0.

    Args:
        embeddings: [N, D], floating.
        labels: [N], int64.
        margin: distance that centres are pushed apart to, > 0.
    Returns:
        `CenterCluster(loss, pull, push)`, float32 scalars (float64 for float64).
    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.

    >>> import torch
    >>> x = torch.tensor([[0.0], [2.0], [5.0]])
    >>> [round(v.item(), 3) for v in center_cluster_loss(x, torch.tensor([0, 0, 1]), margin=5.0)]
    [1.667, 0.667, 1.0]

    Spec: mpanet 3 (pair form, quirks M1-M3). Golden: mpanet/center_cluster. Backends: reference.
    """
    _checks.floating("embeddings", embeddings, "N, D")
    _checks.labels_of("labels", labels, embeddings.shape[0], embeddings.device)
    _checks.above("margin", margin, 0)
    return CenterCluster(*_center_cluster(embeddings, labels, margin))


# Reference: batch-hard triplet.


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
    references: Tensor,
    reference_labels: Tensor,
    margin: float,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, correct, and per anchor: positive, negative, weight of its hinge (0 or 1/valid)."""
    kind = accumulator(embeddings.dtype)
    x, r = embeddings.to(kind), references.to(kind)
    if x.shape[0] == 0 or r.shape[0] == 0:
        none = labels.new_zeros(x.shape[0])
        return x.new_zeros(()), labels.new_zeros(()), none, none.clone(), x.new_zeros(x.shape[0])
    distance = distance_matrix(x, r, metric)
    same = labels[:, None] == reference_labels[None, :]
    infinity = float("inf")
    positive = distance.masked_fill(~same, -infinity).argmax(dim=1)
    negative = distance.masked_fill(same, infinity).argmin(dim=1)
    near = _mined_distance(x, r[positive], metric)
    far = _mined_distance(x, r[negative], metric)
    valid = same.any(dim=1) & ~same.all(dim=1)
    hinge = near - far + margin
    share = valid / valid.sum().clamp_min(1).to(kind)  # [N], 1 / number of valid anchors
    loss = (hinge.clamp_min(0.0) * share).sum()
    correct = (valid & (far >= near)).sum()
    return loss, correct, positive, negative, share * (hinge > 0.0)


def _batch_hard_backward_reference(
    grad: Tensor,
    embeddings: Tensor,
    references: Tensor,
    positive: Tensor,
    negative: Tensor,
    weight: Tensor,
    metric: str,
) -> tuple[Tensor, Tensor]:
    x, r = embeddings.to(weight.dtype), references.to(weight.dtype)
    if x.shape[0] == 0 or r.shape[0] == 0:
        return torch.zeros_like(embeddings), torch.zeros_like(references)
    g = grad * weight
    x_near, r_near = _mined_gradient(g, x, r[positive], metric)
    x_far, r_far = _mined_gradient(-g, x, r[negative], metric)
    grad_references = torch.zeros_like(r)
    grad_references.index_add_(0, positive, r_near).index_add_(0, negative, r_far)
    return (x_near + x_far).to(embeddings.dtype), grad_references.to(references.dtype)


# Reference: centre cluster.


def _centres(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's centre [N, D], the size of its identity [N], whether it speaks for it [N]."""
    same = labels[:, None] == labels[None, :]
    count = same.sum(dim=1)
    centre = (same.to(x.dtype) / count[:, None]) @ x
    # First row of the same label: a representative without a data-dependent shape.
    first = same.to(torch.int64).argmax(dim=1)
    speaks = first == torch.arange(x.shape[0], device=x.device)
    return centre, count, speaks


def _centre_pairs(centre: Tensor, speaks: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """Distances between centres [N, N], mask of pairs, 1 / number of ordered pairs."""
    # The expanded square in float64: as exact as differences, without their N x N x D work.
    distance = distance_matrix(centre.double(), centre.double(), "euclidean").to(centre.dtype)
    pairs = speaks[:, None] & speaks[None, :]
    pairs = pairs & ~torch.eye(centre.shape[0], dtype=torch.bool, device=centre.device)
    return distance, pairs, 1.0 / pairs.sum().clamp_min(1).to(centre.dtype)


def _center_cluster_reference(
    embeddings: Tensor, labels: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = embeddings.to(accumulator(embeddings.dtype))
    if x.shape[0] == 0:
        return x.new_zeros(()), x.new_zeros(()), x.new_zeros(())
    centre, _, speaks = _centres(x, labels)
    pull = torch.linalg.vector_norm(x - centre, dim=1).mean()
    distance, pairs, share = _centre_pairs(centre, speaks, margin)
    push = ((margin - distance).clamp_min(0.0) * pairs).sum() * share
    return pull + push, pull, push


def _center_cluster_backward_reference(
    grad_pull: Tensor, grad_push: Tensor, embeddings: Tensor, labels: Tensor, margin: float
) -> Tensor:
    x = embeddings.to(grad_pull.dtype)
    if x.shape[0] == 0:
        return torch.zeros_like(embeddings)
    centre, count, speaks = _centres(x, labels)
    away = x - centre
    norm = torch.linalg.vector_norm(away, dim=1, keepdim=True)
    pulled = torch.where(norm > 0.0, away / norm, 0.0) * (grad_pull / x.shape[0])
    distance, pairs, share = _centre_pairs(centre, speaks, margin)
    active = pairs & (distance < margin) & (distance > SQUARE_FLOOR**0.5)
    # Ordered pairs count every unordered one twice, hence the 2: -2 g/(P(P-1)) (c_p - c_q)/d_pq.
    coefficient = torch.where(active, -2.0 * grad_push * share / distance, 0.0)
    # Zero except in rows that speak for their identity.
    pushed = coefficient.sum(1, keepdim=True) * centre - coefficient @ centre
    same = (labels[:, None] == labels[None, :]).to(x.dtype)
    grad_centre = same @ (pushed - pulled)  # of the centre, repeated on each of its rows
    return (pulled + grad_centre / count[:, None]).to(embeddings.dtype)


# Fakes.


def _batch_hard_fake(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor,
    reference_labels: Tensor,
    margin: float,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kind, rows = accumulator(embeddings.dtype), embeddings.shape[0]
    index = labels.new_empty(rows)
    return (
        embeddings.new_empty((), dtype=kind),
        labels.new_empty(()),
        index,
        torch.empty_like(index),
        embeddings.new_empty(rows, dtype=kind),
    )


def _batch_hard_backward_fake(
    grad: Tensor,
    embeddings: Tensor,
    references: Tensor,
    positive: Tensor,
    negative: Tensor,
    weight: Tensor,
    metric: str,
) -> tuple[Tensor, Tensor]:
    return embeddings.new_empty(embeddings.shape), references.new_empty(references.shape)


def _center_cluster_fake(
    embeddings: Tensor, labels: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    scalar = embeddings.new_empty((), dtype=accumulator(embeddings.dtype))
    return scalar, torch.empty_like(scalar), torch.empty_like(scalar)


# Gradients.


def _batch_hard_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, _, references, _, _, ctx.metric = inputs
    ctx.save_for_backward(embeddings, references, *output[2:])


def _batch_hard_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, r = _batch_hard_backward(grad, *ctx.saved_tensors, ctx.metric)
    return x, None, r, None, None, None


def _center_cluster_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, labels, ctx.margin = inputs
    ctx.save_for_backward(embeddings, labels)


def _center_cluster_gradient(
    ctx: Any, grad_loss: Tensor, grad_pull: Tensor, grad_push: Tensor
) -> tuple[Any, ...]:
    embeddings, labels = ctx.saved_tensors
    gradient = _center_cluster_backward(
        grad_loss + grad_pull, grad_loss + grad_push, embeddings, labels, ctx.margin
    )
    return gradient, None, None


# Registration.

_batch_hard = register(
    "batch_hard_triplet_loss",
    "(Tensor embeddings, Tensor labels, Tensor references, Tensor reference_labels, float margin,"
    " str metric) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_batch_hard_reference,
    fake=_batch_hard_fake,
    setup_context=_batch_hard_save,
    backward=_batch_hard_gradient,
    autocast=torch.float32,
)
_batch_hard_backward = register(
    "batch_hard_triplet_loss_backward",
    "(Tensor grad, Tensor embeddings, Tensor references, Tensor positive, Tensor negative,"
    " Tensor weight, str metric) -> (Tensor, Tensor)",
    reference=_batch_hard_backward_reference,
    fake=_batch_hard_backward_fake,
)
_center_cluster = register(
    "center_cluster_loss",
    "(Tensor embeddings, Tensor labels, float margin) -> (Tensor, Tensor, Tensor)",
    reference=_center_cluster_reference,
    fake=_center_cluster_fake,
    setup_context=_center_cluster_save,
    backward=_center_cluster_gradient,
    autocast=torch.float32,
)
_center_cluster_backward = register(
    "center_cluster_loss_backward",
    "(Tensor grad_pull, Tensor grad_push, Tensor embeddings, Tensor labels, float margin)"
    " -> Tensor",
    reference=_center_cluster_backward_reference,
    fake=lambda grad_pull, grad_push, embeddings, *_: embeddings.new_empty(embeddings.shape),
)
