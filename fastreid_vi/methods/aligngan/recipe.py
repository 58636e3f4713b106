"""AlignGAN's options and its published training recipe. No torch here.

Spec: aligngan 3, 4 and 5 (quirks A1 to A18).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from fastreid_vi.config import (
    DataConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
    check_choices,
)


@dataclass(frozen=True, kw_only=True)
class AlignGANOptions:
    """Networks, stages and losses; defaults are the official code's unless a field says so."""

    depth: Literal[18, 34, 50] = 50
    """ResNet depth of the encoder; paper and official code: 50."""
    last_stride: Literal[1, 2] = 1
    """Stride of layer4; official: 1."""
    weights: str = "imagenet"
    """Start of the encoder: "imagenet" (official), "none", or a torchvision state dict file."""
    encoder_size: tuple[int, int] = (384, 192)
    """Height and width that images are resized to before the encoder; official: 384 x 192."""
    conv_dim: int = 64
    """Channels of the first layer of generators and discriminators; official: 64."""
    residual_blocks: int = 4
    """Of a generator; official: 4."""
    discriminator_layers: int = 4
    """Halvings of a plain discriminator after its first; official: 4. The joint discriminator has
    always 4."""
    embedding: int = 256
    """Size of the metric embedding and of the classifier's bottleneck; official: 256."""
    dropout: float = 0.5
    """Before the classifier; official: 0.5."""
    pixel_images: int = 32
    """Rows at the end of a `paired` batch that are the pixel batch, the others being the feature
    batch: data.pixel_identities * data.images; official: 16 visible + 16 infrared. 0: every phase
    has the whole batch."""
    feature_warmup_epochs: int = 50
    """Epochs (100 iterations each) of stage A, the encoder on infrared images; official: 50."""
    pixel_warmup_epochs: int = 100
    """Epochs of stage B, the generators; official: 100. The epochs that follow are stage C, joint
    training; official: 101."""
    margin: float = 1.0
    """Of the cosine batch-hard triplet losses; official: 1."""
    soft_bh: tuple[int, int] = (0, 0)
    """Take the k-th hardest positive and negative, counted from 0; official: (0, 0)."""
    feature_triplet_weight: float = 1.0
    """Weight of the encoder's triplet losses; official: 1. An encoder without ImageNet weights
    needs less, or a smaller margin, lest all its embeddings collapse."""
    feature_gan_weight: float = 0.1
    """Weight of the encoder's adversarial loss; official: 0.1."""
    cycle_weight: float = 10.0
    """Weight of the generators' cycle loss; official: 10."""
    mapping_weight: float = 5.0
    """Weight of the generators' identity mapping loss; official: 5."""
    pixel_triplet_weight: float = 0.1
    """Weight of the generators' triplet losses; official: 0.1."""
    pixel_identity_weight: float = 0.1
    """Weight of the generators' identity loss; official: 0.1."""
    pixel_triplet_labels: Literal["correct", "official"] = "correct"
    """Labels of the generators' second triplet loss, real anchors against fake candidates: right,
    or exchanged as in the official code; the same in aligned batches (A1)."""
    gan_pairs: Literal["official", "own"] = "official"
    """What the joint discriminator must not tell from (real image, real feature): every mixture of
    real and fake, each side being trained beside the other's real one (official code), or (fake
    image, its own feature) alone (the paper's figure; A2)."""
    wrong_pair: bool = True
    """Also show the joint discriminator real images with features of other persons; official code:
    yes, the paper's figure: no (A2)."""
    in_eval: Literal["running", "instance"] = "running"
    """Statistics of the generators' norms at test time: running averages, as the published weights
    need (official code), or the image's own as in training (A3)."""
    preview_updates_stats: bool = False
    """`preview` of a network in training mode runs in that mode and moves the running statistics,
    as the official code's previews do (A4)."""
    pixel_bn: Literal["train", "eval"] = "train"
    """Batch norm of encoder and embedder in the generators' phases: the small batch's statistics,
    which also move the running ones (official code), or the running ones (A5)."""
    bn_split: int = 1
    """Parts of a batch whose statistics are computed apart; running ones come from the first. The
    official code trains on 4 devices: 4 (A6)."""

    def __post_init__(self) -> None:
        check_choices(self)
        positive = ("conv_dim", "discriminator_layers", "embedding", "bn_split")
        for name, least in (
            *dict.fromkeys(positive, 1).items(),
            *dict.fromkeys(("residual_blocks", "pixel_images"), 0).items(),
            *dict.fromkeys(("feature_warmup_epochs", "pixel_warmup_epochs"), 0).items(),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected >= {least}, got {getattr(self, name)}")
        if min(self.encoder_size) < 1 or min(self.soft_bh) < 0:
            sizes = f"{self.encoder_size}, {self.soft_bh}"
            raise ValueError(f"encoder_size, soft_bh: expected >= 1 and >= 0, got {sizes}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")
        if self.margin != self.margin:
            raise ValueError("margin: expected a number, got nan")
        for name in (f.name for f in dataclasses.fields(self) if f.name.endswith("_weight")):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected >= 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class AlignGANRecipe(Recipe):
    """A run of AlignGAN: `optim` moves encoder and embedder, `pixel_optim` all others."""

    model: AlignGANOptions = field(default_factory=AlignGANOptions)
    pixel_optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=2e-4, betas=(0.5, 0.999), weight_decay=0.0)
    )
    """Optimiser of the generators and of each discriminator; official: Adam 2e-4, betas 0.5 and
    0.999, no weight decay."""

    def __post_init__(self) -> None:
        if self.data.normalize != "symmetric":
            raise ValueError(
                f"data.normalize: expected 'symmetric' for AlignGAN, got {self.data.normalize!r}"
            )
        rows = self.data.pixel_identities * self.data.images
        if self.model.pixel_images != rows:
            raise ValueError(
                f"model.pixel_images: expected {rows} (data.pixel_identities "
                f"{self.data.pixel_identities} * data.images {self.data.images}), got "
                f"{self.model.pixel_images}"
            )

    def optim_of(self, player: str) -> OptimConfig:
        """`optim` for encoder and embedder ("feature"), `pixel_optim` for the other players."""
        return self.optim if player == "feature" else self.pixel_optim


def sysu() -> AlignGANRecipe:
    """SYSU-MM01: 251 epochs of 100 iterations, 18 identities x 8 images and 4 x 8, 128 x 128."""
    return AlignGANRecipe(
        method="aligngan",
        dataset="sysu",
        data=DataConfig(
            height=128,
            width=128,
            identities=18,
            images=8,
            sampler="uniform",
            pixel_identities=4,
            resize="bicubic",
            flip=0.5,
            pad=0,
            normalize="symmetric",
        ),
        optim=OptimConfig(
            name="sgd", lr=0.2, weight_decay=5e-4, nesterov=True, backbone_lr_scale=0.1
        ),
        schedule=ScheduleConfig(epochs=251, iterations=100, milestones=(200,), gamma=0.1),
        run=RunConfig(seed=1, eval_every=50, keep=2),
        model=AlignGANOptions(),
    )


def regdb() -> AlignGANRecipe:
    """RegDB with the recipe for SYSU-MM01: the official code has no loader for RegDB."""
    return dataclasses.replace(sysu(), dataset="regdb")


def llcm() -> AlignGANRecipe:
    """LLCM with the recipe for SYSU-MM01: LLCM is younger than the official code."""
    return dataclasses.replace(sysu(), dataset="llcm")
