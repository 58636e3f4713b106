"""Plans and images for the tests of augment: every kind, every corner of a crop, every box."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastreid_vi
from fastreid_vi.augment import KINDS, Plan, augment, level_table, plain_plan
from tests.contract import device_of


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Noise, with flat and saturated patches: greys, blacks, equal channels, full ranges."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    for image in images:
        rows, columns = random.integers(0, height), random.integers(0, width)
        image[rows:, columns:] = random.choice([0, 255, 7, 128], 3).astype(np.uint8)
        image[:rows, :columns, 1] = image[:rows, :columns, 0]
    return torch.from_numpy(images)


def any_plan(
    count: int, images: Tensor, seed: int = 0, *, mix: bool = False, **columns: Any
) -> Plan:
    """Everything at random, and further out than any recipe goes."""
    random = np.random.default_rng(seed)
    height, width = images.shape[1:3]
    raw = random.random((count, 3))

    def integers(low: int, high: int, *sizes: int) -> Tensor:
        return torch.from_numpy(random.integers(low, high + 1, (count, *sizes)))

    def boxes() -> Tensor:
        box = integers(-2, max(height, width) + 2, 4)
        return torch.cat([box[:, :2], box[:, 2:].clamp(min=0)], dim=1)

    plan = plain_plan(integers(0, len(images) - 1))._replace(
        flip=integers(0, 1) > 0,
        top=integers(-height, height),
        left=integers(-width, width),
        border=integers(0, 255).to(torch.uint8),
        kind=torch.arange(count) % len(KINDS),
        hue=integers(0, 255),
        weights=torch.from_numpy(raw / raw.sum(axis=1, keepdims=True)),
        boxes=boxes(),
        planes=integers(0, 2, 2),
        channel=integers(0, 2),
        factor=torch.from_numpy(random.random(count, dtype=np.float32)),
        nearest=integers(0, 1) > 0,
        erase=boxes() * integers(0, 1)[:, None],
        values=torch.from_numpy(random.normal(size=(count, 3)).astype(np.float32)),
        levels=level_table((0.3, 0.4, 0.5), (0.2, 0.25, 1.7)),
    )
    # Half the crops lie where those of recipes lie.
    near = torch.arange(count) % 2 == 0
    plan = plan._replace(
        top=torch.where(near, plan.top.clamp(-3, 3), plan.top),
        left=torch.where(near, plan.left.clamp(-3, 3), plan.left),
    )
    if mix:
        drawn = random.normal(size=(count, 3)), random.uniform([80, 35], [150, 60], (count, 2))
        numbers = np.column_stack(drawn).astype(np.float32)
        numbers[::3] = 0
        plan = plan._replace(channel_mix=torch.from_numpy(numbers))
    return plan._replace(**columns)


def run(room: str, images: Tensor, plan: Plan, **options: Any) -> Tensor:
    """The result of one room, on the CPU."""
    device = device_of(room)
    with fastreid_vi.backend(room):
        return augment(images.to(device), plan.to(device), **options).cpu()
