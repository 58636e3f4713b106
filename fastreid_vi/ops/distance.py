"""Pairwise distances between embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._checks import Metric
from fastreid_vi._dispatch import register
from fastreid_vi.ops._shared import accumulator

SQUARE_FLOOR = 1e-12
"""Squared distances are clamped here before the root, as published, and get no gradient there."""
NORM_FLOOR = 1e-12
"""Norms are clamped here before the division of the cosine."""


def pairwise_distance(
    x: Tensor, y: Tensor | None = None, *, metric: Metric = "euclidean"
) -> Tensor:
    """Distance of every row of `x` to every row of `y`.

    "sqeuclidean": |x_i - y_j|^2
    "euclidean": sqrt(max(|x_i - y_j|^2, 1e-12)); clamped entries get no gradient
    "cosine": 1 - u_i . v_j with u = x / max(|x|, 1e-12)

    Sums of differences, not |x|^2 + |y|^2 - 2 x . y, and the cosine as half the squared distance of
    the unit rows: near-equal rows keep their small distances to a few units in the last place.
    NaN and infinity propagate.

    Args:
        x: [N, D], floating, D >= 1.
        y: [M, D], dtype of `x`; None compares `x` with itself.
        metric: "euclidean", "sqeuclidean" or "cosine".
    Returns:
        [N, M], dtype of `x` (float32 under autocast); accumulated in float32, or float64.
    Raises:
        TypeError: not floating, or dtypes differ.
        ValueError: not rank 2, D is zero or differs, devices differ, or an unknown metric.

    >>> import torch
    >>> pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))[0, 1].item()
    5.0

    Spec: lba 3, mcja 3.3. Golden: lba/triplet. Backends: cpu.
    """
    _checks.embeddings("x", x)
    if y is not None:
        _checks.floating("y", y, "M, D")
        _checks.shaped_like("y", y, (y.shape[0], x.shape[1]), x)
    _checks.choice("metric", metric, Metric)
    distance: Tensor = _pairwise_distance(x, y, metric)
    return distance if torch.is_autocast_enabled(x.device.type) else distance.to(x.dtype)


# Reference.


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their norm [N, D], and the norm, not below the floor [N, 1]."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(NORM_FLOOR)
    return rows / norm, norm


def _missing(unit: Tensor) -> Tensor:
    """(1 - |u|^2) / 2 [N] of rows that the floor kept short, else exactly zero."""
    square = unit.square().sum(1)
    return torch.where(square < 0.5, (1.0 - square) / 2.0, 0.0)


def squares(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 [N, M], from differences."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def distance_matrix(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """`pairwise_distance` of rows already in the accumulation dtype."""
    if metric == "cosine":
        u, v = unit_rows(x)[0], unit_rows(y)[0]
        # 1 - u.v = |u - v|^2 / 2 + (1 - |u|^2) / 2 + (1 - |v|^2) / 2: the last two are zero but for
        # rows shorter than the floor.
        return squares(u, v) / 2 + _missing(u)[:, None] + _missing(v)[None, :]
    square = squares(x, y)
    return square if metric == "sqeuclidean" else square.clamp_min(SQUARE_FLOOR).sqrt()


def weighted_differences(coefficient: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """sum over j of c_ij (x_i - y_j) [N, D], in float64: the two parts nearly cancel."""
    c, a, b = coefficient.double(), x.double(), y.double()
    return (c.sum(1, keepdim=True) * a - c @ b).to(x.dtype)


def _distance_reference(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    kind = accumulator(x.dtype)
    return distance_matrix(x.to(kind), (x if y is None else y).to(kind), metric)


def _distance_backward_reference(
    grad: Tensor, x: Tensor, y: Tensor | None, distance: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    a = x.to(grad.dtype)
    b = a if y is None else y.to(grad.dtype)
    if metric == "cosine":
        (u, u_norm), (v, v_norm) = unit_rows(a), unit_rows(b)
        du, dv = -grad @ v, -grad.t() @ u
        da = (du - u * (du * u).sum(1, keepdim=True)) / u_norm
        db = (dv - v * (dv * v).sum(1, keepdim=True)) / v_norm
    else:
        if metric == "euclidean":  # d sqrt(s) = ds / (2 sqrt(s)); none where the clamp acts
            grad = torch.where(distance > SQUARE_FLOOR**0.5, grad / distance, 0.0)
        else:
            grad = 2.0 * grad
        da, db = weighted_differences(grad, a, b), weighted_differences(grad.t(), b, a)
    if y is None:
        return (da + db).to(x.dtype), x.new_empty(0)
    return da.to(x.dtype), db.to(y.dtype)


# Fakes and gradients.


def _distance_fake(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    columns = (x if y is None else y).shape[0]
    return x.new_empty(x.shape[0], columns, dtype=accumulator(x.dtype))


def _distance_backward_fake(
    grad: Tensor, x: Tensor, y: Tensor | None, distance: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if y is None else y.new_empty(y.shape)


def _distance_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, ctx.metric = inputs
    ctx.save_for_backward(x, y, output)


def _distance_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y, distance = ctx.saved_tensors
    dx, dy = _distance_backward(grad.contiguous(), x, y, distance, ctx.metric)
    return dx, None if y is None else dy, None


# Registration.

_pairwise_distance = register(
    "pairwise_distance",
    "(Tensor x, Tensor? y, str metric) -> Tensor",
    reference=_distance_reference,
    fake=_distance_fake,
    backends=("cpu",),
    setup_context=_distance_save,
    backward=_distance_gradient,
    autocast=torch.float32,
)
_distance_backward = register(
    "pairwise_distance_backward",
    "(Tensor grad, Tensor x, Tensor? y, Tensor distance, str metric) -> (Tensor, Tensor)",
    reference=_distance_backward_reference,
    fake=_distance_backward_fake,
    backends=("cpu",),
)
