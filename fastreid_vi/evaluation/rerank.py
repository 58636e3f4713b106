"""k-reciprocal re-ranking, plain and over several spectra, and what it takes of memory."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fastreid_vi import _backend
from fastreid_vi.evaluation.arrays import (
    Real,
    at_least_one,
    choice,
    described,
    like,
    real_matrix,
    to_numpy,
)
from fastreid_vi.evaluation.positions import cores, stays_on_device, why_not
from fastreid_vi.evaluation.rerank_reference import Method, dense_multi_spectral
from fastreid_vi.evaluation.rerank_sparse import (
    NORM_ROWS,
    Shape,
    SparseReranking,
    sparse_memory,
)

Neighborhood = Literal["all", "queries"]
SpectralDirection = Literal["i2v", "v2i"]
RerankPrecision = Literal["float32", "float16"]

# Squares of such numbers, and sums of them, are far from the ends of float32.
SAFE_EXPONENT = 40


def k_reciprocal_rerank(
    query: Any,
    gallery: Any,
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    neighbors: Neighborhood = "all",
    expand: bool = True,
    precision: RerankPrecision = "float32",
    threads: int | None = None,
) -> Any:
    """Re-ranked distances of queries and gallery images by k-reciprocal encoding.

    F = (1 - weight) J + weight O: the Jaccard distance of the two images' neighbours, mixed with
    their squared Euclidean distance over the largest one of the query. MPANet's SYSU-MM01 figures
    take `neighbors="queries"`, its RegDB figures and Zhong et al. the defaults.

    The result for one query depends on all other queries: say so beside the numbers.

    Args:
        query, gallery: [Q, D] and [G, D] features, taken as they are (the protocols use unit
            vectors); left unchanged. What lies on a CUDA device is re-ranked there.
        k1: two images are neighbours when each is among the other's k1 nearest.
        k2: lists of neighbours are averaged over the k2 nearest images.
        weight: of the plain distance, from 0 to 1.
        neighbors: "all" images, or "queries" alone (gallery images are nobody's neighbours).
        expand: add the neighbours of neighbours (local expansion).
        precision: "float16" reproduces the rounding of the released code, on whole matrices.
        threads: of the C++ room; by default the cores of this process. It changes no bit.
    Returns:
        [Q, G] float32, smaller is nearer, of the kind of `query`. `rerank_memory` tells before how
        many bytes it takes to get there.
    Raises:
        TypeError, ValueError: the argument that does not fit, by name; a number that is not finite.
        RuntimeError: the backend asked for cannot run.
    Spec: reranking. Golden: eval/rerank_single, eval/rerank_single_k10, eval/rerank_unit_norm,
        eval/rerank_edges. Backends: retrieval, cuda.

    >>> k_reciprocal_rerank([[0.0], [1.0]], [[0.1], [0.9]], k1=1, k2=1).round(2)
    array([[0.01, 0.94],
           [0.94, 0.01]], dtype=float32)
    """
    method = make_method(k1, k2, weight, neighbors, expand)
    _check(precision, threads)
    named = [("query", query), ("gallery", gallery)]
    if precision == "float32" and stays_on_device(query):
        device = importlib.import_module("fastreid_vi.evaluation.device_rerank")
        tensors = device.feature_sets(named)
        return device.like(query, device.rerank(tensors[:1], tensors[1:], method))
    sets = feature_sets(named)
    return like(query, _rerank(sets[:1], sets[1:], method, precision, threads))


def multi_spectral_rerank(
    queries: Any,
    galleries: Any,
    *,
    k1: int = 40,
    k2: int = 20,
    weight: float = 0.3,
    direction: SpectralDirection = "i2v",
    neighbors: Neighborhood = "queries",
    expand: bool = False,
    precision: RerankPrecision = "float32",
    threads: int | None = None,
) -> Any:
    """Re-ranked distances with several feature sets of the visible side (MCJA's MSER).

    All sets are re-ranked together, each image once per set; the result is the mean over the sets.
    The defaults are MCJA's for SYSU-MM01; RegDB: k1=50, k2=10, weight=0.2, neighbors="all".

    Args:
        queries, galleries: sets of features, n times [Q, D] and n times [G, D]: the original images
            first, then their single channels. The infrared side has one: a single matrix will do,
            and of n only the first is used.
        direction: "i2v", infrared queries; "v2i", visible queries.
        k1, k2, weight, neighbors, expand, precision, threads: as for `k_reciprocal_rerank`.
    Returns:
        [Q, G] float32, of the kind of the first set.
    Raises:
        TypeError, ValueError: the argument that does not fit, by name; a number that is not finite.
        RuntimeError: the backend asked for cannot run.
    Spec: reranking. Golden: eval/mser_i2v_masked, eval/mser_i2v_full, eval/mser_v2i_full,
        mcja/mser. Backends: retrieval, cuda.
    """
    method = make_method(k1, k2, weight, neighbors, expand)
    choice("direction", direction, SpectralDirection)
    asking, asked = _sets("queries", queries), _sets("galleries", galleries)
    infrared, visible = (asking, asked) if direction == "i2v" else (asked, asking)
    if len(infrared) not in (1, len(visible)):
        names = ("queries", "galleries") if direction == "i2v" else ("galleries", "queries")
        raise ValueError(
            f"{names[0]}: expected 1 set or {len(visible)}, as {names[1]}, got {len(infrared)}"
        )
    _check(precision, threads)
    device = None
    if precision == "float32" and stays_on_device(asking[0][1]):
        device = importlib.import_module("fastreid_vi.evaluation.device_rerank")
    arrays = (device.feature_sets if device else feature_sets)([*asking, *asked])
    left, right = arrays[: len(asking)], arrays[len(asking) :]
    for side, sets in (("queries", left), ("galleries", right)):
        for number, array in enumerate(sets):
            if array.shape != sets[0].shape:
                raise ValueError(
                    f"{side}[{number}]: expected shape {list(sets[0].shape)}, as {side}[0], got "
                    f"{list(array.shape)}"
                )
    left, right = (left[:1], right) if direction == "i2v" else (left, right[:1])
    if device:
        return device.like(asking[0][1], device.rerank(left, right, method))
    return like(asking[0][1], _rerank(left, right, method, precision, threads))


def rerank_memory(
    queries: int,
    gallery: int,
    dim: int,
    *,
    spectra: int = 1,
    direction: SpectralDirection = "i2v",
    k1: int | None = None,
    k2: int | None = None,
    neighbors: Neighborhood | None = None,
    expand: bool | None = None,
    precision: RerankPrecision = "float32",
    threads: int | None = None,
) -> int:
    """Bytes that re-ranking on the host takes at most beyond its arguments, result included.

    Args:
        queries, gallery: images on either side.
        dim: length of a feature, of which there are copies where it is not float32.
        spectra: feature sets of the visible side; more than one is `multi_spectral_rerank`.
        direction, k1, k2, neighbors, expand, precision, threads: as for the functions, with their
            defaults.
    Raises:
        TypeError, ValueError: the argument that does not fit, by name.

    >>> rerank_memory(3803, 301, 2048, neighbors="queries") < 2**27
    True
    """
    for name, value in (("queries", queries), ("gallery", gallery), ("dim", dim)):
        at_least_one(name, value)
    at_least_one("spectra", spectra)
    choice("direction", direction, SpectralDirection)
    choice("precision", precision, RerankPrecision)
    single = spectra == 1
    method = make_method(
        (20 if single else 40) if k1 is None else k1,
        (6 if single else 20) if k2 is None else k2,
        0.0,
        ("all" if single else "queries") if neighbors is None else neighbors,
        single if expand is None else expand,
    )
    sets = (1, spectra) if direction == "i2v" else (spectra, 1)
    shape = Shape(queries, sets[0], gallery, sets[1])
    copies = 4 * dim * shape.items + 8 * dim * NORM_ROWS
    if room_of(precision) == "reference":
        # Distances, O, keys, lists of int64 and what sorting takes; V, V' and its columns.
        width = 2 if precision == "float16" else 4
        return copies + shape.items**2 * (4 * 4 + 2 * 8 + 3 * width)
    return copies + sparse_memory(shape, method, threads or cores())


def make_method(k1: Any, k2: Any, weight: Any, neighbors: Any, expand: Any) -> Method:
    """Checked parameters."""
    at_least_one("k1", k1)
    at_least_one("k2", k2)
    if isinstance(weight, bool) or not isinstance(weight, int | float | np.floating | np.integer):
        raise TypeError(f"weight: expected a number, got {type(weight).__name__}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: expected 0 to 1, got {weight}")
    choice("neighbors", neighbors, Neighborhood)
    if not isinstance(expand, bool | np.bool_):
        raise TypeError(f"expand: expected a bool, got {type(expand).__name__}")
    return Method(int(k1), int(k2), float(weight), neighbors == "queries", bool(expand))


def room_of(precision: str) -> str:
    """The backend that re-ranks: the one asked for, else retrieval where it was built."""
    forced = _backend.forced()
    if precision == "float16":
        if forced == "retrieval":
            raise RuntimeError(
                "re-ranking: backend 'retrieval' was asked for, but precision 'float16' has the "
                "reference only"
            )
        return "reference"
    missing = why_not("retrieval")
    if forced == "retrieval" and missing:
        raise RuntimeError(
            f"re-ranking: backend 'retrieval' was asked for but cannot run: {missing}"
        )
    return "reference" if forced == "reference" or missing else "retrieval"


def feature_sets(named: Sequence[tuple[str, Any]]) -> list[Real]:
    """Float32 matrices of one width, finite, their rows adjacent.

    O does not change when all features are scaled: numbers whose squares would leave float32 are
    multiplied by a power of two, which is exact.
    """
    arrays = [real_matrix(name, value, "[n, D]") for name, value in named]
    first, largest = named[0][0], 0.0
    for (name, _), array in zip(named, arrays, strict=True):
        if not array.size:
            raise ValueError(
                f"{name}: expected one row and one number at least, got shape {list(array.shape)}"
            )
        if array.shape[1] != arrays[0].shape[1]:
            raise ValueError(
                f"{first}, {name}: expected equal lengths, got {arrays[0].shape[1]} and "
                f"{array.shape[1]}"
            )
        extent = max(float(array.max()), -float(array.min()))
        if not math.isfinite(extent):
            row = int(np.argmin(np.isfinite(array).all(axis=1)))
            raise ValueError(f"{name}: row {row} is not finite")
        largest = max(largest, extent)
    exponent = math.frexp(largest)[1]
    if largest and abs(exponent) > SAFE_EXPONENT:
        arrays = [np.ldexp(array, -exponent) for array in arrays]
    return [np.ascontiguousarray(array, np.float32) for array in arrays]


def rerank_sets(
    queries: Sequence[Real], galleries: Sequence[Real], method: Method, threads: int | None
) -> Real:
    """F of checked features in float32, by the room that is chosen."""
    return _rerank(queries, galleries, method, "float32", threads)


def _check(precision: Any, threads: Any) -> None:
    choice("precision", precision, RerankPrecision)
    if threads is not None:
        at_least_one("threads", threads)


def _rerank(
    queries: Sequence[Real],
    galleries: Sequence[Real],
    method: Method,
    precision: RerankPrecision,
    threads: int | None,
) -> Real:
    if room_of(precision) == "reference":
        return dense_multi_spectral(list(queries), list(galleries), method, precision)
    whole = np.arange(len(galleries[0]))
    return SparseReranking(queries, galleries, method, [whole], threads or cores()).result(0)


def _sets(name: str, value: Any) -> list[tuple[str, Any]]:
    """Feature sets by name: of a sequence, of an array [n, N, D], or a single matrix."""
    if isinstance(value, list | tuple) and value and np.ndim(value[0]) == 2:
        return [(f"{name}[{number}]", part) for number, part in enumerate(value)]
    array = value if hasattr(value, "ndim") else to_numpy(name, value)
    if array.ndim == 2:
        return [(f"{name}[0]", value)]
    if array.ndim != 3 or not len(array):
        raise ValueError(
            f"{name}: expected feature sets [n, N, D], got {described(to_numpy(name, array))}"
        )
    return [(f"{name}[{number}]", array[number]) for number in range(len(array))]
