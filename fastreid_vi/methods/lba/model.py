"""LbA: a stem per modality, a shared trunk, dense alignment of partners inside it.

Spec: lba 2, 3. Golden: lba/e2e_tiny.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

from fastreid_vi.backbone import TwoStreamResNet
from fastreid_vi.config import Batch
from fastreid_vi.layers import BNNeck, GeM
from fastreid_vi.methods import base
from fastreid_vi.methods.base import Losses, Method, widened
from fastreid_vi.methods.lba.alignment import aligned_with
from fastreid_vi.methods.lba.losses import Outputs, lba_losses
from fastreid_vi.methods.lba.pairing import (
    Arrangement,
    Pairs,
    arrange,
    check_paired,
    draw_pairs,
    paired_arrangement,
)
from fastreid_vi.methods.lba.recipe import LbAOptions

LAYERS: Final = {"both": (3, 4), "layer3": (3,), "layer4": (4,), "none": ()}


class LbA(Method):
    """LbA.

    Args:
        num_ids: training identities.
        options: network, losses and quirks.
        backbone: replaces the ResNet that `options` describes, with separate `stems` and modules
            `layer1` to `layer4`; `options.weights` is then not read.
    Raises:
        ValueError: `num_ids` < 1, or weights that cannot be read (`WeightsError`).

    Start: neck weight N(1, 0.01) (standard deviation), classifier N(0, 0.001).
    """

    backbone: TwoStreamResNet

    def __init__(
        self,
        num_ids: int,
        options: LbAOptions | None = None,
        *,
        backbone: TwoStreamResNet | None = None,
    ) -> None:
        super().__init__()
        if num_ids < 1:
            raise ValueError(f"num_ids: expected >= 1, got {num_ids}")
        self.num_ids = num_ids
        self.options = options = options or LbAOptions()
        if backbone is None:
            backbone = TwoStreamResNet(
                options.depth, stems="separate", last_stride=options.last_stride
            )
            backbone.load_weights(options.weights)
        self.backbone = backbone
        self.embed_dim = backbone.out_channels
        self.pool = GeM()
        self.bottleneck = BNNeck(self.embed_dim, weight_std=0.01)
        self.classifier = nn.Linear(self.embed_dim, num_ids, bias=False)
        nn.init.normal_(self.classifier.weight, 0.0, 0.001)

    def compile_backbone(self) -> None:
        """Compile stems and layers one by one: layer4 runs twice in a step."""
        for module in self.backbone.children():
            module.compile()

    def training_step(self, batch: Batch, phase: str = "main") -> Losses:
        """All losses of one batch; partners are drawn anew for every aligned layer.

        Args:
            batch: k visible and k infrared images of each of P identities, P > k. With
                `batch.paired` the device is not waited for; otherwise rows may stand in any order,
                and labels and modalities are read. Without alignment any batch is taken. Of several
                processes each pairs its own rows; paired batches have the same size in all.
            phase: "main".
        Raises:
            TypeError, ValueError: a label, modality or the phase does not fit, or the batch cannot
                be paired.
        """
        self.check_batch(batch, phase)
        layers = LAYERS[self.options.align]
        arrangement = self._arrangement(batch) if layers or batch.paired else None
        feat3 = self._until_layer3(batch)
        feat4 = self._layer(4, feat3)
        maps = {3: feat3, 4: feat4}
        aligned: dict[int, Tensor] = {}  # maps by layer
        dense: dict[int, Tensor] = {}
        for layer in layers:
            assert arrangement is not None
            pairs = self.draw(arrangement).to(feat3.device)
            aligned[layer], dense[layer], _ = aligned_with(maps[layer], pairs, self.options)
        # Running statistics follow the official order: layer4 has seen the plain map before the
        # aligned one, the neck sees the aligned features before the plain ones.
        aligned_logits: dict[int, Tensor] = {}
        if self.options.ic_weight:
            for layer, features in aligned.items():
                top = self._layer(4, features) if layer == 3 else features
                aligned_logits[layer] = self._classify(self._pooled(top))
        pooled = self._pooled(feat4)
        outputs = Outputs(pooled, self._classify(pooled), aligned_logits, dense)
        return lba_losses(outputs, batch.labels, self.options, equal_sizes=batch.paired > 0)

    def draw(self, arrangement: Arrangement) -> Pairs:
        """Partners for one layer, on the CPU."""
        options = self.options
        return draw_pairs(arrangement, pairing=options.pairing, rng=options.pairing_rng)

    def test_features(self, images: Tensor, modality: Tensor) -> Tensor:
        """Pooled feature before (or after) the neck, divided by its L2 norm."""
        features = self._pooled(self.backbone(images, modality))
        if self.options.test_feature == "bn":
            features = self.bottleneck(features)
        return F.normalize(features)

    def _arrangement(self, batch: Batch) -> Arrangement:
        if not batch.paired:
            return arrange(batch.labels, batch.modality)
        if base._values_are_read(batch.labels):
            check_paired(batch.labels, batch.modality, batch.paired)
        return paired_arrangement(len(batch.labels), batch.paired)

    def _until_layer3(self, batch: Batch) -> Tensor:
        visible = len(batch.labels) // 2 if batch.paired else None
        features = self.backbone.stem(batch.images, batch.modality, visible)
        for index in (1, 2, 3):
            features = self._layer(index, features)
        return features

    def _layer(self, index: int, features: Tensor) -> Tensor:
        features = self.backbone.get_submodule(f"layer{index}")(features)
        return self.backbone.after_layer(index, features)

    def _pooled(self, features: Tensor) -> Tensor:
        """[B, D], never half precision."""
        if self.options.gem_clamp is not None:
            features = features.clamp_min(self.options.gem_clamp)
        return widened(self.pool(features))

    def _classify(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.bottleneck(pooled))
        return logits
