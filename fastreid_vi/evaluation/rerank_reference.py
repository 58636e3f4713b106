"""Re-ranking as the papers write it, on whole N x N matrices: the truth the sparse room is held to.

Three precisions: "float64"; "float32"; "float16", the rounding of the released code, bit for bit.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from fastreid_vi.evaluation.arrays import Int, Mask, Real

Precision = Literal["float64", "float32", "float16"]

# A row whose distances are all rounding of |x|^2, that many units in its last place, has none: its
# images are one image. Products of equal rows differ from their norm by up to six of them.
ROUNDING = 16


class Method(NamedTuple):
    """What to compute; the field names are those of the public arguments."""

    k1: int
    k2: int
    weight: float
    masked: bool
    """Queries alone are neighbours (`neighbors="queries"`)."""
    expand: bool

    @property
    def half(self) -> int:
        """Length of the lists that local expansion adds: k1 / 2, halves to even."""
        return round(self.k1 / 2)


class Steps(NamedTuple):
    """Every matrix on the way; rows are items: queries, then gallery."""

    distances: Real  # [N, N] squared Euclidean
    scaled: Real  # [Q, G] O, each query's distances divided by its largest
    lists: Int  # [N, N] ranking lists
    encoding: Real  # [N, N] V
    expanded: Real  # [N, N] V'
    jaccard: Real  # [Q, G] J
    result: Real  # [Q, G] F


def dense_rerank(items: Real, queries: int, method: Method, precision: Precision) -> Steps:
    """Re-rank items of which the first `queries` are queries and the others gallery images.

    Args:
        items: [N, D] floating point, finite; queries first.
        queries: how many.
        method: what to compute.
        precision: of V, V', S and J; distances are float64 for "float64", else float32.
    Spec: reranking, 1 and 4.
    """
    items = items.astype(np.float64 if precision == "float64" else np.float32, copy=False)
    squares = np.einsum("nd,nd->n", items, items)
    distances = squares[:, None] + squares - 2 * (items @ items.T)
    scaled = _scaled(distances, squares, precision)

    keys = distances.copy()
    if method.masked:
        keys[:, queries:] = np.inf
    lists = np.argsort(keys, axis=1, kind="stable")

    dtype = np.dtype(precision)
    encoding = np.zeros(distances.shape, dtype)  # V
    for i, members in enumerate(_neighbor_sets(lists, method)):
        near = np.exp(-scaled[i, members])
        encoding[i, members] = near / near.sum()
    expanded = encoding  # V'
    if method.k2 > 1:
        # NumPy adds halves up in float32.
        expanded = np.stack([encoding[row[: method.k2]].mean(axis=0) for row in lists])

    jaccard = _jaccard(expanded, queries, precision)
    scaled = scaled[:queries, queries:]
    near = jaccard * dtype.type(1 - method.weight)
    result = near.astype(items.dtype, copy=False) + items.dtype.type(method.weight) * scaled
    return Steps(distances, scaled, lists, encoding, expanded, jaccard, result)


def dense_multi_spectral(
    queries: list[Real], galleries: list[Real], method: Method, precision: Precision
) -> Real:
    """Mean of F over the spectra, of which one side has several, [Q, G]."""
    count, images = len(queries[0]), len(galleries[0])
    items = np.concatenate([*queries, *galleries])
    whole = dense_rerank(items, count * len(queries), method, precision).result
    if len(queries) > 1:
        return np.asarray(whole.reshape(len(queries), count, images).mean(axis=0))
    return np.asarray(whole.reshape(count, len(galleries), images).mean(axis=1))


def _scaled(distances: Real, squares: Real, precision: Precision) -> Real:
    """O: every item's distances divided by the largest; zeros where that is rounding."""
    largest = distances.max(axis=0)
    if precision == "float16":  # as released, but for 0 / 0
        return np.asarray((distances / np.where(largest == 0, 1, largest)).T)
    rounding = ROUNDING * np.finfo(distances.dtype).eps * squares
    some = largest > rounding
    scaled = np.maximum(distances, 0) / np.where(some, largest, 1)
    return np.asarray(np.where(some, scaled, 0).T)


def _neighbor_sets(lists: Int, method: Method) -> list[Int]:
    """R* of every item, ascending."""
    reciprocal = _reciprocal(lists, method.k1)
    if not method.expand:
        return [np.flatnonzero(row) for row in reciprocal]
    shorter = _reciprocal(lists, method.half)
    sets = []
    for row in reciprocal:
        whole = row.copy()
        for c in np.flatnonzero(row):
            added = shorter[c]
            # The initial set decides, not the growing one.
            if 3 * np.count_nonzero(added & row) > 2 * np.count_nonzero(added):
                whole |= added
        sets.append(np.flatnonzero(whole))
    return sets


def _reciprocal(lists: Int, k: int) -> Mask:
    """[i, j]: each among the first k + 1 of the other's list."""
    near = np.zeros(lists.shape, bool)
    np.put_along_axis(near, lists[:, : k + 1], True, axis=1)
    return np.asarray(near & near.T)


def _jaccard(expanded: Real, queries: int, precision: Precision) -> Real:
    """J of queries x gallery; sums run over ascending columns."""
    by_column: Any = np.ascontiguousarray(expanded[queries:].T)  # [N, G]
    overlap = np.zeros((queries, by_column.shape[1]), expanded.dtype)
    for i in range(queries):
        for c in np.flatnonzero(expanded[i]):
            overlap[i] += np.minimum(expanded[i, c], by_column[c])
    if precision != "float16":
        overlap = np.minimum(overlap, 1)  # beyond 1 lies rounding only
    return np.asarray(1 - overlap / (2 - overlap))
