"""Visible-infrared person re-identification: published methods on fused kernels, exact evaluation.

Submodules load on first use: `import fastreid_vi` and `fastreid_vi.evaluation` do not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastreid_vi._backend import backend
from fastreid_vi.version import __version__

if TYPE_CHECKING:
    from fastreid_vi._dispatch import backends

_SUBMODULES = (
    "augment",
    "config",
    "data",
    "evaluation",
    "layers",
    "methods",
    "ops",
    "report",
    "train",
)

__all__ = ["__version__", "backend", "backends", *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name == "backends":
        return importlib.import_module("fastreid_vi._dispatch").backends
    if name in _SUBMODULES:
        return importlib.import_module(f"fastreid_vi.{name}")
    raise AttributeError(f"module 'fastreid_vi' has no attribute {name!r}")
