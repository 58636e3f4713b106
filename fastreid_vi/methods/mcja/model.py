"""MCJA: shared ResNet with modality distribution adapters, GeM, a BN neck and one classifier.

Spec: mcja 2, 3. Golden: mcja/mda, mcja/head, mcja/state_dict_layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreid_vi.backbone import BLOCKS, Depth, LastStride, Trunk, TwoStreamResNet
from fastreid_vi.config import Batch
from fastreid_vi.layers import BNNeck, DistributionAdapter, GeM
from fastreid_vi.methods.base import Losses, Method, widened
from fastreid_vi.methods.mcja.losses import mcja_losses
from fastreid_vi.methods.mcja.recipe import MCJAOptions
from fastreid_vi.methods.mcja.spectra import SPECTRA, Spectrum, spectral_view


class MCJABackbone(TwoStreamResNet):
    """ResNet with one stem and an adapter after each of the last blocks of some layers.

    The adapters of layer s are `MDA_s.0`, `MDA_s.1`, ... in order of depth.
    """

    def __init__(
        self,
        depth: Depth = 50,
        *,
        last_stride: LastStride = 2,
        mda_layers: Sequence[int] = (0, 2, 3, 0),
        mda_m: int = 2,
    ) -> None:
        super().__init__(depth, stems="shared", last_stride=last_stride)
        for layer, wanted in enumerate(mda_layers, start=1):
            count, channels = min(wanted, BLOCKS[depth][layer - 1]), self.channels[layer - 1]
            adapters = [DistributionAdapter(channels, mda_m) for _ in range(count)]
            self.add_module(f"MDA_{layer}", nn.ModuleList(adapters))

    def run_layer(self, index: int, features: Tensor) -> Tensor:
        """Run the blocks of a layer, the last ones each followed by its adapter."""
        blocks = list(self.get_submodule(f"layer{index}").children())
        adapters = list(self.get_submodule(f"MDA_{index}").children())
        plain = len(blocks) - len(adapters)
        for i, block in enumerate(blocks):
            features = block(features)
            if i >= plain:
                features = adapters[i - plain](features)
        return features


class MCJA(Method):
    """MCJA.

    Args:
        num_ids: training identities.
        options: network and losses.
        backbone: replaces the ResNet that `options` describes; `options.weights` is then not read.
    Raises:
        ValueError: `num_ids` < 1, or weights that cannot be read (`WeightsError`).

    Parameters have the official names but for the adapters, which are in `backbone`, and the
    ImageNet classifier `backbone.fc`, which the official network keeps without using it; see
    `official`. The modality acts in the retrieval loss alone. Training needs two rows or more.
    """

    spectra: ClassVar[tuple[Spectrum, ...]] = SPECTRA
    """What visible test images are embedded as for multi-spectral re-ranking, in its order."""

    def __init__(
        self, num_ids: int, options: MCJAOptions | None = None, *, backbone: Trunk | None = None
    ) -> None:
        super().__init__()
        if num_ids < 1:
            raise ValueError(f"num_ids: expected >= 1, got {num_ids}")
        self.num_ids = num_ids
        self.options = options = options or MCJAOptions()
        if backbone is None:
            backbone = MCJABackbone(
                options.depth,
                last_stride=options.last_stride,
                mda_layers=options.mda_layers,
                mda_m=options.mda_m,
            )
            backbone.load_weights(options.weights)
        self.backbone = backbone
        self.embed_dim = backbone.out_channels
        self.pool = GeM()
        self.bn_neck = BNNeck(self.embed_dim)
        self.classifier = nn.Linear(self.embed_dim, num_ids, bias=False)

    def training_step(self, batch: Batch, phase: str = "main") -> Losses:
        """Identity and retrieval loss of one batch, rows in any order and of any modality.

        Args:
            batch: B >= 2 rows; with one modality alone the retrieval loss is zero (Q6).
            phase: "main".
        Raises:
            TypeError, ValueError: a label, modality or the phase does not fit (see `check_batch`).
        """
        self.check_batch(batch, phase)
        embeddings = self._embeddings(batch.images, batch.modality)
        logits = self.classifier(embeddings)
        return mcja_losses(embeddings, logits, batch.labels, batch.modality, self.options)

    def test_features(self, images: Tensor, modality: Tensor) -> Tensor:
        """Embeddings after the BN neck, divided by their L2 norm when `normalize_test`."""
        features = self._embeddings(images, modality)
        return F.normalize(features) if self.options.normalize_test else features

    def embed_spectra(
        self, images: Tensor, modality: Tensor, spectra: Sequence[Spectrum] = SPECTRA
    ) -> Tensor:
        """Embed each view of a batch of visible images.

        The views are made from the normalised images, which are read and resized once. Views of the
        uint8 images, as a loader makes them, go through `embed` and give the same up to rounding.

        Args:
            images: [B, 3, H, W], floating, normalised with ImageNet's mean and deviation.
            modality: [B] int64.
            spectra: "original", or "r", "g", "b" for one channel in place of all three.
        Returns:
            [L, B, embed_dim], as `embed` gives it for each of the L views.
        Raises:
            TypeError, ValueError: as for `embed`; a view that there is not.
        """
        views = [self.embed(spectral_view(images, name), modality) for name in spectra]
        return torch.stack(views) if views else images.new_empty(0, len(images), self.embed_dim)

    def _embeddings(self, images: Tensor, modality: Tensor) -> Tensor:
        """After the neck; the cube of GeM would overflow float16, so it is in float32."""
        features = widened(self.backbone(images, modality))
        embeddings: Tensor = self.bn_neck(self.pool(features))
        return embeddings
