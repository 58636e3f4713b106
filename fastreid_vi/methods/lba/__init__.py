"""LbA: learning by aligning, dense cross-modal correspondences (Park et al., ICCV 2021)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastreid_vi.methods.lba.recipe import LbAOptions, LbARecipe, llcm, regdb, sysu

if TYPE_CHECKING:
    from fastreid_vi.methods.lba.model import LbA

__all__ = ["LbA", "LbAOptions", "LbARecipe", "llcm", "regdb", "sysu"]


def __getattr__(name: str) -> Any:
    if name == "LbA":  # loads torch
        return importlib.import_module("fastreid_vi.methods.lba.model").LbA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
