"""The steps of `augment` one by one, with given draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi.augment import fused
from fastreid_vi.augment.draws import IMAGENET_MEAN, IMAGENET_STD, KINDS
from fastreid_vi.augment.plan import (
    Plan,
    Rounding,
    View,
    level_table,
    plain_plan,
    view_plan,
)


def weighted_grayscale(images: Tensor, weights: Tensor, *, rounding: Rounding = "trunc") -> Tensor:
    """Three equal planes (w1 R + w2 G) + w3 B, in float64 and this order.

    Args:
        images: [B, H, W, 3] uint8.
        weights: [B, 3] floating, each >= 0, sum 1.
        rounding: "trunc" cuts the fraction off, as MCJA's code does: white may become 254, where
            weights sum to a little less than one. "nearest" rounds half to even.
    Returns:
        [B, H, W, 3] uint8.
    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device or `rounding` does not fit; on the CPU, weights that do not sum
            to one.

    >>> import torch
    >>> image = torch.tensor([[[[100, 20, 0]]]], dtype=torch.uint8)
    >>> weighted_grayscale(image, torch.tensor([[0.5, 0.25, 0.25]])).tolist()
    [[[[55, 55, 55]]]]

    Spec: mcja 3.5. Golden: mcja/augment. Backends: cpu, triton.
    """
    fused.check_images(images)
    weights = fused.floating("weights", weights, images, (3,)).double()
    if _looked_at(images):
        fused.check_weights("weights", weights)
    return _bytes(images, _kind(images, "gray", rounding)._replace(weights=weights))


def channel_cutmix(images: Tensor, boxes: Tensor, channels: Tensor) -> Tensor:
    """Three equal planes: one channel, and another one inside a box.

    Args:
        images: [B, H, W, 3] uint8.
        boxes: [B, 4] integers: top, left, height, width; clipped to the image.
        channels: [B, 2] integers 0 to 2: outside, inside the box.
    Returns:
        [B, H, W, 3] uint8.
    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or device does not fit; on the CPU, a negative side or no such channel.

    >>> import torch
    >>> image = torch.tensor([[[[1, 2, 3], [1, 2, 3]]]], dtype=torch.uint8)
    >>> channel_cutmix(image, torch.tensor([[0, 1, 9, 9]]), torch.tensor([[0, 2]])).tolist()
    [[[[1, 1, 1], [3, 3, 3]]]]

    Spec: mcja 3.5 (Q1: the official axes of the boxes). Golden: mcja/augment.
    Backends: cpu, triton.
    """
    fused.check_images(images)
    boxes = fused.integers("boxes", boxes, images, (4,))
    channels = fused.integers("channels", channels, images, (2,))
    if _looked_at(images):
        fused.check_boxes("boxes", boxes)
        fused.between("channels", channels, 0, 2)
    return _bytes(images, _kind(images, "cutmix")._replace(boxes=boxes, planes=channels))


def spectrum_jitter(
    images: Tensor, channel: Tensor, factor: Tensor, *, rounding: Rounding = "trunc"
) -> Tensor:
    """Every channel c becomes g + factor (c - g), g one of them, in float32.

    Args:
        images: [B, H, W, 3] uint8.
        channel: [B] integers 0 to 2: g.
        factor: [B] floating, 0 (g alone) to 1 (the image).
        rounding: "trunc" as in MCJA's code, or "nearest".
    Returns:
        [B, H, W, 3] uint8.
    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device or `rounding` does not fit; on the CPU, a factor outside 0 to 1
            or no such channel.

    >>> import torch
    >>> image = torch.tensor([[[[100, 20, 0]]]], dtype=torch.uint8)
    >>> spectrum_jitter(image, torch.tensor([1]), torch.tensor([0.5])).tolist()
    [[[[60, 20, 10]]]]

    Spec: mcja 3.5. Golden: mcja/augment. Backends: cpu, triton.
    """
    fused.check_images(images)
    channel = fused.integers("channel", channel, images, ())
    factor = fused.floating("factor", factor, images, ()).float()
    if _looked_at(images):
        fused.between("channel", channel, 0, 2)
        fused.check_factor("factor", factor)
    plan = _kind(images, "jitter", rounding)
    return _bytes(images, plan._replace(channel=channel, factor=factor))


def hue_jitter(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue through Pillow's HSV with 256 hues: h becomes (h + trunc(255 shift)) mod 256.

    Args:
        images: [B, H, W, 3] uint8.
        shift: [B] floating, a fraction of the circle.
    Returns:
        [B, H, W, 3] uint8. A shift of zero still passes through HSV.
    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or device does not fit; on the CPU, a shift that is not finite.

    >>> import torch
    >>> red = torch.tensor([[[[255, 0, 0]]]], dtype=torch.uint8)
    >>> hue_jitter(red, torch.tensor([1 / 3])).tolist()
    [[[[0, 255, 0]]]]

    Spec: mcja 3.5. Golden: mcja/augment. Backends: cpu, triton.
    """
    fused.check_images(images)
    hue = hue_steps(fused.floating("shift", shift, images, ()))
    if _looked_at(images):
        fused.check_finite("shift", shift)
    return _bytes(images, _kind(images, "hue")._replace(hue=hue))


def hue_steps(shift: Tensor) -> Tensor:
    """Fractions of the circle as steps of Pillow's 256 hues, 0 to 255."""
    return (shift.double() * 255.0).trunc().long().remainder(256)


def channel_selection(images: Tensor, view: View, *, rounding: Rounding = "trunc") -> Tensor:
    """One channel, or the mean of all, in all three planes: the spectra that MCJA tests with.

    Args:
        images: [B, H, W, 3] uint8.
        view: "r", "g", "b" or "avg"; "original" gives the images back.
        rounding: of the mean, "trunc" or "nearest".
    Returns:
        [B, H, W, 3] uint8.
    Raises:
        TypeError: `images` is not uint8.
        ValueError: the shape, `view` or `rounding` does not fit.

    >>> import torch
    >>> channel_selection(torch.tensor([[[[1, 2, 9]]]], dtype=torch.uint8), "g").tolist()
    [[[[2, 2, 2]]]]

    Spec: mcja 3.5. Golden: mcja/augment. Backends: cpu, triton.
    """
    fused.check_images(images)
    _check_rounding(rounding)
    return _bytes(images, view_plan(_all(images), view, rounding=rounding))


def horizontal_flip(images: Tensor, flip: Tensor) -> Tensor:
    """Swap left and right of the images whose `flip` [B] bool is set; uint8 [B, H, W, 3].

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or device does not fit.

    >>> import torch
    >>> image = torch.tensor([[[[1, 1, 1], [2, 2, 2]]]], dtype=torch.uint8)
    >>> horizontal_flip(image, torch.tensor([True]))[0, 0, :, 0].tolist()
    [2, 1]

    Spec: mpanet 4. Golden: mcja/augment. Backends: cpu, triton.
    """
    fused.check_images(images)
    fused.check_column("flip", flip, images.shape[0], torch.bool, (), images)
    return _bytes(images, plain_plan(_all(images))._replace(flip=flip))


def pad_crop(
    images: Tensor, top: Tensor, left: Tensor, *, pad: int = 10, value: int = 127
) -> Tensor:
    """Pad every side, then crop back to the size of the image.

    Args:
        images: [B, H, W, 3] uint8.
        top: [B] integers, 0 to 2 * pad: first row of the crop in the padded image.
        left: [B] integers, likewise.
        pad: pixels added on every side.
        value: of the added pixels, 0 to 255.
    Returns:
        [B, H, W, 3] uint8.
    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device, `pad` or `value` does not fit; on the CPU, a crop that reads
            outside the padded image.

    >>> import torch
    >>> image = torch.ones(1, 2, 2, 3, dtype=torch.uint8)
    >>> pad_crop(image, torch.tensor([0]), torch.tensor([1]), pad=1, value=7)[0, :, :, 0].tolist()
    [[7, 7], [1, 1]]

    Spec: mpanet 4. Golden: mcja/augment. Backends: cpu, triton.
    """
    fused.check_images(images)
    top = fused.integers("top", top, images, ())
    left = fused.integers("left", left, images, ())
    if pad < 0:
        raise ValueError(f"pad: expected >= 0, got {pad}")
    if not 0 <= value <= 255:
        raise ValueError(f"value: expected 0 to 255, got {value}")
    if _looked_at(images):
        fused.between("top", top, 0, 2 * pad)
        fused.between("left", left, 0, 2 * pad)
    height, width = images.shape[1:3]
    plan = plain_plan(_all(images), border=value)
    # Further out there is nothing but border.
    top, left = (top - pad).clamp(-height, height), (left - pad).clamp(-width, width)
    return _bytes(images, plan._replace(top=top, left=left))


def normalize(
    images: Tensor,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """(x / 255 - mean) / std, each step rounded to float32, then to `dtype`.

    Args:
        images: [B, H, W, 3] uint8.
        mean: of the three channels, of pixels in [0, 1]; ImageNet's by default.
        std: likewise, > 0.
        dtype: float32, bfloat16 or float16.
        memory_format: of the result, channels_last or contiguous_format.
    Returns:
        [B, 3, H, W].
    Raises:
        TypeError: `images` is not uint8, or no such `dtype`.
        ValueError: a shape, `mean`, `std` or `memory_format` does not fit.

    >>> import torch
    >>> normalize(torch.full((1, 1, 1, 3), 255, dtype=torch.uint8), mean=[0.5] * 3, std=[0.5] * 3)
    tensor([[[[1.]],
    <BLANKLINE>
             [[1.]],
    <BLANKLINE>
             [[1.]]]])

    Spec: mpanet 4, aligngan 3.1. Golden: mcja/augment. Backends: cpu, triton.
    """
    fused.check_images(images)
    levels = level_table(mean, std).to(images.device)
    plan = plain_plan(_all(images), levels=levels)
    return fused.augment(images, plan, dtype=dtype, memory_format=memory_format)


# Shared by all.


def _all(images: Tensor) -> Tensor:
    return torch.arange(images.shape[0], device=images.device)


def _looked_at(images: Tensor) -> bool:
    """Whether values are checked here, under the arguments' names; compiled, the op checks."""
    return _checks.values_wanted(images.device.type) and not torch.compiler.is_compiling()


def _check_rounding(rounding: str) -> None:
    if rounding not in ("trunc", "nearest"):
        raise ValueError(f"rounding: expected 'trunc' or 'nearest', got {rounding!r}")


def _kind(images: Tensor, name: str, rounding: Rounding = "trunc") -> Plan:
    _check_rounding(rounding)
    plan = plain_plan(_all(images), rounding=rounding)
    return plan._replace(kind=torch.full_like(plan.kind, KINDS.index(name)))


def _bytes(images: Tensor, plan: Plan) -> Tensor:
    return fused.augment(images, plan, dtype=torch.uint8).permute(0, 2, 3, 1)
