"""MPANet's options and its published training recipes. No torch here.

Spec: mpanet 3 (quirks M1 to M20) and 4.
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
class MPANetOptions:
    """Network and losses; defaults are the official recipe for SYSU-MM01 unless a field says so."""

    depth: Literal[18, 34, 50] = 50
    """ResNet depth; paper and official code: 50."""
    last_stride: Literal[1, 2] = 1
    """Stride of layer4; official code: 1 (`drop_last_stride`)."""
    weights: str = "imagenet"
    """Start of the backbone: "imagenet" (official), "none", or a torchvision state dict file."""
    modality_attention: Literal[0, 1, 2] = 2
    """2: MAM after layer3 and layer4 (paper, official); 1: after layer4 only; 0: none."""
    parts: int = 6
    """Pattern maps; paper and official code: 6."""
    margin: float = 0.7
    """Least distance between two centres; official: 0.7."""
    sep_weight: float = 0.5
    """Weight of the separation loss; official YAML: 0.5 (M20)."""
    sep_normalize: bool = False
    """Divide the separation loss by the number of positions; official: no, so it grows with the
    input (M9)."""
    cc_weight: float = 1.0
    """Weight of the centre cluster loss; official: 1."""
    cc_mode: Literal["pairs", "rows"] = "pairs"
    """Hinge over identity "pairs", the paper's, in any row order; or over "rows" with anchors 0, K,
    2K, ..., the official code's: the same in identity-major batches only (M1)."""
    cc_safe: bool = True
    """Zero gradient for a row that equals its centre; official: no, NaN for that identity (M2)."""
    cc_expand: bool = False
    """Centre distances as a^2 + b^2 - 2ab, as the official code does, up to 0.7 % off in float32
    (M3)."""
    sid_weight: float = 1.0
    """Weight of both modality classifiers' loss. The official code adds `weight_sid` 0.5 twice:
    1.0; the paper's single weight is 0.5 (M4)."""
    kl_weight: float = 2.5
    """Weight of mutual mean learning's divergence; official YAML: 2.5 (M20)."""
    kl_direction: Literal["student_teacher", "teacher_student"] = "student_teacher"
    """KL(student, teacher) as the official code computes it, or the other way round (M5)."""
    update_rate: float = 0.2
    """u of the mean classifiers up to epoch 99; official YAML: 0.2 (M20), then 20 / (epoch + 1)."""
    ema_update: Literal["before_loss", "after_step"] = "before_loss"
    """When the mean classifiers move: in every training forward, before the loss (official), or
    after the optimiser's step (paper) (M6)."""
    normalize_test: bool = True
    """L2-normalise test features; official: on SYSU-MM01 only (M18)."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.parts < 1:
            raise ValueError(f"parts: expected >= 1, got {self.parts}")
        if not self.margin > 0:
            raise ValueError(f"margin: expected > 0, got {self.margin}")
        for name in ("sep_weight", "cc_weight", "sid_weight", "kl_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected >= 0, got {getattr(self, name)}")
        if not 0 <= self.update_rate <= 1:
            raise ValueError(f"update_rate: expected 0 to 1, got {self.update_rate}")


@dataclass(frozen=True, kw_only=True)
class MPANetRecipe(Recipe):
    """A run of MPANet."""

    model: MPANetOptions = field(default_factory=MPANetOptions)


def sysu() -> MPANetRecipe:
    """SYSU-MM01: 384 x 128, 16 identities x 8 images, Adam 3.5e-4, 140 epochs."""
    return MPANetRecipe(
        method="mpanet",
        dataset="sysu",
        data=DataConfig(
            height=384,
            width=128,
            identities=16,
            images=8,
            sampler="identity_random",
            label_order="file",
            erase=0.5,
        ),
        optim=OptimConfig(name="adam", lr=3.5e-4, betas=(0.9, 0.999), weight_decay=5e-4),
        schedule=ScheduleConfig(epochs=140, milestones=(80, 120), gamma=0.1),
        run=RunConfig(seed=1, eval_every=5, checkpoint_every=5, keep=3),
        model=MPANetOptions(),
    )


def regdb() -> MPANetRecipe:
    """RegDB: 256 x 128, 12 identities x 10 images, 140 epochs, raw test features."""
    recipe = sysu()
    return dataclasses.replace(
        recipe,
        dataset="regdb",
        # The labels in RegDB's lists are not looked at.
        data=dataclasses.replace(
            recipe.data, height=256, identities=12, images=10, label_order="sorted"
        ),
        schedule=dataclasses.replace(recipe.schedule, milestones=(110,)),
        model=dataclasses.replace(recipe.model, normalize_test=False),
    )


def llcm() -> MPANetRecipe:
    """LLCM. Not official: MPANet is older than this data set.

    SYSU-MM01's recipe at 384 x 144, the size that the data set's authors train at.
    """
    recipe = sysu()
    return dataclasses.replace(
        recipe, dataset="llcm", data=dataclasses.replace(recipe.data, width=144)
    )
