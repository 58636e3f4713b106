"""search against a brute force that sorts, in both rooms, whatever the blocks and threads."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastreid_vi
from fastreid_vi.evaluation import nearest, search

METRICS = ("cosine", "inner", "euclidean")
ROOMS = ("retrieval", "reference")


@pytest.fixture(params=ROOMS)
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Ask for one room; whether it ran shows in whether the reference was built."""
    built = []
    reference = nearest._Reference

    def watched(*args: Any) -> Any:
        built.append(1)
        return reference(*args)

    monkeypatch.setattr(nearest, "_Reference", watched)
    with fastreid_vi.backend(request.param):
        yield request.param
    assert bool(built) == (request.param == "reference")


def exact_scores(query: Any, gallery: Any, metric: str, dtype: Any) -> np.ndarray:
    """All scores in extended precision, rounded once."""
    q, g = (x.astype(np.longdouble) for x in (query, gallery))
    if metric == "euclidean":
        return np.sqrt(((q[:, None] - g) ** 2).sum(2)).astype(dtype)
    scores = (q[:, None] * g).sum(2)
    if metric == "cosine":
        lengths = np.sqrt((q * q).sum(1))[:, None] * np.sqrt((g * g).sum(1))
        scores = np.divide(scores, lengths, out=np.zeros_like(scores), where=lengths > 0)
    return scores.astype(dtype)


def brute_force(query: Any, gallery: Any, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    scores = exact_scores(query, gallery, metric, query.dtype)
    order = np.argsort(scores if metric == "euclidean" else -scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def same(one: Any, other: Any) -> bool:
    return all(
        a.dtype == b.dtype and np.array_equal(a, b) and not np.isnan(a).any()
        for a, b in zip(one, other, strict=True)
    )


def people(
    queries: int, images: int, dim: int, dtype: Any = np.float32, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    make = generator.standard_normal
    return make((queries, dim)).astype(dtype), make((images, dim)).astype(dtype)


# Small whole numbers: every product and squared distance is exact, and most are ties.
whole = st.integers(-2, 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", ["inner", "euclidean"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_ties_go_by_gallery_index(room: str, metric: Any, dtype: Any, data: Any) -> None:
    queries, images, dim = (data.draw(st.integers(1, most)) for most in (4, 90, 5))
    query = data.draw(arrays.arrays(dtype, (queries, dim), elements=whole))
    gallery = data.draw(arrays.arrays(dtype, (images, dim), elements=whole))
    k, block = data.draw(st.integers(1, images)), data.draw(st.integers(1, images + 1))
    found = search(query, gallery, k, metric=metric, block=block, threads=2)
    scores, order = brute_force(query, gallery, k, metric)
    assert np.array_equal(found.indices, order)
    assert np.array_equal(found.scores, scores)
    assert found.scores.dtype == dtype
    assert found.indices.dtype == np.int64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", METRICS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 5),
    images=st.integers(1, 300),
    dim=st.integers(1, 70),
    share=st.floats(0, 1),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e6, 1e18]),
    block=st.sampled_from([None, 1, 17, 64, 100]),
)
def test_any_numbers(
    room: str, metric: Any, dtype: Any, seed: int, queries: int, images: int, dim: int,
    share: float, scale: float, block: int | None,
) -> None:  # fmt: skip
    query, gallery = people(queries, images, dim, dtype, seed)
    query, gallery = query * dtype(scale), gallery * dtype(scale)
    gallery[images // 2] = query[0]
    gallery[images // 3] = 0
    k = max(1, round(share * images))
    found = search(query, gallery, k, metric=metric, block=block)
    scores, order = brute_force(query, gallery, k, metric)
    if dtype == np.float32:  # a float64 sum rounds to the float32 that the exact one rounds to
        np.testing.assert_allclose(found.scores, scores, rtol=3e-7)
        swapped = found.indices != order
        assert swapped.mean() < 0.02 or dim == 1
    else:
        size = scale if metric != "inner" else scale * scale
        bound = 1e-13 * (dim if metric == "cosine" else dim * size)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-12, atol=bound)
    true = np.take_along_axis(exact_scores(query, gallery, metric, dtype), found.indices, 1)
    np.testing.assert_allclose(found.scores, true, rtol=3e-7, atol=1e-12 * dim * scale**2)
    assert all(len(set(row)) == k for row in found.indices.tolist())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_blocks_threads_and_rooms_give_the_same_bits(metric: Any, dtype: Any) -> None:
    query, gallery = people(37, 3000, 50, dtype)
    gallery[::7] = gallery[3]  # ties across blocks
    gallery[11::13] *= 100
    results = []
    for name in ROOMS:
        with fastreid_vi.backend(name):
            for block in (None, 1024, 333, 64):
                for threads in (1, 2, 5):
                    options = {"metric": metric, "block": block, "threads": threads}
                    results.append(search(query, gallery, 70, **options))
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("metric", METRICS)
def test_rows_do_not_depend_on_their_company(metric: Any, room: str) -> None:
    """Other products (BLAS has other kernels for one row and for odd rests), the same bits."""
    query, gallery = people(9, 700, 130)
    together = search(query, gallery, 20, metric=metric)
    for i in range(len(query)):
        alone = search(query[i : i + 1], gallery, 20, metric=metric)
        assert same(alone, [part[i : i + 1] for part in together])
    shuffle = np.random.default_rng(1).permutation(len(gallery))
    moved = search(query, gallery[shuffle], 20, metric=metric)
    assert np.array_equal(moved.scores, together.scores)
    assert np.array_equal(shuffle[moved.indices], together.indices)


def test_products_only_discard(monkeypatch: pytest.MonkeyPatch, room: str) -> None:
    """Whatever rounding a product has, within its bound: the result does not move."""
    query, gallery = people(12, 900, 64)
    matmul = np.matmul
    generator = np.random.default_rng(3)

    def worse(a: Any, b: Any, out: Any) -> Any:
        matmul(a, b, out=out)
        lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=0)
        out += (generator.uniform(-1, 1, out.shape) * lengths * 64 * 2.0**-24).astype(out.dtype)

    for metric in METRICS:
        exact = search(query, gallery, 30, metric=metric, block=200)
        monkeypatch.setattr(np, "matmul", worse)
        assert same(search(query, gallery, 30, metric=metric, block=200), exact)
        monkeypatch.undo()


def test_near_duplicates_have_accurate_distances(room: str) -> None:
    """A product would lose all of it: squares of 1e6 are exact to 1e-1 in float32."""
    generator = np.random.default_rng(0)
    base = (1000 + generator.standard_normal((1, 300))).astype(np.float32)
    steps = np.array([3e-4, 0, 1e-3, 6e-4, 0])[:, None]
    gallery = base + (steps * generator.choice([-1, 1], (5, 300))).astype(np.float32)
    found = search(base, gallery, 5, metric="euclidean")
    assert found.indices.tolist() == [[1, 4, 0, 3, 2]]
    squares = [
        sum((Fraction(float(a)) - Fraction(float(b))) ** 2 for a, b in zip(*pair, strict=True))
        for pair in ((base[0], row) for row in gallery[found.indices[0]])
    ]
    np.testing.assert_array_equal(found.scores[0], np.sqrt(np.float64(squares)).astype("f4"))
    assert found.scores[0, :2].tolist() == [0, 0]


def test_similarities_of_a_row_with_itself_are_one(room: str) -> None:
    query, _ = people(50, 1, 333)
    found = search(query, np.concatenate([query * 3, -query]), 100)
    assert np.array_equal(found.indices[:, 0], np.arange(50))
    assert (found.scores[:, 0] == 1).all()
    assert (found.scores[:, -1] == -1).all()


def test_zero_rows_are_similar_to_nothing(room: str) -> None:
    found = search(np.zeros((1, 3)), np.eye(3), 3)
    assert found.scores.tolist() == [[0, 0, 0]]
    assert found.indices.tolist() == [[0, 1, 2]]
    found = search([[1.0, 0, 0]], [[-1.0, 0, 0], [0, 0, 0], [0, 0, 0]], 3)
    assert found.indices.tolist() == [[1, 2, 0]]
    assert not np.signbit(found.scores[0, :2]).any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e19, 3e37])
def test_numbers_whose_products_overflow_or_vanish(metric: Any, scale: float, room: str) -> None:
    query, gallery = people(4, 200, 6)
    gallery[::9] = 1
    query, gallery = (x * np.float32(scale) for x in (query, gallery * 0.1))
    found = search(query, gallery, 50, metric=metric, block=64)
    with np.errstate(over="ignore"):
        scores, order = brute_force(query, gallery, 50, metric)
    assert np.array_equal(found.scores, scores)
    assert np.array_equal(found.indices, order)


def test_an_outlier_does_not_hide_others(room: str) -> None:
    query, gallery = people(5, 3000, 16)
    gallery[1500] *= 1e12
    for metric in METRICS:
        found = search(query, gallery, 9, metric=metric)
        assert np.array_equal(found.indices, brute_force(query, gallery, 9, metric)[1])


def test_many_copies_of_the_best(room: str) -> None:
    """More ties than any list holds, in rising and falling order of their company."""
    query, gallery = people(3, 5000, 24)
    gallery[:4000] = query[0]
    found = search(query, gallery, 40)
    assert np.array_equal(found.indices[0], np.arange(40))
    found = search(query, gallery[::-1], 40)
    assert np.array_equal(found.indices[0], np.arange(1000, 1040))
    gallery = np.linspace(0, 1, 5000, dtype=np.float32)[:, None] * query[:1]
    found = search(query[:1], gallery, 40, metric="inner")  # every row beats all before
    assert np.array_equal(found.indices[0], np.arange(4999, 4959, -1))


def test_a_query_block_and_a_whole_ranking() -> None:
    query, gallery = people(2500, 60, 4)
    found = search(query, gallery, 60, metric="euclidean")
    assert np.array_equal(np.sort(found.indices, axis=1), np.tile(np.arange(60), (2500, 1)))
    assert (np.diff(found.scores, axis=1) >= 0).all()
    assert same(search(query[2040:2060], gallery, 60, metric="euclidean"),
                [part[2040:2060] for part in found])  # fmt: skip
