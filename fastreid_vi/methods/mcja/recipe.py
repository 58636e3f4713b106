"""MCJA's options and its published training recipes. No torch here.

Spec: mcja 3 to 5 (quirks Q1 to Q17). Those of the augmentation are fields of `DataConfig`.
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
class MCJAOptions:
    """Network and losses; defaults are the official recipe for SYSU-MM01 unless a field says so."""

    depth: Literal[18, 34, 50] = 50
    """ResNet depth; paper and official code: 50."""
    last_stride: Literal[1, 2] = 2
    """Stride of layer4; official code: 2, kept (`drop_last_stride` is false)."""
    weights: str = "imagenet"
    """Start of the backbone: "imagenet" (official), "none", or a torchvision state dict file."""
    mda_layers: tuple[int, int, int, int] = (0, 2, 3, 0)
    """How many of the last blocks of layer1 to layer4 are each followed by a modality distribution
    adapter; a layer with fewer blocks has one after each. Official code: 2 + 3 adapters, each with
    a batch norm before its sigmoid and one that starts at zero; the paper's figure draws one slab
    after layer2 and one after layer3, and no batch norm (Q7). The first arXiv version has none:
    (0, 0, 0, 0)."""
    mda_m: int = 2
    """M, pseudo-modalities of an adapter; official: 2 on SYSU-MM01, 12 on RegDB (Q7)."""
    cmr_weight: float = 1.0
    """Weight of the cross-modality retrieval loss; paper and official code: 1."""
    cmr_strength: float = 0.5
    """Strength of its soft rank. Official: 0.5, at which the ranks of a real batch are an affine
    map of the distances: no ranking non-linearity acts, though the paper describes a constraint on
    the ranking list (Q5). They bend below 2 (max - min distance) / n, n the gallery's size."""
    cmr_path: Literal["auto", "pav"] = "auto"
    """How it is computed, same value: "auto" takes the closed form where it holds, "pav" sorts the
    distances of every query and pools adjacent violators, as the official code always does (Q5)."""
    normalize_test: bool = True
    """L2-normalise test features; the official evaluation does so right after the network."""

    def __post_init__(self) -> None:
        check_choices(self)
        if len(self.mda_layers) != 4 or min(self.mda_layers) < 0:
            raise ValueError(f"mda_layers: expected four numbers >= 0, got {self.mda_layers}")
        if self.mda_m < 1:
            raise ValueError(f"mda_m: expected >= 1, got {self.mda_m}")
        if not self.cmr_weight >= 0:
            raise ValueError(f"cmr_weight: expected >= 0, got {self.cmr_weight}")
        if not self.cmr_strength > 0:
            raise ValueError(f"cmr_strength: expected > 0, got {self.cmr_strength}")


@dataclass(frozen=True, kw_only=True)
class MCJARecipe(Recipe):
    """A run of MCJA."""

    model: MCJAOptions = field(default_factory=MCJAOptions)


def sysu() -> MCJARecipe:
    """SYSU-MM01: 384 x 192, 8 identities x 16 images of any modality, Adam 3.5e-4, 140 epochs."""
    return MCJARecipe(
        method="mcja",
        dataset="sysu",
        data=DataConfig(
            height=384,
            width=192,
            identities=8,
            images=16,
            sampler="norm_triplet",
            label_order="file",
            erase=0.5,
            erase_area=(0.02, 0.30),
            visible_spectra=("hue", "gray", "cutmix", "jitter"),
        ),
        optim=OptimConfig(name="adam", lr=3.5e-4, betas=(0.9, 0.999), weight_decay=5e-4),
        schedule=ScheduleConfig(epochs=140, milestones=(80, 120), gamma=0.1),
        run=RunConfig(seed=8, eval_every=1, keep=3),
        model=MCJAOptions(),
    )


def regdb() -> MCJARecipe:
    """RegDB, trial 1: 4 identities x 32 images, M = 12, 300 epochs at one rate."""
    recipe = sysu()
    return dataclasses.replace(
        recipe,
        dataset="regdb",
        # The labels in RegDB's lists are not looked at.
        data=dataclasses.replace(recipe.data, identities=4, images=32, label_order="sorted"),
        schedule=dataclasses.replace(recipe.schedule, epochs=300, milestones=()),
        model=dataclasses.replace(recipe.model, mda_m=12),
    )


def llcm() -> MCJARecipe:
    """LLCM. Not official: MCJA published nothing for this data set; SYSU-MM01's recipe as it is."""
    return dataclasses.replace(sysu(), dataset="llcm")


def sysu_arxiv() -> MCJARecipe:
    """SYSU-MM01 without adapters, the model of the first arXiv version (2307.08316).

    That version has the same augmentation and the same loss. Its other numbers could not be
    compared: they are those of `sysu`.
    """
    recipe = sysu()
    return dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, mda_layers=(0, 0, 0, 0))
    )
