"""The plain two-stream baseline.

Spec: lba 2 without the alignment.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastreid_vi.backbone import Trunk, TwoStreamResNet
from fastreid_vi.config import Batch
from fastreid_vi.layers import BNNeck, GeM
from fastreid_vi.methods.base import Losses, Method, widened
from fastreid_vi.methods.baseline.losses import baseline_losses
from fastreid_vi.methods.baseline.recipe import BaselineOptions


class AveragePool(nn.Module):
    """Mean over positions."""

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C]."""
        return features.mean(dim=(2, 3))


class Baseline(Method):
    """Two-stream ResNet, pooling, BN neck, classifier.

    Args:
        num_ids: training identities.
        options: network and losses.
        backbone: replaces the ResNet that `options` describes; `options.weights` is then not read.
    Raises:
        ValueError: `num_ids` < 1, or weights that cannot be read (`WeightsError`).

    Start: neck weight N(1, 0.01) (standard deviation), classifier N(0, 0.001).
    """

    def __init__(
        self, num_ids: int, options: BaselineOptions | None = None, *, backbone: Trunk | None = None
    ) -> None:
        super().__init__()
        if num_ids < 1:
            raise ValueError(f"num_ids: expected >= 1, got {num_ids}")
        self.num_ids = num_ids
        self.options = options = options or BaselineOptions()
        if backbone is None:
            backbone = TwoStreamResNet(
                options.depth, stems=options.stems, last_stride=options.last_stride
            )
            backbone.load_weights(options.weights)
        self.backbone = backbone
        self.embed_dim = backbone.out_channels
        self.pool = GeM() if options.pooling == "gem" else AveragePool()
        self.bottleneck = BNNeck(self.embed_dim, weight_std=0.01)
        self.classifier = nn.Linear(self.embed_dim, num_ids, bias=False)
        nn.init.normal_(self.classifier.weight, 0.0, 0.001)

    def training_step(self, batch: Batch, phase: str = "main") -> Losses:
        """Identity and triplet loss of one batch, rows in any order.

        In a `paired` batch separate stems take a half each, without waiting for the device.
        """
        self.check_batch(batch, phase)
        embeddings = self._pooled(batch.images, batch.modality, paired=bool(batch.paired))
        logits = self.classifier(self.bottleneck(embeddings))
        return baseline_losses(embeddings, logits, batch.labels, self.options)

    def test_features(self, images: Tensor, modality: Tensor) -> Tensor:
        """Feature after (or before) the neck, divided by its L2 norm when `normalize_test`."""
        features = self._pooled(images, modality)
        if self.options.test_feature == "neck":
            features = self.bottleneck(features)
        return F.normalize(features) if self.options.normalize_test else features

    def _pooled(self, images: Tensor, modality: Tensor, *, paired: bool = False) -> Tensor:
        halves: dict[str, int] = {}
        if paired and isinstance(self.backbone, TwoStreamResNet):
            halves["visible"] = images.shape[0] // 2
        return widened(self.pool(self.backbone(images, modality, **halves)))
