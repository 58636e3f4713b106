"""Real sizes, named. On a GPU the official training batch, on a CPU a slice of it.

FASTREID_VI_BENCH_TINY=1 makes all of them tiny, to rehearse a run of the benchmarks.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch

from benchmarks.clock import TINY

GPU = torch.cuda.is_available()
Size = TypeVar("Size", bound=tuple[int, ...])


class Map(NamedTuple):
    """A feature map [batch, channels, height, width]."""

    batch: int
    channels: int
    height: int
    width: int


class Embeddings(NamedTuple):
    """A batch of embeddings: P identities with K rows each, D columns."""

    identities: int
    images: int
    size: int


class Images(NamedTuple):
    """A batch of pictures [batch, 3, height, width], and the size that they are brought to."""

    batch: int
    height: int
    width: int
    out_height: int
    out_width: int


def _sizes(real: dict[str, Size], tiny: Size) -> dict[str, Size]:
    return dict.fromkeys(real, tiny) if TINY else real


# LbA layers 3 and 4, MPANet layers 3 and 4, MCJA stages 2 to 4: batch as published on a GPU, 8 to
# 32 on a CPU. AlignGAN's generator sees 16 images at a time.
FEATURE_MAPS = _sizes(
    {
        "lba_288x144_layer4": Map(64 if GPU else 32, 2048, 18, 9),
        "lba_alignment_layer3": Map(64 if GPU else 8, 1024, 18, 9),
        "lba_alignment_layer4": Map(64 if GPU else 8, 2048, 18, 9),
        "mpanet_384x128_layer3": Map(128 if GPU else 16, 1024, 24, 8),
        "mpanet_384x128_layer4": Map(128 if GPU else 16, 2048, 24, 8),
        "mcja_384x192_stage2": Map(128 if GPU else 16, 512, 48, 24),
        "mcja_384x192_stage3": Map(128 if GPU else 16, 1024, 24, 12),
        "mcja_384x192_stage4": Map(128 if GPU else 16, 2048, 24, 12),
        "aligngan_128_first": Map(16, 64, 128, 128),
        "aligngan_128_residual": Map(16, 256, 32, 32),
    },
    Map(4, 64, 6, 3),
)

EMBEDDINGS = _sizes(
    {
        "lba_64x2048": Embeddings(8, 8, 2048),
        "mpanet_128x14336": Embeddings(16, 8, 14336),
        "mcja_128x2048": Embeddings(8, 16, 2048),
    },
    Embeddings(4, 4, 32),
)

# Cross-modality retrieval: MCJA's batch, and one four times as large.
RETRIEVAL = _sizes(
    {"mcja_128x2048": EMBEDDINGS["mcja_128x2048"], "512x2048": Embeddings(32, 16, 2048)},
    Embeddings(4, 4, 32),
)

SOFT_RANKS = _sizes({"512x512": (512, 512), "2048x2048": (2048, 2048)}, (8, 8))

# Half of AlignGAN's feature batch: a GPU takes the official 72 pictures.
ENCODER_INPUTS = _sizes(
    {"aligngan_encoder_input": Images(72 if GPU else 16, 128, 128, 384, 192)},
    Images(2, 8, 8, 24, 12),
)
