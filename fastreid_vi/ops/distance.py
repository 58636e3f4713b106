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


def pairwise_distance(
    x: Tensor, y: Tensor | None = None, *, metric: Metric = "euclidean"
) -> Tensor:
    """Distance of every row of `x` to every row of `y`.

    "sqeuclidean": max(|x_i|^2 + |y_j|^2 - 2 x_i . y_j, 0)
    "euclidean": sqrt(max(|x_i - y_j|^2, 1e-12)); clamped entries get no gradient
    "cosine": 1 - x_i . y_j / (max(|x_i|, 1e-12) max(|y_j|, 1e-12))

    Euclidean distances are taken after subtracting the mean of `y` from both sides, which changes
    nothing but the rounding: embeddings with a large common part keep their small distances.

    Args:
        x: [N, D], floating.
        y: [M, D], dtype of `x`; None compares `x` with itself.
        metric: "euclidean", "sqeuclidean" or "cosine".
    Returns:
        [N, M], dtype of `x` (accumulated in float32, or float64 for float64).
    Raises:
        TypeError: not floating, or dtypes differ.
        ValueError: not rank 2, D differs, or an unknown metric.

    >>> import torch
    >>> pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))[0, 1].item()
    5.0

    Spec: lba 3, mcja 3.1. Golden: lba/triplet. Backends: reference (library matmul).
    """
    _checks.floating("x", x, "N, D")
    if y is not None:
        _checks.shaped_like("y", y, (y.shape[0] if y.dim() else 0, x.shape[1]), x)
    _checks.choice("metric", metric, Metric)
    distance: Tensor = _pairwise_distance(x, x if y is None else y, metric)
    return distance


# Reference.


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)
    return rows / norm, norm


def _centre(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    shift = y.mean(dim=0) if y.shape[0] else y.new_zeros(y.shape[1])
    return x - shift, y - shift


def distance_matrix(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """`pairwise_distance` of rows already in the accumulation dtype."""
    if metric == "cosine":
        return 1.0 - _unit(x)[0] @ _unit(y)[0].t()
    x, y = _centre(x, y)
    square = x.square().sum(1)[:, None] + y.square().sum(1)[None, :] - 2.0 * (x @ y.t())
    if metric == "sqeuclidean":
        return square.clamp_min(0.0)
    return square.clamp_min(SQUARE_FLOOR).sqrt()


def _distance_reference(x: Tensor, y: Tensor, metric: str) -> Tensor:
    kind = accumulator(x.dtype)
    return distance_matrix(x.to(kind), y.to(kind), metric).to(x.dtype)


def _distance_backward_reference(
    grad: Tensor, x: Tensor, y: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    kind = accumulator(x.dtype)
    a, b, g = x.to(kind), y.to(kind), grad.to(kind)
    if metric == "cosine":
        (u, u_norm), (v, v_norm) = _unit(a), _unit(b)
        du, dv = -g @ v, -g.t() @ u
        da = (du - u * (du * u).sum(1, keepdim=True)) / u_norm
        db = (dv - v * (dv * v).sum(1, keepdim=True)) / v_norm
        return da.to(x.dtype), db.to(y.dtype)
    distance = distance_matrix(a, b, metric)
    if metric == "euclidean":  # d sqrt(s) = ds / (2 sqrt(s)); no gradient where the clamp acts
        g = torch.where(distance > SQUARE_FLOOR**0.5, g / distance, 0.0)
    else:
        g = torch.where(distance > 0.0, 2.0 * g, 0.0)
    a, b = _centre(a, b)
    da = g.sum(1, keepdim=True) * a - g @ b
    db = g.sum(0)[:, None] * b - g.t() @ a
    return da.to(x.dtype), db.to(y.dtype)


# Fakes and gradients.


def _distance_backward_fake(
    grad: Tensor, x: Tensor, y: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _distance_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, ctx.metric = inputs
    ctx.save_for_backward(x, y)


def _distance_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*_distance_backward(grad.contiguous(), *ctx.saved_tensors, ctx.metric), None)


# Registration.

_pairwise_distance = register(
    "pairwise_distance",
    "(Tensor x, Tensor y, str metric) -> Tensor",
    reference=_distance_reference,
    fake=lambda x, y, metric: x.new_empty(x.shape[0], y.shape[0]),
    setup_context=_distance_save,
    backward=_distance_gradient,
    autocast=torch.float32,
)
_distance_backward = register(
    "pairwise_distance_backward",
    "(Tensor grad, Tensor x, Tensor y, str metric) -> (Tensor, Tensor)",
    reference=_distance_backward_reference,
    fake=_distance_backward_fake,
)
