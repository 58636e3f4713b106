"""MPANet's centre cluster loss: the published loops, tidy eager PyTorch and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_distance import embeddings
from benchmarks.conftest import MODES, Workload, peers
from benchmarks.shapes import EMBEDDINGS
from fastreid_vi import ops


def center_cluster_eager(x: Tensor, labels: Tensor) -> Tensor:
    """The published loops: a centre per row, then every identity against all rows."""
    centres = torch.stack([x[labels == y].mean(0) for y in labels])
    pull = (x - centres).square().sum(1).sqrt().mean()
    pushes = []
    for y in labels.unique():
        own = centres[labels == y][:1]
        others = centres[labels != y]
        pushes.append(
            (0.7 - (others - own).square().sum(1).clamp_min(1e-12).sqrt()).clamp_min(0).mean()
        )
    return pull + torch.stack(pushes).mean()


def center_cluster_tidy(x: Tensor, labels: Tensor) -> Tensor:
    """Identity-major batches with eight or more rows each: a reshape instead of a search."""
    identities = EMBEDDINGS["mpanet_128x14336"].identities
    grouped = x.unflatten(0, (identities, -1))
    centres = grouped.mean(1)
    pull = (grouped - centres[:, None]).square().sum(-1).sqrt().mean()
    upper = torch.triu_indices(identities, identities, 1, device=x.device)
    gaps = (centres[upper[0]] - centres[upper[1]]).square().sum(1).clamp_min(1e-12).sqrt()
    return pull + (0.7 - gaps).clamp_min(0).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["mpanet_128x14336"])
@pytest.mark.parametrize("peer", peers("center_cluster_loss", "eager", "tidy", "compiled"))
def bench_center_cluster_loss(run: Any, peer: str, shape: str, mode: str) -> None:
    x, labels = embeddings(shape)
    others = {"eager": center_cluster_eager, "tidy": center_cluster_tidy}

    def ours(x: Tensor, labels: Tensor) -> Tensor:
        return ops.center_cluster_loss(x, labels).loss

    work = Workload(
        "center_cluster_loss", ours, others, (x, labels), 1e-4, 4 * x.numel(), 12 * x.numel()
    )
    run(work, peer, mode, shape)
