"""MPANet: modality alleviation and pattern alignment (Wu et al., CVPR 2021)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastreid_vi.methods.mpanet.recipe import MPANetOptions, MPANetRecipe, llcm, regdb, sysu

if TYPE_CHECKING:
    from fastreid_vi.methods.mpanet.model import MPANet

__all__ = ["MPANet", "MPANetOptions", "MPANetRecipe", "llcm", "regdb", "sysu"]


def __getattr__(name: str) -> Any:
    if name == "MPANet":  # loads torch
        return importlib.import_module("fastreid_vi.methods.mpanet.model").MPANet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
