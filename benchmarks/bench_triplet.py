"""Triplet losses against their published forms, tidy eager PyTorch, torch.compile and a library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_distance import distance_eager, distance_tidy, embeddings, gram_flops
from benchmarks.conftest import MODES, Workload, peers
from benchmarks.shapes import EMBEDDINGS
from fastreid_vi import ops

try:
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import MeanReducer
except ImportError:  # an optional peer
    LIBRARY: tuple[str, ...] = ()
else:
    LIBRARY = ("pytorch_metric_learning",)


def batch_hard_eager(x: Tensor, labels: Tensor) -> Tensor:
    """The published loop: one boolean selection, maximum and minimum per anchor."""
    distance = distance_eager(x)
    same = labels[:, None] == labels[None, :]
    near = torch.stack([distance[i][same[i]].max() for i in range(len(x))])
    far = torch.stack([distance[i][~same[i]].min() for i in range(len(x))])
    return (near - far + 0.3).clamp_min(0).mean()


def batch_hard_tidy(x: Tensor, labels: Tensor) -> Tensor:
    distance = distance_tidy(x)
    same = labels[:, None] == labels[None, :]
    near = distance.masked_fill(~same, float("-inf")).amax(1)
    far = distance.masked_fill(same, float("inf")).amin(1)
    return (near - far + 0.3).clamp_min(0).mean()


def batch_hard_library(x: Tensor, labels: Tensor) -> Tensor:
    """pytorch-metric-learning: its miner's triplets, then its loss."""
    distance = LpDistance(normalize_embeddings=False)
    mined = BatchHardMiner(distance=distance)(x, labels)
    return TripletMarginLoss(margin=0.3, distance=distance, reducer=MeanReducer())(x, labels, mined)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", list(EMBEDDINGS))
@pytest.mark.parametrize(
    "peer", peers("batch_hard_triplet_loss", "eager", "tidy", "compiled", *LIBRARY)
)
def bench_batch_hard_triplet_loss(run: Any, peer: str, shape: str, mode: str) -> None:
    x, labels = embeddings(shape)
    others = {
        "eager": batch_hard_eager,
        "tidy": batch_hard_tidy,
        "pytorch_metric_learning": batch_hard_library,
    }

    def ours(x: Tensor, labels: Tensor) -> Tensor:
        return ops.batch_hard_triplet_loss(x, labels).loss

    work = Workload(
        "batch_hard_triplet_loss", ours, others, (x, labels), 1e-3, 4 * x.numel(), 12 * x.numel(),
        gram_flops(x),
    )  # fmt: skip
    run(work, peer, mode, shape)


def softmax_published(distance: Tensor, among: Tensor) -> Tensor:
    """Softmax over the entries of a 0-1 mask; the others meet the maximum as zeros."""
    shift = (distance * among).max(dim=1, keepdim=True)[0]
    e = torch.exp(distance - shift) * among
    return e / (e.sum(dim=1, keepdim=True) + 1e-6)


def weighted_eager(x: Tensor, labels: Tensor) -> Tensor:
    """The published form: 0-1 matrices multiply everything."""
    distance = distance_eager(x)
    positives = labels.expand(len(x), len(x)).eq(labels[:, None]).float()
    negatives = labels.expand(len(x), len(x)).ne(labels[:, None]).float()
    near, far = distance * positives, distance * negatives
    furthest = (near * softmax_published(near, positives)).sum(dim=1)
    closest = (far * softmax_published(-far, negatives)).sum(dim=1)
    return torch.nn.functional.soft_margin_loss(closest - furthest, torch.ones_like(furthest))


def weighted_tidy(x: Tensor, labels: Tensor) -> Tensor:
    distance = distance_tidy(x)
    same = labels[:, None] == labels[None, :]
    shift = distance.detach().masked_fill(~same, 0.0).amax(1, keepdim=True)
    pull = torch.where(same, (distance - shift).exp(), 0.0)
    push = torch.where(same, 0.0, (-distance).exp())
    near = (pull * distance).sum(1) / (pull.sum(1) + 1e-6)
    far = (push * distance).sum(1) / (push.sum(1) + 1e-6)
    return torch.nn.functional.softplus(near - far).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", list(EMBEDDINGS))
@pytest.mark.parametrize("peer", peers("weighted_triplet_loss", "eager", "tidy", "compiled"))
def bench_weighted_triplet_loss(run: Any, peer: str, shape: str, mode: str) -> None:
    x, labels = embeddings(shape)
    # Unit rows: beyond a distance of about 14 the published weights of the negatives vanish.
    x = torch.nn.functional.normalize(x.detach()).requires_grad_()
    others = {"eager": weighted_eager, "tidy": weighted_tidy}

    def ours(x: Tensor, labels: Tensor) -> Tensor:
        return ops.weighted_triplet_loss(x, labels).loss

    # The expanded square leaves noise on the diagonal, where a gradient must vanish: a loose gate.
    work = Workload(
        "weighted_triplet_loss", ours, others, (x, labels), 5e-2, 4 * x.numel(), 12 * x.numel(),
        gram_flops(x),
    )  # fmt: skip
    run(work, peer, mode, shape)
