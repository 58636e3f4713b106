"""Ranks from features: one matrix product of queries x pool serves every gallery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from fastreid_vi.evaluation.arrays import Int, Mask
from fastreid_vi.evaluation.features import Features, column_offset, distances
from fastreid_vi.evaluation.positions import Labels, Ranks, rank_rows
from fastreid_vi.evaluation.streaming import rank_streaming

Metric = Literal["cosine", "inner", "euclidean", "sqeuclidean"]

# Distances in memory at one time; larger blocks do not make the product faster.
BLOCK_BYTES: Final = 2**25
# Larger features than this are never in memory as a whole.
MEMORY_BYTES: Final = 2**28


def rank_product(
    query: Features,
    gallery: Features,
    used: Int,
    labels: Labels,
    galleries: Sequence[Int],
    metric: Metric,
    threads: int | None,
) -> Ranks:
    """Positions of the matches of every query in every gallery, [T, Q].

    Args:
        query, gallery: all queries, the whole pool.
        used: rows of the pool that some gallery holds, ascending.
        labels: of all queries and of the rows `used`.
        galleries: rows of the pool, T times.
        metric: "cosine" and "inner" are the negative dot product of what the features give.
        threads: as for `rank_rows`.
    """
    if query.dim != gallery.dim:
        raise ValueError(
            f"query.features, gallery.features: expected equal lengths, got {query.dim} and "
            f"{gallery.dim}"
        )
    ranks = Ranks.empty(len(galleries), len(labels.query_ids))
    rows = np.flatnonzero(can_match(labels))
    query.check_others(rows)
    gallery.check_others(used)
    if not len(rows):
        return ranks
    columns = [np.searchsorted(used, gallery_rows) for gallery_rows in galleries]
    squared = metric.endswith("euclidean")
    dtype = np.result_type(query.dtype, gallery.dtype)
    if (len(rows) + len(used)) * query.dim * dtype.itemsize > MEMORY_BYTES:
        found = rank_streaming(
            query, rows, gallery, used, labels, columns, squared=squared, threads=threads
        )
        ranks.put(slice(None), rows, found)
        return ranks
    left = query.rows(rows).astype(dtype, copy=False)
    right = gallery.rows(used).astype(dtype, copy=False)
    offset = column_offset(right, squared=squared)
    block = max(1, BLOCK_BYTES // (len(used) * dtype.itemsize))
    room = np.empty(min(block, len(rows)) * len(used), dtype)
    for begin in range(0, len(rows), block):
        part = rows[begin : begin + block]
        distance = distances(left[begin : begin + block], right, offset, room)
        found = rank_rows(distance, labels.rows(part), columns, part, threads)
        ranks.put(slice(None), part, found)
    return ranks


def can_match(labels: Labels) -> Mask:
    """Queries that keep a match among the pool images in use; the others need no distances."""
    places = 1 + int(max(labels.query_places.max(), labels.pool_places.max()))
    seen = np.zeros((int(labels.pool_ids.max()) + 2, places), bool)
    seen[labels.pool_ids, labels.pool_places] = True  # the last row is nobody: identity -1
    if labels.rule == "none":
        return np.asarray(np.logical_or.reduce(seen, axis=1)[labels.query_ids])
    here = seen[labels.query_ids, labels.query_places]
    return np.asarray(seen.sum(axis=1)[labels.query_ids] > here)
