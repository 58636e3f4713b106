"""AlignGAN: generators, discriminators and an encoder that train each other in three stages.

Spec: aligngan 2, 3.4, 4. Golden: aligngan/steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreid_vi import ops
from fastreid_vi.backbone import Trunk, TwoStreamResNet
from fastreid_vi.config import VISIBLE, Batch
from fastreid_vi.methods.aligngan import losses
from fastreid_vi.methods.aligngan.batches import (
    Fakes,
    FakesInWaiting,
    Halves,
    halves,
    next_persons,
    pixel_rows,
)
from fastreid_vi.methods.aligngan.discriminator import Discriminator, JointDiscriminator
from fastreid_vi.methods.aligngan.embedder import Embedded, Embedder
from fastreid_vi.methods.aligngan.generator import Generator
from fastreid_vi.methods.aligngan.losses import Side, Translation
from fastreid_vi.methods.aligngan.recipe import AlignGANOptions
from fastreid_vi.methods.aligngan.statistics import fixed_batch_norm, in_parts
from fastreid_vi.methods.base import Losses, Method, evaluation_mode, widened

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

STAGES = (
    ("feature_warmup",),
    ("generators_warmup", "d_rgb_warmup", "d_ir_warmup"),
    ("feature", "generators", "d_rgb", "d_ir"),
)
"""Phases of an iteration of stages A, B and C."""
PLAYERS = {"feature_warmup": "feature", "generators_warmup": "generators"}
PARTS = {
    "feature": ("backbone", "embedder"),
    "generators": ("visible_to_infrared", "infrared_to_visible"),
    "d_rgb": ("visible_discriminator",),
    "d_ir": ("infrared_discriminator",),
    "d_rgb_warmup": ("visible_warmup_discriminator",),
    "d_ir_warmup": ("infrared_warmup_discriminator",),
}
"""Networks that a player moves."""


class AlignGAN(Method):
    """AlignGAN. Below the names of its eight networks, parameters are the official checkpoint's.

    Images are in [-1, 1]. A batch for the generators' and discriminators' phases, and for
    "feature", has as many visible as infrared rows: [visible | infrared] with the persons in the
    same order where `Batch.paired` promises it, else each half is sorted by label.

    A discriminator's phase works on the fakes of the generators' phase before it, which are kept
    until both discriminators have seen them.

    Args:
        num_ids: training identities.
        options: networks, stages, losses and quirks.
        backbone: replaces the ResNet that `options` describes; `options.weights` is then not read.
    Raises:
        ValueError: `num_ids` < 1, or weights that cannot be read (`WeightsError`).
    """

    phases: ClassVar[tuple[str, ...]] = tuple(phase for stage in STAGES for phase in stage)

    def __init__(
        self, num_ids: int, options: AlignGANOptions | None = None, *, backbone: Trunk | None = None
    ) -> None:
        super().__init__()
        if num_ids < 1:
            raise ValueError(f"num_ids: expected >= 1, got {num_ids}")
        self.num_ids = num_ids
        self.options = options = options or AlignGANOptions()
        generator = options.conv_dim, options.residual_blocks, options.in_eval
        self.visible_to_infrared = Generator(*generator)
        self.infrared_to_visible = Generator(*generator)
        plain = options.conv_dim, options.discriminator_layers
        self.visible_discriminator = Discriminator(*plain)
        self.visible_warmup_discriminator = Discriminator(*plain)
        self.infrared_warmup_discriminator = Discriminator(*plain)
        if backbone is None:
            backbone = TwoStreamResNet(
                options.depth, stems="shared", last_stride=options.last_stride
            )
            backbone.load_weights(options.weights)
        self.backbone = backbone
        channels = self.embed_dim = backbone.out_channels
        self.infrared_discriminator = JointDiscriminator(channels, options.conv_dim)
        self.embedder = Embedder(num_ids, channels, options.embedding, options.dropout)
        self._stage, self._fakes = 0, FakesInWaiting()
        self.begin_epoch(1)

    # What the training loop asks.

    def begin_epoch(self, epoch: int) -> None:
        """Choose the stage of the 1-based epoch."""
        super().begin_epoch(epoch)
        first = self.options.feature_warmup_epochs
        second = first + self.options.pixel_warmup_epochs
        self._stage = (epoch > first) + (epoch > second)
        self._fakes.clear()

    @property
    def active_phases(self) -> tuple[str, ...]:
        """The phases of the epoch's stage."""
        return STAGES[self._stage]

    def player(self, phase: str) -> str:
        """Encoder and embedder, and the generators, keep their optimiser from stage to stage."""
        return PLAYERS.get(phase, phase)

    def phase_parameters(self, phase: str) -> Iterator[nn.Parameter]:
        """Parameters of the networks that the phase's player moves."""
        for name in PARTS[self.player(phase)]:
            yield from self.get_submodule(name).parameters()

    def phase_batch(self, batch: Batch, phase: str) -> Batch:
        """The feature rows or the pixel rows of a `paired` batch (`pixel_images`), else all rows.

        Raises:
            ValueError: the batch has no other rows, or no whole persons.
        """
        pixel = pixel_rows(batch, self.options.pixel_images)
        rows = batch.labels.shape[0]
        if pixel == 0:
            return batch
        if self.player(phase) == "feature":
            return batch.rows(0, rows - pixel, batch.paired)
        return batch.rows(rows - pixel, rows, batch.paired)

    def compile_backbone(self) -> None:
        """Compile encoder and generators."""
        for network in (self.backbone, self.visible_to_infrared, self.infrared_to_visible):
            network.compile()

    # The networks.

    def encode(self, images: Tensor) -> Tensor:
        """Feature map of images in [-1, 1]: [B, 3, H, W] -> [B, embed_dim, h, w]."""
        # (x + 1) / 2 and ImageNet's normalisation in one.
        mean = [2 * m - 1 for m in IMAGENET_MEAN]
        std = [2 * s for s in IMAGENET_STD]
        resized = ops.resize_normalize(images, self.options.encoder_size, mean=mean, std=std)
        features: Tensor = in_parts(self.backbone, resized, self.options.bn_split)
        return features

    def translate(self, generator: nn.Module, images: Tensor) -> Tensor:
        """Images through one of the generators."""
        translated: Tensor = in_parts(generator, images, self.options.bn_split)
        return translated

    def _embed(self, features: Tensor) -> Embedded:
        embedded = in_parts(self.embedder, features, self.options.bn_split)
        return Embedded(*embedded)

    # Training.

    def training_step(self, batch: Batch, phase: str = "feature_warmup") -> Losses:
        """Losses of one batch for one phase.

        Args:
            batch: both modalities, as many rows of each; infrared alone for "feature_warmup".
            phase: one of `phases`.
        Raises:
            TypeError, ValueError: a label, modality, size or the phase does not fit.
            RuntimeError: a discriminator's phase without the generators' phase before it.
        """
        warmup = phase == "feature_warmup"
        self.check_batch(batch, phase, both_modalities=not warmup)
        parts = halves(batch, even=not warmup)
        if warmup:
            side = Side(self._embed(self.encode(parts.infrared)), parts.infrared_labels)
            return losses.feature_warmup_losses(side, self.options)
        if phase == "feature":
            return self._feature_step(parts)
        if phase.startswith("generators"):
            joint = phase == "generators"
            found, fakes = self._generators_step(parts, joint=joint)
            self._fakes.put(batch.images, fakes, STAGES[2 if joint else 1][-2:])
            return found
        fakes = self._fakes.take(batch.images, phase)
        if phase == "d_ir":
            return self._joint_step(parts, fakes)
        real, fake = parts.infrared, fakes.infrared
        if phase.startswith("d_rgb"):
            real, fake = parts.visible, fakes.visible
        discriminator = self.get_submodule(PARTS[phase][0])
        real_scores, fake_scores = discriminator(torch.cat((real, fake))).chunk(2)
        return losses.discriminator_losses(real_scores, {"fake": fake_scores})

    def _feature_step(self, parts: Halves) -> Losses:
        """C1: encoder and embedder on translated visible and on infrared images."""
        with torch.no_grad():
            translated = self.translate(self.visible_to_infrared, parts.visible)
        fake_map, real_map = self.encode(translated), self.encode(parts.infrared)
        fake = Side(self._embed(fake_map), parts.visible_labels)
        real = Side(self._embed(real_map), parts.infrared_labels)
        scores = self.infrared_discriminator(parts.infrared, fake_map)
        return losses.feature_losses(fake, real, scores, self.options)

    def _generators_step(self, parts: Halves, *, joint: bool) -> tuple[Losses, Fakes]:
        """B, C2: both generators; their fakes, for the discriminators."""
        to_infrared, to_visible = self.visible_to_infrared, self.infrared_to_visible
        # Running statistics see first the other modality, then fakes, then the own one (A3).
        fake_infrared = self.translate(to_infrared, parts.visible)
        fake_visible = self.translate(to_visible, parts.infrared)
        cycle_visible = self.translate(to_visible, fake_infrared)
        cycle_infrared = self.translate(to_infrared, fake_visible)
        mapped_visible = self.translate(to_visible, parts.visible)
        mapped_infrared = self.translate(to_infrared, parts.infrared)
        with self._pixel_statistics():
            with torch.no_grad():
                real_map = self.encode(parts.infrared)
                real = Side(self._embed(real_map), parts.infrared_labels)
            fake_map = self.encode(fake_infrared)
            fake = Side(self._embed(fake_map), parts.visible_labels)
        if joint:
            shown = real_map if self.options.gan_pairs == "official" else fake_map.detach()
            visible_scores = self.visible_discriminator(fake_visible)
            infrared_scores = self.infrared_discriminator(fake_infrared, shown)
        else:
            visible_scores = self.visible_warmup_discriminator(fake_visible)
            infrared_scores = self.infrared_warmup_discriminator(fake_infrared)
        x_v, x_i = parts.visible, parts.infrared
        visible = Translation(visible_scores, cycle_infrared, mapped_visible, x_i, x_v)
        infrared = Translation(infrared_scores, cycle_visible, mapped_infrared, x_v, x_i)
        found = losses.generator_losses(visible, infrared, fake, real, self.options)
        return found, Fakes(fake_visible, fake_infrared, real_map, fake_map)

    def _joint_step(self, parts: Halves, fakes: Fakes) -> Losses:
        """C2, joint discriminator: one real pairing and up to four fake ones, in one pass."""
        network = self.infrared_discriminator
        pictures = torch.cat((parts.infrared, fakes.infrared))
        maps = torch.cat((fakes.real_map, fakes.fake_map))
        real_image, fake_image = network.image_branch(pictures).chunk(2)
        real_map, fake_map = network.feature_branch(maps, pictures).chunk(2)
        pairs = {"real": (real_image, real_map)}
        if self.options.wrong_pair:
            wrong = next_persons(parts, real_image, network.image_branch)
            pairs["wrong_person"] = (wrong, real_map)
        if self.options.gan_pairs == "official":
            pairs |= {"fake_feature": (real_image, fake_map), "fake_image": (fake_image, real_map)}
        pairs["fake"] = (fake_image, fake_map)
        images, features = (torch.cat(side) for side in zip(*pairs.values(), strict=True))
        scores = dict(zip(pairs, network.score(images, features).chunk(len(pairs)), strict=True))
        return losses.discriminator_losses(scores.pop("real"), scores)

    def _pixel_statistics(self) -> AbstractContextManager[None]:
        if self.options.pixel_bn == "train":
            return nullcontext()
        return fixed_batch_norm(self.backbone, self.embedder)

    # Testing.

    def test_features(self, images: Tensor, modality: Tensor) -> Tensor:
        """Pooled maps of an image and its mirror image, summed, over their L2 norm.

        Visible images are first translated.
        """
        visible = modality == VISIBLE
        if torch.compiler.is_compiling():  # shapes must not depend on values
            translated = self.visible_to_infrared(images).to(images.dtype)
            images = torch.where(visible[:, None, None, None], translated, images)
        else:
            rows = visible.nonzero()[:, 0]
            translated = self.visible_to_infrared(images[rows]).to(images.dtype)
            images = images.index_copy(0, rows, translated)
        both = torch.cat((images, images.flip(3)))
        pooled = widened(self.encode(both).mean(dim=(2, 3)))
        straight, mirrored = pooled.chunk(2)
        return F.normalize(straight + mirrored)

    @torch.no_grad()
    def preview(self, images: Tensor, modality: Tensor) -> Tensor:
        """Images, their translations, and these translated back, for looking.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            modality: [B] int64.
        Returns:
            [B, 3, 3, H, W] in [-1, 1]: image, translation, translation back. In evaluation mode,
            unless `preview_updates_stats`.
        """
        mode = nullcontext() if self.options.preview_updates_stats else evaluation_mode(self)
        visible = (modality == VISIBLE)[:, None, None, None]
        with mode:
            infrared = self.visible_to_infrared(images)
            other = torch.where(visible, infrared, self.infrared_to_visible(images))
            back = torch.where(
                visible, self.infrared_to_visible(other), self.visible_to_infrared(other)
            )
        return torch.stack((images, other.to(images.dtype), back.to(images.dtype)), dim=1)
