"""MCJA: multi-level cross-modality joint alignment (Liang et al., TCSVT 2024)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastreid_vi.methods.mcja.recipe import (
    MCJAOptions,
    MCJARecipe,
    llcm,
    regdb,
    sysu,
    sysu_arxiv,
)

if TYPE_CHECKING:
    from fastreid_vi.methods.mcja.model import MCJA

__all__ = ["MCJA", "MCJAOptions", "MCJARecipe", "llcm", "regdb", "sysu", "sysu_arxiv"]


def __getattr__(name: str) -> Any:
    if name == "MCJA":  # loads torch
        return importlib.import_module("fastreid_vi.methods.mcja.model").MCJA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
