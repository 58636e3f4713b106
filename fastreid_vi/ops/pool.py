"""Pooling of feature maps: generalised mean, pattern maps, and the loss that separates them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._dispatch import register
from fastreid_vi.ops._shared import accumulator, cast_for_autocast, layout_of

Activation = Literal["sigmoid", "softmax"]


class PatternPool(NamedTuple):
    """Result of `pattern_pool`."""

    pooled: Tensor  # [B, P, C]
    maps: Tensor  # [B, P, H, W]


def gem_pool(features: Tensor, p: float = 3.0, eps: float = 1e-12) -> Tensor:
    """Generalised-mean pooling over positions.

    y[b, c] = (mean over s of x[b, c, s]^p + eps)^(1/p)

    The input is not clamped: where the mean of powers is negative the result is NaN, as in the
    published code.

    Args:
        features: [B, C, H, W], floating, non-negative; NCHW or channels_last.
        p: exponent, > 0; 1 is the mean, large p nears the maximum.
        eps: >= 0, added before the root, keeps the gradient finite at zero.
    Returns:
        [B, C], dtype of `features`.
    Raises:
        TypeError: `features` is not a floating tensor.
        ValueError: `features` is not rank 4 or has no channel or position, `p` <= 0 or `eps` < 0.

    >>> import torch
    >>> gem_pool(torch.full((1, 2, 3, 3), 2.0)).tolist()
    [[2.0, 2.0]]

    Spec: lba 3, mcja 3.2. Golden: lba/gem, mcja/head. Backends: cpu, triton, cuda.
    """
    _checks.feature_map("features", features)
    _checks.above("p", p, 0)
    _checks.at_least("eps", eps, 0)
    pooled: Tensor = _gem_pool(features, p, eps)[0]
    return pooled


def pattern_pool(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "sigmoid",
) -> PatternPool:
    """Pattern maps and the features pooled under each of them.

    maps[b, i, s] = act(weight[i] . x[b, :, s] + bias[i])
    "sigmoid": pooled[b, i, c] = mean over s of maps[b, i, s] x[b, c, s], divided by S = H W
    "softmax" (over positions): pooled[b, i, c] = sum over s of maps[b, i, s] x[b, c, s]

    Args:
        features: [B, C, H, W], floating; NCHW or channels_last.
        weight: [P, C, 1, 1], a 1x1 convolution; dtype of `features` (both are cast under autocast).
        bias: [P] or None.
        activation: "sigmoid" (MPANet) or "softmax" (MCJA).
    Returns:
        `PatternPool(pooled [B, P, C], maps [B, P, H, W])`, dtype of `features`.
    Raises:
        TypeError: not floating, or dtypes differ.
        ValueError: a shape, device or the activation does not fit.

    >>> import torch
    >>> x, w = torch.ones(2, 3, 4, 4), torch.zeros(6, 3, 1, 1)
    >>> pattern_pool(x, w).pooled[0, 0].tolist()
    [0.5, 0.5, 0.5]

    Spec: mpanet 3. Golden: mpanet/pattern_attention. Backends: cpu, triton, cuda.
    """
    _checks.feature_map("features", features)
    _checks.floating("weight", weight, "P, C, 1, 1")
    if bias is None:
        features, weight = cast_for_autocast(features, weight)
    else:
        features, weight, bias = cast_for_autocast(features, weight, bias)
        _checks.shaped_like("bias", bias, (weight.shape[0],), features)
    _checks.shaped_like("weight", weight, (weight.shape[0], features.shape[1], 1, 1), features)
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one map, got {_checks.described(weight)}")
    _checks.choice("activation", activation, Activation)
    return PatternPool(*_pattern_pool(features, weight, bias, activation))


def map_separation_loss(maps: Tensor) -> Tensor:
    """Mean overlap of the pattern maps of a sample.

    L = 2 / (B P (P-1)) sum over b, i < j, s of maps[b, i, s] maps[b, j, s]

    Not divided by the number of positions, as published. One map, or an empty batch, gives zero.

    Args:
        maps: [B, P, H, W], floating.
    Returns:
        Scalar, float32 (float64 for float64).
    Raises:
        TypeError: `maps` is not a floating tensor.
        ValueError: `maps` is not rank 4.

    >>> import torch
    >>> map_separation_loss(torch.ones(2, 6, 4, 3)).item()
    12.0

    Spec: mpanet 3. Golden: mpanet/pattern_attention. Backends: cpu, triton.
    """
    _checks.feature_map("maps", maps)
    loss: Tensor = _map_separation_loss(maps)
    return loss


# Reference: the definition.


def _gem_reference(features: Tensor, p: float, eps: float) -> tuple[Tensor, Tensor]:
    x = features.to(accumulator(features.dtype))
    moment = x.pow(p).mean(dim=(2, 3)) + eps  # [B, C]
    return moment.pow(1.0 / p).to(features.dtype), moment


def _gem_backward_reference(grad: Tensor, features: Tensor, moment: Tensor, p: float) -> Tensor:
    positions = features.shape[2] * features.shape[3]
    scale = grad.to(moment.dtype) * moment.pow(1.0 / p - 1.0) / positions  # [B, C]
    gradient = scale[..., None, None] * features.to(moment.dtype).pow(p - 1.0)
    return gradient.to(features.dtype).contiguous(memory_format=layout_of(features))


def _activate(logits: Tensor, activation: str) -> Tensor:
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(dim=-1)


def _pattern_reference(
    features: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = features.shape
    count = weight.shape[0]
    x = features.to(accumulator(features.dtype)).reshape(batch, channels, height * width)
    logits = torch.matmul(weight.to(x.dtype).reshape(count, channels), x)  # [B, P, S]
    if bias is not None:
        logits = logits + bias.to(x.dtype)[:, None]
    maps = _activate(logits, activation)
    pooled = torch.matmul(maps, x.transpose(1, 2))  # [B, P, C]
    if activation == "sigmoid":
        pooled = pooled / (height * width)
    return pooled.to(features.dtype), maps.to(features.dtype).reshape(batch, count, height, width)


def _pattern_backward_reference(
    grad_pooled: Tensor,
    grad_maps: Tensor,
    features: Tensor,
    weight: Tensor,
    maps: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = features.shape
    count, kind = weight.shape[0], accumulator(features.dtype)
    x = features.to(kind).reshape(batch, channels, height * width)
    a = maps.to(kind).reshape(batch, count, height * width)
    w = weight.to(kind).reshape(count, channels)
    dp = grad_pooled.to(kind)  # [B, P, C]
    if activation == "sigmoid":
        dp = dp / (height * width)
    da = grad_maps.to(kind).reshape(a.shape) + torch.matmul(dp, x)  # [B, P, S]
    if activation == "sigmoid":
        dz = da * a * (1.0 - a)
    else:
        dz = a * (da - (a * da).sum(-1, keepdim=True))
    dx = torch.matmul(a.transpose(1, 2), dp) + torch.matmul(dz.transpose(1, 2), w)  # [B, S, C]
    dw = torch.einsum("bps,bcs->pc", dz, x)
    # A bias moves all positions alike, which softmax cancels: its gradient is zero, not rounding
    # noise.
    db = dz.sum(dim=(0, 2)) if activation == "sigmoid" else dz.new_zeros(count)
    dx_map = dx.transpose(1, 2).reshape(features.shape).to(features.dtype)
    return (
        dx_map.contiguous(memory_format=layout_of(features)),
        dw.to(weight.dtype).reshape(weight.shape),
        db.to(weight.dtype),
    )


def _pairs(maps: Tensor) -> int:
    """B P (P-1), and 1 where there is no pair, so that the empty sum divides to zero."""
    return max(maps.shape[0] * maps.shape[1] * (maps.shape[1] - 1), 1)


def _separation_reference(maps: Tensor) -> Tensor:
    a = maps.to(accumulator(maps.dtype))
    overlap = (a.sum(dim=1).square() - a.square().sum(dim=1)).sum()  # both orders of every pair
    return overlap / _pairs(maps)


def _separation_backward_reference(grad: Tensor, maps: Tensor) -> Tensor:
    a = maps.to(grad.dtype)
    gradient = (a.sum(dim=1, keepdim=True) - a) * (2.0 * grad / _pairs(maps))
    return gradient.to(maps.dtype).contiguous(memory_format=layout_of(maps))


# Fakes: shapes, dtypes, strides.


def _gem_fake(features: Tensor, p: float, eps: float) -> tuple[Tensor, Tensor]:
    shape = features.shape[:2]
    return features.new_empty(shape), features.new_empty(shape, dtype=accumulator(features.dtype))


def _map_like(features: Tensor) -> Tensor:
    return torch.empty_like(features, memory_format=layout_of(features))


def _pattern_fake(
    features: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = features.shape
    count = weight.shape[0]
    return features.new_empty(batch, count, channels), features.new_empty(
        batch, count, height, width
    )


def _pattern_backward_fake(
    grad_pooled: Tensor,
    grad_maps: Tensor,
    features: Tensor,
    weight: Tensor,
    maps: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _map_like(features),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        weight.new_empty(weight.shape[0]),
    )


# Gradients.


def _gem_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, ctx.p, _ = inputs
    ctx.save_for_backward(features, output[1])


def _gem_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    features, moment = ctx.saved_tensors
    return _gem_backward(grad.contiguous(), features, moment, ctx.p), None, None


def _pattern_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, weight, bias, ctx.activation = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(features, weight, output[1])


def _pattern_gradient(ctx: Any, grad_pooled: Tensor, grad_maps: Tensor) -> tuple[Any, ...]:
    dx, dw, db = _pattern_backward(
        grad_pooled.contiguous(), grad_maps.contiguous(), *ctx.saved_tensors, ctx.activation
    )
    return dx, dw, db if ctx.has_bias else None, None


def _separation_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _separation_gradient(ctx: Any, grad: Tensor) -> Tensor:
    gradient: Tensor = _separation_backward(grad, ctx.saved_tensors[0])
    return gradient


# Registration.

_gem_pool = register(
    "gem_pool",
    "(Tensor features, float p, float eps) -> (Tensor, Tensor)",
    reference=_gem_reference,
    fake=_gem_fake,
    backends=("cpu", "triton", "cuda"),
    rows=(0,),
    setup_context=_gem_save,
    backward=_gem_gradient,
)
_gem_backward = register(
    "gem_pool_backward",
    "(Tensor grad, Tensor features, Tensor moment, float p) -> Tensor",
    reference=_gem_backward_reference,
    fake=lambda grad, features, moment, p: _map_like(features),
    backends=("cpu", "triton", "cuda"),
    rows=(0, 1, 2),
)
_pattern_pool = register(
    "pattern_pool",
    "(Tensor features, Tensor weight, Tensor? bias, str activation) -> (Tensor, Tensor)",
    reference=_pattern_reference,
    fake=_pattern_fake,
    rows=(0,),
    backends=("cpu", "triton", "cuda"),
    setup_context=_pattern_save,
    backward=_pattern_gradient,
)
_pattern_backward = register(
    "pattern_pool_backward",
    "(Tensor grad_pooled, Tensor grad_maps, Tensor features, Tensor weight, Tensor maps,"
    " str activation) -> (Tensor, Tensor, Tensor)",
    reference=_pattern_backward_reference,
    fake=_pattern_backward_fake,
    backends=("cpu", "triton", "cuda"),
)
_map_separation_loss = register(
    "map_separation_loss",
    "(Tensor maps) -> Tensor",
    reference=_separation_reference,
    fake=lambda maps: maps.new_empty((), dtype=accumulator(maps.dtype)),
    backends=("cpu", "triton"),
    setup_context=_separation_save,
    backward=_separation_gradient,
)
_separation_backward = register(
    "map_separation_loss_backward",
    "(Tensor grad, Tensor maps) -> Tensor",
    reference=_separation_backward_reference,
    fake=lambda grad, maps: _map_like(maps),
    backends=("cpu", "triton"),
)
