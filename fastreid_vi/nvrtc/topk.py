"""Launch of the kernels of search, as csrc/cuda/topk.cu does it."""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from fastreid_vi.nvrtc import compiler, runtime
from fastreid_vi.nvrtc.kernel import Kernel
from fastreid_vi.nvrtc.layout import (
    ACCUMULATORS,
    VECTOR_BYTES,
    WARP,
    blocks,
    c_type,
    sort_padded,
    vector_of,
)

_SIZES: Final = compiler.constants("topk.cuh")
_METRICS: Final = {"cosine": 0, "inner": 1, "euclidean": 2}
_INSTANCES: Final = tuple((t,) for t in ACCUMULATORS)
_MERGE = Kernel("topk.cuh", "merge_top_k_kernel", _INSTANCES)
_PAIRS = Kernel("topk.cuh", "pair_scores_kernel", _INSTANCES)
_NORMS = Kernel("topk.cuh", "row_norms_kernel", _INSTANCES)


class _Terms(ctypes.Structure):
    """`ColumnTerms` of topk.cuh."""

    _fields_ = (("scale", ctypes.c_void_p), ("shift", ctypes.c_void_p))


class _Rows(ctypes.Structure):
    """`NormedRows`."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("norms", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
    )


def merge_top_k(
    best: Tensor,
    best_index: Tensor,
    scores: Tensor,
    indices: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    first_index: int,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The k best of a list and a block of scores."""
    own = _rows_of("merge_top_k: scores", scores)
    rows, columns = own.shape
    if best.dim() != 2:
        raise RuntimeError("merge_top_k: best: expected a matrix")
    listed = best.shape[1]
    longest = _SIZES["kTopKLongest"]
    if not (1 <= k <= longest and listed <= k):
        raise RuntimeError(
            f"merge_top_k: expected k from 1 to {longest} and no longer list of the best, got "
            f"k = {k} and a list of {listed}"
        )
    if first_index < 0 or first_index + columns >= 2**31:
        raise RuntimeError(
            f"merge_top_k: expected indices below 2^31, got first_index {first_index}"
        )
    kept = min(k, listed + columns)
    best = _shaped("merge_top_k: best", best, rows, listed, own.dtype)
    best_index = _shaped("merge_top_k: best_index", best_index, rows, listed, torch.int64)
    if indices is not None:
        indices = _shaped("merge_top_k: indices", indices, rows, columns, torch.int64)
    if scale is not None:
        scale = vector_of("merge_top_k: scale", scale, columns, own.dtype)
    if shift is not None:
        shift = vector_of("merge_top_k: shift", shift, columns, own.dtype)
    out = own.new_empty((rows, kept))
    out_index = own.new_empty((rows, kept), dtype=torch.int64)
    if out.numel() == 0:
        return out, out_index
    padded = sort_padded(kept)
    room = max(padded, _SIZES["kTopKBuffer"])
    size = (padded + room) * 2 * own.element_size()
    limit = runtime.present.shared_memory_limit(own) - 1024
    if size > limit:
        raise RuntimeError(
            f"merge_top_k: k = {k} needs {size} bytes of shared memory, this device has {limit}"
        )
    vector = VECTOR_BYTES // own.element_size()
    wide = columns % vector == 0 and (rows <= 1 or own.stride(0) % vector == 0)
    wide &= all(t.data_ptr() % VECTOR_BYTES == 0 for t in (own, scale, shift) if t is not None)
    _MERGE.launch(
        (c_type(own),),
        blocks(rows),
        _SIZES["kTopKThreads"],
        size,
        best,
        best_index,
        own,
        indices,
        _Terms(*(None if t is None else t.data_ptr() for t in (scale, shift))),
        out,
        out_index,
        ctypes.c_int64(own.stride(0)),
        ctypes.c_int64(first_index),
        ctypes.c_int(listed),
        ctypes.c_int(columns),
        ctypes.c_int(kept),
        ctypes.c_int(padded),
        ctypes.c_int(room),
        ctypes.c_bool(wide),
    )
    return out, out_index


def pair_scores(
    query: Tensor,
    gallery: Tensor,
    query_norms: Tensor,
    gallery_norms: Tensor,
    columns: Tensor,
    metric: str,
) -> Tensor:
    """Scores of chosen pairs."""
    if metric not in _METRICS:
        raise RuntimeError(f"pair_scores: expected a known metric, got {metric}")
    left, right = _rows_of("pair_scores: query", query), _rows_of("pair_scores: gallery", gallery)
    if left.dtype != right.dtype or left.shape[1] != right.shape[1]:
        raise RuntimeError(
            "pair_scores: expected query and gallery of one dtype and length of rows"
        )
    ours = vector_of("pair_scores: query_norms", query_norms, len(left), torch.float64)
    others = vector_of("pair_scores: gallery_norms", gallery_norms, len(right), torch.float64)
    if columns.dim() != 2:
        raise RuntimeError("pair_scores: columns: expected a matrix")
    listed = columns.shape[1]
    chosen = _shaped("pair_scores: columns", columns, len(left), listed, torch.int64)
    scores = left.new_empty((len(left), listed))
    if scores.numel() == 0:
        return scores
    _PAIRS.launch(
        (c_type(left),),
        _warps(scores.numel()),
        _SIZES["kScoreThreads"],
        0,
        _Rows(left.data_ptr(), ours.data_ptr(), left.stride(0)),
        _Rows(right.data_ptr(), others.data_ptr(), right.stride(0)),
        chosen,
        scores,
        ctypes.c_int64(scores.numel()),
        ctypes.c_int(listed),
        ctypes.c_int(left.shape[1]),
        ctypes.c_int(_METRICS[metric]),
    )
    return scores


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norms."""
    own = _rows_of("row_norms: rows", rows)
    norms = own.new_empty((len(own),), dtype=torch.float64)
    if len(own):
        _NORMS.launch(
            (c_type(own),),
            _warps(len(own)),
            _SIZES["kScoreThreads"],
            0,
            own,
            norms,
            ctypes.c_int64(own.stride(0)),
            ctypes.c_int64(len(own)),
            ctypes.c_int(own.shape[1]),
        )
    return norms


def _rows_of(name: str, x: Tensor) -> Tensor:
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"{name}: expected a matrix of float32 or float64")
    if max(x.shape) >= 2**31 - 1:
        raise RuntimeError(f"{name}: expected fewer than 2^31 rows and columns")
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _shaped(name: str, x: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if x.dtype != dtype or x.shape != (rows, columns):
        raise RuntimeError(f"{name}: expected shape [{rows}, {columns}] and a dtype that fits")
    return x.contiguous()


def _warps(count: int) -> int:
    per_block = _SIZES["kScoreThreads"] // WARP
    return blocks(-(-count // per_block))
