"""The k nearest gallery rows of every query, exactly, in one pass over a gallery of any size."""

from __future__ import annotations

import importlib
from typing import Any, Final, NamedTuple

import numpy as np

from fastreid_vi.evaluation.arrays import (
    Double,
    Int,
    Real,
    at_least_one,
    choice,
    like,
    real_matrix,
    to_numpy,
)
from fastreid_vi.evaluation.nearest import Metric, Nearest, nearest, row_norms
from fastreid_vi.evaluation.positions import cores, stays_on_device

QUERIES: Final = 2048  # multiplied at once with
COLUMNS: Final = 2048  # gallery rows: the products stay in the cache
# Rows of a part: the longer, the fewer need a score.
IN_PLACE: Final = 2**17  # where they can be read again
COPIED: Final = 2**13  # converted or fetched, with
NUMBERS: Final = 2**23  # at most


class SearchResult(NamedTuple):
    """Best first, ties by gallery index, [Q, k] each, as the kind of array the query is.

    Attributes:
        scores: similarities, falling, for "cosine" and "inner"; distances, rising, for "euclidean".
            float32, or float64 if an argument is float64 or holds integers.
        indices: int64 rows of the gallery.
    """

    scores: Any
    indices: Any


def search(
    query: Any,
    gallery: Any,
    k: int,
    *,
    metric: Metric = "cosine",
    threads: int | None = None,
    block: int | None = None,
) -> SearchResult:
    """The k nearest gallery rows of every query, exactly.

    One pass over the gallery, block by block, with a running list of the k best per query: nothing
    of size Q x G, and a gallery larger than memory works. Each score is summed in float64 and
    rounded once, so the result is the same to the bit for any block size, number of threads and
    BLAS, and euclidean distances of near duplicates are accurate.

    Args:
        query: [Q, D], real numbers: NumPy, torch, CuPy, DLPack or nested lists. What lies on a CUDA
            device is searched there.
        gallery: [G, D]; only slices of rows are read, so `np.memmap`, an HDF5 data set or a tensor
            on a GPU never is in memory as a whole. float32 and float64 are read in place.
        k: neighbours wanted, 1 to G.
        metric: "cosine" (a zero row has similarity 0 with all), "inner" or "euclidean" (the true
            distance, not its square).
        threads: of the C++ room; by default the cores of this process. BLAS has threads of its own
            (OMP_NUM_THREADS). It changes no result.
        block: gallery rows read at once, by default a size that fits the cache. It changes no
            result.
    Returns:
        `SearchResult(scores, indices)`, [Q, k] each, NumPy arrays, or torch tensors or CuPy arrays
        on the query's device if it is one.
    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an empty argument, rows of different lengths, k below 1 or above G, an unknown
            metric, or a NaN or infinity, with its row.
    Spec: evaluation, 4.6. Backends: retrieval, cuda.

    >>> search([[1.0, 0.0]], [[0.0, 2.0], [3.0, 0.0], [1.0, 1.0]], 2).indices
    array([[1, 2]])
    """
    choice("metric", metric, Metric)
    for name, value in (("k", k), ("threads", threads), ("block", block)):
        if value is not None or name == "k":
            at_least_one(name, value)
    if stays_on_device(query):
        device = importlib.import_module("fastreid_vi.evaluation.device")
        return SearchResult(*device.search(query, gallery, k, metric, block))
    queries, rows = real_matrix("query", query, "[Q, D]"), Rows(gallery)
    if not queries.size:
        raise ValueError(f"query: expected at least one row and column, got {list(queries.shape)}")
    rows.check(queries.shape[1], k)
    scores, indices = nearest_rows(queries, rows, k, metric, threads or cores(), block)
    return SearchResult(like(query, scores), like(query, indices))


def nearest_rows(
    queries: Real, rows: Rows, k: int, metric: Metric, threads: int, block: int | None
) -> tuple[Real, Int]:
    """`search` for checked arguments."""
    dtype = np.result_type(queries.dtype, rows.dtype)
    queries = _adjacent(queries.astype(dtype, copy=False))
    norms = finite_norms("query", queries, 0, threads)
    lists = nearest(queries, norms, k, metric)
    count = len(queries)
    step = block or rows.part(dtype)
    room = np.empty(min(count, QUERIES) * min(step, COLUMNS, len(rows)), dtype)
    for first in range(0, len(rows), step):
        part = rows.read(first, first + step, dtype)
        lengths = finite_norms("gallery", part, first, threads)
        # The longest row of a part bounds the error of its products: an outlier gets a short part.
        even = lengths.max() <= 4 * np.median(lengths)
        reach = len(part) if even else COLUMNS
        for start in range(0, len(part), reach):
            piece = slice(start, start + reach)
            for begin in range(0, count, QUERIES):
                some = slice(begin, begin + QUERIES)
                lists.open(begin, len(queries[some]), part[piece], lengths[piece], first + start)
                _add_products(lists, queries[some], part[piece], room, threads)
                lists.close(threads)
    return lists.take(threads)


def _add_products(lists: Nearest, queries: Real, part: Real, room: Real, threads: int) -> None:
    for column in range(0, len(part), COLUMNS):
        columns = part[column : column + COLUMNS]
        products = room[: len(queries) * len(columns)].reshape(len(queries), len(columns))
        with np.errstate(all="ignore"):  # what overflows is scored by itself
            np.matmul(queries, columns.T, out=products)
        lists.add(products, column, threads)


class Rows:
    """A gallery of which slices of rows are read."""

    def __init__(self, gallery: Any) -> None:
        sliceable = hasattr(gallery, "shape") and hasattr(gallery, "__getitem__")
        self._gallery = gallery if sliceable else to_numpy("gallery", gallery)
        self.shape = tuple(int(size) for size in self._gallery.shape)
        if len(self.shape) != 2:
            raise ValueError(f"gallery: expected shape [G, D], got shape {list(self.shape)}")
        self.dtype = self._real(0, 0).dtype

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, begin: int, end: int, dtype: np.dtype[Any]) -> Real:
        """Rows as a type, where they are if they can be used there."""
        return _adjacent(self._real(begin, end).astype(dtype, copy=False))

    def part(self, dtype: np.dtype[Any]) -> int:
        """How many rows to read at once."""
        if np.may_share_memory(self.read(0, 1, dtype), self.read(0, 1, dtype)):
            return IN_PLACE
        return max(min(COPIED, NUMBERS // self.shape[1]), COLUMNS)

    def _real(self, begin: int, end: int) -> Real:
        """Rows as float32 or float64."""
        return real_matrix("gallery", self._gallery[begin : min(end, len(self))], "[G, D]")

    def check(self, dim: int, k: int) -> None:
        """Against the length of the queries and the number of neighbours."""
        if 0 in self.shape:
            raise ValueError(
                f"gallery: expected at least one row and column, got {list(self.shape)}"
            )
        if self.shape[1] != dim:
            raise ValueError(
                f"gallery: expected rows of length {dim} as in query, got {list(self.shape)}"
            )
        if k > len(self):
            raise ValueError(f"k: expected at most the {len(self)} rows of gallery, got {k}")


def _adjacent(rows: Real) -> Real:
    """Columns next to each other in memory and rows that do not overlap, as BLAS wants them."""
    size, length = rows.itemsize, rows.shape[1]
    good = (length == 1 or rows.strides[1] == size) and rows.strides[0] >= length * size
    return rows if good else np.ascontiguousarray(rows)


def finite_norms(name: str, rows: Real, first: int, threads: int) -> Double:
    """Norms of rows that are finite, or an error that names the first that is not."""
    norms = row_norms(rows, threads)
    bad = ~np.isfinite(norms)
    if bad.any():
        row = int(bad.argmax())
        if np.isfinite(rows[row]).all():
            raise ValueError(f"{name}: the squared length of row {first + row} overflows")
        what = "NaN" if np.isnan(rows[row]).any() else "an infinity"
        raise ValueError(f"{name}: expected finite numbers, got {what} in row {first + row}")
    return norms
