"""What rank_metrics takes, what it refuses, and which room it uses."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastreid_vi
from fastreid_vi.evaluation import PerQuery, RankMetrics, positions, rank_metrics, ranking


def problem(dtype: Any = np.float32) -> dict[str, Any]:
    generator = np.random.default_rng(7)
    return {
        "distance": generator.standard_normal((12, 50)).astype(dtype),
        "query_ids": generator.integers(0, 6, 12),
        "gallery_ids": generator.integers(0, 6, 50),
        "query_cams": generator.integers(1, 7, 12),
        "gallery_cams": generator.integers(1, 7, 50),
    }


def run(given: dict[str, Any], **options: Any) -> RankMetrics:
    return rank_metrics(**given, **options)


def equal(a: RankMetrics, b: RankMetrics) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class OnlyDLPack:
    """An array of some other library."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


class OnDevice:
    """Quacks like a CuPy array, which NumPy must not convert by itself."""

    __cuda_array_interface__: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def get(self) -> np.ndarray:
        return self._array

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        raise TypeError("implicit conversion to a NumPy array is not allowed")


@pytest.mark.parametrize(
    "kind", [torch.from_numpy, np.ndarray.tolist, OnlyDLPack, OnDevice], ids=lambda k: k.__name__
)
def test_kinds_of_arrays(kind: Any) -> None:
    given = problem(np.float64)
    assert equal(run({name: kind(value) for name, value in given.items()}), run(given))


def test_tensors_with_a_graph_and_in_half_precision(room: str) -> None:
    given = problem()
    tensor = torch.from_numpy(given["distance"])
    graph = run({**given, "distance": (tensor.clone().requires_grad_() * 1)})
    assert equal(graph, run(given))
    for half in (torch.bfloat16, torch.float16):
        rounded = run({**given, "distance": tensor.to(half).float()})
        assert equal(run({**given, "distance": tensor.to(half)}), rounded)


@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "f8", ">f4", ">f8", "i1", "i4", "i8", "u2", "u8"], ids=str
)
def test_dtypes_of_distances(room: str, dtype: str) -> None:
    given = problem()
    whole = np.round(given["distance"] * 15 + 60)
    assert equal(run({**given, "distance": whole.astype(dtype)}), run({**given, "distance": whole}))


def test_mapped_half_precision_is_converted_by_rows(
    room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem()
    np.save(tmp_path / "d.npy", given["distance"].astype(np.float16))
    mapped = np.load(tmp_path / "d.npy", mmap_mode="r")
    whole = run({**given, "distance": np.array(mapped, np.float32)})
    for size in (1, 100, 149):
        monkeypatch.setattr(ranking, "CONVERTED", size)
        assert equal(run({**given, "distance": mapped}), whole)
    broken = np.array(mapped)
    broken[7, 3] = np.nan
    with pytest.raises(ValueError, match=r"NaN for query 7 \(column 3\)"):
        run({**given, "distance": broken})


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "i4", "u4", "i8", "u8", ">i4"])
def test_dtypes_of_labels(room: str, dtype: str) -> None:
    given = problem()
    other = {name: v if name == "distance" else v.astype(dtype) for name, v in given.items()}
    assert equal(run(other), run(given))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_strides(room: str, dtype: Any) -> None:
    given = problem(dtype)
    distance = given["distance"]
    wide = np.full((24, 150), np.nan, dtype)
    wide[::2, 1::3] = distance
    packed = np.zeros(distance.shape, np.dtype([("a", "i1"), ("d", dtype)]))
    packed["d"] = distance
    for view in (
        wide[::2, 1::3],
        np.asfortranarray(distance),
        distance[::-1, ::-1].copy()[::-1, ::-1],
        packed["d"],  # rows of bytes that no stride in elements describes
    ):
        assert equal(run({**given, "distance": view}), run(given))
    subset = np.arange(50)[::-3]
    chosen = {
        **given,
        "gallery_ids": given["gallery_ids"][subset],
        "gallery_cams": given["gallery_cams"][subset],
    }
    strided = run({**chosen, "distance": distance[:, ::-3]})
    assert equal(strided, run({**chosen, "distance": distance[:, subset]}))


def test_inputs_are_left_alone(room: str) -> None:
    given = problem()
    given["query_cams"][:4] = 3
    before = {name: value.copy() for name, value in given.items()}
    for value in given.values():
        value.setflags(write=False)
    for rule in ("none", "location", "same_id_and_camera"):
        run(given, camera_rule=rule, per_query=True)
    assert all(np.array_equal(given[name], before[name]) for name in given)


def test_ties_go_by_gallery_index(room: str) -> None:
    same = {"query_ids": [1], "protocol": "regdb", "per_query": True}
    zeros = rank_metrics([[0.0, -0.0, -0.0]], gallery_ids=[2, 1, 3], **same)
    assert zeros.per_query.first_image.tolist() == [2]
    infinite = rank_metrics(
        np.array([[np.inf, np.inf, -np.inf, 5]]), gallery_ids=[2, 1, 3, 1], **same
    )
    assert infinite.per_query.first_image.tolist() == [2]
    assert infinite.per_query.last.tolist() == [4]


def test_cameras_2_and_3_are_one_place(room: str) -> None:
    labels = {"query_ids": [1, 1], "gallery_ids": [1, 1, 2], "gallery_cams": [2, 3, 5]}
    found = rank_metrics([[0, 1, 2]] * 2, query_cams=[3, 5], per_query=True, **labels)
    assert found.valid.tolist() == [False, True]
    found = rank_metrics([[0, 1, 2]] * 2, query_cams=[2, 5], **labels)
    assert found.valid.tolist() == [False, True]
    kept = rank_metrics([[0, 1, 2]] * 2, query_cams=[3, 5], protocol="llcm", **labels)
    assert kept.valid.tolist() == [True, True]


def test_protocols_are_their_options(room: str) -> None:
    given = problem()
    names = {
        "sysu": ("location", "identity", 20),
        "regdb": ("none", "image", 20),
        "llcm": ("same_id_and_camera", "identity", 20),
        "market": ("same_id_and_camera", "image", 50),
    }
    for protocol, (rule, cmc_by, max_rank) in names.items():
        found = run(given, protocol=protocol)
        assert found.cmc.shape == (max_rank,)
        for other in names:
            options = {"camera_rule": rule, "cmc_by": cmc_by, "max_rank": max_rank}
            assert equal(found, run(given, protocol=other, **options))


def test_cameras_may_be_left_out_for_regdb(room: str) -> None:
    given = problem()
    labels = [given[name] for name in ("distance", "query_ids", "gallery_ids")]
    assert equal(run(given, protocol="regdb"), rank_metrics(*labels, protocol="regdb"))


def test_result(room: str) -> None:
    found = run(problem(), per_query=True)
    cmc, mean_precision, penalty, valid = found
    assert (cmc is found.cmc, valid is found.valid) == (True, True)
    assert (mean_precision, penalty) == (found.mAP, found.mINP)
    assert cmc.dtype == np.float64
    assert valid.dtype == np.bool_
    assert isinstance(found.per_query, PerQuery)
    assert {part.dtype for part in found.per_query[2:]} == {np.dtype(np.int64)}
    assert run(problem()).per_query is None
    copy = pickle.loads(pickle.dumps(found))
    assert equal(copy, found)
    assert np.array_equal(copy.per_query.last, found.per_query.last)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query_ids": (
        {"query_ids": range(11)},
        ValueError,
        r"query_ids: .* shape \[12\], got .*\[11\]",
    ),
    "gallery_ids": ({"gallery_ids": range(51)}, ValueError, r"gallery_ids: .*\[50\], got .*\[51\]"),
    "query_cams": ({"query_cams": [1]}, ValueError, r"query_cams: .*\[12\], got int64 \[1\]"),
    "gallery_cams": ({"gallery_cams": [1]}, ValueError, r"gallery_cams: .*\[50\], got int64 \[1\]"),
    "no query_cams": ({"query_cams": None}, ValueError, r"query_cams: .*'location'.* got None"),
    "no gallery_cams": ({"gallery_cams": None}, ValueError, r"gallery_cams: .* got None"),
    "matrix of ids": ({"query_ids": np.ones((12, 1), int)}, ValueError, r"query_ids: .*\[12, 1\]"),
    "float ids": ({"query_ids": np.ones(12)}, TypeError, r"query_ids: .*integers.*float64 \[12\]"),
    "bool ids": ({"query_ids": np.ones(12, bool)}, TypeError, r"query_ids: .*bool \[12\]"),
    "text ids": ({"query_ids": ["a"] * 12}, TypeError, r"query_ids: expected integers"),
    "huge ids": ({"query_ids": np.full(12, 2**63, np.uint64)}, ValueError, r"query_ids: .*2\*\*63"),
    "vector": ({"distance": np.zeros(50)}, ValueError, r"distance: expected shape \[Q, G\]"),
    "complex": ({"distance": np.zeros((12, 50), complex)}, TypeError, r"distance: .*complex128"),
    "ragged": ({"distance": [[1, 2], [3]]}, ValueError, r"distance: expected an array, got list"),
    "None": ({"distance": None}, TypeError, r"distance: expected real numbers.*object"),
    "protocol": ({"protocol": "cuhk03"}, ValueError, r"protocol: .*'market'.*got 'cuhk03'"),
    "rule": ({"camera_rule": "same"}, ValueError, r"camera_rule: .*got 'same'"),
    "cmc_by": ({"cmc_by": "name"}, ValueError, r"cmc_by: .*got 'name'"),
    "max_rank": ({"max_rank": 0}, ValueError, r"max_rank: expected >= 1, got 0"),
    "max_rank type": ({"max_rank": 2.0}, TypeError, r"max_rank: expected an integer, got float"),
    "threads": ({"threads": -1}, ValueError, r"threads: expected >= 1, got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        rank_metrics(**{**problem(), **change})


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    rows, columns = (np.zeros(size, int) for size in shape)
    message = rf"distance: expected at least one query and one image, got shape \[{shape[0]}, "
    with pytest.raises(ValueError, match=message):
        rank_metrics(np.zeros(shape), rows, columns, rows, columns)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_names_the_first_query(room: str, dtype: Any) -> None:
    given = problem(dtype)
    # The rule drops this image for this query; a NaN is an error all the same.
    given["query_cams"][5] = given["gallery_cams"][33] = 4
    given["distance"][5, 33] = given["distance"][9, 0] = np.nan
    for threads in (1, 4):
        with pytest.raises(ValueError, match=r"distance: NaN for query 5 \(column 33\)"):
            run(given, threads=threads)


def test_nan_in_the_last_columns(room: str) -> None:
    for column in range(50):
        given = problem()
        given["distance"][11, column] = np.nan
        with pytest.raises(ValueError, match=rf"query 11 \(column {column}\)"):
            run(given)


def test_first_of_many_nan_rows() -> None:
    distance = np.zeros((500, 40), np.float32)
    distance[123:, 7] = np.nan
    labels = np.zeros(500, int), np.zeros(40, int)
    for _ in range(20):
        with pytest.raises(ValueError, match=r"NaN for query 123 \(column 7\)"):
            rank_metrics(distance, *labels, protocol="regdb", threads=4)


def test_counts_are_named_without_a_valid_query(room: str) -> None:
    with pytest.raises(ValueError, match="0 of 2 queries have a match in 3 gallery images, rule"):
        rank_metrics(np.zeros((2, 3)), [1, 2], [3, 4, 5], protocol="regdb")


def test_the_room_asked_for_runs_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert positions.choose() == "retrieval"
    for other in ("cpu", "triton", "cuda"):  # ranking never had them: its own order stays
        with fastreid_vi.backend(other):
            assert positions.choose() == "retrieval"
        assert positions.why_not(other) == f"ranking has no {other} room"
    real = importlib.import_module

    def without(name: str, *args: Any) -> Any:
        if name == "fastreid_vi._retrieval":
            raise ImportError("not built")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    assert positions.choose() == "reference"
    assert run(problem()).mAP > 0
    with (
        fastreid_vi.backend("retrieval"),
        pytest.raises(
            RuntimeError, match=r"'retrieval' was asked for but cannot run: .* not built"
        ),
    ):
        run(problem())


def test_the_environment_chooses_the_room() -> None:
    code = "from fastreid_vi.evaluation import positions; print(positions.choose())"
    for name in ("reference", "retrieval"):
        assert _python(code, FASTREID_VI_BACKEND=name) == name


def test_loads_neither_torch_nor_scipy() -> None:
    code = """
import sys, time
import numpy
began = time.process_time()
import fastreid_vi.evaluation as evaluation
took = time.process_time() - began
evaluation.rank_metrics([[0.1, 0.2]], [1], [2, 1], protocol="regdb")
loaded = {"torch", "scipy", "triton", "PIL"} & set(sys.modules)
print(sorted(loaded), took < 0.5)
"""
    assert _python(code) == "[] True"


def _python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


class TestNative:
    """The compiled module checks what it could read out of bounds."""

    good: tuple[Any, ...] = (
        np.zeros((2, 3), np.float32),
        *(np.zeros(n, np.int32) for n in (2, 2, 3, 3)),
        np.arange(3),
        np.array([0, 3]),
        "none",
        1,
    )

    @pytest.mark.parametrize(
        ("at", "value", "message"),
        [
            (0, np.zeros((2, 3), np.float16), "distance"),
            (0, np.zeros((2, 2, 3), np.float32), "distance: expected a matrix"),
            (1, np.zeros(3, np.int32), "one entry per row"),
            (1, np.ones(2, np.int32), "dense identities"),
            (1, np.full(2, -2, np.int32), "dense identities"),
            (3, np.full(3, 3, np.int32), "dense identities"),
            (3, np.full(3, -1, np.int32), "dense identities"),
            (4, np.zeros(2, np.int32), "one entry per column"),
            (5, np.array([0, 1, 3]), "columns of distance"),
            (5, np.array([0, -1, 2]), "columns of distance"),
            (6, np.array([0, 2]), "offsets"),
            (6, np.array([0, 4, 3]), "offsets"),
            (6, np.array([], int), "offsets"),
            (7, "nobody", "rule"),
        ],
    )
    def test_refuses(self, at: int, value: Any, message: str) -> None:
        native = importlib.import_module("fastreid_vi._retrieval")
        native.rank_rows(*self.good)
        arguments = list(self.good)
        arguments[at] = value
        with pytest.raises(ValueError, match=message):
            native.rank_rows(*arguments)

    def test_no_gallery_and_no_query(self) -> None:
        native = importlib.import_module("fastreid_vi._retrieval")
        arguments = list(self.good)
        arguments[5:7] = np.zeros(0, np.int64), np.zeros(1, np.int64)
        *counts, bad_row = native.rank_rows(*arguments)
        assert {part.shape for part in counts} == {(0, 2)}
        assert bad_row == -1
        nobody = np.zeros(0, np.int32)
        empty = (np.zeros((0, 3), np.float32), nobody, nobody, *self.good[3:])
        assert native.rank_rows(*empty)[0].shape == (1, 0)
