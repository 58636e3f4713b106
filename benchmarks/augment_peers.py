"""The training transform as batched PyTorch: what a user without `augment` would write.

Slots are grouped by what is done to them before the clock starts, so that nothing is computed twice
and compiled PyTorch sees static shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastreid_vi.augment.draws import KINDS
from fastreid_vi.augment.plan import Plan

PAD = 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Grouped(NamedTuple):
    """A plan as tensors of the batch, and the slots of every kind."""

    plan: Plan
    groups: tuple[Tensor, ...]  # slots of KINDS[1], KINDS[2], ...


def grouped(plan: Plan) -> Grouped:
    slots = (torch.nonzero(plan.kind == k)[:, 0] for k in range(1, len(KINDS)))
    return Grouped(plan, tuple(slots))


def gray(x: Tensor, plan: Plan, slots: Tensor) -> Tensor:
    w = plan.weights[slots][:, None, None]
    y = w[..., 0] * x[..., 0] + w[..., 1] * x[..., 1] + w[..., 2] * x[..., 2]
    return y.to(torch.uint8)[..., None].expand_as(x)


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    top, left, tall, wide = boxes[:, :, None, None].unbind(1)
    row = torch.arange(height, device=boxes.device)[:, None]
    column = torch.arange(width, device=boxes.device)
    return (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)


def plane(x: Tensor, channel: Tensor) -> Tensor:
    return x.gather(3, channel[:, None, None, None].expand(*x.shape[:3], 1))


def cutmix(x: Tensor, plan: Plan, slots: Tensor) -> Tensor:
    box = inside(plan.boxes[slots], *x.shape[1:3])[..., None]
    planes = plan.planes[slots]
    return torch.where(box, plane(x, planes[:, 1]), plane(x, planes[:, 0])).expand_as(x)


def jitter(x: Tensor, plan: Plan, slots: Tensor) -> Tensor:
    centre = plane(x, plan.channel[slots]).float()
    return (centre + plan.factor[slots][:, None, None, None] * (x - centre)).to(torch.uint8)


def hue(x: Tensor, plan: Plan, slots: Tensor) -> Tensor:
    """In float32 with 256 hues: within a level or two of Pillow's."""
    r, g, b = x.float().unbind(3)
    v, low = x.amax(3).float(), x.amin(3).float()
    spread = v - low
    d = spread.clamp(min=1)
    six = torch.where(r == v, (g - b) / d, torch.where(g == v, 2 + (b - r) / d, 4 + (r - g) / d))
    h = torch.floor((six / 6) % 1 * 255) + plan.hue[slots][:, None, None]
    s = torch.floor(spread / v.clamp(min=1) * 255) / 255
    place = h % 256 * (6 / 255)
    # One formula for the three channels: v (1 - s clamp(|(place + n) mod 6 - 3| - 1)).
    shift = torch.tensor([0.0, 4.0, 2.0], device=x.device)
    wheel = (((place[..., None] + shift) % 6 - 3).abs() - 1).clamp(0, 1)
    return (v[..., None] * (1 - s[..., None] * (1 - wheel))).round().to(torch.uint8)


def changed(images: Tensor, work: Grouped) -> Tensor:
    x = images[work.plan.source]
    for slots, change in zip(work.groups, (hue, gray, cutmix, jitter), strict=False):
        if len(slots):
            x = x.index_copy(0, slots, change(x[slots], work.plan, slots))
    return x


def cropped(x: Tensor, plan: Plan) -> Tensor:
    height, width = x.shape[1:3]
    x = torch.nn.functional.pad(x, (0, 0, PAD, PAD, PAD, PAD), value=127)
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    rows = (plan.top + PAD)[:, None] + torch.arange(height, device=x.device)
    columns = plan.left[:, None] + torch.arange(width, device=x.device)
    columns = torch.where(plan.flip[:, None], width - 1 - columns, columns) + PAD
    return x[batch, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def normalized(x: Tensor, plan: Plan) -> Tensor:
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (MEAN, STD))
    y = (x.float() / 255 - mean) / std
    y = y.masked_fill(inside(plan.erase, *x.shape[2:])[:, None], 0)
    return y.to(torch.bfloat16, memory_format=torch.channels_last)


def batched(images: Tensor, work: Grouped) -> Tensor:
    """bfloat16 [B, 3, H, W], channels_last."""
    # Compiled as three graphs, which is 1.5 times as fast as one: Inductor would compute what a
    # gather reads once more for every read.
    x = changed(images, work)
    torch._dynamo.graph_break()
    x = cropped(x, work.plan)
    torch._dynamo.graph_break()
    return normalized(x, work.plan)
