"""What is done to every slot of a batch: explicit tensors, to be tested and repeated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastreid_vi.augment.draws import IMAGENET_MEAN, IMAGENET_STD, KINDS

Rounding = Literal["trunc", "nearest"]
View = Literal["original", "r", "g", "b", "avg"]

VIEWS: tuple[View, ...] = ("original", "r", "g", "b", "avg")


class Plan(NamedTuple):
    """Everything that `augment` does, for B slots. One device holds all tensors.

    In this order: the image `source` is taken, its channels are changed as `kind` says, then mixed;
    it is flipped, and moved by `top` and `left` within a border; pixel values become `levels`; the
    box `erase` is overwritten.
    """

    source: Tensor  # [B] int64: row of `images`
    flip: Tensor  # [B] bool: left and right are swapped
    top: Tensor  # [B] int64, -H to H: row of the image that is shown first; < 0: border above
    left: Tensor  # [B] int64, -W to W: column of the flipped image that is shown first
    border: Tensor  # [B] uint8: pixels that are shown from outside the image
    kind: Tensor  # [B] int64: position in KINDS
    hue: Tensor  # [B] int64, 0 to 255: added to Pillow's 256 hues
    weights: Tensor  # [B, 3] float64, sum 1: gray
    boxes: Tensor  # [B, 4] int64, cutmix: top, left, height, width, clipped to the image
    planes: Tensor  # [B, 2] int64, cutmix: channel outside, channel inside the box
    channel: Tensor  # [B] int64: channel that jitter draws to, or that is shown alone
    factor: Tensor  # [B] float32, jitter: share of the image, 0 for the channel alone
    nearest: Tensor  # [B] bool: gray, jitter and average round; False cuts the fraction off
    erase: Tensor  # [B, 4] int64: top, left, height, width in the result, clipped to it
    values: Tensor  # [B, 3] float32: what the erased box is set to, after normalisation
    levels: Tensor  # [3, 256] float32: what every pixel value of a channel becomes
    channel_mix: Tensor | None = None  # [B, 5] float32: three weights, mean, spread; spread 0: none

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Plan:
        """The same plan on another device, carried there in one copy (from pinned memory to CUDA).

        >>> import torch
        >>> plain_plan(torch.arange(2)).to("cpu").source.tolist()
        [0, 1]
        """
        device = torch.device(device)
        if self.source.device == device:
            return self
        columns = [column for column in self if column is not None]
        bytes_of = [column.contiguous().reshape(-1).view(torch.uint8) for column in columns]
        # Every column starts where its largest possible element may.
        padded = [-(-len(part) // 8) * 8 for part in bytes_of]
        pin = device.type == "cuda" and self.source.device.type == "cpu"
        packed = torch.empty(
            sum(padded), dtype=torch.uint8, device=self.source.device, pin_memory=pin
        )
        for part, room in zip(bytes_of, torch.split(packed, padded), strict=True):
            room[: len(part)] = part
        moved = torch.split(packed.to(device, non_blocking=non_blocking), padded)
        views = iter(
            room[: len(part)].view(column.dtype).view(column.shape)
            for room, part, column in zip(moved, bytes_of, columns, strict=True)
        )
        return Plan._make(None if column is None else next(views) for column in self)

    def rows(self, slots: Tensor) -> Plan:
        """The plan of some slots."""
        return Plan._make(
            column if name == "levels" or column is None else column[slots]
            for name, column in self._asdict().items()
        )


def level_table(
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """What the 256 values of a pixel become: (x / 255 - mean) / std, each step in float32.

    Args:
        mean: of the three channels, of pixels in [0, 1].
        std: likewise, > 0.
    Returns:
        [3, 256] float32, on the CPU.
    Raises:
        ValueError: not three numbers each, or a deviation that is not positive.

    >>> level_table((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))[0, [0, 255]].tolist()
    [-1.0, 1.0]
    """
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) != 3:
            raise ValueError(f"{name}: expected three numbers, got {len(numbers)}")
    if not all(value > 0 for value in std):
        raise ValueError(f"std: expected > 0, got {tuple(std)}")
    pixels = torch.arange(256, dtype=torch.float32).expand(3, 256)
    columns = (torch.tensor(numbers, dtype=torch.float32)[:, None] for numbers in (mean, std))
    mu, sigma = columns
    # Tensors, not numbers: a division by a number may be a product with its rounded inverse.
    return (pixels / torch.tensor(255.0) - mu) / sigma


def plain_plan(
    source: Tensor, *, border: int = 127, levels: Tensor | None = None, rounding: Rounding = "trunc"
) -> Plan:
    """The plan that only takes the images `source` and normalises them.

    Args:
        source: [B] int64, rows of the images; its device is the plan's.
        border: value of pixels outside the image, 0 to 255.
        levels: [3, 256] float32, of `level_table`; ImageNet's by default.
        rounding: of spectra, "trunc" or "nearest".
    Returns:
        A plan to be changed by `_replace`.

    >>> plain_plan(torch.tensor([3, 0])).kind.tolist()
    [0, 0]
    """
    device, count = source.device, source.shape[0]

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(count, *shape, dtype=dtype, device=device)

    return Plan(
        source=source,
        flip=zeros(dtype=torch.bool),
        top=zeros(),
        left=zeros(),
        border=torch.full((count,), border, dtype=torch.uint8, device=device),
        kind=zeros(),
        hue=zeros(),
        weights=torch.full((count, 3), 1 / 3, dtype=torch.float64, device=device),
        boxes=zeros(4),
        planes=torch.tensor([0, 1], device=device).repeat(count, 1),
        channel=zeros(),
        factor=zeros(dtype=torch.float32),
        nearest=torch.full((count,), rounding == "nearest", device=device),
        erase=zeros(4),
        values=zeros(3, dtype=torch.float32),
        levels=level_table().to(device) if levels is None else levels,
    )


def view_plan(
    source: Tensor,
    view: View = "original",
    *,
    flip: bool = False,
    visible: Tensor | None = None,
    levels: Tensor | None = None,
    rounding: Rounding = "trunc",
) -> Plan:
    """The plan of a test: images as they are, or mirrored, or one spectrum of visible images.

    Args:
        source: [B] int64, rows of the images.
        view: "original", "r", "g" or "b" (one channel in all three planes) or "avg", their mean.
        flip: swap left and right.
        visible: [B] bool; the other images are shown as they are. None: all are visible.
        levels: [3, 256] float32, of `level_table`; ImageNet's by default.
        rounding: of the mean, "trunc" or "nearest".
    Raises:
        ValueError: no such view.

    >>> plan = view_plan(torch.arange(2), "g", visible=torch.tensor([True, False]))
    >>> plan.kind.tolist(), plan.channel.tolist()
    ([5, 0], [1, 1])

    Spec: mcja 3.5.
    """
    if view not in VIEWS:
        raise ValueError(f"view: expected one of {', '.join(map(repr, VIEWS))}, got {view!r}")
    plan = plain_plan(source, levels=levels, rounding=rounding)
    plan = plan._replace(flip=torch.full_like(plan.flip, flip))
    if view == "original":
        return plan
    kind = torch.full_like(plan.kind, KINDS.index("average" if view == "avg" else "channel"))
    if visible is not None:
        kind = kind * visible
    channel = torch.full_like(plan.channel, max("rgb".find(view), 0))
    return plan._replace(kind=kind, channel=channel)
