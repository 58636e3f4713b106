"""MCJA's modality distribution adapter, through its affine form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._dispatch import register
from fastreid_vi.ops._shared import (
    accumulator,
    cast_for_autocast,
    layout_of,
    moments,
    update_running,
)


def distribution_adapter(
    features: Tensor,
    sc_weight: Tensor,
    sc_bias: Tensor,
    ca_weight: Tensor,
    ca_bn_weight: Tensor,
    ca_bn_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    ca_running_mean: Tensor | None = None,
    ca_running_var: Tensor | None = None,
    norm_running_mean: Tensor | None = None,
    norm_running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """MCJA's modality distribution adapter (MDA).

    p[b, m] = softmax over positions of sc_weight[m] . x; t[b, c, m] = sum over s of p x
    g = sigmoid(BN1d(sum over m of ca_weight[c, m] t[b, c, m])); y = BN2d(g x) + x

    Both batch norms follow from sums of x per sample and channel, so that y is one affine map of x
    per sample and channel. Training uses batch statistics and moves the running ones in place,
    where given; evaluation uses the running ones.

    Args:
        features: [B, C, H, W], floating (cast under autocast); NCHW or channels_last.
        sc_weight: [M, C, 1, 1], M pseudo-modalities; parameters have the dtype of `features` or
            float32.
        sc_bias: [M]; the softmax cancels it: no effect, and its gradient is exactly zero.
        ca_weight: [C, 1, M].
        ca_bn_weight: [C], of the gate's batch norm, as is `ca_bn_bias`.
        ca_bn_bias: [C].
        norm_weight: [C], of the map's batch norm, as is `norm_bias`; with both zero y = x.
        norm_bias: [C].
        ca_running_mean: [C], floating; a buffer, no gradient, as the other three. All or none.
        ca_running_var: [C].
        norm_running_mean: [C].
        norm_running_var: [C].
        training: batch statistics or, with running ones, those.
        momentum: in [0, 1], weight of the new statistics.
        eps: > 0, added to the variances.
    Returns:
        [B, C, H, W], dtype and memory format of `features`.
    Raises:
        TypeError: not floating, or dtypes do not fit.
        ValueError: a shape or device does not fit; a batch of less than 2 in training; some running
            statistics without the others, or none in evaluation; `momentum` or `eps` out of range.

    >>> import torch
    >>> x, c = torch.rand(2, 4, 3, 2), torch.ones(4)
    >>> distribution_adapter(x, torch.rand(2, 4, 1, 1), torch.zeros(2), torch.rand(4, 1, 2),
    ...                      c, c, c, c).shape
    torch.Size([2, 4, 3, 2])

    Spec: mcja 3.1. Golden: mcja/mda. Backends: cpu, triton.
    """
    _checks.feature_map("features", features)
    _checks.floating("sc_weight", sc_weight, "M, C, 1, 1")
    (features,) = cast_for_autocast(features)
    batch, channels, height, width = features.shape
    count = sc_weight.shape[0]
    if count == 0:
        raise ValueError(
            f"sc_weight: expected at least one row, got {_checks.described(sc_weight)}"
        )
    for name, tensor, shape in (
        ("sc_weight", sc_weight, (count, channels, 1, 1)),
        ("sc_bias", sc_bias, (count,)),
        ("ca_weight", ca_weight, (channels, 1, count)),
        ("ca_bn_weight", ca_bn_weight, (channels,)),
        ("ca_bn_bias", ca_bn_bias, (channels,)),
        ("norm_weight", norm_weight, (channels,)),
        ("norm_bias", norm_bias, (channels,)),
    ):
        _checks.parameter(name, tensor, shape, features)
    running = (ca_running_mean, ca_running_var, norm_running_mean, norm_running_var)
    names = ("ca_running_mean", "ca_running_var", "norm_running_mean", "norm_running_var")
    for name, buffer in zip(names, running, strict=True):
        if buffer is not None:
            _checks.buffer(name, buffer, channels, features)
    given = sum(buffer is not None for buffer in running)
    if given not in (0, 4) or (given == 0 and not training):
        expected = "all four or none" if training else "all four in evaluation"
        raise ValueError(f"{', '.join(names)}: expected {expected}, got {given}")
    if training and batch < 2:
        raise ValueError(
            f"features: expected B >= 2 in training, got {_checks.described(features)}"
        )
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected a number in [0, 1], got {momentum}")
    _checks.above("eps", eps, 0)
    fixed = (None,) * 4 if training else running
    parameters = (sc_weight, sc_bias, ca_weight, ca_bn_weight, ca_bn_bias, norm_weight, norm_bias)
    out, *_, ca_mean, ca_var, norm_mean, norm_var = _distribution_adapter(
        features, *parameters, *fixed, eps
    )
    if training:
        pixels = batch * height * width
        update_running(ca_running_mean, ca_mean, momentum)
        update_running(ca_running_var, ca_var * (batch / (batch - 1)), momentum)
        update_running(norm_running_mean, norm_mean, momentum)
        update_running(norm_running_var, norm_var * (pixels / (pixels - 1)), momentum)
    result: Tensor = out
    return result


# Reference.


def _adapter_reference(
    features: Tensor,
    sc_weight: Tensor,
    sc_bias: Tensor,
    ca_weight: Tensor,
    ca_bn_weight: Tensor,
    ca_bn_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    ca_running_mean: Tensor | None,
    ca_running_var: Tensor | None,
    norm_running_mean: Tensor | None,
    norm_running_var: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    kind = accumulator(features.dtype)
    x = features.to(kind)
    mean, variance = (t.double() for t in moments(x))  # [B, C] each
    centred = x.flatten(2) - mean.to(kind)[..., None]  # [B, C, S]
    # A shift of the logits has no effect.
    attention = torch.softmax(sc_weight.to(kind).flatten(1) @ centred, dim=-1)  # [B, M, S]
    context = attention @ centred.transpose(1, 2)  # [B, M, C], relative to the mean
    # Work on [B, C] is in float64: a large mean costs no precision.
    sc, ca_scale, ca_shift, norm_scale, norm_shift = (
        p.double() for p in (ca_weight, ca_bn_weight, ca_bn_bias, norm_weight, norm_bias)
    )
    z = ((context + mean[:, None]) * sc[:, 0].t()).sum(dim=1)  # [B, C]
    if ca_running_mean is None or ca_running_var is None:
        ca_mean = z.mean(dim=0)
        ca_var = (z - ca_mean).square().mean(dim=0)
    else:
        ca_mean, ca_var = (r.to(z.dtype, copy=True) for r in (ca_running_mean, ca_running_var))
    gate = torch.sigmoid(ca_scale * ((z - ca_mean) * (ca_var + eps).rsqrt()) + ca_shift)
    if norm_running_mean is None or norm_running_var is None:
        norm_mean = (gate * mean).mean(dim=0)
        # Within and between samples: no difference of large sums.
        between = (gate * mean - norm_mean).square()
        norm_var = (gate.square() * variance + between).mean(dim=0)
    else:
        running = (norm_running_mean, norm_running_var)
        norm_mean, norm_var = (r.to(z.dtype, copy=True) for r in running)
    scale = norm_scale * (norm_var + eps).rsqrt()
    a, d = scale * gate, scale * (gate * mean - norm_mean) + norm_shift
    y = x + (a.to(kind)[..., None] * centred + d.to(kind)[..., None]).reshape(x.shape)
    out = y.to(features.dtype).contiguous(memory_format=layout_of(features))
    return out, attention, context, mean, variance, gate, ca_mean, ca_var, norm_mean, norm_var


def _adapter_backward_reference(
    grad: Tensor,
    features: Tensor,
    sc_weight: Tensor,
    ca_weight: Tensor,
    ca_bn_weight: Tensor,
    norm_weight: Tensor,
    attention: Tensor,
    context: Tensor,
    mean: Tensor,
    variance: Tensor,
    gate: Tensor,
    ca_mean: Tensor,
    ca_var: Tensor,
    norm_mean: Tensor,
    norm_var: Tensor,
    eps: float,
    fixed: bool,
) -> tuple[Tensor, ...]:
    kind = attention.dtype
    batch, positions = features.shape[0], features.shape[2] * features.shape[3]
    g = grad.to(kind).flatten(2)
    centred = features.to(kind).flatten(2) - mean.to(kind)[..., None]
    sum_g, sum_gc = g.sum(dim=2).double(), (g * centred).sum(dim=2).double()  # [B, C]
    # Through the map's batch norm: d(g x) = scale g - on_x centred - offset.
    rstd = (norm_var + eps).rsqrt()
    shift = rstd * (gate * mean - norm_mean)  # its normalised values are rstd gate centred + shift
    grad_norm_bias = sum_g.sum(dim=0)
    grad_norm_weight = (rstd * gate * sum_gc + shift * sum_g).sum(dim=0)
    scale = norm_weight.double() * rstd
    on_x, offset = torch.zeros_like(mean), torch.zeros_like(mean)
    if not fixed:
        pixels = batch * positions
        on_x = scale * rstd * gate * grad_norm_weight / pixels
        offset = scale * (grad_norm_bias + shift * grad_norm_weight) / pixels
    grad_gate = mean * (scale * sum_g - positions * offset)
    grad_gate = grad_gate + scale * sum_gc - positions * on_x * variance
    # Through the gate's batch norm and the context.
    w = ca_weight.double()[:, 0].t()  # [M, C]
    whole = context + mean[:, None]
    ca_rstd = (ca_var + eps).rsqrt()
    normal = ((whole * w).sum(dim=1) - ca_mean) * ca_rstd
    dz = grad_gate * gate * (1.0 - gate)
    grad_bias, grad_weight = dz.sum(dim=0), (dz * normal).sum(dim=0)
    if not fixed:
        dz = dz - (grad_bias + normal * grad_weight) / batch
    dz = ca_bn_weight.double() * ca_rstd * dz
    grad_ca = (dz[:, None] * whole).sum(dim=0)  # [M, C]
    grad_context = (dz[:, None] * w).to(kind)  # [B, M, C]
    # Through the softmax; its gradient sums to zero, so that centred x serves.
    grad_attention = grad_context @ centred
    mixed = (attention * grad_attention).sum(dim=2, keepdim=True)
    grad_logits = attention * (grad_attention - mixed)  # [B, M, S]
    grad_sc = (grad_logits @ centred.transpose(1, 2)).sum(dim=0)
    on_g, on_x, offset = (
        t.to(kind)[..., None] for t in (1 + scale * gate, gate * on_x, gate * offset)
    )
    dx = on_g * g - (on_x * centred + offset)
    dx = dx + grad_context.transpose(1, 2) @ attention
    dx = dx + sc_weight.to(kind).flatten(1).t() @ grad_logits
    dx = dx.reshape(features.shape).to(features.dtype)
    return (
        dx.contiguous(memory_format=layout_of(features)),
        grad_sc.to(sc_weight.dtype).reshape(sc_weight.shape),
        grad_ca.t()[:, None].to(ca_weight.dtype).contiguous(),
        grad_weight.to(ca_bn_weight.dtype),
        grad_bias.to(ca_bn_weight.dtype),
        grad_norm_weight.to(norm_weight.dtype),
        grad_norm_bias.to(norm_weight.dtype),
    )


# Fakes.


def _adapter_fake(
    features: Tensor, sc_weight: Tensor, *_: Tensor | float | None
) -> tuple[Tensor, ...]:
    kind = accumulator(features.dtype)
    batch, channels, height, width = features.shape
    count = sc_weight.shape[0]
    return (
        torch.empty_like(features, memory_format=layout_of(features)),
        features.new_empty(batch, count, height * width, dtype=kind),
        features.new_empty(batch, count, channels, dtype=kind),
        *(features.new_empty(batch, channels, dtype=torch.float64) for _ in range(3)),
        *(features.new_empty(channels, dtype=torch.float64) for _ in range(4)),
    )


def _adapter_backward_fake(
    grad: Tensor,
    features: Tensor,
    sc_weight: Tensor,
    ca_weight: Tensor,
    ca_bn_weight: Tensor,
    norm_weight: Tensor,
    *_: Tensor | float | bool,
) -> tuple[Tensor, ...]:
    parameters = (sc_weight, ca_weight, ca_bn_weight, ca_bn_weight, norm_weight, norm_weight)
    return (
        torch.empty_like(features, memory_format=layout_of(features)),
        *(p.new_empty(p.shape) for p in parameters),
    )


# Gradients.


def _adapter_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, sc_weight, sc_bias, ca_weight, ca_bn_weight, _, norm_weight = inputs[:7]
    ctx.save_for_backward(
        features, sc_weight, ca_weight, ca_bn_weight, norm_weight, *output[1:], sc_bias
    )
    ctx.eps, ctx.fixed = inputs[-1], inputs[8] is not None


def _adapter_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    *saved, sc_bias = ctx.saved_tensors
    dx, grad_sc, *others = _adapter_backward(grad, *saved, ctx.eps, ctx.fixed)
    return (dx, grad_sc, torch.zeros_like(sc_bias), *others, *(None,) * 5)


# Registration.

_distribution_adapter = register(
    "distribution_adapter",
    "(Tensor features, Tensor sc_weight, Tensor sc_bias, Tensor ca_weight, Tensor ca_bn_weight,"
    " Tensor ca_bn_bias, Tensor norm_weight, Tensor norm_bias, Tensor? ca_running_mean,"
    " Tensor? ca_running_var, Tensor? norm_running_mean, Tensor? norm_running_var, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_adapter_reference,
    fake=_adapter_fake,
    backends=("cpu", "triton"),
    setup_context=_adapter_save,
    backward=_adapter_gradient,
)
_adapter_backward = register(
    "distribution_adapter_backward",
    "(Tensor grad, Tensor features, Tensor sc_weight, Tensor ca_weight, Tensor ca_bn_weight,"
    " Tensor norm_weight, Tensor attention, Tensor context, Tensor mean, Tensor variance,"
    " Tensor gate, Tensor ca_mean, Tensor ca_var, Tensor norm_mean, Tensor norm_var, float eps,"
    " bool fixed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_adapter_backward_reference,
    fake=_adapter_backward_fake,
    backends=("cpu", "triton"),
)
