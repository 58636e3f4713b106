"""Batches and networks that the MCJA tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreid_vi import methods
from fastreid_vi.backbone import Trunk
from fastreid_vi.config import INFRARED, VISIBLE, Batch
from fastreid_vi.methods.mcja import MCJA, MCJAOptions


class GivenMap(Trunk):
    """The images are the feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels

    def forward(self, images: Tensor, modality: Tensor | None = None) -> Tensor:
        return images


def small(num_ids: int = 6, channels: int = 32, **options: Any) -> MCJA:
    """MCJA on a given map, seeded."""
    torch.manual_seed(0)
    return MCJA(num_ids, MCJAOptions(**options), backbone=GivenMap(channels))


def tiny(**options: Any) -> MCJA:
    """MCJA on ResNet-18 for four identities, seeded, its adapters acting."""
    torch.manual_seed(0)
    network = methods.create("mcja", 4, depth=18, weights="none", **options)
    assert isinstance(network, MCJA)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm_bn" in name:
                parameter.copy_(torch.rand_like(parameter))
    return network


def images_batch(count: int = 8, ids: int = 4, height: int = 64, width: int = 32) -> Batch:
    """Random images, identity-major, infrared and visible in turn."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, height, width, generator=generator)
    labels = torch.arange(count) // (count // ids)
    modality = 1 - torch.arange(count) % 2
    return Batch(images, labels, modality, torch.where(modality == 1, 3, 1))


def losses_of(network: MCJA, batch: Batch) -> dict[str, float]:
    """Values of every term and of the total."""
    losses = network.training_step(batch)
    named = {**losses.terms, "total": losses.total}
    return {name: float(value.detach()) for name, value in named.items()}


def modality_of(cams: np.ndarray) -> Tensor:
    """Cameras 1, 2, 4 and 5 are visible; any other is infrared."""
    return torch.from_numpy(np.where(np.isin(cams, (1, 2, 4, 5)), VISIBLE, INFRARED)).long()
