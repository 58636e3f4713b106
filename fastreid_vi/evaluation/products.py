"""Ranks from features: one matrix product of queries x pool serves every gallery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from fastreid_vi.evaluation.arrays import Int, Mask, Real
from fastreid_vi.evaluation.features import Features
from fastreid_vi.evaluation.positions import Labels, Ranks, rank_rows

Metric = Literal["cosine", "inner", "euclidean", "sqeuclidean"]

# Distances in memory at one time; larger blocks do not make the product faster.
BLOCK_BYTES: Final = 2**25


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
    rows = np.flatnonzero(_can_match(labels))
    query.check_others(rows)
    gallery.check_others(used)
    columns = [np.searchsorted(used, gallery_rows) for gallery_rows in galleries]
    dtype = np.result_type(query.dtype, gallery.dtype)
    left = query.rows(rows).astype(dtype, copy=False)
    right = gallery.rows(used).astype(dtype, copy=False)
    offset = prepare(left, right, metric)
    block = max(1, BLOCK_BYTES // (len(used) * dtype.itemsize))
    room = np.empty((min(block, len(rows)), len(used)), dtype)
    for begin in range(0, len(rows), block):
        part = rows[begin : begin + block]
        distance = distances(left[begin : begin + block], right, offset, room)
        found = rank_rows(distance, labels.rows(part), columns, part, threads)
        ranks.put(slice(None), part, found)
    return ranks


def prepare(left: Real, right: Real, metric: Metric) -> Real | None:
    """Scale `left` in place for `distances`; what `distances` adds to every column, if anything."""
    # Ranking needs no |q|^2, the same for a query's whole row, and no root.
    offset = np.einsum("nd,nd->n", right, right) if metric.endswith("euclidean") else None
    left *= -1 if offset is None else -2
    return offset


def distances(left: Real, right: Real, offset: Real | None, room: Real) -> Real:
    """Keys that order every row's columns, [rows of left, rows of right], written into `room`."""
    out: Real = room[: len(left), : len(right)]
    np.matmul(left, right.T, out=out)
    if offset is not None:
        out += offset
    return out


def _can_match(labels: Labels) -> Mask:
    """Queries that keep a match among the pool images in use; the others need no distances."""
    places = 1 + int(max(labels.query_places.max(), labels.pool_places.max()))
    seen = np.zeros((int(labels.pool_ids.max()) + 2, places), bool)
    seen[labels.pool_ids, labels.pool_places] = True  # the last row is nobody: identity -1
    if labels.rule == "none":
        return np.asarray(np.logical_or.reduce(seen, axis=1)[labels.query_ids])
    here = seen[labels.query_ids, labels.query_places]
    return np.asarray(seen.sum(axis=1)[labels.query_ids] > here)
