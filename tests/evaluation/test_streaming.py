"""A pool that does not fit in memory: blocks give the integers of the whole, from mapped files."""

from __future__ import annotations

import importlib
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastreid_vi
from fastreid_vi.evaluation import (
    Embeddings,
    Evaluation,
    camera_matrix,
    evaluate_llcm,
    evaluate_regdb,
    evaluate_sysu,
    products,
    streaming,
    sysu_table,
)
from tests.evaluation.conftest import Data

RULES = ("none", "location", "same_id_and_camera")
METRICS = ("cosine", "inner", "euclidean", "sqeuclidean")
RAW: dict[str, Any] = {"normalize": False, "metric": "sqeuclidean"}
law = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=["reference", "retrieval"])
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Everything is streamed through one room, in tiny blocks; how often that room ran."""
    calls: list[int] = []

    def watched(name: str, room: Any) -> Any:
        def call(*args: Any) -> int:
            assert name == request.param, f"{name} ran, {request.param} was asked for"
            calls.append(len(args[0]))
            return int(room(*args))

        return call

    for name in ("_reference", "_retrieval"):
        monkeypatch.setattr(streaming, name, watched(name[1:], getattr(streaming, name)))
    monkeypatch.setattr(products, "MEMORY_BYTES", 0)
    tiny(monkeypatch, images=7, queries=5)
    with fastreid_vi.backend(request.param):
        yield calls


def tiny(monkeypatch: pytest.MonkeyPatch, images: int, queries: int) -> None:
    monkeypatch.setattr(streaming, "MOST_IMAGES", images)
    monkeypatch.setattr(streaming, "MOST_QUERIES", queries)


def same(a: Evaluation, b: Evaluation) -> bool:
    for m, n in zip(a.trials, b.trials, strict=True):
        assert m.per_query is not None
        assert n.per_query is not None
        for x, y in zip((*m, *m.per_query), (*n, *n.per_query), strict=True):
            np.testing.assert_array_equal(x, y)
    return len(a.trials) == len(b.trials)


def whole(function: Any, *args: Any, **options: Any) -> Evaluation:
    """The result of the path that keeps all features in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "MEMORY_BYTES", 2**62)
        return function(*args, **options, per_query=True)


def some(seed: int, count: int, persons: int, dim: int = 5, values: int = 3) -> Embeddings:
    """Small whole numbers: exact products and many ties."""
    generator = np.random.default_rng(seed)
    features = generator.integers(-values, values + 1, (count, dim)).astype(np.float32)
    ids = generator.integers(-persons, 2 * persons, count) * 3
    return Embeddings(features, ids, generator.integers(1, 7, count))


@law
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 60),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(RULES),
    st.sampled_from(METRICS[1:]),
)
def test_blocks_of_any_size(
    counted: list[int],
    seed: int,
    queries: int,
    images: int,
    columns: int,
    rows: int,
    rule: Any,
    metric: Any,
) -> None:
    query, gallery = some(seed, queries, 3), some(seed + 1, images, 3)
    options = {"camera_rule": rule, "metric": metric, "normalize": False}
    try:
        expected = whole(evaluate_regdb, query, gallery, **options)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            evaluate_regdb(query, gallery, **options)
        return
    with pytest.MonkeyPatch.context() as patch:
        tiny(patch, columns, rows)
        before = len(counted)
        assert same(evaluate_regdb(query, gallery, per_query=True, **options), expected)
        assert len(counted) > before


@pytest.mark.parametrize("rule", RULES)
def test_galleries_share_the_blocks(counted: list[int], data: Data, rule: Any) -> None:
    options = {"shots": 10, "camera_rule": rule, **RAW}
    expected = whole(evaluate_sysu, *data, trials=3, **options)
    with pytest.MonkeyPatch.context() as patch:
        tiny(patch, 300, 100)
        assert same(evaluate_sysu(*data, trials=3, per_query=True, **options), expected)


@pytest.mark.parametrize("rule", RULES)
def test_gallery_order_decides_ties(counted: list[int], rule: Any) -> None:
    """Galleries in an order of their own, with many equal distances."""
    query, gallery = some(5, 40, 2, dim=2), some(6, 120, 2, dim=2)
    galleries = [np.random.default_rng(t).permutation(120)[:90] for t in range(4)]
    options = {"galleries": galleries, "camera_rule": rule, **RAW}
    found = camera_matrix(query, gallery, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "MEMORY_BYTES", 2**62)
        expected = camera_matrix(query, gallery, **options)
    assert counted
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_protocols(counted: list[int], data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch, 400, 200)
    expected = whole(sysu_table, *data, trials=2, **RAW)
    found = sysu_table(*data, trials=2, per_query=True, **RAW)
    assert all(same(found[name], expected[name]) for name in expected)
    query, gallery = some(0, 40, 6), some(1, 300, 6)
    for options in ({}, {"vis_to_ir": "released"}):
        again = evaluate_llcm(query, gallery, per_query=True, **options, **RAW)
        assert same(again, whole(evaluate_llcm, query, gallery, **options, **RAW))


@pytest.mark.parametrize("matches", [255, 256, 257, 900])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_matches(
    counted: list[int], matches: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C++ room counts around hundreds of matches by another loop."""
    tiny(monkeypatch, 500, 3)
    gallery = some(3, 1200, 5)._replace(ids=np.r_[np.full(matches, 4), np.arange(1200 - matches)])
    query = some(4, 5, 1)._replace(ids=np.array([4, 4, 0, 5, 4]))
    query, gallery = (x._replace(features=x.features.astype(dtype)) for x in (query, gallery))
    expected = whole(evaluate_regdb, query, gallery, **RAW)
    assert same(evaluate_regdb(query, gallery, per_query=True, **RAW), expected)


def test_unit_vectors(counted: list[int], data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are normalised as the whole is."""
    tiny(monkeypatch, 300, 100)
    expected = whole(evaluate_sysu, *data, mode="indoor")
    found = evaluate_sysu(*data, mode="indoor", per_query=True)
    for a, b in zip(found.trials, expected.trials, strict=True):
        assert (a.mAP, a.mINP) == pytest.approx((b.mAP, b.mINP), abs=1e-12)
        np.testing.assert_allclose(a.cmc, b.cmc, rtol=0, atol=1e-12)


def test_equal_images_in_different_blocks(counted: list[int]) -> None:
    """A constant embedding: everything ties, so gallery order decides."""
    query, gallery = some(0, 9, 4, dim=16), some(1, 80, 4, dim=16)
    blank = [x._replace(features=np.ones_like(x.features)) for x in (query, gallery)]
    expected = whole(evaluate_regdb, *blank)
    assert same(evaluate_regdb(*blank, per_query=True), expected)


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8", "i2"])
def test_mapped_files(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    tiny(monkeypatch, 64, 16)
    query, gallery = some(0, 40, 6), some(1, 300, 6)
    mapped = []
    for name, images in (("query", query), ("gallery", gallery)):
        path = tmp_path / f"{name}.npy"
        np.save(path, images.features.astype(dtype))
        mapped.append(images._replace(features=np.load(path, mmap_mode="r")))
    expected = whole(evaluate_regdb, query, gallery, **RAW)
    assert same(evaluate_regdb(*mapped, per_query=True, **RAW), expected)


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped half-precision pool of 64 MB is ranked in an eighth of that."""
    monkeypatch.setattr(products, "MEMORY_BYTES", 2**21)
    monkeypatch.setattr(streaming, "POOL_BYTES", 2**20)
    monkeypatch.setattr(streaming, "DISTANCE_BYTES", 2**20)
    images, dim = 16384, 2048
    path = tmp_path / "pool.npy"
    pool = np.lib.format.open_memmap(path, "w+", np.float16, (images, dim))
    pool[:] = np.random.default_rng(0).integers(-3, 4, dim).astype(np.float16)
    pool[np.arange(images), np.arange(images) % dim] += np.float16(1)
    pool.flush()
    del pool
    gallery = Embeddings(np.load(path, mmap_mode="r"), np.arange(images) // 4)
    query = Embeddings(gallery.features[::1024].astype(np.float32), gallery.ids[::1024])
    tracemalloc.start()
    try:
        found = evaluate_regdb(query, gallery, **RAW)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 8
    assert found.mean.cmc[-1] > 0


def test_threads(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MEMORY_BYTES", 0)
    tiny(monkeypatch, 500, 100)
    with fastreid_vi.backend("retrieval"):
        one, many = (
            evaluate_sysu(*data, trials=2, per_query=True, threads=t, **RAW) for t in (1, 5)
        )
    assert same(one, many)


def test_nan_and_infinity(counted: list[int]) -> None:
    query, gallery = some(0, 9, 4), some(1, 80, 4)
    for side in (query, gallery):
        for value in (np.nan, np.inf):
            features = side.features.copy()
            features[5, 2] = value
            broken = side._replace(features=features)
            pair = (broken, gallery) if side is query else (query, broken)
            with pytest.raises(ValueError, match=r"\.features: row 5 is not finite"):
                evaluate_regdb(*pair)
    huge = [x._replace(features=x.features * np.float32(1e38)) for x in (query, gallery)]
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="distance: NaN for query"):
        evaluate_regdb(*huge, normalize=False, metric="sqeuclidean")
    with pytest.raises(ValueError, match="expected equal lengths, got 5 and 4"):
        evaluate_regdb(query, gallery._replace(features=gallery.features[:, 1:]))


class TestNative:
    """The compiled function checks what it could read or write out of bounds."""

    def good(self) -> list[Any]:
        int32, int64 = (lambda *v: np.array(v, np.int32)), (lambda *v: np.array(v, np.int64))
        return [
            np.array([[3, 1, 2], [0, 5, 5]], np.float32),
            int32(0, 2),
            int32(0, 0),
            int32(0, 1, 2),
            int32(1, 1, 1),
            int64(0, 1, 2),
            int32(2, 1, 0),
            int64(0, 3),
            "none",
            int64(0, 1, 2),
            np.array([3, 5], np.float32),
            int32(2, 0),
            np.zeros(2, np.int64),
            np.zeros(2, np.int64),
            np.full(2, -1, np.int32),
            1,
        ]

    def test_counts(self) -> None:
        native = importlib.import_module("fastreid_vi._retrieval")
        arguments = self.good()
        assert native.count_ahead(*arguments) == -1
        assert arguments[12].tolist() == [2, 1]  # a tie at slot 1 loses to the match at slot 0
        assert arguments[13].tolist() == [2, 1]
        assert arguments[14].tolist() == [2, 0]

    @pytest.mark.parametrize(
        ("at", "value", "message"),
        [
            (0, np.zeros((3, 3), np.float32), "one entry per row"),
            (0, np.zeros((2, 2), np.float32), "one entry per column"),
            (3, np.array([0, 2, 1], np.int32), "pool_ids: expected to ascend"),
            (5, np.array([0, 1, 3]), "columns of distance"),
            (5, np.array([-1, 1, 2]), "columns of distance"),
            (5, np.array([1, 0, 2]), "columns: expected to ascend"),
            (6, np.zeros(2, np.int32), "slots: expected one entry"),
            (7, np.array([0, 4]), "offsets"),
            (7, np.array([], int), "offsets"),
            (8, "nobody", "rule"),
            (9, np.array([0, 1]), "start"),
            (9, np.array([0, 3, 2]), "start"),
            (11, np.zeros(1, np.int32), "one entry per match"),
            (12, np.zeros(3, int), "one entry per match"),
            (13, np.zeros(1, int), "one entry per row and gallery"),
            (14, np.zeros(3, np.int32), "one entry per row and gallery"),
        ],
    )
    def test_refuses(self, at: int, value: Any, message: str) -> None:
        native = importlib.import_module("fastreid_vi._retrieval")
        arguments = self.good()
        arguments[at] = value
        with pytest.raises(ValueError, match=message):
            native.count_ahead(*arguments)

    def test_writes_into_the_arrays_given(self) -> None:
        native = importlib.import_module("fastreid_vi._retrieval")
        arguments = self.good()
        arguments[12] = arguments[12].astype(np.int32)  # a converted copy would be lost
        with pytest.raises(TypeError):
            native.count_ahead(*arguments)
