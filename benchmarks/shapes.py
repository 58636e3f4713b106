"""Real sizes, named. On a GPU the official training batch, on a CPU a slice of it."""

from __future__ import annotations

from typing import NamedTuple

import torch

GPU = torch.cuda.is_available()


class Map(NamedTuple):
    """A feature map [batch, channels, height, width]."""

    batch: int
    channels: int
    height: int
    width: int


# LbA layers 3 and 4, MPANet layers 3 and 4, MCJA stage 4: batch as published on a GPU, 8 to 32 on
# a CPU.
FEATURE_MAPS = {
    "lba_288x144_layer4": Map(64 if GPU else 32, 2048, 18, 9),
    "lba_alignment_layer3": Map(64 if GPU else 8, 1024, 18, 9),
    "lba_alignment_layer4": Map(64 if GPU else 8, 2048, 18, 9),
    "mpanet_384x128_layer3": Map(128 if GPU else 16, 1024, 24, 8),
    "mpanet_384x128_layer4": Map(128 if GPU else 16, 2048, 24, 8),
    "mcja_384x192_stage2": Map(128 if GPU else 16, 512, 48, 24),
    "mcja_384x192_stage3": Map(128 if GPU else 16, 1024, 24, 12),
    "aligngan_128_first": Map(16, 64, 128, 128),
    "aligngan_128_residual": Map(16, 256, 32, 32),
    "mcja_384x192_stage4": Map(128 if GPU else 16, 2048, 24, 12),
}


class Embeddings(NamedTuple):
    """A batch of embeddings: P identities with K rows each, D columns."""

    identities: int
    images: int
    size: int


EMBEDDINGS = {
    "lba_64x2048": Embeddings(8, 8, 2048),
    "mpanet_128x14336": Embeddings(16, 8, 14336),
    "mcja_128x2048": Embeddings(8, 16, 2048),
}
