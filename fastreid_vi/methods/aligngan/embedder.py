"""AlignGAN's embedder: pooled feature, identity logits and metric embedding of a feature map.

Spec: aligngan 2. Golden: aligngan/embedder.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from fastreid_vi.methods.base import widened


class Embedded(NamedTuple):
    """What the embedder says about a feature map [B, C, H, W]."""

    pooled: Tensor  # [B, C] mean over positions
    logits: Tensor  # [B, num_ids]
    embedding: Tensor  # [B, embedding] for the triplet losses


class _Classifier(nn.Module):
    """Bottleneck and classifier, under their official names."""

    def __init__(self, channels: int, hidden: int, num_ids: int) -> None:
        super().__init__()
        first, norm, last = (
            nn.Linear(channels, hidden),
            nn.BatchNorm1d(hidden),
            nn.Linear(hidden, num_ids),
        )
        nn.init.kaiming_normal_(first.weight, a=0, mode="fan_out")
        nn.init.zeros_(first.bias)
        nn.init.normal_(norm.weight, 1.0, 0.02)
        nn.init.normal_(last.weight, 0.0, 0.001)
        nn.init.zeros_(last.bias)
        self.bottle = nn.Sequential(first, norm, nn.LeakyReLU(0.1))
        self.classifier = nn.Sequential(last)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.bottle(features))
        return logits


class Embedder(nn.Module):
    """Mean over positions, then a classifier with bottleneck and a linear metric embedding.

    Args:
        num_ids: training identities.
        channels: of the feature map.
        embedding: size of bottleneck and metric embedding.
        dropout: of the pooled feature, for the classifier only.
    """

    def __init__(
        self, num_ids: int, channels: int = 2048, embedding: int = 256, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.classifier0 = _Classifier(channels, embedding, num_ids)
        self.embedder0 = nn.Linear(channels, embedding)
        self.dropout = dropout

    def forward(self, features: Tensor) -> Embedded:
        """[B, C, H, W] -> `Embedded`."""
        pooled = widened(features.mean(dim=(2, 3)))
        dropped = F.dropout(pooled, self.dropout, self.training)
        return Embedded(pooled, self.classifier0(dropped), self.embedder0(pooled))
