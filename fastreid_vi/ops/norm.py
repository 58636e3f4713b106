"""Normalisation ops on feature maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._dispatch import register
from fastreid_vi.ops._shared import accumulator, cast_for_autocast, layout_of


def modality_alleviation(
    features: Tensor, reduce_weight: Tensor, expand_weight: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """MPANet's modality alleviation module (MAM): a gate between a channel and its instance norm.

    mu, v = mean and biased variance over positions; xn = (x - mu) / sqrt(v + eps)
    m = sigmoid(expand(relu(reduce(mu)))); y = m x + (1 - m) xn

    Args:
        features: [B, C, H, W], floating; NCHW or channels_last.
        reduce_weight: [C/r, C, 1, 1], 1x1 convolution without bias; dtype of `features`
            (all three are cast under autocast).
        expand_weight: [C, C/r, 1, 1].
        eps: > 0, added to the variance.
    Returns:
        [B, C, H, W], dtype and memory format of `features`. May be negative.
    Raises:
        TypeError: not floating, or dtypes differ.
        ValueError: a shape or device does not fit, or `eps` <= 0.

    >>> import torch
    >>> x = torch.rand(2, 16, 4, 3)
    >>> modality_alleviation(x, torch.rand(1, 16, 1, 1), torch.rand(16, 1, 1, 1)).shape
    torch.Size([2, 16, 4, 3])

    Spec: mpanet 3, "MAM". Golden: mpanet/mam. Backends: cpu, triton.
    """
    _checks.feature_map("features", features)
    _checks.floating("reduce_weight", reduce_weight, "C/r, C, 1, 1")
    _checks.floating("expand_weight", expand_weight, "C, C/r, 1, 1")
    features, reduce_weight, expand_weight = cast_for_autocast(
        features, reduce_weight, expand_weight
    )
    channels, hidden = features.shape[1], reduce_weight.shape[0]
    if hidden == 0:
        raise ValueError(
            f"reduce_weight: expected at least one row, got {_checks.described(reduce_weight)}"
        )
    _checks.shaped_like("reduce_weight", reduce_weight, (hidden, channels, 1, 1), features)
    _checks.shaped_like("expand_weight", expand_weight, (channels, hidden, 1, 1), features)
    _checks.above("eps", eps, 0)
    result: Tensor = _modality_alleviation(features, reduce_weight, expand_weight, eps)[0]
    return result


# Reference.


def _alleviation_reference(
    features: Tensor, reduce_weight: Tensor, expand_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = features.to(accumulator(features.dtype))
    mean = x.mean(dim=(2, 3))  # [B, C]
    centred = x - mean[..., None, None]
    rstd = (centred.square().mean(dim=(2, 3)) + eps).rsqrt()
    hidden = torch.relu(mean @ reduce_weight.to(x.dtype).flatten(1).t())  # [B, C/r]
    gate = torch.sigmoid(hidden @ expand_weight.to(x.dtype).flatten(1).t())  # [B, C]
    keep, norm = gate[..., None, None], rstd[..., None, None]
    out = keep * x + (1.0 - keep) * norm * centred
    return (
        out.to(features.dtype).contiguous(memory_format=layout_of(features)),
        mean,
        rstd,
        gate,
    )


def _alleviation_backward_reference(
    grad: Tensor,
    features: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    positions = features.shape[2] * features.shape[3]
    g = grad.to(mean.dtype)
    centred = features.to(mean.dtype) - mean[..., None, None]
    sum_g = g.sum(dim=(2, 3))  # [B, C]
    sum_gc = (g * centred).sum(dim=(2, 3))
    grad_reduce, grad_expand, grad_mean = gate_gradient(
        sum_g, sum_gc, reduce_weight, expand_weight, mean, rstd, gate
    )
    # dx = m g + (1-m) q (g - mean(g) - xn mean(g xn)) + dmu / S: affine in g and x per channel.
    pull = (1.0 - gate) * rstd
    on_g = gate + pull
    on_x = -pull * rstd.square() * sum_gc / positions
    offset = (grad_mean - pull * sum_g) / positions
    dx = on_g[..., None, None] * g + on_x[..., None, None] * centred + offset[..., None, None]
    return (
        dx.to(features.dtype).contiguous(memory_format=layout_of(features)),
        grad_reduce.to(reduce_weight.dtype).reshape(reduce_weight.shape),
        grad_expand.to(expand_weight.dtype).reshape(expand_weight.shape),
    )


def gate_gradient(
    sum_g: Tensor,
    sum_gc: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient through the gate: of both weights and of the mean, all [B, C]-sized work.

    `sum_g` and `sum_gc` are the sums over positions of dy and of dy (x - mean).
    """
    w1 = reduce_weight.to(mean.dtype).flatten(1)  # [C/r, C]
    w2 = expand_weight.to(mean.dtype).flatten(1)  # [C, C/r]
    hidden = torch.relu(mean @ w1.t())
    grad_gate = mean * sum_g + (1.0 - rstd) * sum_gc  # sum of dy (x - xn)
    dz = grad_gate * gate * (1.0 - gate)
    grad_hidden = (dz @ w2) * (hidden > 0)
    return grad_hidden.t() @ mean, dz.t() @ hidden, grad_hidden @ w1


# Fakes.


def _alleviation_fake(
    features: Tensor, reduce_weight: Tensor, expand_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistic = features.new_empty(features.shape[:2], dtype=accumulator(features.dtype))
    out = torch.empty_like(features, memory_format=layout_of(features))
    return out, statistic, torch.empty_like(statistic), torch.empty_like(statistic)


def _alleviation_backward_fake(
    grad: Tensor,
    features: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(features, memory_format=layout_of(features)),
        torch.empty_like(reduce_weight, memory_format=torch.contiguous_format),
        torch.empty_like(expand_weight, memory_format=torch.contiguous_format),
    )


# Gradients.


def _alleviation_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _alleviation_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return (*_alleviation_backward(grad, *ctx.saved_tensors), None)


# Registration.

_modality_alleviation = register(
    "modality_alleviation",
    "(Tensor features, Tensor reduce_weight, Tensor expand_weight, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_alleviation_reference,
    fake=_alleviation_fake,
    rows=(0,),
    backends=("cpu", "triton"),
    setup_context=_alleviation_save,
    backward=_alleviation_gradient,
)
_alleviation_backward = register(
    "modality_alleviation_backward",
    "(Tensor grad, Tensor features, Tensor reduce_weight, Tensor expand_weight, Tensor mean,"
    " Tensor rstd, Tensor gate) -> (Tensor, Tensor, Tensor)",
    reference=_alleviation_backward_reference,
    fake=_alleviation_backward_fake,
    backends=("cpu", "triton"),
)
