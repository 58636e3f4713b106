"""What search takes, reads, gives back and refuses."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastreid_vi.evaluation import SearchResult, search
from tests.evaluation.test_rank_inputs import OnDevice, OnlyDLPack
from tests.evaluation.test_search import people, same

QUERY, GALLERY = people(6, 900, 20, np.float64)


class OnlySlices:
    """A gallery that lives elsewhere, as an HDF5 data set does; it remembers what was read."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.shape, self.longest = array, array.shape, 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = self._array[rows].copy()
        self.longest = max(self.longest, len(found))
        return found


@pytest.mark.parametrize(
    "kind",
    [torch.from_numpy, np.ndarray.tolist, OnlyDLPack, OnDevice, OnlySlices, np.asfortranarray],
    ids=lambda k: k.__name__,
)
def test_kinds_of_galleries(kind: Any) -> None:
    assert same(search(QUERY, kind(GALLERY), 9), search(QUERY, GALLERY, 9))


@pytest.mark.parametrize("kind", [np.ndarray.tolist, OnlyDLPack, OnDevice, np.asfortranarray])
def test_kinds_of_queries(kind: Any) -> None:
    assert same(search(kind(QUERY), GALLERY, 9), search(QUERY, GALLERY, 9))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8", "i1", "u1", "i8"])
def test_dtypes(dtype: str) -> None:
    query, gallery = np.round(QUERY * 9 + 30).astype(dtype), np.round(GALLERY * 9 + 30)
    wide = "f4" if dtype in ("f2", "f4", ">f4") else "f8"
    found = search(query, gallery.astype(dtype), 9)
    assert same(found, search(query.astype(wide), gallery.astype(wide), 9))
    assert found.scores.dtype == wide
    assert search(query, gallery.astype("f8"), 9).scores.dtype == np.float64
    assert search(query.astype("f8"), gallery.astype(dtype), 9).scores.dtype == np.float64


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_tensors_in_half_precision(half: torch.dtype) -> None:
    query, gallery = (torch.from_numpy(x).to(half) for x in (QUERY, GALLERY))
    found = search(query, gallery, 9, metric="euclidean")
    assert found.scores.dtype == torch.float32
    wide = search(query.float().numpy(), gallery.float().numpy(), 9, metric="euclidean")
    assert same([part.numpy() for part in found], wide)


def test_results_are_the_kind_of_array_that_the_query_is() -> None:
    tensor = torch.from_numpy(QUERY)
    found = search(tensor.requires_grad_(), GALLERY, 4)
    assert isinstance(found, SearchResult)
    assert isinstance(found.scores, torch.Tensor)
    assert not found.scores.requires_grad
    assert found.indices.dtype == torch.int64
    assert same([part.numpy() for part in found], search(QUERY, GALLERY, 4))
    assert isinstance(search(QUERY, torch.from_numpy(GALLERY), 4).indices, np.ndarray)
    scores, indices = search(QUERY, GALLERY, 4)
    assert (scores.shape, indices.shape) == ((6, 4), (6, 4))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    query, gallery = (torch.from_numpy(x).cuda() for x in (QUERY, GALLERY))
    found = search(query, gallery, 9)
    assert found.scores.device == query.device
    assert same([part.cpu().numpy() for part in found], search(QUERY, GALLERY, 9))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_strides(dtype: Any) -> None:
    query, gallery = QUERY.astype(dtype), GALLERY.astype(dtype)
    expected = search(query, gallery, 9)
    wide = np.full((1800, 60), np.nan, dtype)
    wide[::2, 1:21] = gallery
    sparse = np.full((900, 60), np.nan, dtype)
    sparse[:, ::3] = gallery
    packed = np.zeros(gallery.shape, np.dtype([("a", "i1"), ("d", dtype)]))
    packed["d"] = gallery
    rising = gallery[::-1].copy()[::-1]
    for view in (wide[::2, 1:21], sparse[:, ::3], packed["d"], rising):
        assert same(search(query, view, 9), expected)
        assert same(search(view[:6], gallery, 9), search(gallery[:6], gallery, 9))
    repeated = np.broadcast_to(gallery[:1], (50, 20))
    assert search(query, repeated, 50).indices.tolist() == [list(range(50))] * 6
    assert search(query, gallery[::2], 3).indices.max() < 450


def test_only_blocks_are_read() -> None:
    query, gallery = people(3, 30_000, 8)
    slices = OnlySlices(gallery)
    assert same(search(query, slices, 5), search(query, gallery, 5))
    assert 0 < slices.longest <= 8192
    search(query, slices, 5, block=100)
    slices.longest = 0
    search(query, slices, 5, block=100)
    assert slices.longest == 100


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_mapped_file_is_not_loaded(tmp_path: Path, dtype: Any) -> None:
    query, gallery = people(4, 60_000, 64, dtype)
    gallery.tofile(tmp_path / "gallery")
    mapped = np.memmap(tmp_path / "gallery", dtype, "r", shape=gallery.shape)
    expected = search(query, gallery, 10)
    tracemalloc.start()
    found = search(query, mapped, 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert same(found, expected)
    assert peak < 6e6, "the gallery in float32 is 15 MB"
    assert type(found.scores) is np.ndarray


def test_nothing_of_queries_times_images() -> None:
    query, gallery = people(3000, 20_000, 4)
    tracemalloc.start()
    search(query, gallery, 5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3000 * 20_000 * 4 / 10


def test_inputs_are_left_alone() -> None:
    given = QUERY.copy(), GALLERY.copy()
    for array in given:
        array.setflags(write=False)
    for metric in ("cosine", "inner", "euclidean"):
        search(*given, 5, metric=metric)
    assert np.array_equal(given[0], QUERY)
    assert np.array_equal(given[1], GALLERY)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no rows": ({"query": np.zeros((0, 20))}, ValueError, r"query: .*at least one.*\[0, 20\]"),
    "no images": ({"gallery": np.zeros((0, 20))}, ValueError, r"gallery: .*at least.*\[0, 20\]"),
    "no columns": (
        {"query": np.zeros((2, 0)), "gallery": np.zeros((2, 0))},
        ValueError,
        r"query: expected at least one row and column, got \[2, 0\]",
    ),
    "lengths": ({"gallery": np.zeros((9, 21))}, ValueError, r"gallery: .* 20 .* got \[9, 21\]"),
    "vector": ({"query": np.zeros(20)}, ValueError, r"query: expected shape \[Q, D\]"),
    "vectors": ({"gallery": np.zeros(20)}, ValueError, r"gallery: expected shape \[G, D\], got"),
    "cube": ({"gallery": np.zeros((9, 20, 1))}, ValueError, r"gallery: .*got shape \[9, 20, 1\]"),
    "ragged": ({"gallery": [[1, 2], [3]]}, ValueError, r"gallery: expected an array, got list"),
    "complex": ({"gallery": GALLERY + 1j}, TypeError, r"gallery: .*real numbers .*complex128"),
    "text": ({"query": [["a"]]}, TypeError, r"query: expected real numbers"),
    "None": ({"gallery": None}, ValueError, r"gallery: "),
    "k": ({"k": 0}, ValueError, r"k: expected >= 1, got 0"),
    "k too large": ({"k": 901}, ValueError, r"k: expected at most the 900 rows of gallery, got"),
    "k type": ({"k": 2.0}, TypeError, r"k: expected an integer, got float"),
    "k None": ({"k": None}, TypeError, r"k: expected an integer, got NoneType"),
    "metric": ({"metric": "l2"}, ValueError, r"metric: .*'euclidean'.* got 'l2'"),
    "threads": ({"threads": 0}, ValueError, r"threads: expected >= 1, got 0"),
    "block": ({"block": 0}, ValueError, r"block: expected >= 1, got 0"),
    "long": (
        {"query": QUERY * 1e200},
        ValueError,
        r"query: the squared length of row 0 overflows",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        search(**{"query": QUERY, "gallery": GALLERY, "k": 3, **change})


@pytest.mark.parametrize("room", ["retrieval", "reference"])
@pytest.mark.parametrize("block", [None, 64])
@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (-np.inf, "an infinity")])
def test_the_first_bad_row_is_named(room: str, block: int | None, value: float, name: str) -> None:
    import fastreid_vi

    with fastreid_vi.backend(room):
        gallery = GALLERY.copy()
        gallery[[470, 899], [19, 0]] = value
        with pytest.raises(ValueError, match=rf"gallery: expected finite .* {name} in row 470"):
            search(QUERY, gallery, 3, block=block, threads=3)
        query = QUERY.copy()
        query[5, 7] = value
        with pytest.raises(ValueError, match=rf"query: expected finite numbers, got {name} in ro"):
            search(query, gallery, 3, block=block)


def test_loads_no_torch() -> None:
    code = (
        "import sys; from fastreid_vi.evaluation import search;"
        "search([[1.0, 2]], [[1.0, 2]], 1); print('torch' in sys.modules, 'faiss' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False"], result.stderr


class TestNative:
    """The compiled module checks what it could read out of bounds."""

    rows = np.zeros((5, 3), np.float32)
    norms = np.zeros(5)

    def lists(self, **change: Any) -> Any:
        native = importlib.import_module("fastreid_vi._retrieval")
        given = {"queries": self.rows, "norms": self.norms, "k": 2, "metric": "inner", **change}
        return native.nearest(*given.values())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"queries": np.zeros(5, np.float32)}, "queries: expected a matrix"),
            ({"queries": np.zeros((3, 5), np.float32).T}, "queries: .* adjacent columns"),
            ({"norms": np.zeros(4)}, "norms: expected one norm per row"),
            ({"norms": np.zeros((5, 1))}, "norms: expected one norm per row"),
            ({"k": 0}, "k: expected >= 1"),
            ({"metric": "l2"}, "metric: unknown"),
        ],
    )
    def test_refuses_lists(self, change: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.lists(**change)

    @pytest.mark.parametrize(
        ("at", "value", "message"),
        [
            (0, -1, "range of queries"),
            (0, 1, "range of queries"),
            (1, -1, "range of queries"),
            (1, 6, "range of queries"),
            (2, np.zeros((5, 4), np.float32), "rows as long as the queries"),
            (3, np.zeros(6), "one norm per row"),
        ],
    )
    def test_refuses_parts(self, at: int, value: Any, message: str) -> None:
        arguments = [0, 5, self.rows, self.norms, 0]
        arguments[at] = value
        with pytest.raises(ValueError, match=message):
            self.lists().open(*arguments)

    @pytest.mark.parametrize(
        ("products", "column", "message"),
        [
            (np.zeros((4, 5), np.float32), 0, "one row per open query"),
            (np.zeros((5, 6), np.float32), 0, "columns of the open part"),
            (np.zeros((5, 5), np.float32), 1, "columns of the open part"),
            (np.zeros((5, 2), np.float32), -1, "columns of the open part"),
        ],
    )
    def test_refuses_products(self, products: Any, column: int, message: str) -> None:
        lists = self.lists()
        lists.open(0, 5, self.rows, self.norms, 0)
        with pytest.raises(ValueError, match=message):
            lists.add(products, column, 1)

    def test_refuses_to_end_early(self) -> None:
        lists = self.lists()
        with pytest.raises(ValueError, match="open query"):
            lists.add(np.zeros((5, 5), np.float32), 0, 1)
        lists.close(1)
        with pytest.raises(RuntimeError, match="fewer than k"):
            lists.take(1)
        lists.open(0, 5, self.rows[:1], self.norms[:1], 0)
        lists.close(1)
        with pytest.raises(RuntimeError, match="fewer than k"):
            lists.take(1)
