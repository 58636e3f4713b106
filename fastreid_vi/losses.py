"""The ranking losses as `nn.Module`s, for people who have their own training loop.

Each takes `(embeddings, labels)` and returns a scalar; the classes are thin skins over
`fastreid_vi.ops`, which documents the maths. With `gather=True` pairs are mined over the rows of
all processes: loss and gradients are those of one process on the joined batch (every process
computes the whole loss). Under DistributedDataParallel, which averages gradients, add
`averaged=True`.

>>> import torch
>>> from fastreid_vi import losses
>>> embeddings = torch.randn(8, 16, requires_grad=True)
>>> loss = losses.BatchHardTripletLoss(margin=0.3)(embeddings, torch.arange(8) // 2)
>>> loss.backward()
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastreid_vi import _checks, ops
from fastreid_vi._checks import Metric
from fastreid_vi._distributed import joined

__all__ = [
    "BatchHardTripletLoss",
    "CenterClusterLoss",
    "CrossModalityRetrievalLoss",
    "WeightedRegularizedTripletLoss",
]


class _RankingLoss(nn.Module):
    """What the losses share: how rows of other processes join.

    Args:
        gather: mine over the rows of all processes.
        averaged: gradients are averaged over processes afterwards (DistributedDataParallel).
        equal_sizes: every process has the same number of rows; spares a synchronisation.
        group: process group, None is the default one.
    """

    def __init__(
        self,
        *,
        gather: bool = False,
        averaged: bool = False,
        equal_sizes: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        if averaged and not gather:
            raise ValueError("averaged: expected False without gather=True")
        self.gather, self.averaged = gather, averaged
        self.equal_sizes, self.group = equal_sizes, group

    def batch(self, embeddings: Tensor, *labels: Tensor) -> tuple[Tensor, ...]:
        """The rows to mine in: the own ones, or with `gather` those of all processes."""
        if not self.gather:
            return embeddings, *labels
        return joined(
            embeddings,
            *labels,
            group=self.group,
            equal_sizes=self.equal_sizes,
            averaged=self.averaged,
        )

    def extra_repr(self) -> str:
        """Whether other processes take part."""
        return "gather=True" if self.gather else ""


class BatchHardTripletLoss(_RankingLoss):
    """Hardest positive and negative of each anchor; see `ops.batch_hard_triplet_loss`.

    The batch-hard loss of Hermans et al. (2017), as LbA uses it ("euclidean", margin 0.3) and
    AlignGAN ("cosine", margin 1.0). An anchor is a positive of itself, which matters only for
    identities with a single image.
    """

    def __init__(self, margin: float = 0.3, metric: Metric = "euclidean", **gathering: Any) -> None:
        super().__init__(**gathering)
        _checks.choice("metric", metric, Metric)
        self.margin, self.metric = margin, metric

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        references: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        """[N, D] and [N] -> scalar; pairs are mined in `references` [M, D], [M] when given."""
        embeddings, labels = self.batch(embeddings, labels)
        if references is not None and reference_labels is not None:
            references, reference_labels = self.batch(references, reference_labels)
        return ops.batch_hard_triplet_loss(
            embeddings,
            labels,
            margin=self.margin,
            metric=self.metric,
            references=references,
            reference_labels=reference_labels,
        ).loss

    def extra_repr(self) -> str:
        """Margin and metric."""
        return f"margin={self.margin}, metric={self.metric!r}"


class WeightedRegularizedTripletLoss(_RankingLoss):
    """Softly weighted triplets without a margin, of AGW (Ye et al. 2021).

    See `ops.weighted_triplet_loss`. With `normalize` the embeddings are divided by their L2 norm
    first, as AGW's code can.
    """

    def __init__(self, *, normalize: bool = False, stable: bool = False, **gathering: Any) -> None:
        super().__init__(**gathering)
        self.normalize, self.stable = normalize, stable

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """[N, D] and [N] -> scalar."""
        embeddings, labels = self.batch(embeddings, labels)
        if self.normalize:
            embeddings = nn.functional.normalize(embeddings, dim=1)
        return ops.weighted_triplet_loss(embeddings, labels, stable=self.stable).loss

    def extra_repr(self) -> str:
        """Options."""
        return f"normalize={self.normalize}, stable={self.stable}"


class CenterClusterLoss(_RankingLoss):
    """Rows to their identity's centre, centres apart, of MPANet; see `ops.center_cluster_loss`."""

    def __init__(self, margin: float = 0.7, **gathering: Any) -> None:
        super().__init__(**gathering)
        _checks.above("margin", margin, 0)
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """[N, D] and [N] -> scalar."""
        embeddings, labels = self.batch(embeddings, labels)
        return ops.center_cluster_loss(embeddings, labels, margin=self.margin).loss

    def extra_repr(self) -> str:
        """Margin."""
        return f"margin={self.margin}"


class CrossModalityRetrievalLoss(_RankingLoss):
    """Soft ranks of the other modality (CMR), of MCJA; see `ops.cross_modality_retrieval_loss`."""

    def __init__(self, strength: float = 0.5, **gathering: Any) -> None:
        super().__init__(**gathering)
        _checks.above("strength", strength, 0)
        self.strength = strength

    def forward(self, embeddings: Tensor, labels: Tensor, modalities: Tensor) -> Tensor:
        """[N, D], [N] and [N] (0 visible, else infrared) -> scalar."""
        embeddings, labels, modalities = self.batch(embeddings, labels, modalities)
        return ops.cross_modality_retrieval_loss(
            embeddings, labels, modalities, strength=self.strength
        )

    def extra_repr(self) -> str:
        """Strength."""
        return f"strength={self.strength}"
