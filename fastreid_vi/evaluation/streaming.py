"""Ranks over a pool too large for memory: blocks of images, looked at twice.

The first pass keeps the distance of every query to its matches, the second counts what lies ahead
of them. Queries and pool are taken by identity, so that the matches of a block of images are those
of one run of queries, and so that an identity's images follow each other.

Two rooms count, with equal integers: C++ threads (`retrieval`), NumPy (`reference`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from fastreid_vi.evaluation.arrays import Dense, Int, Real
from fastreid_vi.evaluation.features import Features, column_offset, distances
from fastreid_vi.evaluation.positions import Labels, Ranks, choose, cores

# Of one block's features and of its distances to a block of queries.
POOL_BYTES: Final = 2**26
DISTANCE_BYTES: Final = 2**25
MOST_IMAGES: Final = 2**14
MOST_QUERIES: Final = 2**12


class Block(NamedTuple):
    """Pool images that are in memory together, by identity, and where galleries hold them."""

    images: slice
    """Of the pool by identity."""
    ids: Dense
    places: Dense
    """[C] labels."""
    columns: Int
    """Of the block, ascending inside each gallery."""
    slots: Dense
    """Their positions in the gallery."""
    offsets: Int
    """[T + 1] limits of the galleries in `columns`."""


class Matches(NamedTuple):
    """Distances of the matches of each (query, gallery), nearest first, equal ones by slot."""

    start: Int
    """[R x T + 1] limits in the others."""
    distance: Real
    slot: Dense


class Ahead(NamedTuple):
    """Kept images of other identities so far."""

    images: Int
    """[matches] ahead of each match."""
    identities: Int
    """[R x T] identities with an image ahead of the first match."""
    last: Dense
    """[R x T] identity counted last; -1 before any."""


class Pool:
    """The pool by identity, block by block.

    Args:
        features: of the whole pool.
        used: its rows that some gallery holds, ascending.
        labels: `pool_ids` and `pool_places` are those of `used`.
        galleries: positions in `used`, T times.
        size: images of a block.
    """

    def __init__(
        self, features: Features, used: Int, labels: Labels, galleries: Sequence[Int], size: int
    ) -> None:
        order = np.argsort(labels.pool_ids, kind="stable")
        self.ids, self.places = labels.pool_ids[order], labels.pool_places[order]
        self._features, self._rows, self.size, self.dtype = (
            features,
            used[order],
            size,
            features.dtype,
        )
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        self._members = []
        for gallery in galleries:
            columns = place[gallery]
            slots = np.argsort(columns, kind="stable")
            self._members.append((columns[slots], slots.astype(np.int32)))

    def blocks(self) -> Iterator[Block]:
        """All blocks in order, without features."""
        for begin in range(0, len(self.ids), self.size):
            part = slice(begin, begin + self.size)
            columns, slots, offsets = [], [], [0]
            for member, slot in self._members:
                a, b = np.searchsorted(member, [part.start, part.stop])
                columns.append(member[a:b] - begin)
                slots.append(slot[a:b])
                offsets.append(offsets[-1] + int(b - a))
            yield Block(
                part,
                self.ids[part],
                self.places[part],
                np.concatenate(columns),
                np.concatenate(slots),
                np.array(offsets, np.int64),
            )

    def features(self, block: Block) -> Real:
        """[C, D] of one block."""
        return self._features.rows(self._rows[block.images])


class Tiles:
    """Distances of all pairs, one block of queries x one block of the pool at a time."""

    def __init__(self, query: Features, rows: Int, ids: Dense, pool: Pool, squared: bool) -> None:
        self._query, self._rows, self._ids = query, rows, ids
        self._pool, self._squared = pool, squared
        self._dtype = np.result_type(query.dtype, pool.dtype)
        size = DISTANCE_BYTES // (pool.size * self._dtype.itemsize)
        self._size = min(max(1, size), MOST_QUERIES)

    def some(self, *, only_matches: bool) -> Iterator[tuple[Block, slice, Real]]:
        """(block, queries, distances), with `only_matches` those that may hold a match.

        The same tile has the same bits each time: a match is compared with itself.
        """
        room = np.empty(min(self._size, len(self._rows)) * self._pool.size, self._dtype)
        for block in self._pool.blocks():
            right = None
            for begin in range(0, len(self._rows), self._size):
                part = slice(begin, min(begin + self._size, len(self._rows)))
                ids = self._ids[part]
                if only_matches and (ids[-1] < block.ids[0] or block.ids[-1] < ids[0]):
                    continue
                if right is None:
                    right = self._pool.features(block).astype(self._dtype, copy=False)
                    offset = column_offset(right, squared=self._squared)
                left = self._query.rows(self._rows[part]).astype(self._dtype, copy=False)
                yield block, part, distances(left, right, offset, room)


def rank_streaming(
    query: Features,
    rows: Int,
    gallery: Features,
    used: Int,
    labels: Labels,
    galleries: Sequence[Int],
    *,
    squared: bool,
    threads: int | None,
) -> Ranks:
    """Positions of the matches of some queries in every gallery, [T, R].

    Args:
        query, rows: the queries and those of them to rank.
        gallery, used: the whole pool and its rows that some gallery holds, ascending.
        labels: of all queries and of the rows `used`.
        galleries: positions in `used`, T times.
        squared: squared Euclidean distances, else negative dot products.
        threads: as for `rank_rows`.
    """
    order = np.argsort(labels.query_ids[rows], kind="stable")
    mine = labels.rows(rows[order])
    bytes_per_image = gallery.dim * np.result_type(query.dtype, gallery.dtype).itemsize
    size = min(max(1, POOL_BYTES // max(1, bytes_per_image)), MOST_IMAGES, len(used))
    pool = Pool(gallery, used, labels, galleries, size)
    tiles = Tiles(query, rows[order], mine.query_ids, pool, squared)
    found = [
        _matches_of(distance, block, part.start, mine.rows(part))
        for block, part, distance in tiles.some(only_matches=True)
    ]
    segments = len(rows) * len(galleries)
    matches = _sorted(found, segments)
    ahead = Ahead(
        np.zeros(len(matches.slot), np.int64),
        np.zeros(segments, np.int64),
        np.full(segments, -1, np.int32),
    )
    count = _retrieval if choose() == "retrieval" else _reference
    for block, part, distance in tiles.some(only_matches=False):
        run = slice(part.start * len(galleries), part.stop * len(galleries))
        bad_row = count(
            distance,
            mine.rows(part),
            block,
            *_of_run(matches, ahead, run),
            threads or cores(),
        )
        if bad_row >= 0:
            raise ValueError(f"distance: NaN for query {rows[order][part.start + bad_row]}")
    ranks = Ranks.empty(len(galleries), len(rows))
    ranks.put(slice(None), order, _ranks(matches, ahead, len(rows), len(galleries)))
    return ranks


def _matches_of(
    distance: Real, block: Block, first_query: int, labels: Labels
) -> tuple[Int, Dense, Real]:
    """(query x T + gallery, slot, distance) of every match in one tile."""
    galleries = len(block.offsets) - 1
    # Every query of an image's identity, image by image: runs of the queries by identity.
    ids = block.ids[block.columns]
    begin = np.searchsorted(labels.query_ids, ids)
    count = np.searchsorted(labels.query_ids, ids, side="right") - begin
    entry = np.repeat(np.arange(len(ids)), count)
    row = np.arange(len(entry)) - np.repeat(np.cumsum(count) - count, count) + begin[entry]
    column = block.columns[entry]
    if labels.rule != "none":  # of the same identity, so both rules drop the same place
        kept = labels.query_places[row] != block.places[column]
        entry, row, column = entry[kept], row[kept], column[kept]
    gallery = np.searchsorted(block.offsets, entry, side="right") - 1
    segment = (first_query + row) * galleries + gallery
    return segment, block.slots[entry], distance[row, column]


def _sorted(found: list[tuple[Int, Dense, Real]], segments: int) -> Matches:
    segment, slot, distance = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((slot, distance, segment))
    start = np.searchsorted(segment[order], np.arange(segments + 1))
    return Matches(start.astype(np.int64), distance[order], slot[order])


def _of_run(matches: Matches, ahead: Ahead, run: slice) -> tuple[Matches, Ahead]:
    """Views on some segments."""
    start = matches.start[run.start : run.stop + 1]
    part = slice(int(start[0]), int(start[-1]))
    return (
        Matches(start - start[0], matches.distance[part], matches.slot[part]),
        Ahead(ahead.images[part], ahead.identities[run], ahead.last[run]),
    )


def _retrieval(
    distance: Real, labels: Labels, block: Block, matches: Matches, ahead: Ahead, threads: int
) -> int:
    native = importlib.import_module("fastreid_vi._retrieval")
    bad_row: int = native.count_ahead(
        distance,
        labels.query_ids,
        labels.query_places,
        block.ids,
        block.places,
        block.columns,
        block.slots,
        block.offsets,
        labels.rule,
        *matches,
        *ahead,
        threads,
    )
    return bad_row


def _reference(
    distance: Real, labels: Labels, block: Block, matches: Matches, ahead: Ahead, threads: int
) -> int:
    """The definition, a query and a gallery at a time."""
    nan = np.isnan(distance).any(axis=1)
    if nan.any():
        return int(nan.argmax())
    galleries = len(block.offsets) - 1
    for segment in range(len(matches.start) - 1):
        row, gallery = divmod(segment, galleries)
        part = slice(*matches.start[segment : segment + 2])
        inside = slice(*block.offsets[gallery : gallery + 2])
        columns, slots = block.columns[inside], block.slots[inside]
        kept = block.ids[columns] != labels.query_ids[row]
        if labels.rule == "location":
            kept &= block.places[columns] != labels.query_places[row]
        columns, slots = columns[kept], slots[kept]
        key = distance[row, columns]
        first = True
        for match in range(part.start, part.stop):
            limit, at = matches.distance[match], matches.slot[match]
            before = (key < limit) | ((key == limit) & (slots < at))
            ahead.images[match] += before.sum()
            if first and before.any():
                ids = np.unique(block.ids[columns[before]])
                ahead.identities[segment] += len(ids) - (ids[0] == ahead.last[segment])
                ahead.last[segment] = ids[-1]
            first = False
    return -1


def _ranks(matches: Matches, ahead: Ahead, queries: int, galleries: int) -> Ranks:
    """[T, R] each."""
    count = np.diff(matches.start)
    segment = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(segment)) - matches.start[segment] + 1  # m of r_m
    rank = ahead.images + number
    valid = count > 0
    first, last, identity = (np.zeros(len(count), np.int64) for _ in range(3))
    first[valid] = rank[matches.start[:-1][valid]]
    last[valid] = rank[matches.start[1:][valid] - 1]
    identity[valid] = 1 + ahead.identities[valid]
    # Adds up in order: the bits of a plain loop over matches.
    precision = np.bincount(segment, number / rank, len(count))
    precision = np.divide(precision, count, out=np.full(len(count), np.nan), where=valid)

    def table(values: Int) -> Dense:
        return np.asarray(values.reshape(queries, galleries).T, np.int32)

    return Ranks(
        table(count),
        table(first),
        table(identity),
        table(last),
        precision.reshape(queries, galleries).T,
    )
