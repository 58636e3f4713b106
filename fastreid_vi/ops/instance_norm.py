"""Instance normalisation with the activation and the residual sum that follow it."""

from __future__ import annotations

from typing import Any, Literal

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

Activation = Literal["relu", "leaky_relu", "none"]


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: Activation = "relu",
    negative_slope: float = 0.2,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
) -> Tensor:
    """Instance norm, activation and residual sum in one pass.

    y = act(weight (x - mu) / sqrt(v + eps) + bias) + residual, with mu, v = mean and biased
    variance over the positions of each sample and channel. With running statistics, training also
    moves these in place, as PyTorch's InstanceNorm2d does: r = (1 - momentum) r + momentum (batch
    mean of mu, or of v S / (S - 1)); evaluation takes them for mu and v.

    Args:
        x: [B, C, H, W], floating; NCHW or channels_last.
        weight: [C], dtype of `x` or float32; None for 1.
        bias: [C], dtype of `x` or float32; None for 0.
        residual: [B, C, H, W], dtype of `x` (both are cast under autocast); added last.
        activation: "relu", "leaky_relu" or "none".
        negative_slope: of "leaky_relu", >= 0.
        eps: > 0, added to the variance.
        running_mean: [C], floating; a buffer, no gradient.
        running_var: [C], floating; given together with `running_mean`.
        training: with running statistics, whether to move them or to use them.
        momentum: in [0, 1], weight of the new statistics.
    Returns:
        [B, C, H, W], dtype and memory format of `x`.
    Raises:
        TypeError: not floating, or dtypes do not fit.
        ValueError: a shape or device does not fit, one running statistic without the other, one
            position where the running variance is to move, `activation`, `negative_slope`, `eps`
            or `momentum` out of range.

    >>> import torch
    >>> instance_norm_act(torch.tensor([[[[1.0, 3.0]]]]), activation="none")
    tensor([[[[-1.0000,  1.0000]]]])

    Spec: aligngan 3.2. Golden: aligngan/instance_norm. Backends: cpu, triton.
    """
    _checks.feature_map("x", x)
    if residual is not None:
        _checks.floating("residual", residual, "B, C, H, W")
        x, residual = cast_for_autocast(x, residual)
        _checks.shaped_like("residual", residual, tuple(x.shape), x)
    else:
        (x,) = cast_for_autocast(x)
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _checks.parameter(name, vector, (channels,), x)
    _checks.choice("activation", activation, Activation)
    _checks.at_least("negative_slope", negative_slope, 0)
    _checks.above("eps", eps, 0)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: expected both or none, got one")
    for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        if buffer is not None:
            _checks.buffer(name, buffer, channels, x)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected a number in [0, 1], got {momentum}")
    moving = training and running_mean is not None
    if moving and positions == 1:
        raise ValueError(
            "x: expected more than one position to move running_var, got " + _checks.described(x)
        )
    fixed_mean, fixed_var = (None, None) if training else (running_mean, running_var)
    out, mean, variance = _instance_norm_act(
        x, weight, bias, residual, fixed_mean, fixed_var, activation, negative_slope, eps
    )
    if moving and x.shape[0] > 0:
        update_running(running_mean, mean.mean(dim=0), momentum)
        update_running(running_var, variance.mean(dim=0) * (positions / (positions - 1)), momentum)
    result: Tensor = out
    return result


# Reference.


def _per_channel(vector: Tensor | None, like: Tensor, otherwise: float) -> Tensor | float:
    return otherwise if vector is None else vector.to(like.dtype)[:, None, None]


def _instance_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    activation: str,
    negative_slope: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    v = x.to(accumulator(x.dtype))
    if running_mean is None or running_var is None:
        mean, variance = moments(v)  # [B, C] each
        mean = mean.to(v.dtype)
    else:
        mean = running_mean.to(v.dtype).repeat(x.shape[0], 1)
        variance = running_var.to(v.dtype).repeat(x.shape[0], 1)
    scale = (variance + eps).rsqrt()[..., None, None] * _per_channel(weight, v, 1.0)
    y = scale * (v - mean[..., None, None]) + _per_channel(bias, v, 0.0)
    if activation == "relu":
        y = torch.relu(y)
    elif activation == "leaky_relu":
        y = torch.nn.functional.leaky_relu(y, negative_slope)
    if residual is not None:
        y = y + residual.to(v.dtype)
    return y.to(x.dtype).contiguous(memory_format=layout_of(x)), mean, variance


def _instance_norm_backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    activation: str,
    negative_slope: float,
    eps: float,
    fixed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    g = grad.to(mean.dtype)
    centred = x.to(mean.dtype) - mean[..., None, None]
    rstd = (variance + eps).rsqrt()[..., None, None]
    scale = rstd * _per_channel(weight, g, 1.0)
    if activation != "none":
        z = scale * centred + _per_channel(bias, g, 0.0)
        g = torch.where(z > 0, g, g * (negative_slope if activation == "leaky_relu" else 0.0))
    h = rstd * centred
    sum_g, sum_gh = g.sum(dim=(2, 3)), (g * h).sum(dim=(2, 3))  # [B, C]
    dx = g
    if not fixed:  # the statistics move with x
        positions = x.shape[2] * x.shape[3]
        dx = g - (sum_g[..., None, None] + h * sum_gh[..., None, None]) / positions
    return (
        (scale * dx).to(x.dtype).contiguous(memory_format=layout_of(x)),
        x.new_empty(0) if weight is None else sum_gh.sum(dim=0).to(weight.dtype),
        x.new_empty(0) if bias is None else sum_g.sum(dim=0).to(bias.dtype),
    )


# Fakes.


def _instance_norm_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    activation: str,
    negative_slope: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=accumulator(x.dtype))
    out = torch.empty_like(x, memory_format=layout_of(x))
    return out, mean, torch.empty_like(mean)


def _instance_norm_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    activation: str,
    negative_slope: float,
    eps: float,
    fixed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=layout_of(x)),
        x.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


# Gradients.


def _instance_norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, running_mean, _, *options = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.options = (*options, running_mean is not None)
    ctx.residual_layout = None if residual is None else layout_of(residual)


def _instance_norm_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, weight, bias, mean, variance = ctx.saved_tensors
    dresidual = None
    if ctx.residual_layout is not None:  # first, so that one copy serves both gradients
        grad = dresidual = grad.contiguous(memory_format=ctx.residual_layout)
    dx, dweight, dbias = _instance_norm_backward(
        grad, x, weight, bias, mean, variance, *ctx.options
    )
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        dresidual,
        *(None,) * 5,
    )


# Registration.

_instance_norm_act = register(
    "instance_norm_act",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean,"
    " Tensor? running_var, str activation, float negative_slope, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_instance_norm_reference,
    fake=_instance_norm_fake,
    backends=("cpu", "triton"),
    setup_context=_instance_norm_save,
    backward=_instance_norm_gradient,
)
_instance_norm_backward = register(
    "instance_norm_act_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance,"
    " str activation, float negative_slope, float eps, bool fixed) -> (Tensor, Tensor, Tensor)",
    reference=_instance_norm_backward_reference,
    fake=_instance_norm_backward_fake,
    backends=("cpu", "triton"),
)
