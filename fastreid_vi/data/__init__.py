"""Data sets, samplers and loaders. Only the loaders need torch; they load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastreid_vi.data.datasets import SysuMM01
from fastreid_vi.data.images import DataError, ImageList, images_in
from fastreid_vi.data.index import Index
from fastreid_vi.data.llcm import LLCM
from fastreid_vi.data.permutations import Permutations
from fastreid_vi.data.regdb import RegDB
from fastreid_vi.data.sampler import IdentityRandom, PairedIdentity, make_sampler

if TYPE_CHECKING:
    from fastreid_vi.data.check import SysuReport, check_sysu
    from fastreid_vi.data.findings import Finding, Report
    from fastreid_vi.data.llcm_check import check_llcm
    from fastreid_vi.data.loader import eval_loader, train_loader
    from fastreid_vi.data.pack import Pack
    from fastreid_vi.data.packing import write_pack
    from fastreid_vi.data.regdb_check import check_regdb
    from fastreid_vi.data.synthetic import synthesize

_LAZY = {
    "Finding": "findings",
    "Pack": "pack",
    "Report": "findings",
    "SysuReport": "check",
    "check_llcm": "llcm_check",
    "check_regdb": "regdb_check",
    "check_sysu": "check",
    "eval_loader": "loader",
    "synthesize": "synthetic",
    "train_loader": "loader",
    "write_pack": "packing",
}

__all__ = [
    "LLCM",
    "DataError",
    "Finding",
    "IdentityRandom",
    "ImageList",
    "Index",
    "Pack",
    "PairedIdentity",
    "Permutations",
    "RegDB",
    "Report",
    "SysuMM01",
    "SysuReport",
    "check_llcm",
    "check_regdb",
    "check_sysu",
    "eval_loader",
    "images_in",
    "make_sampler",
    "synthesize",
    "train_loader",
    "write_pack",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastreid_vi.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastreid_vi.data.{_LAZY[name]}"), name)
