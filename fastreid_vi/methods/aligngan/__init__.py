"""AlignGAN: joint pixel and feature alignment by adversarial training (Wang et al., ICCV 2019)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastreid_vi.methods.aligngan.recipe import (
    AlignGANOptions,
    AlignGANRecipe,
    llcm,
    regdb,
    sysu,
)

if TYPE_CHECKING:
    from fastreid_vi.methods.aligngan.model import AlignGAN

__all__ = ["AlignGAN", "AlignGANOptions", "AlignGANRecipe", "llcm", "regdb", "sysu"]


def __getattr__(name: str) -> Any:
    if name == "AlignGAN":  # loads torch
        return importlib.import_module("fastreid_vi.methods.aligngan.model").AlignGAN
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
