"""Resizing of images together with their normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._dispatch import register
from fastreid_vi.ops._shared import accumulator, cast_for_autocast, layout_of


def resize_normalize(
    images: Tensor,
    size: tuple[int, int],
    *,
    mean: float | Sequence[float],
    std: float | Sequence[float],
) -> Tensor:
    """Bilinear resize and per-channel normalisation in one pass.

    y[b, c] = (resize(x[b, c]) - mean[c]) / std[c]. Half-pixel centres: output i looks at
    (i + 1/2) in / out - 1/2, clamped at the border; no antialiasing. These phases are exact
    fractions. Backward scatters the same weights, in a fixed order.

    Args:
        images: [B, C, H, W], floating (cast under autocast); any strides.
        size: height and width of the result, in pixels.
        mean: one per channel, or one for all, in the units of `images`.
        std: likewise, > 0.
    Returns:
        [B, C, *size], dtype and memory format of `images`.
    Raises:
        TypeError: `images` is not floating.
        ValueError: `images` is not rank 4 or empty in a channel or pixel, `size` is not two
            positive integers, `mean` or `std` is not one number per channel, or `std` <= 0.

    >>> import torch
    >>> resize_normalize(torch.tensor([[[[0.0, 4.0]]]]), (1, 4), mean=2.0, std=2.0)
    tensor([[[[-1.0000, -0.5000,  0.5000,  1.0000]]]])

    Spec: aligngan 3.1. Golden: aligngan/resize_norm. Backends: cpu, triton.
    """
    _checks.feature_map("images", images)
    (images,) = cast_for_autocast(images)
    if len(size) != 2 or not (size[0] >= 1 and size[1] >= 1):
        raise ValueError(f"size: expected (height, width), both >= 1, got {tuple(size)}")
    means = _one_per_channel("mean", mean, images.shape[1])
    stds = _one_per_channel("std", std, images.shape[1])
    for value in stds:
        _checks.above("std", value, 0)
    result: Tensor = _resize_normalize(images, int(size[0]), int(size[1]), means, stds)
    return result


def _one_per_channel(name: str, values: float | Sequence[float], channels: int) -> list[float]:
    if isinstance(values, (int, float)):
        return [float(values)] * channels
    if len(values) != channels:
        raise ValueError(
            f"{name}: expected one number per channel ({channels}), got {len(values)} numbers"
        )
    return [float(value) for value in values]


# Reference.


def _sources(length: int, source: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper neighbour of each of `length` outputs among `source`, weight of the upper."""
    i = torch.arange(length, device=device)
    # The coordinate times 2 length is a whole number.
    numerator = ((2 * i + 1) * source - length).clamp(min=0)
    low = numerator.div(2 * length, rounding_mode="floor")
    fraction = numerator.remainder(2 * length).double() / (2 * length)
    return low, (low + 1).clamp(max=source - 1), fraction


def _interpolation(length: int, source: int, like: Tensor) -> Tensor:
    """[length, source]: the resize along one axis as a matrix."""
    low, high, fraction = _sources(length, source, like.device)
    one_hot = torch.nn.functional.one_hot
    matrix = (1 - fraction)[:, None] * one_hot(low, source)
    return (matrix + fraction[:, None] * one_hot(high, source)).to(like.dtype)


def _resize_reference(
    images: Tensor, height: int, width: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    x = images.to(accumulator(images.dtype))
    for axis, length in ((2, height), (3, width)):
        low, high, fraction = _sources(length, x.shape[axis], x.device)
        f = fraction.to(x.dtype)[:, None] if axis == 2 else fraction.to(x.dtype)
        x = (1 - f) * x.index_select(axis, low) + f * x.index_select(axis, high)
    mu, sigma = (x.new_tensor(values)[:, None, None] for values in (mean, std))
    y = ((x - mu) / sigma).to(images.dtype)
    return y.contiguous(memory_format=layout_of(images))


def _resize_backward_reference(
    grad: Tensor, height: int, width: int, std: Sequence[float], channels_last: bool
) -> Tensor:
    g = grad.to(accumulator(grad.dtype))
    rows = _interpolation(g.shape[2], height, g)
    columns = _interpolation(g.shape[3], width, g)
    dx = rows.t() @ (g / g.new_tensor(std)[:, None, None]) @ columns
    return dx.to(grad.dtype).contiguous(memory_format=_layout(channels_last))


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


# Fakes.


def _resize_fake(
    images: Tensor, height: int, width: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    shape = (*images.shape[:2], height, width)
    return images.new_empty(shape).contiguous(memory_format=layout_of(images))


def _resize_backward_fake(
    grad: Tensor, height: int, width: int, std: Sequence[float], channels_last: bool
) -> Tensor:
    shape = (*grad.shape[:2], height, width)
    return grad.new_empty(shape).contiguous(memory_format=_layout(channels_last))


# Gradients.


def _resize_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, _, _, _, std = inputs
    ctx.source = images.shape[2:]
    ctx.std, ctx.channels_last = std, layout_of(images) == torch.channels_last


def _resize_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dx = _resize_backward(grad, *ctx.source, ctx.std, ctx.channels_last)
    return dx, None, None, None, None


# Registration.


def _refuses(backend: str, images: Tensor, height: int, width: int, *_: Any) -> str | None:
    if backend == "triton" and max(*images.shape[2:], height, width) > 32767:
        return "more than 32767 rows or columns"  # its coordinates are int32
    return None


_resize_normalize = register(
    "resize_normalize",
    "(Tensor images, SymInt height, SymInt width, float[] mean, float[] std) -> Tensor",
    reference=_resize_reference,
    fake=_resize_fake,
    rows=(0,),
    backends=("cpu", "triton"),
    refuses=_refuses,
    setup_context=_resize_save,
    backward=_resize_gradient,
)
_resize_backward = register(
    "resize_normalize_backward",
    "(Tensor grad, SymInt height, SymInt width, float[] std, bool channels_last) -> Tensor",
    reference=_resize_backward_reference,
    fake=_resize_backward_fake,
    rows=(0,),
    backends=("cpu", "triton"),
    refuses=_refuses,
)
