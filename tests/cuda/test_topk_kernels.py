"""The kernels of csrc/cuda/topk.cu, executed on the CPU: merges against a stable sort, scores and
norms against `_retrieval` to the bit; `search` through them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastreid_vi
from fastreid_vi._dispatch import OPS
from fastreid_vi.evaluation import device, search
from tests.cuda import emulator
from tests.cuda.conftest import Emulated
from tests.cuda.test_ranking_kernels import on_emulated_device

DTYPES = (torch.float32, torch.float64)
METRICS = ("cosine", "inner", "euclidean")
ARRAYS = {torch.float32: np.float32, torch.float64: np.float64}


def seeded(*shape: int, dtype: torch.dtype = torch.float32, ties: bool = True) -> Tensor:
    """Half steps, so that many are equal."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return ((2 * values).round() / 2 if ties else values).to(dtype)


def none(scores: Tensor) -> tuple[Tensor, Tensor]:
    empty = scores.new_empty((len(scores), 0))
    return empty, empty.long()


def check(
    emulated: Emulated,
    best: tuple[Tensor, Tensor],
    scores: Tensor,
    k: int,
    *,
    first: int = 0,
    indices: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch; the scores, bits of NaN aside, and the indices of the reference."""
    launches = emulated.emulation.launches
    arguments = (*best, scores, indices, scale, shift, first, k)
    found = emulated.merge_top_k(*arguments)
    assert emulated.emulation.launches == launches + 1
    expected = OPS["merge_top_k"].reference(*arguments)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.nan_to_num(7e7), want.nan_to_num(7e7))
    assert not (found[0].signbit() & (found[0] == 0)).any()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("k", "columns"),
    [(1, 1), (1, 50), (7, 3), (7, 500), (32, 1024), (33, 1025), (100, 3000), (600, 600)],
)
def test_sizes(emulated: Emulated, k, columns, dtype):
    scores = seeded(3, columns, dtype=dtype)
    best = check(emulated, none(scores), scores, k)
    assert best[0].shape == (3, min(k, columns))
    check(emulated, best, -scores, k, first=columns)


def test_a_rising_row_fills_the_buffer_again_and_again(emulated: Emulated):
    """Every score beats the list, so nothing is passed over."""
    scores = torch.arange(7000.0).repeat(2, 1)
    scores[1] = scores[1].flip(0)
    for k in (5, 2500):
        found = check(emulated, none(scores), scores, k, first=3)
        assert found[1][0, 0] == 7002
        assert found[1][1, 0] == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_longest_list(emulated: Emulated, dtype):
    """4,096, of which 2,049 and more make a list longer than the buffer."""
    scores = seeded(1, 5000, dtype=dtype)
    best = check(emulated, none(scores), scores[:, :4500], 4096)
    check(emulated, best, scores[:, 4500:], 4096, first=4500)


def test_equal_scores_go_by_index(emulated: Emulated):
    scores = torch.zeros(2, 900)
    best = check(emulated, none(scores), scores, 40, first=1000)
    assert best[1][0].tolist() == list(range(1000, 1040))
    best = check(emulated, best, scores, 40)  # lower indices that come later win
    assert best[1][0].tolist() == list(range(40))


def test_indices_of_their_own(emulated: Emulated):
    scores = seeded(4, 700)
    indices = torch.randperm(700, generator=torch.Generator().manual_seed(1)).repeat(4, 1)
    check(emulated, none(scores), scores, 50, indices=indices)
    check(emulated, none(scores), scores, 50, indices=indices + 2**31 - 701)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_and_shift(emulated: Emulated, dtype):
    scores, terms = seeded(3, 301, dtype=dtype), seeded(301, dtype=dtype, ties=False)
    check(emulated, none(scores), scores, 20, scale=terms)
    check(emulated, none(scores), scores, 20, shift=terms)
    check(emulated, none(scores), scores[:, 1:], 20, shift=terms[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_infinities_and_signed_zeros(emulated: Emulated, dtype):
    """A NaN is worse than every number; both zeros are one."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-42], dtype=dtype)
    chosen = torch.randint(6, (3, 90), generator=torch.Generator().manual_seed(2))
    scores = values[chosen]
    for k in (5, 88):
        best = check(emulated, none(scores), scores, k)
        check(emulated, best, scores.flip(1), k, first=90)


VIEWS = {
    "rows": lambda s: s[::2],
    "columns": lambda s: s[:, ::3],
    "transposed": lambda s: s.t(),
    "misaligned": lambda s: s[:, 1:],
    "expanded": lambda s: s[:1].expand(4, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(emulated: Emulated, dtype, view):
    scores = VIEWS[view](seeded(12, 64, dtype=dtype))
    check(emulated, none(scores), scores, 9)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty(emulated: Emulated, shape):
    scores, launches = torch.zeros(shape), emulated.emulation.launches
    found = emulated.merge_top_k(*none(scores), scores, None, None, None, 0, 4)
    assert found[0].shape == found[1].shape == (shape[0], min(4, shape[1]))
    assert emulated.emulation.launches == launches
    norms = emulated.row_norms(scores)
    assert norms.shape == shape[:1]
    assert not norms.any()


def test_the_order_of_threads_does_not_matter(emulation: emulator.Emulator):
    scores, results = seeded(2, 3000), []
    for order in emulator.ORDERS:
        emulation.order(order, seed=len(results))
        arguments = (*none(scores), scores, None, None, None, 0, 77)
        results.append(Emulated(emulation).merge_top_k(*arguments))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals(emulated: Emulated):
    scores = torch.zeros(2, 6)
    best = none(scores)
    for arguments, message in (
        ((*best, scores.half(), None, None, None, 0, 3), "scores: expected a matrix of float32"),
        ((*best, scores, None, None, None, 0, 4097), "expected k from 1 to 4096"),
        ((*best, scores, None, None, None, 0, 0), "expected k from 1 to 4096"),
        ((scores, scores.long(), scores, None, None, None, 0, 5), "a list of 6"),
        ((best[0][:1], best[1], scores, None, None, None, 0, 3), r"best: expected shape \[2, 0\]"),
        ((best[0], best[1].int(), scores, None, None, None, 0, 3), "best_index: expected shape"),
        ((*best, scores, None, None, None, 2**31 - 6, 3), "expected indices below"),
        ((*best, scores, scores, None, None, 0, 3), "indices: expected shape"),
        ((*best, scores, None, scores[0, 1:], None, 0, 3), r"scale: expected float32 of shape \[6"),
        ((*best, scores, None, None, scores[0].double(), 0, 3), "shift: expected float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulated.merge_top_k(*arguments)
    norms, columns = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.int64)
    for arguments, message in (
        ((scores, scores, norms, norms, columns, "manhattan"), "expected a known metric, got manh"),
        ((scores, scores[:, 1:], norms, norms, columns, "inner"), "one dtype and length of rows"),
        ((scores, scores, norms[:1], norms, columns, "inner"), "query_norms: expected float64"),
        ((scores, scores, norms, norms.float(), columns, "inner"), "gallery_norms: expected"),
        ((scores, scores, norms, norms, columns.int(), "inner"), "columns: expected shape"),
        ((scores, scores, norms, norms, columns[0], "inner"), "columns: expected a matrix"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulated.pair_scores(*arguments)
    with pytest.raises(RuntimeError, match="rows: expected a matrix of float32 or float64"):
        emulated.row_norms(scores[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 31, 32, 33, 64, 200])
def test_norms_to_the_bit(emulated: Emulated, dim, dtype):
    native = pytest.importorskip("fastreid_vi._retrieval", reason="_retrieval was not built")
    rows = seeded(41, dim, dtype=dtype, ties=False)
    rows[3] = 0
    rows[4, 0] = torch.inf
    rows[5, -1] = torch.nan
    expected = native.row_norms(rows.numpy(), 1)
    for found in (emulated.row_norms(rows), OPS["row_norms"].reference(rows)):
        assert np.array_equal(found.numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_scores_to_the_bit(emulated: Emulated, metric, dtype):
    """Of all pairs, against the search that returns them all."""
    query, gallery = (seeded(n, 45, dtype=dtype, ties=False) for n in (5, 23))
    query[1], gallery[7] = 0, 0
    gallery[8] = query[0] * 3
    with fastreid_vi.backend("retrieval"):
        scores, columns = search(query.numpy(), gallery.numpy(), 23, metric=metric)
    norms = emulated.row_norms(query), emulated.row_norms(gallery)
    arguments = (query, gallery, *norms, torch.from_numpy(columns), metric)
    for found in (emulated.pair_scores(*arguments), OPS["pair_scores"].reference(*arguments)):
        keys = 0 - found if metric == "euclidean" else found
        assert np.array_equal(keys.numpy(), scores)


class TestSearch:
    """The public function on tensors "of a device", that is on the CPU, by the emulated room."""

    @pytest.fixture(autouse=True)
    def _room(self, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        on_emulated_device(emulated, monkeypatch)
        before = emulated.emulation.launches
        with fastreid_vi.backend("cuda"):
            yield
        assert emulated.emulation.launches > before

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("metric", METRICS)
    def test_equals_the_host_to_the_bit(self, metric, dtype):
        query, gallery = (seeded(n, 24, dtype=dtype, ties=False) for n in (6, 260))
        for k in (1, 40, 260):
            alike(query, gallery, k, metric=metric)
        alike(query, gallery, 12, metric=metric, block=50)

    @pytest.mark.parametrize("metric", METRICS)
    def test_ties(self, metric):
        alike(seeded(5, 3), seeded(300, 3), 30, metric=metric)

    @pytest.mark.parametrize("metric", METRICS)
    def test_near_duplicates_are_all_scored(self, metric):
        """More of them than candidates, apart by less than a product's error."""
        query, gallery = (seeded(n, 40, ties=False) for n in (3, 400))
        gallery[20:300] = gallery[20] + 1e-7 * seeded(280, 40, ties=False)
        query[0] = gallery[20]
        query[1] = 0
        alike(query, gallery, 9, metric=metric)
        alike(query, gallery, 9, metric=metric, block=150)

    def test_what_products_cannot_hold(self):
        """Norms whose products overflow or vanish in float32."""
        query, gallery = (seeded(n, 6, ties=False) for n in (3, 90))
        for scale in (1e19, 1e-24):
            alike(query * scale, gallery * scale, 5, metric="euclidean")
            alike(query * scale, gallery * scale, 5, metric="inner")

    def test_galleries_elsewhere(self, tmp_path):
        """On the host: NumPy, a memory-mapped file, nested lists; kinds of numbers."""
        query, gallery = seeded(4, 8, ties=False), seeded(70, 8, ties=False).numpy()
        np.save(tmp_path / "gallery.npy", gallery)
        mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
        expected = search(query.numpy(), gallery, 5)
        for given in (gallery, mapped, gallery.tolist(), gallery.astype(np.float64)):
            found = search(query, given, 5, block=32)
            assert np.array_equal(found.indices.numpy(), expected.indices)
        assert search(query, gallery.astype(np.float64), 5).scores.dtype == torch.float64
        assert search(query.half(), torch.from_numpy(gallery).bfloat16(), 5).scores.dtype == (
            torch.float32
        )

    def test_a_longer_list_than_the_kernels_keep(self):
        """The room says so where it was asked for; else PyTorch sorts."""
        query, gallery = seeded(1, 2, ties=False), seeded(4200, 2, ties=False)
        with pytest.raises(RuntimeError, match="k = 4200, it keeps up to 4096"):
            search(query, gallery, 4100)
        with fastreid_vi.backend("reference"):
            alike(query, gallery, 4100)
        search(query, gallery, 1)

    def test_results_are_tensors_without_a_graph(self):
        query = seeded(2, 4).requires_grad_()
        scores, indices = search(query, seeded(9, 4), 3)
        assert isinstance(scores, Tensor)
        assert not scores.requires_grad
        assert indices.dtype == torch.int64

    def test_wrong_values(self):
        query, gallery = seeded(3, 4), seeded(9, 4)
        search(query, gallery, 1)
        bad, infinite = gallery.clone(), query.clone()
        bad[5, 1], infinite[2, 0] = torch.nan, torch.inf
        for arguments, message in (
            ((query, bad, 2), "gallery: expected finite numbers, got NaN in row 5"),
            ((infinite, gallery, 2), "query: expected finite numbers, got an infinity in row 2"),
            ((query.double() * 1e200, gallery, 2), "query: the squared length of row 0 overflows"),
            ((query, gallery, 10), "k: expected at most the 9 rows of gallery, got 10"),
            ((query, gallery[:, 1:], 2), r"gallery: expected rows of length 4 as in query"),
            ((query[:0], gallery, 2), r"query: expected at least one row and column, got \[0, 4"),
            ((query[0], gallery, 2), r"query: expected shape \[Q, D\], got float32 \[4\]"),
            ((query, gallery[:0], 2), r"gallery: expected at least one row and column"),
        ):
            with pytest.raises(ValueError, match=message):
                search(*arguments)


def test_reduced_products_are_switched_off_and_back(monkeypatch: pytest.MonkeyPatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with device.full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def alike(query: Tensor, gallery: Tensor, k: int, **options: Any) -> None:
    """The result of the host's room, to the last bit."""
    found = search(query, gallery, k, **options)
    with fastreid_vi.backend("retrieval"):
        expected = search(query.numpy(), gallery.numpy(), k, **options)
    assert np.array_equal(found.indices.numpy(), expected.indices)
    assert np.array_equal(found.scores.numpy(), expected.scores)
    assert found.scores.numpy().dtype == expected.scores.dtype
