"""Batches and networks that the MPANet tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_vi.backbone import Trunk
from fastreid_vi.config import Batch
from fastreid_vi.methods.mpanet import MPANet, MPANetOptions


class GivenMap(Trunk):
    """The images are the feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels

    def forward(self, images: Tensor, modality: Tensor | None = None) -> Tensor:
        return images


def small(num_ids: int = 5, channels: int = 8, **options: object) -> MPANet:
    """MPANet on a given map, seeded."""
    torch.manual_seed(0)
    return MPANet(num_ids, MPANetOptions(**options), backbone=GivenMap(channels))  # type: ignore[arg-type]


def small_batch(
    labels: tuple[int, ...] = (2, 2, 2, 2, 4, 4, 4, 4, 0, 0, 0, 0),
    modality: tuple[int, ...] = (1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0),
    channels: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> Batch:
    """Feature maps [B, C, 4, 3] as images; P = 3, K = 4, infrared and visible in turn."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(len(labels), channels, 4, 3, generator=generator, dtype=dtype)
    marks = torch.tensor(modality)
    return Batch(maps, torch.tensor(labels), marks, torch.where(marks == 1, 6, 2))
