"""The dense triplet loss: at every position, nearer to the positive map than to the negative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._dispatch import register
from fastreid_vi.ops._matching import Weighting, map_of, mask_rows, position_losses, rows_of
from fastreid_vi.ops._shared import accumulator, layout_of

EPS = 1e-6  # added to every channel of a difference, as the published distance does


def dense_triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    weight: Tensor,
    *,
    margin: float = 0.3,
    weighting: Weighting = "sample",
) -> Tensor:
    """Triplet loss of every position, weighted by a co-attention mask.

    d+(p) = |anchor_p - positive_p + 1e-6|, d-(p) likewise, norms over channels
    l_b(p) = max(0, margin + d+(p) - d-(p))
    "sample": L = mean over b, p of weight_b(p) l_b(p)
    "batch":  L = mean over p of (mean over b of weight_b(p)) (mean over b of l_b(p)), what the
    published code computes by broadcasting (spec, L1)

    The weight is detached. An empty batch gives zero.

    Args:
        anchor: [B, C, H, W], floating; NCHW or channels_last.
        positive, negative: as `anchor`, for example two `align_features(...).aligned`.
        weight: [B, 1, H, W], floating, for example `align_features(...).comask`.
        margin: any number.
        weighting: "sample" or "batch".
    Returns:
        Scalar, float32 (float64 for float64).
    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: a shape, a device or `weighting` does not fit, or `margin` is NaN.

    >>> import torch
    >>> x = torch.rand(2, 3, 4, 4)
    >>> round(dense_triplet_loss(x, x, x, torch.ones(2, 1, 4, 4)).item(), 4)
    0.3

    Spec: lba 3 (dense triplet). Golden: lba/cmalign_loss_a_fwd, lba/cmalign_loss_a_grad,
    lba/cmalign_loss_b, lba/cmalign_loss_c_signed, lba/cmalign_edge. Backends: cpu, triton.
    """
    _checks.feature_map("anchor", anchor)
    _checks.shaped_like("positive", positive, tuple(anchor.shape), anchor)
    _checks.shaped_like("negative", negative, tuple(anchor.shape), anchor)
    weights = mask_rows("weight", weight, anchor)
    _checks.number("margin", margin)
    _checks.choice("weighting", weighting, Weighting)
    loss: Tensor = _dense_triplet(anchor, positive, negative, weights, margin, weighting)[0]
    return loss


# Reference: the definition.


def _distance(rows: Tensor, other: Tensor) -> Tensor:
    distance: Tensor = torch.linalg.vector_norm(rows - other + EPS, dim=2)
    return distance


def _reference(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    weight: Tensor,
    margin: float,
    weighting: str,
) -> tuple[Tensor, Tensor]:
    """Loss, and the slopes of both distances over the distances, [2, B, S]."""
    x = rows_of(anchor)
    near, far = _distance(x, rows_of(positive)), _distance(x, rows_of(negative))
    return position_losses(near, far, weight, margin, weighting)


def _backward_reference(
    grad: Tensor, anchor: Tensor, positive: Tensor, negative: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x = rows_of(anchor)
    pull = (grad * slopes[0])[..., None] * (x - rows_of(positive) + EPS)
    push = (grad * slopes[1])[..., None] * (x - rows_of(negative) + EPS)
    return map_of(pull + push, anchor), map_of(-pull, positive), map_of(-push, negative)


# Fakes: shapes, dtypes, strides.


def _fake(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    weight: Tensor,
    margin: float,
    weighting: str,
) -> tuple[Tensor, Tensor]:
    kind = accumulator(anchor.dtype)
    size = anchor.shape[2] * anchor.shape[3]
    slopes = anchor.new_empty(2, anchor.shape[0], size, dtype=kind)
    return anchor.new_empty((), dtype=kind), slopes


def _backward_fake(
    grad: Tensor, anchor: Tensor, positive: Tensor, negative: Tensor, slopes: Tensor
) -> tuple[Tensor, ...]:
    maps = (anchor, positive, negative)
    return tuple(torch.empty_like(x, memory_format=layout_of(x)) for x in maps)


# Gradient.


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], output[1])


def _gradient(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    return *_dense_triplet_backward(grad, *ctx.saved_tensors), None, None, None


# Registration.

_dense_triplet = register(
    "dense_triplet_loss",
    "(Tensor anchor, Tensor positive, Tensor negative, Tensor weight, float margin,"
    " str weighting) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    setup_context=_save,
    backward=_gradient,
    backends=("cpu", "triton"),
)
_dense_triplet_backward = register(
    "dense_triplet_loss_backward",
    "(Tensor grad, Tensor anchor, Tensor positive, Tensor negative, Tensor slopes)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
    backends=("cpu", "triton"),
)
