"""Where the matches of every query stand in many galleries, each some columns of one matrix.

Two rooms give the same bits:

    retrieval   C++ threads: counts the images ahead of each match, sorts no row
    reference   NumPy: a stable argsort of every row

So do those of `device`, for distances that are there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from fastreid_vi import _backend
from fastreid_vi.evaluation.arrays import Dense, Double, Int, Real, dense, on_device

CameraRule = Literal["none", "location", "same_id_and_camera"]


class Ranks(NamedTuple):
    """Where the matches stand, [T, Q]: gallery, query. Zeros, and AP NaN, without a match."""

    matches: Dense
    first_image: Dense
    first_identity: Dense
    last_image: Dense
    average_precision: Double

    @classmethod
    def empty(cls, galleries: int, queries: int) -> Ranks:
        """No match anywhere."""
        shape = (galleries, queries)
        zeros = [np.zeros(shape, np.int32) for _ in range(4)]
        return cls(zeros[0], zeros[1], zeros[2], zeros[3], np.full(shape, np.nan))

    def gallery(self, index: int) -> Ranks:
        """One gallery, [Q] each."""
        return Ranks(
            self.matches[index],
            self.first_image[index],
            self.first_identity[index],
            self.last_image[index],
            self.average_precision[index],
        )

    def queries(self, rows: Int) -> Ranks:
        """Some queries of one gallery."""
        return Ranks(
            self.matches[rows],
            self.first_image[rows],
            self.first_identity[rows],
            self.last_image[rows],
            self.average_precision[rows],
        )

    def put(self, galleries: int | slice, queries: Int | slice, found: Ranks) -> None:
        """Write what was found for some queries of one or all galleries."""
        whole: Any  # mypy joins the field types to object
        for whole, part in zip(self, found, strict=True):
            whole[galleries, queries] = part


@dataclass(frozen=True)
class Labels:
    """Identities and places of queries and pool, dense; a query identity the pool lacks is -1."""

    query_ids: Dense
    query_places: Dense
    pool_ids: Dense
    pool_places: Dense
    rule: CameraRule

    def rows(self, rows: Int | slice) -> Labels:
        """The same pool, some of the queries."""
        return Labels(
            self.query_ids[rows],
            self.query_places[rows],
            self.pool_ids,
            self.pool_places,
            self.rule,
        )


def make_labels(
    query_ids: Int, query_cams: Int, pool_ids: Int, pool_cams: Int, rule: CameraRule
) -> Labels:
    """Dense labels; the rule `location` puts cameras 2 and 3 into one place."""
    identities = np.unique(pool_ids)
    if rule == "location":
        query_cams = np.where(query_cams == 3, 2, query_cams)
        pool_cams = np.where(pool_cams == 3, 2, pool_cams)
    places = np.unique(np.concatenate([query_cams, pool_cams]))
    return Labels(
        dense(query_ids, identities),
        dense(query_cams, places),
        dense(pool_ids, identities),
        dense(pool_cams, places),
        rule,
    )


def why_not(backend: str) -> str | None:
    """Why this process cannot rank with a backend; None when it can."""
    if backend == "reference":
        return None
    if backend != "retrieval":
        return f"ranking has no {backend} room"
    try:
        importlib.import_module("fastreid_vi._retrieval")
    except ImportError as error:
        return f"the C++ extension _retrieval does not load: {error}"
    return None


def choose() -> str:
    """The backend `rank_rows` uses: the one asked for, else retrieval where it was built."""
    forced = _backend.forced()
    if forced in ("reference", "retrieval"):
        if reason := why_not(forced):
            raise RuntimeError(
                f"ranking: backend {forced!r} was asked for but cannot run: {reason}"
            )
        return forced
    return "retrieval" if why_not("retrieval") is None else "reference"


def rank_rows(
    distance: Any, labels: Labels, galleries: Sequence[Int], names: Int, threads: int | None
) -> Ranks:
    """Place the matches of every row in every gallery.

    Args:
        distance: [R, N], float32 or float64, any strides: queries x pool; a NumPy array, or a torch
            tensor for the rooms of its device.
        labels: of these R queries and N pool images.
        galleries: T lists of pool columns in gallery order, which decides ties.
        names: [R] query numbers, for the message about a NaN.
        threads: of the C++ room; None for all cores of this process.
    """
    if isinstance(distance, np.ndarray):
        room = _retrieval if choose() == "retrieval" else _reference
        ranks, bad_row = room(distance, labels, galleries, threads or cores())
        column = int(np.isnan(distance[bad_row]).argmax()) if bad_row >= 0 else -1
    else:
        device = importlib.import_module("fastreid_vi.evaluation.device")
        ranks, columns = device.rank_rows(distance, labels, galleries)
        bad_row = int((columns >= 0).argmax())
        column = int(columns[bad_row])
    if column >= 0:
        raise ValueError(f"distance: NaN for query {names[bad_row]} (column {column})")
    return ranks


def stays_on_device(value: Any) -> bool:
    """Whether the rooms of `evaluation.device` take an array; the host's do where they must."""
    return on_device(value) and _backend.forced() != "retrieval"


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _retrieval(
    distance: Real, labels: Labels, galleries: Sequence[Int], threads: int
) -> tuple[Ranks, int]:
    native = importlib.import_module("fastreid_vi._retrieval")
    offsets = np.cumsum([0, *map(len, galleries)], dtype=np.int64)
    columns = np.concatenate([np.zeros(0, np.int64), *galleries])
    *counts, bad_row = native.rank_rows(
        distance,
        labels.query_ids,
        labels.query_places,
        labels.pool_ids,
        labels.pool_places,
        columns,
        offsets,
        labels.rule,
        threads,
    )
    return Ranks(*counts), bad_row


def _reference(
    distance: Real, labels: Labels, galleries: Sequence[Int], threads: int
) -> tuple[Ranks, int]:
    ranks = Ranks.empty(len(galleries), len(distance))
    longest = max((len(columns) for columns in galleries), default=0)
    block = max(1, 2**20 // max(longest, 1))
    for begin in range(0, len(distance), block):
        rows = slice(begin, begin + block)
        nan = np.isnan(distance[rows]).any(axis=1)
        if nan.any():
            return ranks, begin + int(nan.argmax())
        for trial, columns in enumerate(galleries):
            if len(columns):
                found = _rank_gallery(distance[rows, columns], labels.rows(rows), columns)
                ranks.put(trial, rows, found)
    return ranks, -1


def _rank_gallery(distance: Real, labels: Labels, columns: Int) -> Ranks:
    """The definition: sort, mark the kept images and the matches, count. All [R, G]."""
    images = len(columns)
    ids = labels.pool_ids[columns]
    same_place = labels.query_places[:, None] == labels.pool_places[columns]
    same_id = labels.query_ids[:, None] == ids
    kept = np.ones_like(same_id)
    if labels.rule != "none":
        kept = ~same_place if labels.rule == "location" else ~(same_place & same_id)

    order = np.argsort(distance, axis=1, kind="stable")
    kept = np.take_along_axis(kept, order, axis=1)
    match = np.take_along_axis(same_id, order, axis=1) & kept
    position = np.where(kept, np.cumsum(kept, axis=1), images + 1)
    matches = match.sum(axis=1)
    first = np.where(match, position, images + 1).min(axis=1)
    last = np.where(match, position, 0).max(axis=1)
    # Zeros between the terms leave a running sum as it is: the bits of a plain loop over matches.
    terms = np.where(match, np.cumsum(match, axis=1) / position, 0.0)
    precision = np.cumsum(terms, axis=1)[:, -1]

    # An identity stands where its best image stands.
    of_image = np.empty_like(position)
    np.put_along_axis(of_image, order, position, axis=1)
    by_identity = np.argsort(ids, kind="stable")
    starts = np.flatnonzero(np.diff(ids[by_identity], prepend=-1))
    best = np.minimum.reduceat(of_image[:, by_identity], starts, axis=1)
    identity = 1 + (best < first[:, None]).sum(axis=1)

    valid = matches > 0
    return Ranks(
        matches.astype(np.int32),
        np.where(valid, first, 0).astype(np.int32),
        np.where(valid, identity, 0).astype(np.int32),
        last.astype(np.int32),
        np.divide(precision, matches, out=np.full(len(valid), np.nan), where=valid),
    )
