"""Batches and networks that the LbA tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastreid_vi import methods
from fastreid_vi.backbone import Trunk, TwoStreamResNet
from fastreid_vi.config import Batch
from fastreid_vi.methods.lba import LbA, LbAOptions

WIDTHS = (6, 8, 12, 16, 24)


class MiniatureStem(nn.Module):
    """conv1 3x3 stride 2, batch norm, ReLU, max-pool."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> Tensor:
        out = self.bn1(self.conv1(images)).relu()
        return nn.functional.max_pool2d(out, 3, stride=2, padding=1)


class Miniature(TwoStreamResNet):
    """The network of the golden files: four layers of one convolution behind two stems."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        Trunk.__init__(self)
        self.stems, self.channels, self.out_channels = "separate", widths[1:], widths[-1]
        self.visible_stem, self.infrared_stem = MiniatureStem(widths[0]), MiniatureStem(widths[0])
        for i, size in enumerate((1, 3, 3, 1), start=1):
            conv = nn.Conv2d(widths[i - 1], widths[i], size, padding=size // 2, bias=False)
            layer = nn.Sequential(conv, nn.BatchNorm2d(widths[i]), nn.ReLU())
            self.add_module(f"layer{i}", layer)


def miniature(num_ids: int = 7, **options: Any) -> LbA:
    """LbA on the miniature, seeded."""
    torch.manual_seed(0)
    return LbA(num_ids, LbAOptions(**options), backbone=Miniature())


def paired_batch(
    identities: int = 4,
    images: int = 2,
    size: tuple[int, int] = (24, 12),
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Random images as `paired_identity` orders them, labels falling."""
    generator = torch.Generator().manual_seed(5)
    rows = 2 * identities * images
    pixels = torch.randn(rows, 3, *size, generator=generator, dtype=dtype)
    labels = torch.arange(identities - 1, -1, -1).repeat_interleave(images).repeat(2)
    modality = (torch.arange(rows) >= rows // 2).long()
    return Batch(pixels, labels, modality, torch.where(modality == 1, 3, 1), images)


def shuffled(batch: Batch, seed: int = 3) -> tuple[Batch, Tensor]:
    """The same images in another order, nothing promised, and that order."""
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(seed))
    return Batch(*(tensor[order] for tensor in batch[:4])), order


def tiny(num_ids: int = 4, **options: Any) -> LbA:
    """LbA on ResNet-18, seeded."""
    torch.manual_seed(0)
    network = methods.create("lba", num_ids, depth=18, weights="none", **options)
    assert isinstance(network, LbA)
    return network


def losses_of(network: LbA, batch: Batch, seed: int = 0) -> dict[str, float]:
    """Values of every term and of the total, partners drawn from a seed."""
    torch.manual_seed(seed)
    losses = network.training_step(batch)
    named = {**losses.terms, "total": losses.total}
    return {name: float(value.detach()) for name, value in named.items()}
