"""Augmentation with explicit draws: uint8 [N, H, W, 3] in, normalised floating point out.

`sample_plan` draws, `augment` does everything that was drawn in one pass; the functions beside it
do one step each. Nothing is differentiable. Names load on first use: `fastreid_vi.augment.draws`
needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastreid_vi.augment.draws import KINDS

if TYPE_CHECKING:
    from fastreid_vi.augment.erase import random_erase
    from fastreid_vi.augment.explicit import (
        channel_cutmix,
        channel_selection,
        horizontal_flip,
        hue_jitter,
        normalize,
        pad_crop,
        spectrum_jitter,
        weighted_grayscale,
    )
    from fastreid_vi.augment.fused import augment
    from fastreid_vi.augment.plan import VIEWS, Plan, level_table, plain_plan, view_plan
    from fastreid_vi.augment.sampling import batch_plan, plan_of, sample_plan

_LAZY = {
    "VIEWS": "plan",
    "Plan": "plan",
    "augment": "fused",
    "batch_plan": "sampling",
    "channel_cutmix": "explicit",
    "channel_selection": "explicit",
    "horizontal_flip": "explicit",
    "hue_jitter": "explicit",
    "level_table": "plan",
    "normalize": "explicit",
    "pad_crop": "explicit",
    "plain_plan": "plan",
    "plan_of": "sampling",
    "random_erase": "erase",
    "sample_plan": "sampling",
    "spectrum_jitter": "explicit",
    "view_plan": "plan",
    "weighted_grayscale": "explicit",
}

__all__ = [
    "KINDS",
    "VIEWS",
    "Plan",
    "augment",
    "batch_plan",
    "channel_cutmix",
    "channel_selection",
    "horizontal_flip",
    "hue_jitter",
    "level_table",
    "normalize",
    "pad_crop",
    "plain_plan",
    "plan_of",
    "random_erase",
    "sample_plan",
    "spectrum_jitter",
    "view_plan",
    "weighted_grayscale",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"fastreid_vi.augment.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'fastreid_vi.augment' has no attribute {name!r}")
