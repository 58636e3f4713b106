"""Launch of the kernels of re-ranking, as csrc/cuda/rerank.cu does it."""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from fastreid_vi.nvrtc import compiler, runtime
from fastreid_vi.nvrtc.kernel import Kernel
from fastreid_vi.nvrtc.layout import VECTOR_BYTES, WARP, blocks, vector_of

_SIZES: Final = compiler.constants("rerank.cuh")
_RANKS = Kernel("rerank.cuh", "rerank_ranks_kernel")
_NEIGHBORS = Kernel("rerank.cuh", "rerank_neighbors_kernel")
_AVERAGE = Kernel("rerank.cuh", "rerank_average_kernel")
_FUSE = Kernel("rerank.cuh", "rerank_fuse_kernel")

Sparse = tuple[Tensor, Tensor, Tensor]


class _Lists(ctypes.Structure):
    """`RerankLists` of rerank.cuh."""

    _fields_ = (*((f"at{i}", ctypes.c_void_p) for i in range(3)), ("length", ctypes.c_int))


class _Rows(ctypes.Structure):
    """`RerankRows` and `RerankOutput`."""

    _fields_ = tuple((f"at{i}", ctypes.c_void_p) for i in range(3))


class _Scale(ctypes.Structure):
    """`RerankScale`."""

    _fields_ = (("maxima", ctypes.c_void_p), ("rounding", ctypes.c_void_p))


class _Shape(ctypes.Structure):
    """`RerankShape`."""

    _fields_ = (*((f"size{i}", ctypes.c_int) for i in range(5)), ("weight", ctypes.c_float))


def rerank_neighbors(
    lists: Tensor,
    distances: Tensor,
    features: Tensor,
    maxima: Tensor,
    rounding: Tensor,
    k1: int,
    half: int,
    expand: bool,
) -> Sparse:
    """V."""
    op = "rerank_neighbors"
    if lists.dim() != 2 or features.dim() != 2:
        raise RuntimeError(f"{op}: expected lists [R, L] and features [R, D]")
    (rows, length), dim = lists.shape, features.shape[1]
    for name, value in (("rows", rows), ("features' length", dim), ("k1", k1), ("half", half)):
        _number(f"{op}: {name}", value)
    lists = _matrix(f"{op}: lists", lists, rows, length, torch.int32)
    distances = _matrix(f"{op}: distances", distances, rows, length, torch.float32)
    features = _matrix(f"{op}: features", features, rows, dim, torch.float32)
    scale = _scale(op, maxima, rounding, rows)
    reach, added = min(k1 + 1, length), min(half + 1, length) if expand else 0
    room = min(reach * (1 + added), rows)
    result = _sparse_rows(lists, rows, room)
    if rows == 0:
        return result
    size = 2 * -(-rows // 32) * 4
    limit = runtime.present.shared_memory_limit(lists) - 1024
    if size > limit:
        raise RuntimeError(
            f"{op}: {rows} items need {size} bytes of shared memory, this device has {limit}"
        )
    ranks = lists.new_empty((rows, length))
    if length:
        per_block = _SIZES["kRanksThreads"] // WARP
        _RANKS.launch(
            (),
            blocks(-(-(rows * length) // per_block)),
            _SIZES["kRanksThreads"],
            0,
            lists,
            ranks,
            ctypes.c_int64(rows * length),
            ctypes.c_int(length),
        )
    _NEIGHBORS.launch(
        (),
        blocks(rows),
        _SIZES["kNeighborsThreads"],
        size,
        _Lists(lists.data_ptr(), distances.data_ptr(), ranks.data_ptr(), length),
        _Scale(*(part.data_ptr() for part in scale)),
        features,
        _addresses(result),
        ctypes.c_int(rows),
        ctypes.c_int(dim),
        ctypes.c_int(k1),
        ctypes.c_int(half),
        ctypes.c_int(room),
        ctypes.c_bool(expand),
    )
    return result


def rerank_average(
    lists: Tensor, counts: Tensor, columns: Tensor, values: Tensor, room: int
) -> Sparse:
    """V'."""
    op = "rerank_average"
    if lists.dim() != 2 or columns.dim() != 2:
        raise RuntimeError(f"{op}: expected lists [M, K] and columns [R, E]")
    (rows, listed), (items, entries) = lists.shape, columns.shape
    _number(f"{op}: rows", items)
    _number(f"{op}: room", room)
    lists = _matrix(f"{op}: lists", lists, rows, listed, torch.int32)
    given = _rows(op, counts, columns, values)
    result = _sparse_rows(lists, rows, room)
    if rows == 0:
        return result
    _AVERAGE.launch(
        (),
        blocks(rows),
        _SIZES["kAverageThreads"],
        min(items, _SIZES["kAverageColumns"]) * 4,
        lists,
        _addresses(given),
        _addresses(result),
        ctypes.c_int(listed),
        ctypes.c_int(items),
        ctypes.c_int(entries),
        ctypes.c_int(room),
    )
    return result


def rerank_fuse(
    query_counts: Tensor,
    query_columns: Tensor,
    query_values: Tensor,
    gallery_counts: Tensor,
    gallery_columns: Tensor,
    gallery_values: Tensor,
    base: Tensor,
    maxima: Tensor,
    rounding: Tensor,
    query_sets: int,
    gallery_sets: int,
    columns: int,
    weight: float,
) -> Tensor:
    """F."""
    op = "rerank_fuse"
    if not base.dim() == query_columns.dim() == gallery_columns.dim() == 2:
        raise RuntimeError(f"{op}: expected matrices")
    (rows, images), (longest, others) = base.shape, gallery_columns.shape
    sets = query_sets >= 1 and gallery_sets >= 1 and rows % query_sets == 0
    if not sets or others != images * gallery_sets:
        raise RuntimeError(f"{op}: base [query sets x Q, G] does not fit the sets")
    _number(f"{op}: columns", columns)
    base = _matrix(f"{op}: base", base, rows, images, torch.float32)
    room = query_columns.shape[1]
    asking = (
        vector_of(f"{op}: query_counts", query_counts, rows, torch.int32),
        _matrix(f"{op}: query_columns", query_columns, rows, room, torch.int32),
        _matrix(f"{op}: query_values", query_values, rows, room, torch.float32),
    )
    asked = (
        vector_of(f"{op}: gallery_counts", gallery_counts, others, torch.int32),
        _matrix(f"{op}: gallery_columns", gallery_columns, longest, others, torch.int32),
        _matrix(f"{op}: gallery_values", gallery_values, longest, others, torch.float32),
    )
    scale = _scale(op, maxima, rounding, rows)
    queries = rows // query_sets
    out = base.new_empty((queries, images))
    if out.numel() == 0:
        return out
    width = min(columns, _SIZES["kFuseColumns"])
    chunks = -(-images // _SIZES["kFuseThreads"])
    groups = -(-queries // _SIZES["kFuseQueries"])
    _FUSE.launch(
        (),
        blocks(groups * chunks),
        _SIZES["kFuseThreads"],
        width * VECTOR_BYTES,
        _addresses(asking),
        _addresses(asked),
        base,
        _Scale(*(part.data_ptr() for part in scale)),
        out,
        _Shape(queries, query_sets, images, gallery_sets, columns, weight),
        ctypes.c_int(room),
        ctypes.c_int(width),
        ctypes.c_int(chunks),
    )
    return out


def _addresses(rows: Sparse) -> _Rows:
    return _Rows(*(part.data_ptr() for part in rows))


def _sparse_rows(like: Tensor, rows: int, room: int) -> Sparse:
    return (
        like.new_empty((rows,)),
        like.new_empty((rows, room)),
        like.new_empty((rows, room), dtype=torch.float32),
    )


def _rows(op: str, counts: Tensor, columns: Tensor, values: Tensor) -> Sparse:
    rows, entries = columns.shape
    return (
        vector_of(f"{op}: counts", counts, rows, torch.int32),
        _matrix(f"{op}: columns", columns, rows, entries, torch.int32),
        _matrix(f"{op}: values", values, rows, entries, torch.float32),
    )


def _scale(op: str, maxima: Tensor, rounding: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return (
        vector_of(f"{op}: maxima", maxima, rows, torch.float32),
        vector_of(f"{op}: rounding", rounding, rows, torch.float32),
    )


def _matrix(name: str, x: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if x.dtype != dtype or x.shape != (rows, columns):
        kind = str(dtype).removeprefix("torch.")
        raise RuntimeError(f"{name}: expected {kind} of shape [{rows}, {columns}]")
    return x.contiguous()


def _number(name: str, value: int) -> None:
    if not 0 <= value < 2**31 - 1:
        raise RuntimeError(f"{name}: expected 0 to 2^31 - 2, got {value}")
