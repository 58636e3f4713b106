"""The FAISS index: what it finds, how much of the truth that is, and what it refuses."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastreid_vi.evaluation import search
from fastreid_vi.evaluation.approximate import ApproximateIndex, build_index, load_index

KINDS = ("hnsw", "ivf")
METRICS = ("cosine", "inner", "euclidean")


@pytest.fixture(autouse=True)
def _needs_faiss() -> None:
    pytest.importorskip("faiss", reason="needs the extra faiss")


def clustered(count: int, seed: int) -> np.ndarray:
    """Rows around 150 centres, as people in a gallery are."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((150, 32))
    rows = centres[generator.integers(0, 150, count)] + 0.4 * generator.standard_normal((count, 32))
    return rows.astype(np.float32)


QUERY, GALLERY = clustered(40, 1), clustered(3000, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_finds_most_and_says_how_much(kind: Any, metric: Any) -> None:
    index = build_index(GALLERY, metric=metric, kind=kind)
    found, true = index.search(QUERY, 10), search(QUERY, GALLERY, 10, metric=metric)
    share = np.mean(
        [len(set(a) & set(b)) for a, b in zip(found.indices, true.indices, strict=True)]
    )
    assert index.recall(QUERY, GALLERY, 10) == pytest.approx(share / 10)
    assert index.recall(QUERY, GALLERY, 10) > (0.6 if metric == "inner" else 0.9)
    order = np.diff(found.scores, axis=1)
    assert (order >= 0).all() if metric == "euclidean" else (order <= 0).all()
    same = found.indices == true.indices
    np.testing.assert_allclose(found.scores[same], true.scores[same], rtol=1e-5)
    assert found.indices.dtype == np.int64


@pytest.mark.parametrize("kind", KINDS)
def test_more_effort_finds_more(kind: Any) -> None:
    index = build_index(GALLERY, kind=kind, effort=1)
    few = index.recall(QUERY, GALLERY, 5)
    index.effort = 3000
    assert few < index.recall(QUERY, GALLERY, 5) > 0.99
    with pytest.raises(ValueError, match="effort: expected >= 1, got 0"):
        index.effort = 0


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: Any, tmp_path: Path) -> None:
    index = build_index(GALLERY, kind=kind, effort=77, metric="euclidean")
    index.save(tmp_path / "people.index")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["people.index", "people.index.json"]
    again = load_index(tmp_path / "people.index")
    assert (again.kind, again.metric, again.effort) == (kind, "euclidean", 77)
    assert again.shape == (3000, 32)
    for one, other in zip(index.search(QUERY, 7), again.search(QUERY, 7), strict=True):
        assert np.array_equal(one, other)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path, record = tmp_path / "i", tmp_path / "i.json"
    with pytest.raises(FileNotFoundError, match=r"i: no such file; an index is .*i and .*i\.json"):
        load_index(path)
    build_index(GALLERY[:100]).save(path)
    good = record.read_text()
    for text in ("{", "[]", good.replace("hnsw", "flat"), '{"kind": "ivf"}'):
        record.write_text(text)
        with pytest.raises(ValueError, match=r"i\.json: not the record of an index"):
            load_index(path)
    record.write_text(json.dumps({**json.loads(good), "shape": [101, 32]}))
    with pytest.raises(ValueError, match=r"expected \[101, 32\] vectors, got \[100, 32\]"):
        load_index(path)
    record.write_text(good)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="i: not a FAISS index"):
        load_index(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="i: not a FAISS index"):
        load_index(path)
    with pytest.raises(OSError, match="cannot be written"):
        build_index(GALLERY[:10]).save(tmp_path / "none" / "i")


def test_places_that_stay_empty() -> None:
    index = build_index(GALLERY, kind="ivf", effort=1)
    found = index.search(QUERY[:2], 2000)
    empty = found.indices == -1
    assert empty.any()
    assert (found.scores[empty] == -np.inf).all()
    assert (found.scores[~empty] <= 1.001).all()


def test_kinds_of_arrays() -> None:
    index = build_index(torch.from_numpy(GALLERY).to(torch.float64))
    found = index.search(torch.from_numpy(QUERY), 5)
    assert isinstance(found.indices, torch.Tensor)
    expected = build_index(GALLERY).search(QUERY, 5)
    assert (found.indices.numpy() == expected.indices).mean() > 0.95
    zero = build_index(np.zeros((3, 4))).search(np.zeros((1, 4)), 2)
    assert zero.scores.tolist() == [[0, 0]]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "k": ({"k": 0}, "k: expected >= 1, got 0"),
    "k too large": ({"k": 3001}, "k: expected at most the 3000 rows of the gallery, got 3001"),
    "length": ({"query": QUERY[:, :5]}, r"query: expected shape \[Q, 32\], got \[40, 5\]"),
    "none": ({"query": QUERY[:0]}, r"query: expected shape \[Q, 32\], got \[0, 32\]"),
    "nan": ({"query": QUERY * np.float32("nan")}, "query: .* NaN in row 0"),
}


@pytest.fixture(scope="module")
def index() -> ApproximateIndex:
    return build_index(GALLERY, kind="ivf")


@pytest.mark.parametrize("case", BAD)
def test_bad_queries(index: ApproximateIndex, case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        index.search(**{"query": QUERY, "k": 3, **change})


def test_bad_galleries(index: ApproximateIndex) -> None:
    with pytest.raises(ValueError, match=r"gallery: expected \[3000, 32\], got \[2999, 32\]"):
        index.recall(QUERY, GALLERY[:-1], 3)
    with pytest.raises(ValueError, match=r"gallery: expected at least one row .* \[0, 32\]"):
        build_index(GALLERY[:0])
    broken = GALLERY.copy()
    broken[2100, 3] = np.nan
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"gallery: expected finite .* NaN in row 2100"):
            build_index(broken, kind=kind)
    with pytest.raises(ValueError, match="kind: expected one of 'hnsw', 'ivf', got 'flat'"):
        build_index(GALLERY, kind="flat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="metric: expected one of"):
        build_index(GALLERY, metric="l2")  # type: ignore[arg-type]


def test_without_faiss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.import_module

    def without(name: str, *args: Any) -> Any:
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    message = r"approximate search needs FAISS .*: pip install fastreid-vi\[faiss\]"
    with pytest.raises(ImportError, match=message):
        build_index(GALLERY)
    with pytest.raises(ImportError, match=message):
        load_index(tmp_path / "i")
