"""Batches and networks that the MPANet tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_vi import methods
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


def images_batch(count: int = 8, ids: int = 2, height: int = 64, width: int = 32) -> Batch:
    """Random images, identity-major, infrared and visible in turn."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, height, width, generator=generator)
    labels = torch.arange(count) // (count // ids)
    modality = 1 - torch.arange(count) % 2
    return Batch(images, labels, modality, torch.where(modality == 1, 3, 1))


def tiny(**options: object) -> MPANet:
    """MPANet on ResNet-18 for four identities, seeded."""
    torch.manual_seed(0)
    network = methods.create("mpanet", 4, depth=18, weights="none", **options)
    assert isinstance(network, MPANet)
    return network


def losses_of(network: MPANet, batch: Batch) -> dict[str, float]:
    """Values of every term and of the total."""
    losses = network.training_step(batch)
    named = {**losses.terms, "total": losses.total}
    return {name: float(value.detach()) for name, value in named.items()}


def moved(network: MPANet) -> dict[str, torch.Tensor]:
    """Change the students, as an optimiser's step does; their state before."""
    with torch.no_grad():
        for classifier in (network.visible_classifier, network.infrared_classifier):
            classifier.weight.add_(torch.randn_like(classifier.weight))
    return {k: v.clone() for k, v in network.state_dict().items()}
