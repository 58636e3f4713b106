"""MPANet: shared ResNet, modality alleviation, pattern alignment, five identity classifiers.

Spec: mpanet 2, 3. Golden: mpanet/train_forward, mpanet/train_forward_regdb_cams.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreid_vi.backbone import Depth, LastStride, Trunk, TwoStreamResNet
from fastreid_vi.config import Batch
from fastreid_vi.layers import BNNeck, ModalityAlleviation, PatternPool
from fastreid_vi.methods.base import Losses, Method, evaluation_mode, widened
from fastreid_vi.methods.mpanet.losses import Outputs, mpanet_losses
from fastreid_vi.methods.mpanet.recipe import MPANetOptions


class MPANetBackbone(TwoStreamResNet):
    """ResNet with one stem, and a MAM after layer4 or after layer3 and layer4."""

    def __init__(
        self, depth: Depth = 50, *, last_stride: LastStride = 1, modality_attention: int = 2
    ) -> None:
        super().__init__(depth, stems="shared", last_stride=last_stride)
        if modality_attention >= 2:
            self.MAM3 = ModalityAlleviation(self.channels[2])
        if modality_attention >= 1:
            self.MAM4 = ModalityAlleviation(self.channels[3])
        self.modality_attention = modality_attention

    def after_layer(self, index: int, features: Tensor) -> Tensor:
        """Alleviate the modality in the maps of layer3 and layer4."""
        if index == 3 and self.modality_attention >= 2:
            return self.MAM3(features)  # type: ignore[no-any-return]
        if index == 4 and self.modality_attention >= 1:
            return self.MAM4(features)  # type: ignore[no-any-return]
        return features


class Patterns(NamedTuple):
    """Pattern alignment of a batch."""

    embeddings: Tensor  # [B, D], D = (P + 1) C: parts 0..P-1, then the plain mean
    maps: Tensor  # [B, P, H, W]


class MPANet(Method):
    """MPANet. Parameter names and shapes are those of the official checkpoint.

    Args:
        num_ids: training identities.
        options: network, losses and quirks.
        backbone: replaces the ResNet that `options` describes; `options.weights` is then not read.
    Raises:
        ValueError: `num_ids` < 1, or weights that cannot be read (`WeightsError`).

    The mean classifiers (`visible_classifier_`, `infrared_classifier_`) are parameters without
    gradient. They move in every training forward, also when the loss scaler later skips the step
    (`ema_update`, M6).
    """

    def __init__(
        self, num_ids: int, options: MPANetOptions | None = None, *, backbone: Trunk | None = None
    ) -> None:
        super().__init__()
        if num_ids < 1:
            raise ValueError(f"num_ids: expected >= 1, got {num_ids}")
        self.num_ids = num_ids
        self.options = options = options or MPANetOptions()
        self.update_rate = options.update_rate
        if backbone is None:
            backbone = MPANetBackbone(
                options.depth,
                last_stride=options.last_stride,
                modality_attention=options.modality_attention,
            )
            backbone.load_weights(options.weights)
        self.backbone = backbone
        self.spatial_attention = PatternPool(backbone.out_channels, options.parts)
        self.embed_dim = (options.parts + 1) * backbone.out_channels
        self.bn_neck = BNNeck(self.embed_dim)
        self.classifier = self._classifier()
        self.visible_classifier = self._classifier()
        self.infrared_classifier = self._classifier()
        self.visible_classifier_ = self._classifier()
        self.infrared_classifier_ = self._classifier()
        with torch.no_grad():
            for mean, student in self._mean_classifiers():
                mean.weight.requires_grad_(False)
                # A copy: sharing storage would let a loaded mean overwrite its student (M7).
                mean.weight.copy_(student.weight)

    def _classifier(self) -> nn.Linear:
        return nn.Linear(self.embed_dim, self.num_ids, bias=False)

    def _mean_classifiers(self) -> tuple[tuple[nn.Linear, nn.Linear], ...]:
        """Each moving average with the classifier it follows."""
        return (
            (self.visible_classifier_, self.visible_classifier),
            (self.infrared_classifier_, self.infrared_classifier),
        )

    def begin_epoch(self, epoch: int) -> None:
        """Set u = 0.2 min(100 / (epoch + 1), 1) (official rate) for the 1-based epoch."""
        super().begin_epoch(epoch)
        self.update_rate = self.options.update_rate * min(100 / (epoch + 1), 1)

    @torch.no_grad()
    def update_means(self) -> None:
        """Move both mean classifiers: M <- (1 - u) M + u W."""
        for mean, student in self._mean_classifiers():
            mean.weight.lerp_(student.weight, self.update_rate)

    def after_step(self) -> None:
        """Move the mean classifiers here when `ema_update` is "after_step"."""
        if self.options.ema_update == "after_step":
            self.update_means()

    def align(self, features: Tensor) -> Patterns:
        """Pattern alignment of the backbone's map: [B, C, H, W] -> `Patterns`."""
        pooled, maps = self.spatial_attention(features)
        average = widened(features.mean(dim=(2, 3)))
        return Patterns(torch.cat((widened(pooled).flatten(1), average), dim=1), maps)

    def classify(self, patterns: Patterns, neck: Tensor) -> Outputs:
        """Logits of the five classifiers.

        Args:
            patterns: handed on to the losses.
            neck: [B, D], the embeddings after the BN neck.
        """
        with torch.no_grad():  # the teachers pass no gradient, neither to f nor to M
            teachers = self.visible_classifier_(neck), self.infrared_classifier_(neck)
        return Outputs(
            patterns.maps,
            patterns.embeddings,
            self.classifier(neck),
            self.visible_classifier(neck),
            self.infrared_classifier(neck),
            *teachers,
        )

    def training_step(self, batch: Batch, phase: str = "main") -> Losses:
        """Losses of one batch; in training mode the mean classifiers move first.

        Args:
            batch: rows in any order (P x K for `cc_mode="rows"`), both modalities.
            phase: "main".
        Raises:
            TypeError, ValueError: a label, modality or the phase does not fit, or a modality is
                absent (M13; its losses are 0 where the values are not read, see `check_batch`).
        """
        self.check_batch(batch, phase, both_modalities=True)
        patterns = self.align(self.backbone(batch.images, batch.modality))
        neck = self.bn_neck(patterns.embeddings)
        if self.training and self.options.ema_update == "before_loss":
            self.update_means()
        outputs = self.classify(patterns, neck)
        return mpanet_losses(outputs, batch.labels, batch.modality, self.options)

    def test_features(self, images: Tensor, modality: Tensor) -> Tensor:
        """bn_neck(embeddings), divided by their L2 norm when `normalize_test` (SYSU-MM01, M18)."""
        features: Tensor = self.bn_neck(self.align(self.backbone(images, modality)).embeddings)
        return F.normalize(features) if self.options.normalize_test else features

    def pattern_maps(self, images: Tensor) -> Tensor:
        """Pattern maps of images, for looking: [B, 3, H, W] -> [B, P, H', W'], values in 0..1."""
        with evaluation_mode(self):
            return self.align(self.backbone(images)).maps
