"""MPANet's centre cluster loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._dispatch import register
from fastreid_vi.ops._shared import accumulator
from fastreid_vi.ops.distance import SQUARE_FLOOR, distance_matrix, weighted_differences


class CenterCluster(NamedTuple):
    """Result of `center_cluster_loss`; loss = pull + push."""

    loss: Tensor  # scalar
    pull: Tensor  # scalar, mean distance to the own centre
    push: Tensor  # scalar, mean hinge between centres


def center_cluster_loss(
    embeddings: Tensor, labels: Tensor, *, margin: float = 0.7
) -> CenterCluster:
    """MPANet's centre cluster loss: rows near their centre, centres apart.

    c_y = mean of the rows with label y; the gradient flows through the centres
    pull = mean over rows i of |x_i - c_{y_i}|
    push = mean over identity pairs p < q of max(0, margin - |c_p - c_q|)

    The identities may come in any order and number of rows. A row that equals its centre gets the
    zero gradient. A single identity has push = 0; an empty batch has loss 0. The published code
    takes every K-th row for a centre instead, which is the same for identity-major batches; that
    form is the option `cc_mode="rows"` of the method "mpanet".

    Args:
        embeddings: [N, D], floating, D >= 1.
        labels: [N], int64.
        margin: distance that centres are pushed apart to, > 0.
    Returns:
        `CenterCluster(loss, pull, push)`, float32 scalars (float64 for float64).
    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
        NonFiniteError: a NaN or infinity in the embeddings leaves no loss (a ValueError; on CUDA
            tensors only with FASTREID_VI_CHECK_VALUES=1, else the loss is NaN).

    >>> import torch
    >>> x = torch.tensor([[0.0], [2.0], [5.0]])
    >>> [round(v.item(), 3) for v in center_cluster_loss(x, torch.tensor([0, 0, 1]), margin=5.0)]
    [1.667, 0.667, 1.0]

    Spec: mpanet 3 (pair form, M1-M3). Golden: mpanet/center_cluster. Backends: cpu, triton, cuda.
    """
    _checks.embeddings("embeddings", embeddings)
    _checks.labels_of("labels", labels, embeddings.shape[0], embeddings.device)
    _checks.above("margin", margin, 0)
    return CenterCluster(*_center_cluster(embeddings, labels, margin)[:3])


# Reference.


def _centres(x: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's centre [N, D], the size of its identity [N], whether it stands for it [N]."""
    same = first[:, None] == first[None, :]
    count = same.sum(dim=1)
    centre = ((same.double() / count[:, None]) @ x.double()).to(x.dtype)  # never TF32
    return centre, count, first == torch.arange(x.shape[0], device=x.device)


def _gaps(centre: Tensor, speaks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances between centres [N, N], mask of pairs, 1 / number of ordered pairs.

    Rows that stand for no identity are left out by the mask: no data-dependent shapes.
    """
    pairs = speaks[:, None] & speaks[None, :]
    pairs = pairs & ~torch.eye(centre.shape[0], dtype=torch.bool, device=centre.device)
    share = 1.0 / pairs.sum().clamp_min(1).to(centre.dtype)
    return distance_matrix(centre, centre, "euclidean"), pairs, share


def _center_cluster_reference(
    embeddings: Tensor, labels: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, pull, push; per row the first row of its identity and the distance to its centre."""
    x = embeddings.to(accumulator(embeddings.dtype))
    if x.shape[0] == 0:
        zero = x.new_zeros(())
        return zero, zero.clone(), zero.clone(), labels.new_zeros(0), x.new_zeros(0)
    first = (labels[:, None] == labels[None, :]).to(torch.int64).argmax(dim=1)
    centre, _, speaks = _centres(x, first)
    radius = torch.linalg.vector_norm(x - centre, dim=1)
    distance, pairs, share = _gaps(centre, speaks)
    pull = radius.mean()
    push = torch.where(pairs, (margin - distance).clamp_min(0.0), 0.0).sum() * share
    return pull + push, pull, push, first, radius


def _center_cluster_backward_reference(
    grad_pull: Tensor,
    grad_push: Tensor,
    embeddings: Tensor,
    first: Tensor,
    radius: Tensor,
    margin: float,
) -> Tensor:
    x = embeddings.to(radius.dtype)
    if x.shape[0] == 0:
        return torch.zeros_like(embeddings)
    centre, count, speaks = _centres(x, first)
    pulled = torch.where(radius[:, None] > 0.0, (x - centre) / radius[:, None], 0.0)
    pulled = pulled * (grad_pull / x.shape[0])
    distance, pairs, share = _gaps(centre, speaks)
    active = pairs & (distance < margin) & (distance > SQUARE_FLOOR**0.5)
    # Ordered pairs count every unordered one twice, hence the 2: -2 g/(P(P-1)) (c_p - c_q)/d_pq.
    coefficient = torch.where(active, -2.0 * grad_push * share / distance, 0.0)
    # Zero except in rows that stand for their identity.
    pushed = weighted_differences(coefficient, centre, centre)
    same = (first[:, None] == first[None, :]).double()
    grad_centre = (same @ (pushed - pulled).double()).to(x.dtype)  # repeated on each of its rows
    return (pulled + grad_centre / count[:, None]).to(embeddings.dtype)


def _center_cluster_verify(result: tuple[Tensor, ...], embeddings: Tensor, *_: Any) -> None:
    _checks.explain_nan(result[0], "embeddings", embeddings)


# Fake and gradient.


def _center_cluster_fake(
    embeddings: Tensor, labels: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kind, rows = accumulator(embeddings.dtype), embeddings.shape[0]
    scalar = embeddings.new_empty((), dtype=kind)
    radius = embeddings.new_empty(rows, dtype=kind)
    return scalar, scalar.clone(), scalar.clone(), labels.new_empty(rows), radius


def _center_cluster_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, _, ctx.margin = inputs
    ctx.save_for_backward(embeddings, *output[3:])


def _center_cluster_gradient(
    ctx: Any, grad_loss: Tensor, grad_pull: Tensor, grad_push: Tensor, *_: Tensor
) -> tuple[Any, ...]:
    gradient = _center_cluster_backward(
        grad_loss + grad_pull, grad_loss + grad_push, *ctx.saved_tensors, ctx.margin
    )
    return gradient, None, None


# Registration.

_center_cluster = register(
    "center_cluster_loss",
    "(Tensor embeddings, Tensor labels, float margin) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_center_cluster_reference,
    fake=_center_cluster_fake,
    backends=("cpu", "triton", "cuda"),
    verify=_center_cluster_verify,
    setup_context=_center_cluster_save,
    backward=_center_cluster_gradient,
    autocast=torch.float32,
)
_center_cluster_backward = register(
    "center_cluster_loss_backward",
    "(Tensor grad_pull, Tensor grad_push, Tensor embeddings, Tensor first, Tensor radius,"
    " float margin) -> Tensor",
    reference=_center_cluster_backward_reference,
    fake=lambda grad_pull, grad_push, embeddings, *_: embeddings.new_empty(embeddings.shape),
    backends=("cpu", "triton", "cuda"),
)
