"""Re-ranking without a matrix of all items: products stripe by stripe, everything else in C++.

A stripe holds some rows of the products of all items, from its own first item on: the rest is its
mirror image. It is looked at once and thrown away. What stays is short: the nearest items of every
item, the largest distance of every row, and the distances of queries to gallery images.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from fastreid_vi.evaluation.arrays import Int, Real
from fastreid_vi.evaluation.rerank_reference import ROUNDING, Method

# A stripe fits the last cache level; fewer and larger products wait less for each other's threads,
# smaller ones leave out more of the mirror image.
STRIPE_BYTES: Final = 2**24
STRIPE_ROWS: Final = (64, 1024)
# Rows that are widened to float64 at once.
NORM_ROWS: Final = 256


class Shape(NamedTuple):
    """How many of what; one side alone has several sets of features."""

    queries: int
    query_sets: int
    images: int
    gallery_sets: int

    @property
    def query_items(self) -> int:
        """Items that are queries; they come first."""
        return self.queries * self.query_sets

    @property
    def items(self) -> int:
        """N."""
        return self.query_items + self.images * self.gallery_sets


class Lengths(NamedTuple):
    """Sizes that follow from the shape and the method."""

    rows: int
    """Items that can be neighbours."""
    candidates: int
    """Items that lists choose among by distance."""
    keep: int
    """List of an item that can be a neighbour."""
    keep_others: int
    """List of any other item."""
    stripe: int
    """Rows of a stripe."""


def lengths(shape: Shape, method: Method) -> Lengths:
    """Sizes of lists and stripes.

    Where queries alone are neighbours but are fewer than a list is long, lists run into the gallery
    by index: its first images, and no others, are neighbours too.
    """
    keep = min(max(method.k1 + 1, method.k2), shape.items)
    rows = max(shape.query_items, keep) if method.masked else shape.items
    candidates = shape.query_items if method.masked else shape.items
    low, high = STRIPE_ROWS
    stripe = min(max(STRIPE_BYTES // (4 * shape.items), low), high, rows)
    others = min(method.k2, shape.items) if rows < shape.items else 0
    return Lengths(rows, candidates, keep, others, stripe)


class SparseReranking:
    """Queries and a pool of images, of which every trial searches some.

    Args:
        queries, galleries: sets of features, float32 [Q, D] and [P, D] each, C-contiguous; squares
            of their norms are finite. One of the two has one set.
        method: what to compute.
        trials: columns of the pool; several only where queries alone are neighbours and fill the
            lists, for only then the trials share them.
        threads: of the C++ room; the products use those of NumPy's BLAS.
    Attributes:
        lists, other_lists: int32, nearest items of the items that can be neighbours, of the others.
        maxima: [T, items that can be neighbours] m.
        native: R*, V and V' for those who want to look.
    """

    def __init__(
        self,
        queries: Sequence[Real],
        galleries: Sequence[Real],
        method: Method,
        trials: Sequence[Int],
        threads: int,
    ) -> None:
        native = importlib.import_module("fastreid_vi._retrieval")
        shape = Shape(len(queries[0]), len(queries), len(galleries[0]), len(galleries))
        sizes = lengths(shape, method)
        if len(trials) > 1 and not shareable(shape, method):
            raise ValueError("trials: expected one, since neighbours depend on the gallery")
        self.queries = shape.queries
        self._trials, self._threads = list(trials), threads
        parts = [*queries, *galleries]
        squares = np.concatenate([_squares(part) for part in parts])
        base = np.zeros((shape.query_items, shape.images), np.float32)
        selection = native.RerankSelection(
            squares,
            base,
            np.concatenate(self._trials),
            np.cumsum([0, *map(len, self._trials)], dtype=np.int64),
            rows=sizes.rows,
            candidates=sizes.candidates,
            keep=sizes.keep,
            keep_others=sizes.keep_others,
            threads=threads,
        )
        _multiply(parts, sizes, selection)
        self.lists, distances, self.other_lists, self.maxima = selection.finish()
        del selection
        self.native = native.Reranking(
            self.lists,
            distances,
            self.other_lists,
            base,
            rounding(squares[: sizes.rows]),
            parts,
            query_sets=shape.query_sets,
            gallery_sets=shape.gallery_sets,
            k1=method.k1,
            half=method.half,
            expand=method.expand,
            k2=method.k2,
            weight=method.weight,
            threads=threads,
        )

    def result(self, trial: int, queries: Int | None = None) -> Real:
        """F of some queries, all by default, and the trial's images, float32."""
        wanted = np.arange(self.queries) if queries is None else queries
        columns = self._trials[trial]
        found: Real = self.native.result(self.maxima[trial], columns, wanted, self._threads)
        return found


def shareable(shape: Shape, method: Method) -> bool:
    """Whether neighbours are the same for every gallery: all are queries."""
    return method.masked and shape.query_items >= max(method.k1 + 1, method.k2)


def rounding(squares: Real) -> Real:
    """Distances that are rounding of the norms: a row that holds no others has none."""
    return np.asarray(ROUNDING * np.finfo(np.float32).eps * squares, np.float32)


def _squares(part: Real) -> Real:
    """Squared norms, summed in float64."""
    squares = np.empty(len(part), np.float32)
    for begin in range(0, len(part), NORM_ROWS):
        wide = part[begin : begin + NORM_ROWS].astype(np.float64)
        squares[begin : begin + NORM_ROWS] = np.einsum("nd,nd->n", wide, wide)
    return squares


def _multiply(parts: Sequence[Real], sizes: Lengths, selection: Any) -> None:
    """Feed the products of all rows, each with its own item and all later ones."""
    items = sum(map(len, parts))
    room = np.empty(sizes.stripe * items, np.float32)
    first = 0
    for number, part in enumerate(parts):
        for begin in range(0, min(len(part), sizes.rows - first), sizes.stripe):
            end = min(begin + sizes.stripe, len(part), sizes.rows - first)
            left = part[begin:end]
            width = items - first - begin
            stripe = room[: len(left) * width].reshape(len(left), width)
            at = 0
            for right in (part[begin:], *parts[number + 1 :]):
                np.matmul(left, right.T, out=stripe[:, at : at + len(right)])
                at += len(right)
            selection.take(stripe)
        first += len(part)


def sparse_memory(shape: Shape, method: Method, threads: int, trial: int | None = None) -> int:
    """Bytes that `SparseReranking` and one result take at most.

    Args:
        shape: queries and pool.
        method: what to compute.
        threads: of the C++ room.
        trial: images of the largest gallery, by default the pool.
    """
    sizes = lengths(shape, method)
    images = shape.images if trial is None else trial
    others = shape.items - sizes.rows
    lists = sizes.rows * sizes.keep * 8 + others * sizes.keep_others * 4
    base = 4 * shape.query_items * shape.images
    # First half: stripes, and lists twice as long as they will be, eight bytes an entry.
    near, near_others = (min(k, sizes.candidates) for k in (sizes.keep, sizes.keep_others))
    keys = sizes.rows * min(2 * near, sizes.candidates)
    keys += others * min(2 * near_others, sizes.candidates)
    first = 4 * sizes.stripe * shape.items + 8 * keys + 16 * shape.items
    first += threads * 4 * shape.images
    # Second half: places of list entries, members of R*, V' of the gallery by columns, result.
    length = min(method.k1 + 1, sizes.keep)
    members = length * (1 + min(method.half + 1, sizes.keep)) if method.expand else length
    members = min(members, sizes.rows)
    averaged = min(members * method.k2, sizes.rows)
    second = 12 * sizes.rows * (sizes.keep + members)
    second += 8 * images * shape.gallery_sets * averaged + 4 * shape.queries * images
    # A thread's turn of 16 queries: V' by columns, S by gallery rows, J by images.
    second += threads * (96 * sizes.rows + 64 * images * (shape.gallery_sets + 1))
    return base + lists + 4 * shape.items + max(first, second)
