"""Options and recipes of the baseline. No torch here.

The network is AGW's without its non-local blocks: one stem per modality, a shared trunk, GeM, a BN
neck, identity cross entropy and the batch-hard triplet loss. The recipe is the one that AGW and LbA
train their baselines with.

Spec: lba 2, 3 (baseline: L_ID alone) and 4.
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
class BaselineOptions:
    """Network and losses."""

    depth: Literal[18, 34, 50] = 50
    """ResNet depth; AGW and LbA: 50."""
    last_stride: Literal[1, 2] = 1
    """Stride of layer4; AGW and LbA: 1."""
    weights: str = "imagenet"
    """Start of the backbone: "imagenet", "none", or a torchvision state dict file."""
    stems: Literal["separate", "shared"] = "separate"
    """conv1 and bn1 of each modality (AGW, LbA), or one pair for both."""
    pooling: Literal["gem", "average"] = "gem"
    """GeM with the fixed exponent 3 (AGW, LbA), or the mean."""
    triplet_weight: float = 1.0
    """Weight of the batch-hard triplet loss; LbA: 1. AGW has its weighted triplet loss in this
    place."""
    margin: float = 0.3
    """Of the triplet loss; LbA: 0.3."""
    test_feature: Literal["neck", "pooled"] = "neck"
    """Feature after the BN neck (AGW's better one), or before it (LbA, L18)."""
    normalize_test: bool = True
    """L2-normalise test features; AGW and LbA do."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("triplet_weight", "margin"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected >= 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class BaselineRecipe(Recipe):
    """A run of the baseline."""

    model: BaselineOptions = field(default_factory=BaselineOptions)


def sysu() -> BaselineRecipe:
    """SYSU-MM01: 288 x 144, 8 identities x (4 + 4), SGD 0.1 (backbone 0.01), 81 epochs."""
    return BaselineRecipe(
        method="baseline",
        dataset="sysu",
        data=DataConfig(
            height=288,
            width=144,
            identities=8,
            images=8,
            sampler="paired_identity",
            resize="lanczos",
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
        run=RunConfig(seed=0, eval_every=10),
        model=BaselineOptions(),
    )


def regdb() -> BaselineRecipe:
    """RegDB: as on SYSU-MM01, with the labels of its lists."""
    recipe = sysu()
    data = dataclasses.replace(recipe.data, label_order="file")
    return dataclasses.replace(recipe, dataset="regdb", data=data)


def llcm() -> BaselineRecipe:
    """LLCM. Not official: AGW and LbA are older than this data set.

    SYSU-MM01's recipe with the sizes of the data set's authors (DEEN): 384 x 144, 6 identities x
    (4 + 4).
    """
    recipe = sysu()
    data = dataclasses.replace(recipe.data, height=384, width=144, identities=6)
    return dataclasses.replace(recipe, dataset="llcm", data=data)
