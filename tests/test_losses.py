"""The modules of fastreid_vi.losses: the ops behind them, and a library with the same losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_metric_learning import distances, miners, reducers
from pytorch_metric_learning import losses as theirs
from torch import Tensor, nn
from torch.nn import functional as F

from fastreid_vi import losses, ops
from tests.ops.test_pool import seeded

LABELS = torch.arange(24) % 6
MODALITIES = torch.arange(24) // 12


def gradient(module: nn.Module, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    loss = module(leaf, *others)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


MODULES = {
    "batch-hard": (
        losses.BatchHardTripletLoss(0.5),
        lambda x: ops.batch_hard_triplet_loss(x, LABELS, margin=0.5).loss,
    ),
    "batch-hard, cosine": (
        losses.BatchHardTripletLoss(1.0, "cosine"),
        lambda x: ops.batch_hard_triplet_loss(x, LABELS, margin=1.0, metric="cosine").loss,
    ),
    "weighted": (
        losses.WeightedRegularizedTripletLoss(),
        lambda x: ops.weighted_triplet_loss(x, LABELS).loss,
    ),
    "weighted, normalised": (
        losses.WeightedRegularizedTripletLoss(normalize=True, stable=True),
        lambda x: ops.weighted_triplet_loss(F.normalize(x), LABELS, stable=True).loss,
    ),
    "centre cluster": (
        losses.CenterClusterLoss(3.0),
        lambda x: ops.center_cluster_loss(x, LABELS, margin=3.0).loss,
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_their_ops(name: str) -> None:
    module, op = MODULES[name]
    x = seeded(24, 8)
    leaf = x.clone().requires_grad_()
    want = op(leaf)
    got, grad = gradient(module, x, LABELS)
    assert torch.equal(got, want)
    assert torch.equal(grad, torch.autograd.grad(want, leaf)[0])
    assert not list(module.parameters())


def test_retrieval_and_references() -> None:
    x = seeded(24, 8)
    got = losses.CrossModalityRetrievalLoss(0.1)(x, LABELS, MODALITIES)
    assert torch.equal(got, ops.cross_modality_retrieval_loss(x, LABELS, MODALITIES, strength=0.1))
    rows, others = x[:10], x[10:]
    got = losses.BatchHardTripletLoss()(rows, LABELS[:10], others, LABELS[10:])
    want = ops.batch_hard_triplet_loss(
        rows, LABELS[:10], references=others, reference_labels=LABELS[10:]
    )
    assert torch.equal(got, want.loss)
    with pytest.raises(ValueError, match="expected both or none"):
        losses.BatchHardTripletLoss()(rows, LABELS[:10], others)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_batch_hard_equals_pytorch_metric_learning(metric: Any) -> None:
    """Theirs mines positives among the others; with two images or more that is the same pair."""
    if metric == "euclidean":
        distance = distances.LpDistance(normalize_embeddings=False)
    else:
        distance = distances.CosineSimilarity()
    miner = miners.BatchHardMiner(distance=distance)
    loss = theirs.TripletMarginLoss(margin=0.5, distance=distance, reducer=reducers.MeanReducer())

    class Theirs(nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return loss(x, labels, miner(x, labels))

    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(24, 8, generator=generator, dtype=torch.float64)
        labels = LABELS[torch.randperm(24, generator=generator)]
        got = gradient(losses.BatchHardTripletLoss(0.5, metric), x, labels)
        want = gradient(Theirs(), x, labels)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_options_are_shown_and_checked() -> None:
    assert "margin=0.3, metric='cosine'" in repr(losses.BatchHardTripletLoss(metric="cosine"))
    with pytest.raises(ValueError, match="metric: expected one of"):
        losses.BatchHardTripletLoss(metric="dot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="margin: expected > 0"):
        losses.CenterClusterLoss(0.0)
    with pytest.raises(ValueError, match="strength: expected > 0"):
        losses.CrossModalityRetrievalLoss(0.0)
    with pytest.raises(ValueError, match="averaged: expected False without gather"):
        losses.CenterClusterLoss(averaged=True)


def test_gather_without_processes_is_the_plain_loss() -> None:
    x = seeded(24, 8)
    plain = gradient(losses.CenterClusterLoss(3.0), x, LABELS)
    gathered = gradient(losses.CenterClusterLoss(3.0, gather=True, averaged=True), x, LABELS)
    assert torch.equal(plain[0], gathered[0])
    assert torch.equal(plain[1], gathered[1])
