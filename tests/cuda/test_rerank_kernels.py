"""The kernels of csrc/cuda/rerank.cu, executed on the CPU and held to `_retrieval`: lists, sets, V,
V' and the results of the golden cases; the public functions through them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastreid_vi
from fastreid_vi import _dispatch
from fastreid_vi._dispatch import OPS
from fastreid_vi.evaluation import (
    device_rerank,
    k_reciprocal_rerank,
    multi_spectral_rerank,
    rerank,
)
from fastreid_vi.evaluation.device_rerank import averaged_lists, nearest
from fastreid_vi.evaluation.rerank_reference import ROUNDING, Method
from fastreid_vi.evaluation.rerank_sparse import Shape, SparseReranking
from tests.cuda import emulator
from tests.cuda.conftest import Emulated
from tests.cuda.test_ranking_kernels import on_emulated_device
from tests.evaluation.reranking import CASES, Case, case, float_sets

pytest.importorskip("fastreid_vi._retrieval", reason="_retrieval was not built")

NAMES = ("rerank_neighbors", "rerank_average", "rerank_fuse")
# Integer features: products are exact, so the host's lists and distances are these to the bit.
STEPS = (
    "rerank_single/mpanet_masked",
    "rerank_single_k10/mpanet_full",
    "edges/few_queries_masked",
    "edges/k2_one_full",
    "edges/k1_larger_than_set",
    "mser_v2i_full",
)
UNIT = 2**-24


def on_device(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as a device's, and the emulated kernels as its room."""
    on_emulated_device(emulated, monkeypatch)
    for name in NAMES:
        monkeypatch.setitem(_dispatch.OPS[name]._found, "cuda", getattr(emulated, name))
    monkeypatch.setattr(device_rerank, "on_device", lambda value: isinstance(value, Tensor))


def method_of(found: Case) -> Method:
    o = found.options
    return Method(o["k1"], o["k2"], o["weight"], o["neighbors"] == "queries", o["expand"])


class Problem:
    """A case as arguments of the ops, and what the host's room makes of it."""

    def __init__(self, found: Case) -> None:
        queries, galleries = float_sets(found)
        self.method = method_of(found)
        self.shape = Shape(len(queries[0]), len(queries), len(galleries[0]), len(galleries))
        everything = [np.arange(self.shape.images)]
        self.host = SparseReranking(queries, galleries, self.method, everything, 1)
        self.items = torch.from_numpy(np.concatenate([*queries, *galleries]))
        squares = device_rerank._squares(self.items)
        self.found = nearest(self.items, squares, self.shape, self.method)
        self.rows = len(self.found.lists)
        self.rounding = ROUNDING * torch.finfo(torch.float32).eps * squares[: self.rows]

    def neighbors(self) -> tuple[Any, ...]:
        f, m = self.found, self.method
        features = self.items[: self.rows]
        return f.lists, f.distances, features, f.maxima, self.rounding, m.k1, m.half, m.expand

    def fuse(self, averages: tuple[Tensor, Tensor, Tensor]) -> tuple[Any, ...]:
        s, asking = self.shape, self.shape.query_items
        counts, columns, values = averages
        ours = (counts[:asking], columns[:asking], values[:asking])
        theirs = (counts[asking:], columns[asking:].t(), values[asking:].t())
        scale = self.found.maxima[:asking], self.rounding[:asking]
        sets = s.query_sets, s.gallery_sets
        return (*ours, *theirs, self.found.base, *scale, *sets, self.rows, self.method.weight)


def packed(rows: tuple[Tensor, Tensor, Tensor]) -> tuple[Any, Any, Any]:
    """Offsets, columns and values; padding is -1 and 0."""
    counts, columns, values = rows
    some = torch.arange(columns.shape[1]) < counts[:, None]
    assert ((columns == -1) == ~some).all()
    assert (values[~some] == 0).all()
    offsets = np.cumsum([0, *counts.tolist()])
    return offsets, columns[some].numpy(), values[some].numpy()


def alike(found: Any, expected: Any, atol: float) -> None:
    """Sets equal, values close."""
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[2], expected[2], rtol=0, atol=atol)


@pytest.mark.parametrize("name", STEPS)
def test_steps_equal_the_host(emulated: Emulated, name: str):
    """Lists, sets and columns to the last integer; weights, averages and F up to a few units."""
    problem, launches = Problem(case(name)), emulated.emulation.launches
    host, found = problem.host, problem.found
    assert np.array_equal(found.lists.numpy(), host.lists)
    assert np.array_equal(found.other_lists.numpy(), host.other_lists)
    assert np.array_equal(found.maxima.numpy(), host.maxima[0])

    encoding = emulated.rerank_neighbors(*problem.neighbors())
    offsets, columns, _ = host.native.neighbors()
    values = host.native.encoding(host.maxima[0])
    alike(packed(encoding), (offsets, columns, values), 2 * UNIT)

    lists = averaged_lists(found, problem.method)
    room = min(int(encoding[0].max()) * lists.shape[1], problem.rows)
    averages = emulated.rerank_average(lists, *encoding, room)
    expected = host.native.averages(host.maxima[0], np.arange(len(lists)))
    alike(packed(averages), expected, 2 * UNIT)

    result = emulated.rerank_fuse(*problem.fuse(averages))
    np.testing.assert_allclose(result.numpy(), host.result(0), rtol=0, atol=1e-6)
    assert emulated.emulation.launches == launches + 4


@pytest.mark.parametrize("name", STEPS)
def test_steps_equal_the_reference(emulated: Emulated, name: str):
    problem = Problem(case(name))
    encoding = emulated.rerank_neighbors(*problem.neighbors())
    expected = OPS["rerank_neighbors"].reference(*problem.neighbors())
    alike(packed(encoding), packed(expected), 2 * UNIT)
    lists = averaged_lists(problem.found, problem.method)
    room = min(int(encoding[0].max()) * lists.shape[1], problem.rows)
    averages = emulated.rerank_average(lists, *encoding, room)
    alike(packed(averages), packed(OPS["rerank_average"].reference(lists, *encoding, room)), UNIT)
    arguments = problem.fuse(averages)
    found, expected = emulated.rerank_fuse(*arguments), OPS["rerank_fuse"].reference(*arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_more_columns_than_a_tile(emulated: Emulated):
    """Averages and overlaps pass over columns in stretches; a set of the gallery begins anew."""
    generator = np.random.default_rng(3)
    width, rows = 9001, 12
    counts = torch.from_numpy(generator.integers(0, 40, width).astype(np.int32))
    columns = torch.full((width, 40), -1, dtype=torch.int32)
    values = torch.zeros((width, 40))
    for i in range(rows):
        n = int(counts[i])
        columns[i, :n] = torch.from_numpy(np.sort(generator.choice(width, n, replace=False)))
        values[i, :n] = torch.from_numpy(generator.random(n).astype(np.float32)) + 0.01
    counts[0], counts[rows:] = 0, 0
    columns[0], values[0] = -1, 0
    lists = torch.from_numpy(generator.integers(-1, rows, (7, 3)).astype(np.int32))
    lists[0] = -1
    averages = emulated.rerank_average(lists, counts, columns, values, 120)
    expected = OPS["rerank_average"].reference(lists, counts, columns, values, 120)
    alike(packed(averages), packed(expected), 0)
    assert int(averages[1].max()) > 8192
    ours = [part[:3] for part in averages]
    theirs = [averages[0][1:], averages[1][1:].t(), averages[2][1:].t()]
    base, scale = torch.rand(3, 2), torch.ones(3)
    for sets in ((1, 3), (3, 1)):
        if sets == (3, 1):
            theirs = [theirs[0][:2], theirs[1][:, :2], theirs[2][:, :2]]
        arguments = (*ours, *theirs, base, scale, 0 * scale, *sets, width, 0.25)
        found, expected = emulated.rerank_fuse(*arguments), OPS["rerank_fuse"].reference(*arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_more_items_than_threads_of_a_row(emulation: emulator.Emulator):
    """Words of bits beyond a block's threads, and no distance known."""
    emulation.order("ascending")
    emulated = Emulated(emulation)
    rows = 32 * 130 + 5
    lists = (torch.arange(rows)[:, None] ^ torch.tensor([0, 1, 4000])).clamp(max=rows - 1).int()
    distances = torch.full(lists.shape, torch.nan)
    features = torch.randn((rows, 70), generator=torch.Generator().manual_seed(4))
    ones = torch.ones(rows)
    some = torch.arange(0, rows, 997).int()
    with emulated.emulation.unwatched():
        counts, columns, values = emulated.rerank_neighbors(
            lists, distances, features, 200 * ones, ones, 2, 1, False
        )
    for i in some.tolist():
        expected = sorted({j for j in lists[i].tolist() if i in lists[j].tolist()})
        assert columns[i, : counts[i]].tolist() == expected
        near = (-(features[i] - features[expected]).double().square().sum(1) / 200).exp()
        found = values[i, : counts[i]].double()
        torch.testing.assert_close(found, near / near.sum(), rtol=1e-6, atol=0)


def test_the_order_of_threads_does_not_matter(emulation: emulator.Emulator):
    problem, results = Problem(case("rerank_single_k10/mpanet_full")), []
    lists = averaged_lists(problem.found, problem.method)
    for order in emulator.ORDERS:
        emulation.order(order, seed=len(results))
        emulated = Emulated(emulation)
        encoding = emulated.rerank_neighbors(*problem.neighbors())
        averages = emulated.rerank_average(lists, *encoding, 200)
        results.append([*encoding, *averages, emulated.rerank_fuse(*problem.fuse(averages))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty(emulated: Emulated):
    launches = emulated.emulation.launches
    ints, floats = torch.zeros((0, 3), dtype=torch.int32), torch.zeros((0, 3))
    none = torch.zeros(0)
    counts, columns, values = emulated.rerank_neighbors(
        ints, floats, floats, none, none, 2, 1, True
    )
    assert counts.shape == (0,)
    assert columns.shape == values.shape == (0, 0)
    assert emulated.rerank_average(ints, counts, columns, values, 4)[1].shape == (0, 4)
    arguments = (counts, columns, values, counts, columns, values, floats[:, :0], none, none)
    assert emulated.rerank_fuse(*arguments, 1, 1, 0, 0.5).shape == (0, 0)
    assert emulated.emulation.launches == launches


def test_refusals(emulated: Emulated):
    ints, floats, ones = torch.zeros((2, 3), dtype=torch.int32), torch.zeros((2, 3)), torch.ones(2)
    counts = ints[:, 0]
    good = [ints, floats, floats, ones, ones, 2, 1, True]
    for at, value, message in (
        (0, ints.long(), r"lists: expected int32 of shape \[2, 3\]"),
        (0, ints[0], r"expected lists \[R, L\]"),
        (1, floats[:, 1:], r"distances: expected float32 of shape \[2, 3\]"),
        (2, floats.double(), r"features: expected float32 of shape \[2, 3\]"),
        (3, ones[1:], r"maxima: expected float32 of shape \[2\]"),
        (4, ones.int(), r"rounding: expected float32 of shape \[2\]"),
        (5, -1, "k1: expected 0 to"),
        (6, 2**31, "half: expected 0 to"),
    ):
        arguments = [*good]
        arguments[at] = value
        with pytest.raises(RuntimeError, match=message):
            emulated.rerank_neighbors(*arguments)
    good = [ints, counts, ints, floats, 4]
    for at, value, message in (
        (0, ints.float(), "lists: expected int32"),
        (1, counts[1:], r"counts: expected int32 of shape \[2\]"),
        (2, ints[0], r"expected lists \[M, K\] and columns \[R, E\]"),
        (3, floats[:, 1:], "values: expected float32"),
        (4, -1, "room: expected 0 to"),
    ):
        arguments = [*good]
        arguments[at] = value
        with pytest.raises(RuntimeError, match=message):
            emulated.rerank_average(*arguments)
    good = [counts, ints, floats, torch.zeros(3, dtype=torch.int32), ints, floats]
    good += [floats, ones, ones, 1, 1, 2, 0.5]
    for at, value, message in (
        (0, counts[1:], "query_counts: expected int32"),
        (2, floats.double(), "query_values: expected float32"),
        (3, counts, "gallery_counts: expected int32"),
        (4, ints[:, 1:], "does not fit the sets"),
        (5, ints, "gallery_values: expected float32"),
        (6, floats.double(), "base: expected float32"),
        (7, ones[1:], "maxima: expected float32"),
        (9, 3, "does not fit the sets"),
        (11, -1, "columns: expected 0 to"),
    ):
        arguments = [*good]
        arguments[at] = value
        with pytest.raises(RuntimeError, match=message):
            emulated.rerank_fuse(*arguments)


class TestRerank:
    """The public functions on tensors "of a device", that is on the CPU, by the emulated room."""

    @pytest.fixture(autouse=True)
    def _room(self, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        on_device(emulated, monkeypatch)
        before = emulated.emulation.launches
        with fastreid_vi.backend("cuda"):
            yield
        assert emulated.emulation.launches > before

    @pytest.mark.parametrize(
        "name", [n for n in CASES if n.startswith(("edges", "rerank_unit", "mcja/s", "mser_i2v"))]
    )
    def test_golden(self, name: str):
        """As the host's room and, to its tolerance, as the released code."""
        found = case(name)
        sides = (
            [torch.from_numpy(np.array(p)) for p in s] for s in (found.queries, found.galleries)
        )
        queries, galleries = sides
        result = found._replace(queries=queries, galleries=galleries).rerank()
        assert isinstance(result, Tensor)
        assert result.dtype == torch.float32
        with fastreid_vi.backend("retrieval"):
            expected = found.rerank()
        np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(result.numpy(), found.released, rtol=0, atol=5e-3)

    def test_kinds_of_numbers_and_places(self):
        found = case("edges/noexpand_full")
        query, gallery = torch.from_numpy(found.queries[0]), found.galleries[0]
        expected = k_reciprocal_rerank(query, gallery, **found.options)
        for ours, theirs in (
            (query.double(), gallery),
            (query.int(), gallery.tolist()),
            (query.float().requires_grad_(), torch.from_numpy(gallery).t().contiguous().t()),
        ):
            result = k_reciprocal_rerank(ours, theirs, **found.options)
            assert torch.equal(result, expected)
            assert not result.requires_grad

    def test_scales_that_float32_squares_do_not_hold(self):
        found = case("edges/noexpand_full")
        query, gallery = (torch.from_numpy(p[0]).double() for p in (found.queries, found.galleries))
        expected = k_reciprocal_rerank(query, gallery, **found.options)
        for scale in (2.0**100, 2.0**-120, 2.0**900):
            result = k_reciprocal_rerank(query * scale, gallery * scale, **found.options)
            assert torch.equal(result, expected)

    def test_identical_features(self):
        result = k_reciprocal_rerank(torch.ones(3, 4), torch.ones(5, 4), k1=2, k2=2, weight=1.0)
        assert torch.equal(result, torch.zeros(3, 5))

    def test_float16_is_the_reference(self):
        found = case("edges/noexpand_full")
        k_reciprocal_rerank(torch.eye(3), torch.eye(3))
        query, gallery = torch.from_numpy(found.queries[0]), found.galleries[0]
        result = k_reciprocal_rerank(query, gallery, **found.options, precision="float16")
        assert isinstance(result, Tensor)
        assert np.array_equal(result.numpy(), found.released)

    def test_wrong_values(self):
        query, gallery = torch.randn(4, 3), torch.randn(5, 3)
        k_reciprocal_rerank(query, gallery)
        bad = gallery.clone()
        bad[2, 1] = torch.nan
        for call, message in (
            (lambda: k_reciprocal_rerank(query, bad), "gallery: row 2 is not finite"),
            (lambda: k_reciprocal_rerank(query, gallery[:, 1:]), "equal lengths, got 3 and 2"),
            (lambda: k_reciprocal_rerank(query[:0], gallery), r"query: expected one row .* \[0, 3"),
            (lambda: k_reciprocal_rerank(query[0], gallery), r"query: expected shape \[n, D\]"),
            (lambda: k_reciprocal_rerank(query, gallery, threads=0), "threads: expected >= 1"),
            (
                lambda: multi_spectral_rerank(query, [gallery, gallery[1:]]),
                r"galleries\[1\]: expected shape \[5, 3\], as galleries\[0\], got \[4, 3\]",
            ),
            (
                lambda: multi_spectral_rerank([query] * 3, [gallery, gallery]),
                "queries: expected 1 set or 2, as galleries, got 3",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                call()


def test_numpy_arrays_and_cpu_tensors_stay_on_the_host(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any) -> Any:
        raise AssertionError("the device's path ran")

    monkeypatch.setattr(device_rerank, "rerank", fail)
    expected = k_reciprocal_rerank(np.eye(4), np.eye(4))
    assert np.array_equal(k_reciprocal_rerank(torch.eye(4), torch.eye(4)).numpy(), expected)
    assert rerank.room_of("float32") in ("retrieval", "reference")
