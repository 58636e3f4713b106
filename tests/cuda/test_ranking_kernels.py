"""The kernels of csrc/cuda/ranking.cu, executed on the CPU and held to `_retrieval`: the golden
galleries and edges, ties, strides, NaN, many matches and identities; `rank_metrics` through them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import fastreid_vi
from fastreid_vi import _dispatch
from fastreid_vi.evaluation import device, device_products, positions, rank_metrics, ranking
from fastreid_vi.evaluation.positions import Labels, Ranks, make_labels, rank_rows
from tests.conftest import golden
from tests.cuda import emulator
from tests.cuda.conftest import Emulated

RULES = ("none", "location", "same_id_and_camera")
DTYPES = (np.float32, np.float64)


class Problem(NamedTuple):
    """Distances, labels and galleries."""

    distance: np.ndarray
    labels: Labels
    galleries: list[np.ndarray]

    def arguments(self, num_ids: int | None = None, most: int | None = None) -> tuple[Any, ...]:
        """Of the op; by default the bounds are exact."""
        labels, columns = self.labels, self.galleries
        counts = [np.bincount(labels.pool_ids[c]).max(initial=0) for c in columns]
        flat = np.concatenate([np.zeros(0, np.int64), *columns])
        vectors = (labels.query_ids, labels.query_places, labels.pool_ids, labels.pool_places)
        return (
            torch.from_numpy(self.distance),
            *map(torch.from_numpy, vectors),
            torch.from_numpy(flat.astype(np.int32)),
            torch.from_numpy(np.cumsum([0, *map(len, columns)])),
            int(labels.pool_ids.max(initial=-1)) + 1 if num_ids is None else num_ids,
            int(max([0, *counts])) if most is None else most,
            labels.rule,
        )

    def host(self) -> Ranks:
        with fastreid_vi.backend("retrieval"):
            rows = np.arange(len(self.distance))
            return rank_rows(self.distance, self.labels, self.galleries, rows, 1)


def problem(
    queries: int, images: int, identities: int, rule: Any = "location", dtype: Any = np.float32
) -> Problem:
    """Half steps, so many ties; every kind of gallery; queries of nobody."""
    generator = np.random.default_rng(queries + images)
    distance = np.round(2 * generator.standard_normal((queries, images))) / 2
    labels = make_labels(
        generator.integers(0, identities + 1, queries),
        generator.integers(1, 7, queries),
        generator.integers(0, identities, images),
        generator.integers(1, 7, images),
        rule,
    )
    some = generator.permutation(images)
    galleries = [np.arange(images), np.sort(some[: images // 2]), some[: images // 3], some[:0]]
    return Problem(distance.astype(dtype), labels, galleries)


def same(found: Any, expected: Any) -> None:
    """Every integer and every bit."""
    for name, got, want in zip(Ranks._fields, found, expected, strict=True):
        got = np.asarray(got)
        assert got.dtype == want.dtype, name
        assert got.tobytes() == np.ascontiguousarray(want).tobytes() or (
            got.dtype == np.float64 and np.array_equal(got, want, equal_nan=True)
        ), name


def check(emulated: Emulated, given: Problem, **bounds: int) -> Ranks:
    launches = emulated.emulation.launches
    *found, nan_column = emulated.rank_rows(*given.arguments(**bounds))
    assert emulated.emulation.launches >= launches + 2
    assert (nan_column == -1).all()
    expected = given.host()
    same(found, expected)
    return expected


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 40, 6), (3, 300, 3), (5, 131, 90)], ids=str)
def test_ties_rules_and_galleries(emulated: Emulated, shape, rule, dtype):
    check(emulated, problem(*shape, rule=rule, dtype=dtype))


@pytest.mark.parametrize("matches", [1, 2, 31, 32, 33, 64, 65, 200])
def test_numbers_of_matches(emulated: Emulated, matches):
    """Below, at and above the 32 that a warp scans at once, and powers of two."""
    given = problem(2, 260, 2, "none")
    ids = np.where(np.arange(260) % (260 // matches) == 0, 0, 1)[:260]
    ids[np.flatnonzero(ids == 0)[matches:]] = 1
    labels = given.labels
    labels = Labels(
        np.int32([0, 1]), labels.query_places, np.int32(ids), labels.pool_places, "none"
    )
    ranks = check(emulated, given._replace(labels=labels))
    assert ranks.matches[0, 0] == matches


@pytest.mark.parametrize("bounds", [{"most": 4096}, {"num_ids": 330_000}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: t.__name__)
def test_what_shared_memory_does_not_hold(emulated: Emulated, dtype, bounds):
    """Blocks write in global memory."""
    check(emulated, problem(2, 40, 4, dtype=dtype), **bounds)


def test_launches_share_the_memory_of_their_blocks(emulated: Emulated):
    """One launch for each row of 600 galleries: no more than 1,056 blocks have some at once."""
    given = problem(3, 12, 2, "none")
    given = given._replace(galleries=[given.galleries[i % 4] for i in range(600)])
    launches = emulated.emulation.launches
    check(emulated, given, most=4096)
    assert emulated.emulation.launches == launches + 1 + 3


def test_more_matches_than_promised(emulated: Emulated):
    """They are counted and get no positions; nothing is written beyond the promised."""
    given = problem(9, 40, 2, "none")
    arguments = given.arguments(most=3)
    found, plain = emulated.rank_rows(*arguments), _dispatch.OPS["rank_rows"].reference(*arguments)
    for got, want in zip(found, plain, strict=True):
        assert torch.equal(got.nan_to_num(-1.0), want.nan_to_num(-1.0))
    assert (found[0] > 3).any()
    assert not found[1][found[0] > 3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: t.__name__)
def test_infinities_and_signed_zeros(emulated: Emulated, dtype):
    given = problem(6, 50, 4, dtype=dtype)
    values = np.array([-np.inf, -0.0, 0.0, np.inf, 1e-42, -1e-42], dtype)
    distance = values[np.random.default_rng(3).integers(0, 6, (6, 50))]
    check(emulated, given._replace(distance=distance))


VIEWS = {
    "rows": lambda d: d[::2],
    "columns": lambda d: d[:, ::3],
    "backwards": lambda d: d[:, ::1],
    "transposed": lambda d: d.T,
    "one row many times": lambda d: np.lib.stride_tricks.as_strided(
        d, (4, d.shape[1]), (0, d.itemsize)
    ),
    "misaligned": lambda d: d[:, 1:],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: t.__name__)
def test_strides(emulated: Emulated, dtype, view):
    distance = VIEWS[view](problem(40, 41, 4, dtype=dtype).distance)
    given = problem(*distance.shape, 4)
    check(emulated, given._replace(distance=distance))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("images", [1, 7, 300, 301])
def test_nan_is_reported(emulated: Emulated, images, dtype):
    """The first column of each such row, wherever it is; the row has no match, others are whole."""
    given = problem(4, images, 2, "none", dtype)
    expected = given.host()
    distance = given.distance.copy()
    distance[1, images // 2] = distance[1, -1] = distance[3, images - 1] = np.nan
    for view in (distance, np.asfortranarray(distance)):
        *found, nan_column = emulated.rank_rows(*given._replace(distance=view).arguments())
        assert nan_column.tolist() == [-1, images // 2, -1, images - 1]
        for got, want in zip(found, expected, strict=True):
            assert np.array_equal(got[:, ::2], want[:, ::2], equal_nan=want.dtype == np.float64)
            assert not got[:, 1::2].nan_to_num(0).any()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty(emulated: Emulated, shape):
    given = problem(3, 5, 2)
    labels = given.labels
    labels = Labels(
        labels.query_ids[: shape[0]], labels.query_places[: shape[0]],
        labels.pool_ids[: shape[1]], labels.pool_places[: shape[1]], "location",
    )  # fmt: skip
    galleries = [np.arange(shape[1])]
    given = Problem(np.zeros(shape, np.float32), labels, galleries)
    found = emulated.rank_rows(*given.arguments())
    assert [tuple(part.shape) for part in found] == [(1, shape[0])] * 5 + [(shape[0],)]
    assert not found[0].any()
    none = emulated.rank_rows(*given._replace(galleries=[]).arguments())
    assert tuple(none[0].shape) == (0, shape[0])
    assert (none[5] == -1).all()


def test_the_order_of_threads_does_not_matter(emulation: emulator.Emulator):
    given, results = problem(3, 200, 3, "none"), []
    for order in emulator.ORDERS:
        emulation.order(order, seed=len(results))
        results.append(Emulated(emulation).rank_rows(*given.arguments()))
    for other in results[1:]:
        assert all(
            torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))
            for a, b in zip(results[0], other, strict=True)
        )


def test_refusals(emulated: Emulated):
    given = problem(3, 5, 2).arguments()

    def with_(at: int, value: Any) -> tuple[Any, ...]:
        return (*given[:at], value, *given[at + 1 :])

    for at, value, message in (
        (0, given[0].half(), r"expected distance \[R, N\], float32 or float64"),
        (0, given[0][0], r"expected distance \[R, N\]"),
        (1, given[1].long(), r"query_ids: expected int32 of shape \[3\]"),
        (2, given[2][:2], r"query_places: expected int32 of shape \[3\]"),
        (4, given[4][:2], r"pool_places: expected int32 of shape \[5\]"),
        (5, given[5].long(), "columns: expected int32"),
        (6, given[6].int(), "offsets: expected int64"),
        (7, 2**31, r"fewer than 2\^30 rows"),
        (8, -1, "most >= 0"),
        (9, "nobody", "expected a known rule, got nobody"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulated.rank_rows(*with_(at, value))


class TestRankMetrics:
    """The public function on tensors "of a device", that is on the CPU, by the emulated room."""

    @pytest.fixture(autouse=True)
    def _room(self, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        on_emulated_device(emulated, monkeypatch)
        before = emulated.emulation.launches
        with fastreid_vi.backend("cuda"):
            yield
        assert emulated.emulation.launches > before

    def test_edges(self):
        data = golden("eval/eval_edges")
        for case in "ABCEFGHI":
            given = [data[f"{case}_{n}"] for n in ("dist", "q_ids", "g_ids", "q_cams", "g_cams")]
            alike(given)
            alike(given, cmc_by="image", max_rank=60)

    def test_without_a_valid_query(self):
        data = golden("eval/eval_edges")
        given = [data[f"D_{name}"] for name in ("dist", "q_ids", "g_ids", "q_cams", "g_cams")]
        with pytest.raises(ValueError, match=r"no valid query: 0 of 3 queries .* 4 gallery images"):
            rank_metrics(torch.from_numpy(given[0]), *given[1:])

    @pytest.mark.parametrize("name", ["sysu_small", "sysu_mid", "sysu_multi", "market"])
    def test_golden_galleries(self, name):
        data = golden(f"eval/eval_{name}")
        labels = [data[key] for key in ("q_ids", "g_ids", "q_cams", "g_cams")]
        given = [squared(data["q_feat"], data["g_feat"]), *labels]
        alike(given, protocol="market" if name == "market" else "sysu")
        if name == "sysu_small":
            alike([given[0].astype(np.float64), *labels], protocol="llcm")

    def test_regdb(self):
        data = golden("eval/eval_regdb")
        distance = squared(data["v_feat"], data["t_feat"])
        alike([distance, data["v_ids"], data["t_ids"]], protocol="regdb")

    def test_llcm(self):
        data = golden("eval/eval_llcm")
        rows = data["gal_vis"][0]
        distance = squared(data["t_feat"], data["v_feat"][rows])
        labels = [data["t_ids"], data["v_ids"][rows], data["t_cams"], data["v_cams"][rows]]
        alike([distance, *labels], protocol="llcm")

    def test_kinds_of_numbers(self):
        data = golden("eval/eval_edges")
        given = [data[f"A_{name}"] for name in ("dist", "q_ids", "g_ids", "q_cams", "g_cams")]
        for dtype in (torch.float16, torch.bfloat16, torch.int32):
            tensor = torch.from_numpy(given[0]).mul(4).to(dtype)
            wide = tensor.double() if dtype == torch.int32 else tensor.float()
            alike([wide.numpy(), *given[1:]], device=tensor)

    def test_nan_names_query_and_column(self):
        given = problem(4, 20, 2, "none")
        distance = torch.from_numpy(given.distance)
        distance[2, 11] = torch.nan
        ids = given.labels.query_ids, given.labels.pool_ids
        with pytest.raises(ValueError, match=r"distance: NaN for query 2 \(column 11\)"):
            rank_metrics(distance, *ids, protocol="regdb")

    def test_wrong_kinds(self):
        rank_metrics(torch.zeros(1, 1), [1], [1], protocol="regdb")
        with pytest.raises(
            ValueError, match=r"distance: expected shape \[Q, G\], got float32 \[3\]"
        ):
            rank_metrics(torch.zeros(3), [1], [1, 2, 3], protocol="regdb")
        with pytest.raises(TypeError, match=r"distance: expected real numbers"):
            rank_metrics(torch.zeros(1, 1, dtype=torch.bool), [1], [1], protocol="regdb")
        with pytest.raises(
            ValueError, match=r"at least one query and one image, got shape \[0, 3\]"
        ):
            rank_metrics(torch.zeros(0, 3), [], [1, 2, 3], protocol="regdb")


def on_emulated_device(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as a device's, and the emulated kernels as its room."""
    for name in ("rank_rows", "merge_top_k", "pair_scores", "row_norms"):
        monkeypatch.setitem(_dispatch.OPS[name]._found, "cuda", getattr(emulated, name))
    monkeypatch.delitem(_dispatch._KEY, "cuda")
    for module in (positions, device, device_products):
        monkeypatch.setattr(module, "on_device", lambda value: isinstance(value, torch.Tensor))


def squared(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    q, g = query.astype(np.float32), gallery.astype(np.float32)
    return (q * q).sum(1)[:, None] + (g * g).sum(1) - 2 * (q @ g.T)


def alike(given: list[Any], *, device: Any = None, **options: Any) -> None:
    """The result of the host's room, to the last bit."""
    found = rank_metrics(
        torch.from_numpy(given[0]) if device is None else device,
        *map(torch.from_numpy, given[1:]),
        per_query=True,
        **options,
    )
    with fastreid_vi.backend("retrieval"):
        expected = rank_metrics(*given, per_query=True, **options)
    assert isinstance(found.cmc, np.ndarray)
    for got, want in zip((*found, *found.per_query), (*expected, *expected.per_query), strict=True):
        assert np.array_equal(got, want, equal_nan=np.asarray(want).dtype == np.float64)


def test_search_and_ranking_name_their_rooms():
    """`fastreid_vi.backends()` lists the ops of this package."""
    table = fastreid_vi.backends()
    for name in ("rank_rows", "merge_top_k", "pair_scores", "row_norms"):
        assert table[name]["reference"] == "built"
        assert table[name]["cpu"] == f"{name} has no cpu room"
    assert ranking.PROTOCOLS["sysu"].camera_rule == "location"
