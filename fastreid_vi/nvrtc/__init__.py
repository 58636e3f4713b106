"""CUDA rooms without nvcc: the device code of csrc/cuda, compiled by CuPy's NVRTC on first use.

Where the compiled library has no CUDA code, `_dispatch` asks here. One module for each
csrc/cuda/<family>.cu does what that file's host code does: allocate, choose the kernel, launch. The
kernels are the same files (device/ leads to csrc/cuda; a wheel holds a copy), compiled for the
present device, kept on disk, started on PyTorch's current stream.

    kernel.py    a kernel, its instantiations and its launch
    compiler.py  NVRTC: source, options, headers, cache
    runtime.py   device, stream, arguments
    layout.py    feature maps and types, as csrc/common.h has them
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Final

from fastreid_vi.nvrtc import compiler

# Op -> module of this package.
ROOMS: Final = {
    "gem_pool": "pool",
    "gem_pool_backward": "pool",
    "pattern_pool": "pattern_pool",
    "pattern_pool_backward": "pattern_pool",
    "batch_hard_triplet_loss": "triplet",
    "batch_hard_triplet_loss_backward": "triplet",
    "weighted_triplet_loss": "weighted",
    "weighted_triplet_loss_backward": "weighted",
    "center_cluster_loss": "cluster",
    "center_cluster_loss_backward": "cluster",
    "cross_modality_retrieval_loss": "cmr",
    "cross_modality_retrieval_loss_backward": "cmr",
    "soft_rank": "softrank",
    "soft_rank_backward": "softrank",
    "rank_rows": "ranking",
    "merge_top_k": "topk",
    "pair_scores": "topk",
    "row_norms": "topk",
    "rerank_neighbors": "rerank",
    "rerank_average": "rerank",
    "rerank_fuse": "rerank",
}


def room(op: str) -> Callable[..., Any] | str:
    """The function that computes this op, or the reason why this process has none."""
    if op not in ROOMS:
        return f"no NVRTC launcher for {op}"
    if reason := _why_not():
        return reason
    module = importlib.import_module(f"fastreid_vi.nvrtc.{ROOMS[op]}")
    found: Callable[..., Any] = getattr(module, op)
    return found


def owns(function: Callable[..., Any]) -> bool:
    """Whether `room` gave this function."""
    return (getattr(function, "__module__", None) or "").startswith(f"{__name__}.")


def path() -> str:
    """What computes these rooms: "NVRTC through CuPy 14.2"."""
    version = importlib.import_module("cupy").__version__
    return f"NVRTC through CuPy {'.'.join(version.split('.')[:2])}"


_why_not = functools.cache(compiler.why_not)
