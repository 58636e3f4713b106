"""Alignment of maps with their partners, and LbA's whole block: alignment and dense triplet."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._dispatch import register
from fastreid_vi.ops._matching import (
    Weighting,
    comask_of,
    map_of,
    mask_of,
    mask_rows,
    match,
    match_gradient,
    picked,
    position_losses,
    rows_of,
    scattered,
)
from fastreid_vi.ops._shared import accumulator, layout_of


class Alignment(NamedTuple):
    """Result of `align_features`."""

    aligned: Tensor  # [B, C, H, W]
    comask: Tensor  # [B, 1, H, W]


class DenseAlignment(NamedTuple):
    """Result of `dense_alignment`."""

    aligned: Tensor  # [B, C, H, W]
    loss: Tensor  # scalar
    comask: Tensor  # [B, 1, H, W]


def align_features(
    features: Tensor, index: Tensor, *, mask: Tensor, temperature: float = 50.0
) -> Alignment:
    """Each map blended with its partner's features where the mask sees a person.

    aligned_p = mask(p) warped_p + (1 - mask(p)) features_p,  warped from features[index]
    comask as in `correspondence_warp`, with the same mask on both sides

    The mask and the comask are detached; no gathered copy of `features[index]` is made.

    Args:
        features: [B, C, H, W], floating; NCHW or channels_last.
        index: [B], int64: the partner of each sample.
        mask: [B, 1, H, W], floating, for example `feature_mask(features)`.
        temperature: > 0.
    Returns:
        `Alignment(aligned [B, C, H, W], comask [B, 1, H, W])`, dtype of `features`.
    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: a shape, a device, `temperature` or an entry of `index` does not fit.

    >>> import torch
    >>> x, swap = torch.rand(2, 3, 2, 2), torch.tensor([1, 0])
    >>> torch.equal(align_features(x, swap, mask=torch.zeros(2, 1, 2, 2)).aligned, x)
    True

    Spec: lba 3 (warp, reconstruction). Golden: lba/cmalign_loss_a_fwd, lba/cmalign_loss_a_grad,
    lba/cmalign_loss_b, lba/cmalign_loss_c_signed, lba/cmalign_mask_recon. Backends: cpu, triton.
    """
    _checks.feature_map("features", features)
    _checks.labels_of("index", index, features.shape[0], features.device)
    _checks.above("temperature", temperature, 0)
    outputs = _align(features, index, mask_rows("mask", mask, features), temperature)
    return Alignment(*outputs[:2])


def dense_alignment(
    features: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    temperature: float = 50.0,
    margin: float = 0.3,
    weighting: Weighting = "sample",
    eps: float = 1e-6,
) -> DenseAlignment:
    """LbA's whole block: alignment with a positive partner, dense triplet against a negative one.

    mask = feature_mask(features)
    aligned, comask = align_features(features, positive, mask=mask)
    loss = dense_triplet_loss(features, aligned, align_features(features, negative, mask=mask)[0],
                              comask), with `eps` in the place of its 1e-6

    One op in place of four: the negative reconstruction is never formed where a fast room runs.
    Mask and comask are detached.

    Args:
        features: [B, C, H, W], floating; NCHW or channels_last.
        positive, negative: [B], int64: partners of each sample, rows of `features`.
        temperature: > 0.
        margin: any number.
        weighting: "sample" or "batch", as in `dense_triplet_loss`.
        eps: >= 0, added to every channel of a difference; at 0, equal positions get no gradient.
    Returns:
        `DenseAlignment(aligned [B, C, H, W], loss, comask [B, 1, H, W])`: dtype of `features`, the
        loss float32 (float64 for float64).
    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: a shape, a device, an option or an entry of an index does not fit.

    >>> import torch
    >>> x, swap = torch.rand(2, 3, 2, 2), torch.tensor([1, 0])
    >>> result = dense_alignment(x, swap, swap)
    >>> torch.allclose(result.loss, 0.3 * result.comask.mean())
    True

    Spec: lba 3, performance 5.1. Golden: lba/cmalign_loss_a_fwd, lba/cmalign_loss_a_grad,
    lba/cmalign_loss_b, lba/cmalign_loss_c_signed, lba/cmalign_edge. Backends: cpu, triton.
    """
    _checks.feature_map("features", features)
    _checks.labels_of("positive", positive, features.shape[0], features.device)
    _checks.labels_of("negative", negative, features.shape[0], features.device)
    _checks.above("temperature", temperature, 0)
    _checks.number("margin", margin)
    _checks.choice("weighting", weighting, Weighting)
    _checks.at_least("eps", eps, 0)
    outputs = _dense(features, positive, negative, temperature, margin, weighting, eps)
    return DenseAlignment(*outputs[:3])


# Reference: the definition.


def _align_reference(
    features: Tensor, index: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Aligned, comask, P, lse."""
    x = rows_of(features)
    k = picked(x, index)
    probability, lse = match(x, k, features.dtype, temperature)
    p, m = probability.to(x.dtype), mask[..., None]
    aligned = map_of(m * (p @ k) + (1.0 - m) * x, features)
    comask = comask_of(p, mask, picked(mask, index)).to(features.dtype)
    return aligned, _as_mask(comask, features), probability, lse


def _align_backward_reference(
    grad: Tensor,
    features: Tensor,
    index: Tensor,
    mask: Tensor,
    probability: Tensor,
    lse: Tensor,
    temperature: float,
) -> Tensor:
    x, dr, m = rows_of(features), rows_of(grad), mask[..., None]
    dx = _pairing_gradient(m * dr, x, index, probability, lse, temperature)
    return map_of(dx + (1.0 - m) * dr, features)


def _pairing_gradient(
    dw: Tensor, x: Tensor, index: Tensor, probability: Tensor, lse: Tensor, temperature: float
) -> Tensor:
    """From the gradient of the warped rows to that of the rows, as queries and as keys."""
    k, p = picked(x, index), probability.to(x.dtype)
    dq, dk = match_gradient(dw @ k.transpose(1, 2), x, k, p, lse, temperature)
    return dq + scattered(dk + p.transpose(1, 2) @ dw, index, len(x))


def _as_mask(values: Tensor, features: Tensor) -> Tensor:
    return values.reshape(features.shape[0], 1, *features.shape[2:])


def _dense_reference(
    features: Tensor,
    positive: Tensor,
    negative: Tensor,
    temperature: float,
    margin: float,
    weighting: str,
    eps: float,
) -> tuple[Tensor, ...]:
    """Aligned, loss, comask; P and lse of both pairings, the Grams of the samples, mask, slopes."""
    x = rows_of(features)
    mask = mask_of(x)
    matched = [
        match(x, picked(x, index), features.dtype, temperature) for index in (positive, negative)
    ]
    p = [probability.to(x.dtype) for probability, _ in matched]
    m = mask[..., None]
    away = [m * (x - a @ picked(x, i)) for a, i in zip(p, (positive, negative), strict=True)]
    near, far = (torch.linalg.vector_norm(d + eps, dim=2) for d in away)
    comask = comask_of(p[0], mask, picked(mask, positive))
    loss, slopes = position_losses(near, far, comask, margin, weighting)
    return (
        map_of(x - away[0], features),
        loss,
        _as_mask(comask.to(features.dtype), features),
        torch.stack([probability for probability, _ in matched]),
        torch.stack([lse for _, lse in matched]),
        x @ x.transpose(1, 2),
        mask,
        slopes,
    )


def _dense_backward_reference(
    grad_aligned: Tensor,
    grad_loss: Tensor,
    features: Tensor,
    positive: Tensor,
    negative: Tensor,
    aligned: Tensor,
    probability: Tensor,
    lse: Tensor,
    gram: Tensor,
    mask: Tensor,
    slopes: Tensor,
    temperature: float,
    eps: float,
) -> Tensor:
    x, dr, m = rows_of(features), rows_of(grad_aligned), mask[..., None]
    dx = (1.0 - m) * dr
    for side, index in enumerate((positive, negative)):
        w = probability[side].to(x.dtype) @ picked(x, index)
        u = (grad_loss * slopes[side])[..., None] * (m * (x - w) + eps)
        dw = m * (dr - u) if side == 0 else -m * u
        rest = _pairing_gradient(dw, x, index, probability[side], lse[side], temperature)
        dx = dx + m * u + rest
    return map_of(dx, features)


def _verify_align(result: Any, *args: Any) -> None:
    _checks.within("index", args[1], args[0].shape[0])


def _verify_dense(result: Any, *args: Any) -> None:
    _checks.within("positive", args[1], args[0].shape[0])
    _checks.within("negative", args[2], args[0].shape[0])


# Fakes: shapes, dtypes, strides.


def _map_like(features: Tensor) -> Tensor:
    return torch.empty_like(features, memory_format=layout_of(features))


def _align_fake(
    features: Tensor, index: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, size = mask.shape
    comask = features.new_empty(batch, 1, *features.shape[2:])
    probability = features.new_empty(batch, size, size)
    return _map_like(features), comask, probability, torch.empty_like(mask)


def _dense_fake(features: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, size = features.shape[0], features.shape[2] * features.shape[3]
    wide = torch.empty((), dtype=accumulator(features.dtype), device=features.device)
    return (
        _map_like(features),
        wide.new_empty(()),
        features.new_empty(batch, 1, *features.shape[2:]),
        features.new_empty(2, batch, size, size),
        wide.new_empty(2, batch, size),
        wide.new_empty(batch, size, size),
        wide.new_empty(batch, size),
        wide.new_empty(2, batch, size),
    )


# Gradients.


def _align_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, index, mask, ctx.temperature = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, index, mask, *output[2:])


def _align_gradient(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 4
    return _align_backward(grad, *ctx.saved_tensors, ctx.temperature), None, None, None


def _dense_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.temperature, ctx.eps = inputs[3], inputs[6]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], output[0], *output[3:])


def _dense_gradient(
    ctx: Any, grad_aligned: Tensor | None, grad_loss: Tensor | None, *_: None
) -> tuple[Any, ...]:
    features, slopes = ctx.saved_tensors[0], ctx.saved_tensors[-1]
    if grad_aligned is None:
        grad_aligned = torch.zeros_like(features, memory_format=layout_of(features))
    if grad_loss is None:
        grad_loss = slopes.new_zeros(())
    gradient = _dense_backward(
        grad_aligned, grad_loss, *ctx.saved_tensors, ctx.temperature, ctx.eps
    )
    return gradient, None, None, None, None, None, None


# Registration.

_align = register(
    "align_features",
    "(Tensor features, Tensor index, Tensor mask, float temperature)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_align_reference,
    fake=_align_fake,
    verify=_verify_align,
    setup_context=_align_save,
    backward=_align_gradient,
    backends=("cpu", "triton"),
)
_align_backward = register(
    "align_features_backward",
    "(Tensor grad, Tensor features, Tensor index, Tensor mask, Tensor probability, Tensor lse,"
    " float temperature) -> Tensor",
    reference=_align_backward_reference,
    fake=lambda grad, features, *rest: _map_like(features),
    backends=("cpu", "triton"),
)
_dense = register(
    "dense_alignment",
    "(Tensor features, Tensor positive, Tensor negative, float temperature, float margin,"
    " str weighting, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_dense_reference,
    fake=_dense_fake,
    verify=_verify_dense,
    setup_context=_dense_save,
    backward=_dense_gradient,
    backends=("cpu", "triton"),
)
_dense_backward = register(
    "dense_alignment_backward",
    "(Tensor grad_aligned, Tensor grad_loss, Tensor features, Tensor positive, Tensor negative,"
    " Tensor aligned, Tensor probability, Tensor lse, Tensor gram, Tensor mask, Tensor slopes,"
    " float temperature, float eps) -> Tensor",
    reference=_dense_backward_reference,
    fake=lambda grad_aligned, grad_loss, features, *rest: _map_like(features),
    backends=("cpu", "triton"),
)
