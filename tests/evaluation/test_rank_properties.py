"""rank_metrics against plain loops, and the laws of the evaluation spec, section 5."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastreid_vi
from fastreid_vi.evaluation import RankMetrics, rank_metrics
from tests.evaluation import plain
from tests.evaluation.conftest import ROOMS

RULES = ("none", "location", "same_id_and_camera")
# Any int64 is an identity: MPANet's and MCJA's marker -1 and the limits among them.
IDENTITIES = (-1, 0, 7, 8, 2**40, -(2**63), 2**63 - 1)
TIED = (0.0, -0.0, 0.5, -1.5, 2.0, float("inf"), float("-inf"), 3e38)
law = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Problem(NamedTuple):
    """Arguments of rank_metrics."""

    distance: np.ndarray
    query_ids: np.ndarray
    gallery_ids: np.ndarray
    query_cams: np.ndarray
    gallery_cams: np.ndarray


@st.composite
def problems(draw: Any, *, ties: bool = True, images: int = 40) -> Problem:
    queries, gallery = draw(st.integers(1, 6)), draw(st.integers(1, images))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    names = np.array(IDENTITIES)[: draw(st.integers(1, len(IDENTITIES)))]
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    if ties:
        distance = generator.choice(np.array(TIED, dtype), (queries, gallery))
    else:
        order = generator.permuted(np.tile(np.arange(gallery), (queries, 1)), axis=1)
        distance = (order - gallery / 2).astype(dtype)
    return Problem(
        distance,
        generator.choice(names, queries),
        generator.choice(names, gallery),
        generator.integers(1, 7, queries),
        generator.integers(1, 7, gallery),
    )


def run(problem: Problem, rule: Any = "location", **options: Any) -> RankMetrics | None:
    """The metrics, or None where no query is valid."""
    try:
        return rank_metrics(*problem, camera_rule=rule, per_query=True, **options)
    except ValueError as error:
        assert "no valid query" in str(error)  # noqa: PT017
        return None


def same_bits(a: RankMetrics | None, b: RankMetrics | None) -> bool:
    if a is None or b is None:
        return a is b
    assert a.per_query is not None
    assert b.per_query is not None
    parts = zip((*a, *a.per_query), (*b, *b.per_query), strict=True)
    return all(np.array_equal(x, y, equal_nan=np.asarray(x).dtype.kind == "f") for x, y in parts)


@law
@given(problems(), st.sampled_from(RULES))
def test_plain_loop(room: str, problem: Problem, rule: str) -> None:
    expected = plain.rank_all(*problem, rule)
    found = run(problem, rule, max_rank=15)
    valid = [query for query in expected if query is not None]
    if not valid:
        assert found is None
        return
    assert found is not None
    assert found.per_query is not None
    assert found.valid.tolist() == [query is not None for query in expected]
    for i, query in enumerate(expected):
        detail = {name: values[i] for name, values in found.per_query._asdict().items()}
        if query is None:
            assert np.isnan([detail.pop("AP"), detail.pop("INP")]).all()
            assert set(detail.values()) == {0}
        else:
            assert detail == pytest.approx(query, abs=1e-14)
    assert found.mAP == pytest.approx(np.mean([q["AP"] for q in valid]), abs=1e-14)
    assert found.mINP == pytest.approx(np.mean([q["INP"] for q in valid]), abs=1e-14)
    assert np.array_equal(found.cmc, plain.cmc([q["first_identity"] for q in valid], 15))
    by_image = run(problem, rule, cmc_by="image", max_rank=15)
    assert by_image is not None
    assert np.array_equal(by_image.cmc, plain.cmc([q["first_image"] for q in valid], 15))


def big(seed: int, queries: int = 300, images: int = 900, persons: int = 20) -> Problem:
    generator = np.random.default_rng(seed)
    distance = generator.standard_normal((queries, images)).astype(np.float32)
    return Problem(
        np.round(distance, 1),  # many ties
        generator.integers(0, persons, queries),
        generator.integers(0, persons, images),
        generator.integers(1, 7, queries),
        generator.integers(1, 7, images),
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rooms_give_the_same_bits(rule: str, dtype: Any) -> None:
    problem = big(0)
    problem = problem._replace(distance=problem.distance.astype(dtype))
    results = []
    for name in ROOMS:
        with fastreid_vi.backend(name):
            results.append(run(problem, rule))
    assert same_bits(*results)


def test_threads_do_not_change_a_bit() -> None:
    problem = big(1)
    with fastreid_vi.backend("retrieval"):
        one = run(problem, threads=1)
        for threads in (2, 3, 16, 1000):
            assert same_bits(one, run(problem, threads=threads))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("images", [511, 512, 513, 2000])
def test_galleries_of_few_persons(room: str, images: int, rule: str) -> None:
    """Hundreds of matches of a query: the C++ room ranks them by another loop."""
    problem = big(images, queries=4, images=images, persons=1)
    problem.gallery_ids[::97] = 5
    problem.gallery_cams[:] = 1
    problem.gallery_cams[3] = problem.query_cams[0] = 4
    expected = plain.rank_all(*problem, rule)
    found = run(problem, rule)
    assert found is not None
    assert found.per_query is not None
    for i, query in enumerate(expected):
        detail = {name: values[i] for name, values in found.per_query._asdict().items()}
        assert query is None or detail == pytest.approx(query, abs=1e-13)


@law
@given(problems(), st.randoms(use_true_random=False))
def test_order_of_queries(room: str, problem: Problem, random: Any) -> None:
    found = run(problem)
    assume(found is not None)
    order = random.sample(range(len(problem.query_ids)), len(problem.query_ids))
    shuffled = problem._replace(
        distance=problem.distance[order],
        query_ids=problem.query_ids[order],
        query_cams=problem.query_cams[order],
    )
    again = run(shuffled)
    assert np.array_equal(again.valid, found.valid[order])
    assert np.array_equal(again.cmc, found.cmc)
    for a, b in zip(again.per_query, found.per_query, strict=True):
        assert np.array_equal(a, b[order], equal_nan=a.dtype.kind == "f")


@law
@given(problems(ties=False), st.randoms(use_true_random=False))
def test_order_of_the_gallery_without_ties(room: str, problem: Problem, random: Any) -> None:
    order = random.sample(range(len(problem.gallery_ids)), len(problem.gallery_ids))
    shuffled = problem._replace(
        distance=problem.distance[:, order],
        gallery_ids=problem.gallery_ids[order],
        gallery_cams=problem.gallery_cams[order],
    )
    assert same_bits(run(problem), run(shuffled))


@law
@given(problems())
def test_names_of_identities(room: str, problem: Problem) -> None:
    table = {name: 1000 - 3 * i for i, name in enumerate(IDENTITIES)}
    renamed = problem._replace(
        query_ids=np.array([table[int(i)] for i in problem.query_ids]),
        gallery_ids=np.array([table[int(i)] for i in problem.gallery_ids]),
    )
    assert same_bits(run(problem), run(renamed))


@law
@given(problems(ties=False))
def test_increasing_maps_of_distances(room: str, problem: Problem) -> None:
    found = run(problem)
    assert same_bits(found, run(problem._replace(distance=problem.distance.astype(float) ** 3)))
    assert same_bits(
        found, run(problem._replace(distance=np.exp(problem.distance.astype(float)) + 5))
    )


@law
@given(problems(), st.sampled_from(RULES))
def test_an_invalid_query_changes_nothing(room: str, problem: Problem, rule: str) -> None:
    found = run(problem, rule)
    assume(found is not None)
    more = problem._replace(
        distance=np.vstack([problem.distance[:1], problem.distance]),
        query_ids=np.append(123456789, problem.query_ids),
        query_cams=np.append(1, problem.query_cams),
    )
    again = run(more, rule)
    assert not again.valid[0]
    assert np.array_equal(again.valid[1:], found.valid)
    assert np.array_equal(again.cmc, found.cmc)
    assert (again.mAP, again.mINP) == (found.mAP, found.mINP)


@law
@given(problems(), st.data())
def test_a_distractor_twice_never_raises_precision(
    room: str, problem: Problem, data: st.DataObject
) -> None:
    found = run(problem)
    assume(found is not None)
    copied = data.draw(st.integers(0, len(problem.gallery_ids) - 1))
    stranger = problem.query_ids != problem.gallery_ids[copied]
    again = run(
        problem._replace(
            distance=np.hstack([problem.distance, problem.distance[:, [copied]]]),
            gallery_ids=np.append(problem.gallery_ids, problem.gallery_ids[copied]),
            gallery_cams=np.append(problem.gallery_cams, problem.gallery_cams[copied]),
        )
    )
    rows = stranger & found.valid
    assert np.all(again.per_query.AP[rows] <= found.per_query.AP[rows])
    assert np.all(again.per_query.INP[rows] <= found.per_query.INP[rows])
    assert np.array_equal(
        again.per_query.first_identity[rows], found.per_query.first_identity[rows]
    )


@law
@given(problems(), st.sampled_from(RULES))
def test_shape_of_the_curves(room: str, problem: Problem, rule: str) -> None:
    found = run(problem, rule, max_rank=60)
    assume(found is not None)
    image = run(problem, rule, max_rank=60, cmc_by="image")
    assert np.all(np.diff(found.cmc) >= 0)
    assert np.all(np.diff(image.cmc) >= 0)
    assert found.cmc[0] == image.cmc[0]
    assert np.all(found.cmc >= image.cmc)
    assert found.cmc[-1] == image.cmc[-1] == 1
    single = found.per_query.num_pos == 1
    assert np.array_equal(found.per_query.AP[single], found.per_query.INP[single])
    assert np.array_equal(run(problem, rule, max_rank=3).cmc, found.cmc[:3])
