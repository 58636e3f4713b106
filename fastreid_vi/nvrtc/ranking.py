"""Launch of the ranking kernels, as csrc/cuda/ranking.cu does it."""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from fastreid_vi.nvrtc import compiler
from fastreid_vi.nvrtc.kernel import Kernel
from fastreid_vi.nvrtc.layout import ACCUMULATORS, FLAGS, blocks, c_type, sort_padded, vector_of

_SIZES: Final = compiler.constants("ranking.cuh")
_RULES: Final = {"none": 0, "location": 1, "same_id_and_camera": 2}
_THREADS: Final = _SIZES["kRankThreads"]
_RANK = Kernel("ranking.cuh", "rank_rows_kernel", [(t, f) for t in ACCUMULATORS for f in FLAGS])
_NAN = Kernel("ranking.cuh", "nan_column_kernel", [(t,) for t in ACCUMULATORS])


class _Labels(ctypes.Structure):
    """`RankLabels` of ranking.cuh."""

    _fields_ = (*((f"at{i}", ctypes.c_void_p) for i in range(4)), ("rule", ctypes.c_int))


class _Galleries(ctypes.Structure):
    """`RankGalleries`."""

    _fields_ = (
        ("columns", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("count", ctypes.c_int),
    )


class _Counts(ctypes.Structure):
    """`RankCounts`."""

    _fields_ = tuple((f"at{i}", ctypes.c_void_p) for i in range(5))


def rank_rows(
    distance: Tensor,
    query_ids: Tensor,
    query_places: Tensor,
    pool_ids: Tensor,
    pool_places: Tensor,
    columns: Tensor,
    offsets: Tensor,
    num_ids: int,
    most: int,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Matches, the first, its identity's and the last position, precision, NaN columns."""
    if distance.dim() != 2 or distance.dtype not in (torch.float32, torch.float64):
        raise RuntimeError("rank_rows: expected distance [R, N], float32 or float64")
    rows, pool = distance.shape
    count = offsets.numel() - 1
    if max(rows, pool, num_ids, most, columns.numel(), count) > _SIZES["kRankLongest"]:
        raise RuntimeError(
            "rank_rows: expected fewer than 2^30 rows, columns, identities and galleries"
        )
    if min(count, num_ids, most) < 0:
        raise RuntimeError("rank_rows: expected offsets with an entry, num_ids >= 0 and most >= 0")
    if rule not in _RULES:
        raise RuntimeError(f"rank_rows: expected a known rule, got {rule}")
    labels = [
        vector_of(f"rank_rows: {name}", values, length, torch.int32)
        for name, values, length in (
            ("query_ids", query_ids, rows),
            ("query_places", query_places, rows),
            ("pool_ids", pool_ids, pool),
            ("pool_places", pool_places, pool),
        )
    ]
    listed = vector_of("rank_rows: columns", columns, columns.numel(), torch.int32)
    limits = vector_of("rank_rows: offsets", offsets, count + 1, torch.int64)
    counts = [distance.new_empty((count, rows), dtype=torch.int32) for _ in range(4)]
    precision = distance.new_empty((count, rows), dtype=torch.float64)
    nan_column = distance.new_empty((rows,), dtype=torch.int32)
    result = (counts[0], counts[1], counts[2], counts[3], precision, nan_column)
    if rows == 0:
        return result
    _launch(
        distance,
        _Labels(*(part.data_ptr() for part in labels), _RULES[rule]),
        _Galleries(listed.data_ptr(), limits.data_ptr(), count),
        _Counts(*(part.data_ptr() for part in result[:5])),
        nan_column,
        num_ids,
        max(most, 1),
    )
    return result


def _launch(
    distance: Tensor,
    labels: _Labels,
    galleries: _Galleries,
    counts: _Counts,
    nan_column: Tensor,
    num_ids: int,
    most: int,
) -> None:
    kind, rows = c_type(distance), distance.shape[0]
    strides = ctypes.c_int64(distance.stride(0)), ctypes.c_int64(distance.stride(1))
    _NAN.launch(
        (kind,), blocks(rows), _THREADS, 0,
        distance, *strides, nan_column, ctypes.c_int(distance.shape[1]),
    )  # fmt: skip
    if galleries.count == 0:
        return
    size = _bytes(most, num_ids, distance.element_size())
    shared = size <= _SIZES["kRankShared"]
    together = _SIZES["kRankLongest" if shared else "kRankBlocks"]
    step = min(max(together // galleries.count, 1), rows)
    room = 0 if shared else step * galleries.count * size
    scratch = distance.new_empty((room,), dtype=torch.uint8)
    for first in range(0, rows, step):
        _RANK.launch(
            (kind, FLAGS[not shared]),
            blocks(min(step, rows - first) * galleries.count),
            _THREADS,
            size if shared else 0,
            distance,
            *strides,
            labels,
            galleries,
            nan_column,
            counts,
            scratch,
            ctypes.c_int64(size),
            ctypes.c_int(rows),
            ctypes.c_int(first),
            ctypes.c_int(num_ids),
            ctypes.c_int(most),
        )


def _bytes(most: int, num_ids: int, element: int) -> int:
    """`RankMemory::bytes`."""
    words = most + (num_ids + 31) // 32
    return sort_padded(most) * 2 * element + (words + 3) // 4 * 16
