"""The dense triplet loss on given reconstructions against plain PyTorch and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_correspondence import person_map
from benchmarks.conftest import DEVICE, MODES, Workload, peers
from fastreid_vi import ops


def distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y + 1e-6).square().sum(1).sqrt()


def triplet_eager(anchor: Tensor, positive: Tensor, negative: Tensor, weight: Tensor) -> Tensor:
    """[B, 1, H, W] times [B, H, W], as published: every sample meets every weight."""
    hinge = (0.3 + distance(anchor, positive) - distance(anchor, negative)).clamp_min(0.0)
    return (weight * hinge).mean()


def triplet_tidy(anchor: Tensor, positive: Tensor, negative: Tensor, weight: Tensor) -> Tensor:
    """The mean over pairs of samples is a product of means over the batch."""
    hinge = (0.3 + distance(anchor, positive) - distance(anchor, negative)).clamp_min(0.0)
    return (weight[:, 0].mean(0) * hinge.mean(0)).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["lba_alignment_layer4"])
@pytest.mark.parametrize("peer", peers("dense_triplet_loss", "eager", "tidy", "compiled"))
def bench_dense_triplet_loss(run: Any, peer: str, shape: str, mode: str) -> None:
    maps = [person_map(shape, seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(4)
    shape_of_weight = (maps[0].shape[0], 1, *maps[0].shape[2:])
    weight = torch.rand(shape_of_weight, generator=generator).to(DEVICE)

    def ours(anchor: Tensor, positive: Tensor, negative: Tensor, weight: Tensor) -> Tensor:
        return ops.dense_triplet_loss(anchor, positive, negative, weight, weighting="batch")

    others = {"eager": triplet_eager, "tidy": triplet_tidy}
    size = maps[0].numel()
    work = Workload("dense_triplet_loss", ours, others, (*maps, weight), 3e-5, 12 * size, 36 * size)
    run(work, peer, mode, shape)
