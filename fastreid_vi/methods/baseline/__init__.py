"""Plain two-stream baseline: separate stems, shared trunk, identity and triplet loss."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastreid_vi.methods.baseline.recipe import BaselineOptions, BaselineRecipe, llcm, regdb, sysu

if TYPE_CHECKING:
    from fastreid_vi.methods.baseline.model import Baseline

__all__ = ["Baseline", "BaselineOptions", "BaselineRecipe", "llcm", "regdb", "sysu"]


def __getattr__(name: str) -> Any:
    if name == "Baseline":  # loads torch
        return importlib.import_module("fastreid_vi.methods.baseline.model").Baseline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
