"""What re-ranking must do on any input: equal the dense truth, ignore order, stay in bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastreid_vi
from fastreid_vi.evaluation import k_reciprocal_rerank, multi_spectral_rerank, rerank_sparse
from fastreid_vi.evaluation.rerank_reference import Method, dense_multi_spectral, dense_rerank

TOLERANCE = 2e-6


def sparse(queries: Any, galleries: Any, method: Method, threads: int = 2) -> np.ndarray:
    whole = np.arange(len(galleries[0]))
    found = rerank_sparse.SparseReranking(queries, galleries, method, [whole], threads)
    return np.asarray(found.result(0))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray], Method]:
    """Small integers: products are exact, ties are everywhere."""
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    queries, images = draw(st.integers(1, 40)), draw(st.integers(1, 25))
    size, spread = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 20]))
    sets = draw(st.sampled_from([(1, 1), (1, 3), (3, 1)]))
    method = Method(
        draw(st.integers(1, 30)),
        draw(st.integers(1, 12)),
        draw(st.sampled_from([0.0, 0.3, 1.0])),
        draw(st.booleans()),
        draw(st.booleans()),
    )

    def features(count: int) -> np.ndarray:
        return generator.integers(-spread, spread + 1, (count, size)).astype(np.float32)

    left = [features(queries) for _ in range(sets[0])]
    return left, [features(images) for _ in range(sets[1])], method


@given(problems())
@settings(max_examples=200, deadline=None)
def test_sparse_is_dense(problem: Any) -> None:
    queries, galleries, method = problem
    found = sparse(queries, galleries, method)
    expected = dense_multi_spectral(queries, galleries, method, "float64")
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert (found >= 0).all()
    assert (found <= 1 + 1e-6).all()


@given(problems(), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_threads_change_no_bit(problem: Any, threads: int) -> None:
    queries, galleries, method = problem
    one = sparse(queries, galleries, method, 1)
    np.testing.assert_array_equal(one, sparse(queries, galleries, method, threads))


@given(problems(), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_stripes_change_no_bit(problem: Any, rows: int) -> None:
    """Integers make every product exact, whatever its shape."""
    queries, galleries, method = problem
    whole = sparse(queries, galleries, method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rerank_sparse, "STRIPE_ROWS", (rows, rows))
        np.testing.assert_array_equal(whole, sparse(queries, galleries, method))


def many(seed: int, queries: int, images: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Planted identities among unit vectors: no ties."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((12, size))

    def side(count: int) -> np.ndarray:
        rows = centres[generator.integers(0, 12, count)]
        rows = rows + 0.7 * generator.standard_normal((count, size))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    return side(queries), side(images)


MODES = [{"neighbors": n, "expand": e} for n in ("all", "queries") for e in (True, False)]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_many_rows_and_threads(mode: dict[str, Any]) -> None:
    """More rows than a stripe, a turn or a thread has; real numbers."""
    query, gallery = many(0, 700, 300)
    with fastreid_vi.backend("retrieval"):
        one = k_reciprocal_rerank(query, gallery, threads=1, **mode)
        for threads in (2, 3, 8):
            again = k_reciprocal_rerank(query, gallery, threads=threads, **mode)
            np.testing.assert_array_equal(one, again)
    items = np.concatenate([query, gallery])
    method = Method(20, 6, 0.3, mode["neighbors"] == "queries", mode["expand"])
    exact = dense_rerank(items, len(query), method, "float64").result
    # Where two products differ in the last bit, a neighbour at the cut may be another one.
    off = np.abs(one - exact) > TOLERANCE
    assert off.mean() < 0.01


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_order_of_queries_and_gallery(rerank_room: str, mode: dict[str, Any]) -> None:
    query, gallery = many(1, 90, 60)
    generator = np.random.default_rng(2)
    rows, columns = generator.permutation(90), generator.permutation(60)
    plain = k_reciprocal_rerank(query, gallery, **mode)
    mixed = k_reciprocal_rerank(query[rows], gallery[columns], **mode)
    np.testing.assert_allclose(mixed, plain[rows][:, columns], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_weights(rerank_room: str, mode: dict[str, Any]) -> None:
    query, gallery = many(3, 80, 50)
    items = np.concatenate([query, gallery]).astype(np.float64)
    distances = ((items[:, None] - items) ** 2).sum(axis=2)
    scaled = distances[:80, 80:] / distances.max(axis=1)[:80, None]
    plain = k_reciprocal_rerank(query, gallery, weight=1, **mode)
    np.testing.assert_allclose(plain, scaled, rtol=0, atol=TOLERANCE)
    jaccard = k_reciprocal_rerank(query, gallery, weight=0.0, **mode)
    assert (jaccard >= 0).all()
    assert (jaccard <= 1).all()
    assert jaccard.min() < 0.5
    mixed = k_reciprocal_rerank(query, gallery, weight=0.25, **mode)
    np.testing.assert_allclose(mixed, 0.75 * jaccard + 0.25 * scaled, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 512, 2048])
def test_identical_features(rerank_room: str, mode: dict[str, Any], size: int) -> None:
    """Norms and products of equal rows differ by rounding, which is no distance."""
    row = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    result = k_reciprocal_rerank(np.tile(row, (60, 1)), np.tile(row, (30, 1)), weight=1.0, **mode)
    np.testing.assert_array_equal(result, 0)
    for weight in (0.0, 0.3):
        mixed = k_reciprocal_rerank(np.tile(row, (9, 1)), np.tile(row, (5, 1)), weight=weight)
        assert np.isfinite(mixed).all()


def test_zero_features(rerank_room: str) -> None:
    result = k_reciprocal_rerank(np.zeros((8, 4)), np.zeros((5, 4)), k1=3, k2=2)
    assert np.isfinite(result).all()
    assert (result >= 0).all()
    assert (result <= 1).all()


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    ("queries", "images", "k1", "k2"),
    [
        (1, 1, 20, 6),
        (1, 30, 20, 6),
        (30, 1, 20, 6),
        (15, 30, 100, 6),
        (3, 40, 20, 30),
        (5, 5, 9, 9),
    ],
)
def test_small_and_large_lists(
    rerank_room: str, mode: dict[str, Any], queries: int, images: int, k1: int, k2: int
) -> None:
    generator = np.random.default_rng(queries + images)
    query = generator.integers(-50, 50, (queries, 9)).astype(np.float32)
    gallery = generator.integers(-50, 50, (images, 9)).astype(np.float32)
    found = k_reciprocal_rerank(query, gallery, k1=k1, k2=k2, **mode)
    method = Method(k1, k2, 0.3, mode["neighbors"] == "queries", mode["expand"])
    items = np.concatenate([query, gallery])
    expected = dense_rerank(items, queries, method, "float64").result
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("neighbors", ["all", "queries"])
@pytest.mark.parametrize("direction", ["i2v", "v2i"])
def test_one_spectrum_is_the_plain_call(rerank_room: str, neighbors: Any, direction: Any) -> None:
    query, gallery = many(5, 70, 40)
    options: dict[str, Any] = {"k1": 12, "k2": 4, "neighbors": neighbors}
    plain = k_reciprocal_rerank(query, gallery, expand=False, **options)
    found = multi_spectral_rerank([query], [gallery], direction=direction, **options)
    np.testing.assert_array_equal(found, plain)
    np.testing.assert_array_equal(
        multi_spectral_rerank(query, gallery, direction=direction, **options), plain
    )


@pytest.mark.parametrize("direction", ["i2v", "v2i"])
def test_equal_spectra_in_either_direction(rerank_room: str, direction: Any) -> None:
    """The same set three times: every image's copies are its nearest neighbours."""
    query, gallery = many(6, 50, 30)
    sets = ([query], [gallery] * 3) if direction == "i2v" else ([query] * 3, [gallery])
    found = multi_spectral_rerank(*sets, k1=9, k2=3, direction=direction, neighbors="all")
    method = Method(9, 3, 0.3, False, False)
    expected = dense_multi_spectral(*sets, method, "float64")
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    # The set of the infrared side that does not take part may be anything.
    other = ([query, *(np.full_like(query, 7),) * 2], sets[1]) if direction == "i2v" else (
        sets[0], [gallery, *(np.full_like(gallery, 7),) * 2]
    )  # fmt: skip
    again = multi_spectral_rerank(*other, k1=9, k2=3, direction=direction, neighbors="all")
    np.testing.assert_array_equal(found, again)


@pytest.mark.parametrize("exponent", [-90, -60, 3, 60, 100])
def test_scale_does_not_matter(rerank_room: str, exponent: int) -> None:
    query, gallery = many(7, 60, 40)
    scaled = [np.ldexp(x, exponent) for x in (query, gallery)]
    np.testing.assert_array_equal(k_reciprocal_rerank(*scaled), k_reciprocal_rerank(query, gallery))


def test_float64_beyond_float32(rerank_room: str) -> None:
    query, gallery = many(8, 60, 40)
    plain = k_reciprocal_rerank(query, gallery)
    for factor in (1e200, 1e-200):
        wide = [x.astype(np.float64) * factor for x in (query, gallery)]
        np.testing.assert_allclose(k_reciprocal_rerank(*wide), plain, rtol=0, atol=TOLERANCE)


def test_gallery_alone_is_independent_when_masked(rerank_room: str) -> None:
    """Masked, other gallery images matter only by the largest distance."""
    query, gallery = many(9, 60, 40)
    whole = k_reciprocal_rerank(query, gallery, neighbors="queries", weight=0.0)
    far = np.argmax(((query[:, None] - gallery) ** 2).sum(axis=2), axis=1)
    kept = np.unique(far)
    some = k_reciprocal_rerank(query, gallery[kept], neighbors="queries", weight=0.0)
    np.testing.assert_allclose(some, whole[:, kept], rtol=0, atol=TOLERANCE)
