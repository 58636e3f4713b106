"""Random erasing of normalised images, with given boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._dispatch import register
from fastreid_vi.augment import fused
from fastreid_vi.augment.reference import box_mask


def random_erase(images: Tensor, boxes: Tensor, values: Tensor) -> Tensor:
    """Set one box of every image to a value per channel.

    Args:
        images: [B, 3, H, W] floating, normalised; any strides.
        boxes: [B, 4] integers: top, left, height, width; clipped to the image. A side of 0 erases
            nothing.
        values: [3] or [B, 3] floating, in the units of `images`; zeros in every published recipe.
    Returns:
        [B, 3, H, W], dtype and memory format of `images`. Not differentiable.
    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or device does not fit; on the CPU, a negative side or a value that is
            not finite.

    >>> import torch
    >>> image = torch.ones(1, 3, 2, 2)
    >>> random_erase(image, torch.tensor([[1, 0, 1, 2]]), torch.zeros(3))[0, 0].tolist()
    [[1.0, 1.0], [0.0, 0.0]]

    Spec: mcja 3.5, mpanet 4. Golden: mcja/augment. Backends: cpu.
    """
    _checks.floating("images", images, "B, 3, H, W")
    if images.shape[1] != 3:
        raise ValueError(f"images: expected shape [B, 3, H, W], got {_checks.described(images)}")
    count = images.shape[0]
    boxes = fused.integers("boxes", boxes, images, (4,))
    if isinstance(values, Tensor) and values.dim() == 1:
        fused.check_floating("values", values, 3, (), images)
        values = values.expand(count, 3)
    fused.check_floating("values", values, count, (3,), images)
    result: Tensor = _random_erase(images, boxes, values.float())
    return result


def _layout(images: Tensor) -> torch.memory_format:
    if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _reference(images: Tensor, boxes: Tensor, values: Tensor) -> Tensor:
    inside = box_mask(boxes, *images.shape[2:])[:, None]
    erased = torch.where(inside, values[:, :, None, None].to(images.dtype), images)
    return erased.contiguous(memory_format=_layout(images))


def _fake(images: Tensor, boxes: Tensor, values: Tensor) -> Tensor:
    return images.new_empty(images.shape).contiguous(memory_format=_layout(images))


def _verify(result: Tensor, images: Tensor, boxes: Tensor, values: Tensor) -> None:
    fused.check_boxes("boxes", boxes)
    fused.check_finite("values", values)


_random_erase = register(
    "random_erase",
    "(Tensor images, Tensor boxes, Tensor values) -> Tensor",
    reference=_reference,
    fake=_fake,
    family="augment",
    backends=("cpu",),
    rows=(0, 1, 2),
    verify=_verify,
    backward=fused.refuse_gradient,
)
