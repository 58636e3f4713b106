"""LbA's options and its published training recipes. No torch here.

Spec: lba 3 (quirks L1 to L18) and 4.
"""

from __future__ import annotations

import dataclasses
import math
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
class LbAOptions:
    """Network and losses; defaults are the official numbers, with the paper's weighting (L1)."""

    depth: Literal[18, 34, 50] = 50
    """ResNet depth; paper and official code: 50."""
    last_stride: Literal[1, 2] = 1
    """Stride of layer4; official code: 1."""
    weights: str = "imagenet"
    """Start of stems and trunk: "imagenet" (official), "none", or a torchvision state dict file."""
    align: Literal["both", "layer3", "layer4", "none"] = "both"
    """Maps that are aligned; paper and official code: both. With "none" the identity loss alone is
    left, the paper's baseline, and batches may be of any kind."""
    temperature: float = 50.0
    """Factor of the cosine in the matching probability; paper and official code: 50."""
    margin: float = 0.3
    """Of the batch-hard triplet loss; official: 0.3."""
    dt_margin: float = 0.3
    """Of the dense triplet loss; paper and official code: 0.3."""
    triplet_weight: float = 1.0
    """Weight of the batch-hard triplet loss; official: 1."""
    ic_weight: float = 1.0
    """Weight of the identity consistency loss; official: 1. At 0 the aligned maps are not
    classified at all, so that the running statistics come from the plain maps alone."""
    dt_weight: float = 0.5
    """Weight of the dense triplet loss; official: 0.5."""
    weighting: Literal["sample", "batch"] = "sample"
    """Each position's hinge is weighted by its own co-attention (paper), or by the batch mean of
    that position, which the official code's broadcast amounts to (L1)."""
    dist_eps: float = 1e-6
    """Added to every channel of a difference before its norm; official: 1e-6, paper: 0 (L3)."""
    pairing: Literal["cross", "same"] = "cross"
    """Partners come from the other modality (paper and today's official code), or from the same,
    as in the public code from 22 August to 13 October 2021 (L4)."""
    renorm_comask: bool = True
    """Min-max normalise the co-attention again; official: yes, paper: the product of the masks
    (L5)."""
    dt_reduction: Literal["mean", "sum"] = "mean"
    """Dense triplet loss over positions: "mean" (official), or the "sum" of the paper's formula;
    over samples it is a mean in both (L6)."""
    pairing_rng: Literal["own", "python"] = "own"
    """Partners are drawn by torch's CPU generator, or by Python's `random` in the official order of
    draws (L8). A checkpoint holds the states of both."""
    zero_guard: bool = True
    """No gradient through the normalisation of a position whose features are all zero; official:
    False, its gradient is divided by 1e-12 (L11)."""
    gem_clamp: float | None = None
    """Least value that GeM sees; None is official: no clamp (L12)."""
    test_feature: Literal["pooled", "bn"] = "pooled"
    """Test feature before the BN neck (paper and official code) or after it; L2-normalised either
    way (L18)."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected > 0, got {self.temperature}")
        names = ("margin", "dt_margin", "triplet_weight", "ic_weight", "dt_weight", "dist_eps")
        for name in names:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected >= 0, got {getattr(self, name)}")
        if self.gem_clamp is not None and not (
            self.gem_clamp >= 0 and math.isfinite(self.gem_clamp)
        ):
            raise ValueError(f"gem_clamp: expected >= 0 or None, got {self.gem_clamp}")


@dataclass(frozen=True, kw_only=True)
class LbARecipe(Recipe):
    """A run of LbA."""

    model: LbAOptions = field(default_factory=LbAOptions)

    def __post_init__(self) -> None:
        identities, half = self.data.identities, self.data.images // 2
        if self.model.align != "none" and identities - 1 < half:
            raise ValueError(
                f"data.identities: expected at least {half + 1}, for {half} images of each modality"
                f" meet as many other identities, got {identities}"
            )


def sysu() -> LbARecipe:
    """SYSU-MM01: 288 x 144, 8 identities x (4 + 4), SGD 0.1 (backbone 0.01), 81 epochs.

    The official code's numbers, its weighting of the dense triplet loss included (L1); the paper
    writes 80 epochs (L9) and a random crop, which the official code leaves without effect
    (`data.pad`, L7).
    """
    return LbARecipe(
        method="lba",
        dataset="sysu",
        data=DataConfig(
            height=288,
            width=144,
            identities=8,
            images=8,
            sampler="paired_identity",
            resize="lanczos",
            pad=0,
        ),
        optim=OptimConfig(
            name="sgd",
            lr=0.1,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            backbone_lr_scale=0.1,
        ),
        schedule=ScheduleConfig(
            epochs=81, milestones=(20, 50), gamma=0.1, warmup_epochs=10, warmup_start=0.1
        ),
        run=RunConfig(seed=0, eval_every=40),
        model=LbAOptions(weighting="batch"),
    )


def regdb() -> LbARecipe:
    """RegDB: as on SYSU-MM01, with the labels of its lists."""
    recipe = sysu()
    data = dataclasses.replace(recipe.data, label_order="file")
    return dataclasses.replace(recipe, dataset="regdb", data=data)


def llcm() -> LbARecipe:
    """LLCM: 384 x 144, 6 identities x (4 + 4).

    Nobody has published a recipe of LbA for LLCM. This is the one for SYSU-MM01 with the image size
    and the batch of DEEN, the method that came with the data set; no result is known for it.
    """
    recipe = sysu()
    data = dataclasses.replace(recipe.data, height=384, identities=6)
    return dataclasses.replace(recipe, dataset="llcm", data=data)
