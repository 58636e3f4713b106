"""The k best gallery rows of every query, gathered from blocks of products.

Two rooms give the same bits:

    retrieval   C++ threads
    reference   NumPy

A product only discards: its rounding error has a bound, whatever library multiplied, and a row that
cannot be among the k best within it is dropped. The others get a score of their own, summed in
float64 in one fixed order, and the order of the result is (score, index). So no block, thread,
shard or BLAS shows in it.
"""

from __future__ import annotations

import importlib
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from fastreid_vi.evaluation.arrays import Double, Int, Real
from fastreid_vi.evaluation.positions import choose

Metric = Literal["cosine", "inner", "euclidean"]

LANES: Final = 32
PAIRS: Final = 2**14  # scored at once by the reference


class Nearest(Protocol):
    """Lists that fill part by part of the gallery: open, add until all columns came, close."""

    def open(
        self, first_query: int, count: int, gallery: Real, norms: Double, first_index: int
    ) -> None:
        """Some queries meet gallery rows [n, D] at `first_index`; a query's indices rise."""

    def add(self, products: Real, first_column: int, threads: int) -> None:
        """Products [count, m] with the rows of the open part from `first_column` on."""

    def close(self, threads: int) -> None:
        """End the part."""

    def take(self, threads: int) -> tuple[Real, Int]:
        """Scores and gallery indices, [Q, k], best first."""


def row_norms(rows: Real, threads: int) -> Double:
    """Euclidean norms [N]; not finite for a row with a NaN, an infinity or too much."""
    if choose() == "retrieval":
        norms: Double = importlib.import_module("fastreid_vi._retrieval").row_norms(rows, threads)
        return norms
    step = max(1, PAIRS * LANES // max(rows.shape[1], 1))
    parts = [_sums(part, part) for part in (rows[i : i + step] for i in range(0, len(rows), step))]
    norms = np.sqrt(np.concatenate([np.zeros(0), *parts]))
    return norms


def nearest(queries: Real, norms: Double, k: int, metric: Metric) -> Nearest:
    """Empty lists in the room that `choose` names; `queries` must stay as they are."""
    if choose() == "retrieval":
        native = importlib.import_module("fastreid_vi._retrieval")
        lists: Nearest = native.nearest(queries, norms, k, metric)
        return lists
    return _Reference(queries, norms, k, metric)


class _Reference:
    """What csrc/retrieval/search.cpp does, on whole blocks."""

    def __init__(self, queries: Real, norms: Double, k: int, metric: Metric) -> None:
        self._queries, self._norms, self._k, self._metric = queries, norms, k, metric
        # The lists of all queries behind each other, best first.
        self._rows: Int = np.zeros(0, np.int64)
        self._indices: Int = np.zeros(0, np.int64)
        self._keys: Real = np.zeros(0, queries.dtype)
        self._floor = np.full(len(queries), -np.inf)  # the k-th best key

    def open(
        self, first_query: int, count: int, gallery: Real, norms: Double, first_index: int
    ) -> None:
        """See `Nearest`."""
        self._part = first_query, count, gallery, norms, first_index

    def add(self, products: Real, first_column: int, threads: int) -> None:
        """See `Nearest`; scores at once what a block leaves."""
        first_query, count, gallery, norms, first_index = self._part
        some = slice(first_column, first_column + products.shape[1])
        gallery, norms = gallery[some], norms[some]
        chosen = slice(first_query, first_query + count)
        with np.errstate(all="ignore"):  # where something overflows, nothing is discarded
            rows, columns = self._survivors(chosen, products, gallery.shape[1], norms)
            rows += first_query
            keys = self._keys_of(rows, columns, gallery, norms)
        self._merge(rows, keys, columns + first_index + first_column)

    def close(self, threads: int) -> None:
        """See `Nearest`."""
        del self._part

    def take(self, threads: int) -> tuple[Real, Int]:
        """See `Nearest`."""
        shape = (len(self._queries), self._k)
        keys = self._keys.reshape(shape)
        return (0 - keys if self._metric == "euclidean" else keys), self._indices.reshape(shape)

    def _survivors(self, chosen: slice, products: Real, dim: int, norms: Double) -> Any:
        """Rows and columns of the products that may belong to the k best."""
        norm, floor = self._norms[chosen, None], self._floor[chosen, None]
        slack = _slack(self._metric, norm, norms, dim, products.dtype)
        if self._metric == "cosine":
            inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
            close = products * inverse.astype(products.dtype)
            limit = np.where(np.isinf(floor), floor, floor * norm)
        elif self._metric == "euclidean":
            close = products - (norms * norms / 2).astype(products.dtype)
            limit = (norm * norm - floor * floor) / 2
        else:
            close, limit = products, floor
        limit = limit - slack
        if products.shape[1] > self._k:  # k of the block are at least this close
            best = np.partition(close, -self._k, axis=1)[:, -self._k, None]
            limit = np.maximum(limit, best - 2 * slack)
        return np.nonzero((slack == np.inf) | ~(close.astype(np.float64) < limit))

    def _keys_of(self, rows: Int, columns: Int, gallery: Real, norms: Double) -> Real:
        keys = np.empty(len(rows), self._queries.dtype)
        step = max(1, PAIRS * LANES // gallery.shape[1])
        for begin in range(0, len(rows), step):
            pair = slice(begin, begin + step)
            query = self._queries[rows[pair]].astype(np.float64)
            row = gallery[columns[pair]].astype(np.float64)
            if self._metric == "euclidean":
                difference = query - row
                keys[pair] = -np.sqrt(_sums(difference, difference))
                continue
            score = _sums(query, row)
            if self._metric == "cosine":
                ours, other = self._norms[rows[pair]], norms[columns[pair]]
                some = (ours > 0) & (other > 0)
                score = np.divide(score, ours, out=np.zeros_like(score), where=some)
                score = np.divide(score, other, out=score, where=some).clip(-1, 1)
            keys[pair] = score
        keys += 0  # no -0.0
        return keys

    def _merge(self, rows: Int, keys: Real, indices: Int) -> None:
        """Put them into the lists and keep the k best of each."""
        rows = np.concatenate([self._rows, rows])
        keys = np.concatenate([self._keys, keys])
        indices = np.concatenate([self._indices, indices])
        order = np.lexsort((indices, -keys, rows))
        rows, keys, indices = rows[order], keys[order], indices[order]
        sizes = np.bincount(rows, minlength=len(self._queries))
        starts = np.cumsum(sizes) - sizes
        kept = np.arange(len(rows)) - starts[rows] < self._k
        full = sizes >= self._k
        self._floor[full] = keys[starts[full] + self._k - 1]
        self._rows, self._keys, self._indices = rows[kept], keys[kept], indices[kept]


def _sums(left: Real, right: Real) -> Double:
    """Sums of left x right over the last axis in float64: 32 lanes, then halves upon halves."""
    count, dim = left.shape
    lanes = np.zeros((count, LANES))
    for begin in range(0, dim, LANES):
        part = slice(begin, min(begin + LANES, dim))
        product = left[:, part].astype(np.float64) * right[:, part].astype(np.float64)
        lanes[:, : product.shape[1]] += product
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _slack(metric: Metric, norm: Double, norms: Double, dim: int, dtype: npt.DTypeLike) -> Double:
    """Bound on the error of a block's closeness, [q, 1], roundings of scores included.

    |fl(q.g) - q.g| <= gamma |q| |g| in whatever order a library sums (Higham, 3.5), and what
    underflows. Infinite where something may overflow, so that nothing is discarded.
    """
    limits = np.finfo(dtype)
    unit, tiny = float(limits.eps) / 2, float(limits.tiny)
    if dim * unit > 0.25:
        return np.full_like(norm, np.inf)
    most, least = norms.max(), norms.min(initial=np.inf, where=norms > 0)
    gamma = (2 if limits.bits == 64 else 1) * dim * unit / (1 - dim * unit)
    underflow = dim * tiny * (1 + norm + most)
    reach = (norm + most) ** 2
    if metric == "cosine":
        slack = (gamma + 16 * unit) * norm + underflow / least
    elif metric == "inner":
        slack = (gamma + 16 * unit) * norm * most + underflow
    else:
        slack = gamma * norm * most + 16 * unit * reach + underflow
    safe = (reach < float(limits.max) / 8) & (least > 4 * tiny)
    return np.where(safe, slack, np.inf)
