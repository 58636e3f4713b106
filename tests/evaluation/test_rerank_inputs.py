"""Re-ranking's arguments: kinds of arrays, bad input, backends, memory told before it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import fastreid_vi
from fastreid_vi.evaluation import (
    k_reciprocal_rerank,
    multi_spectral_rerank,
    positions,
    rerank_memory,
)

GENERATOR = np.random.default_rng(0)
QUERY = GENERATOR.integers(-9, 10, (30, 6)).astype(np.float32)
GALLERY = GENERATOR.integers(-9, 10, (20, 6)).astype(np.float32)
NAN, INFINITE = QUERY.copy(), GALLERY.copy()
NAN[7, 2], INFINITE[11, 0] = np.nan, -np.inf

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "k1": ({"k1": 0}, r"k1: expected >= 1, got 0"),
    "k2": ({"k2": -3}, r"k2: expected >= 1, got -3"),
    "weight above": ({"weight": 1.5}, r"weight: expected 0 to 1, got 1.5"),
    "weight below": ({"weight": -0.1}, r"weight: expected 0 to 1, got -0.1"),
    "weight NaN": ({"weight": float("nan")}, r"weight: expected 0 to 1, got nan"),
    "neighbors": ({"neighbors": "gallery"}, r"neighbors: .*'all', 'queries'.*'gallery'"),
    "precision": ({"precision": "float64"}, r"precision: .*'float32', 'float16'.*'float64'"),
    "threads": ({"threads": 0}, r"threads: expected >= 1, got 0"),
    "NaN": ({"query": NAN}, r"query: row 7 is not finite"),
    "infinity": ({"gallery": INFINITE}, r"gallery: row 11 is not finite"),
    "lengths": (
        {"gallery": GALLERY[:, 1:]},
        r"query, gallery: expected equal lengths, got 6 and 5",
    ),
    "no query": ({"query": QUERY[:0]}, r"query: expected one row .* got shape \[0, 6\]"),
    "no gallery": ({"gallery": GALLERY[:0]}, r"gallery: expected one row .* got shape \[0, 6\]"),
    "no numbers": ({"query": QUERY[:, :0]}, r"query: expected one row and one number"),
    "vector": ({"query": QUERY[0]}, r"query: expected shape \[n, D\], got float32 \[6\]"),
    "sets": ({"gallery": GALLERY[None]}, r"gallery: expected shape \[n, D\], got .*\[1, 20, 6\]"),
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "k1": ({"k1": 2.0}, r"k1: expected an integer, got float"),
    "k2": ({"k2": True}, r"k2: expected an integer, got bool"),
    "weight": ({"weight": "0.3"}, r"weight: expected a number, got str"),
    "expand": ({"expand": 1}, r"expand: expected a bool, got int"),
    "complex": ({"query": QUERY * 1j}, r"query: expected real numbers"),
    "text": ({"gallery": [["a"]]}, r"gallery: expected real numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    change, message = BAD[case]
    given: dict[str, Any] = {"query": QUERY, "gallery": GALLERY, **change}
    with pytest.raises(ValueError, match=message):
        k_reciprocal_rerank(given.pop("query"), given.pop("gallery"), **given)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_types(case: str) -> None:
    change, message = WRONG[case]
    given: dict[str, Any] = {"query": QUERY, "gallery": GALLERY, **change}
    with pytest.raises(TypeError, match=message):
        k_reciprocal_rerank(given.pop("query"), given.pop("gallery"), **given)


SPECTRAL: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "direction": ([QUERY], [GALLERY], {"direction": "t2v"}, r"direction: .*'i2v', 'v2i'.*'t2v'"),
    "other side": (
        [QUERY] * 2,
        [GALLERY] * 3,
        {},
        r"queries: expected 1 set or 3, as galleries, got 2",
    ),
    "other side back": (
        [QUERY] * 3,
        [GALLERY] * 2,
        {"direction": "v2i"},
        r"galleries: expected 1 set or 3, as queries, got 2",
    ),
    "rows": (
        [QUERY],
        [GALLERY, GALLERY[1:]],
        {},
        r"galleries\[1\]: expected shape \[20, 6\], as galleries\[0\], got \[19, 6\]",
    ),
    "unused rows": (
        [QUERY, QUERY[1:]],
        [GALLERY] * 2,
        {},
        r"queries\[1\]: expected shape \[30, 6\]",
    ),
    "lengths": ([QUERY], [GALLERY, GALLERY[:, 1:]], {}, r"expected equal lengths, got 6 and 5"),
    "none": ([], [GALLERY], {}, r"queries: expected feature sets \[n, N, D\], got .*\[0\]"),
    "no set": (QUERY[None][:0], [GALLERY], {}, r"queries: expected feature sets .*\[0, 30, 6\]"),
    "vector": (QUERY[0], [GALLERY], {}, r"queries: expected feature sets \[n, N, D\]"),
    "NaN": ([NAN], [GALLERY], {}, r"queries\[0\]: row 7 is not finite"),
    "infinity": ([QUERY], [GALLERY, INFINITE], {}, r"galleries\[1\]: row 11 is not finite"),
    "k1": ([QUERY], [GALLERY], {"k1": 0}, r"k1: expected >= 1, got 0"),
}


@pytest.mark.parametrize("case", SPECTRAL)
def test_bad_spectra(case: str) -> None:
    queries, galleries, options, message = SPECTRAL[case]
    with pytest.raises(ValueError, match=message):
        multi_spectral_rerank(queries, galleries, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 5, 8), {}, r"queries: expected >= 1, got 0"),
        ((5, 0, 8), {}, r"gallery: expected >= 1"),
        ((5, 5, 0), {}, r"dim: expected >= 1"),
        ((5, 5, 8), {"spectra": 0}, r"spectra: expected >= 1"),
        ((5, 5, 8), {"neighbors": "none"}, r"neighbors: .*'none'"),
        ((5, 5, 8), {"direction": "both"}, r"direction: .*'both'"),
        ((5, 5, 8), {"precision": "half"}, r"precision: .*'half'"),
        ((5, 5, 8), {"k2": 0}, r"k2: expected >= 1"),
    ],
)
def test_bad_forecast(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rerank_memory(*arguments, **options)


@pytest.mark.parametrize("kind", ["float64", "float16", "int16", "list", "torch", "bfloat16 torch"])
def test_kinds_of_arrays(kind: str) -> None:
    import torch

    expected = k_reciprocal_rerank(QUERY, GALLERY)
    convert: dict[str, Any] = {
        "float64": lambda x: x.astype(np.float64),
        "float16": lambda x: x.astype(np.float16),
        "int16": lambda x: x.astype(np.int16),
        "list": lambda x: x.tolist(),
        "torch": lambda x: torch.from_numpy(x.copy()).requires_grad_(),
        "bfloat16 torch": lambda x: torch.from_numpy(x.copy()).to(torch.bfloat16),
    }
    found = k_reciprocal_rerank(convert[kind](QUERY), convert[kind](GALLERY))
    assert isinstance(found, torch.Tensor if "torch" in kind else np.ndarray)
    assert str(found.dtype).removeprefix("torch.") == "float32"
    np.testing.assert_array_equal(np.asarray(found), expected)
    sets = [convert[kind](GALLERY), convert[kind](GALLERY[::-1].copy())]
    spectral = multi_spectral_rerank(convert[kind](QUERY), sets, k1=5, k2=2)
    assert isinstance(spectral, torch.Tensor if "torch" in kind else np.ndarray)
    alone = multi_spectral_rerank(QUERY, [GALLERY, GALLERY[::-1]], k1=5, k2=2)
    np.testing.assert_array_equal(np.asarray(spectral), alone)


def test_one_array_of_sets() -> None:
    stack = np.stack([GALLERY, GALLERY + 1, GALLERY - 2])
    found = multi_spectral_rerank(QUERY, stack, k1=5, k2=2)
    np.testing.assert_array_equal(found, multi_spectral_rerank([QUERY], [*stack], k1=5, k2=2))


@pytest.mark.parametrize("layout", ["columns", "reversed", "strided", "field"])
def test_layouts(rerank_room: str, layout: str) -> None:
    record = np.zeros(QUERY.shape, [("pad", "u1"), ("value", "f4")])
    record["value"] = QUERY
    wide = np.zeros((60, 12), np.float32)
    wide[::2, ::2] = QUERY
    query = {
        "columns": np.asfortranarray(QUERY),
        "reversed": QUERY[::-1, ::-1].copy()[::-1, ::-1],
        "strided": wide[::2, ::2],
        "field": record["value"],
    }[layout]
    np.testing.assert_array_equal(
        k_reciprocal_rerank(query, GALLERY), k_reciprocal_rerank(QUERY, GALLERY)
    )


def test_inputs_are_left_alone(rerank_room: str) -> None:
    before = QUERY.copy(), GALLERY.copy()
    frozen = QUERY.copy(), GALLERY.copy()
    for part in frozen:
        part.setflags(write=False)
    first = k_reciprocal_rerank(*frozen)
    multi_spectral_rerank([frozen[0]], [frozen[1]] * 2)
    np.testing.assert_array_equal(first, k_reciprocal_rerank(*frozen))
    for a, b in zip(before, frozen, strict=True):
        np.testing.assert_array_equal(a, b)
    first[:] = 0
    np.testing.assert_array_equal(frozen[1], before[1])


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        fastreid_vi.backend("retrieval"),
        pytest.raises(RuntimeError, match=r"'retrieval' was asked for, but precision 'float16'"),
    ):
        k_reciprocal_rerank(QUERY, GALLERY, precision="float16")
    monkeypatch.setattr("fastreid_vi.evaluation.rerank.why_not", lambda _: "it was not built")
    with (
        fastreid_vi.backend("retrieval"),
        pytest.raises(RuntimeError, match=r"'retrieval' .* cannot run: it was not built"),
    ):
        k_reciprocal_rerank(QUERY, GALLERY)
    without = k_reciprocal_rerank(QUERY, GALLERY)
    with fastreid_vi.backend("reference"):
        np.testing.assert_array_equal(without, k_reciprocal_rerank(QUERY, GALLERY))


def test_native_room_refuses_what_does_not_fit() -> None:
    if positions.why_not("retrieval"):
        pytest.skip("no compiled room")
    from fastreid_vi import _retrieval

    squares, base = np.ones(5, np.float32), np.zeros((3, 2), np.float32)
    columns, offsets = np.arange(2), np.array([0, 2])
    sizes = {"rows": 3, "candidates": 3, "keep": 2, "keep_others": 1, "threads": 1}

    def selection(**change: Any) -> Any:
        return _retrieval.RerankSelection(squares, base, columns, offsets, **{**sizes, **change})

    for change in (
        {"rows": 2},
        {"rows": 6},
        {"candidates": 4},
        {"keep": 0},
        {"keep": 6},
        {"keep_others": 6},
    ):
        with pytest.raises(ValueError, match="shape"):
            selection(**change)
    with pytest.raises(ValueError, match="columns: expected gallery images"):
        _retrieval.RerankSelection(squares, base, columns + 1, offsets, **sizes)
    with pytest.raises(ValueError, match="offsets"):
        _retrieval.RerankSelection(squares, base, columns, offsets + 1, **sizes)
    with pytest.raises(TypeError):
        _retrieval.RerankSelection(squares.astype(np.float64), base, columns, offsets, **sizes)
    whole = selection()
    with pytest.raises(ValueError, match="dots: expected all later items"):
        whole.take(np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match="more rows than expected"):
        whole.take(np.zeros((4, 5), np.float32))
    with pytest.raises(ValueError, match="rows are missing"):
        whole.finish()


LARGEST = """
import json, resource, sys
import numpy as np
from fastreid_vi.evaluation import multi_spectral_rerank, rerank_memory
generator = np.random.default_rng(0)
def side(count):
    rows = generator.standard_normal((count, 16), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
query, gallery = side(3803), [side(3010) for _ in range(4)]
multi_spectral_rerank(query[:50], [g[:50] for g in gallery], threads=2)  # loads everything
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
multi_spectral_rerank(query, gallery, threads=2)
told = rerank_memory(3803, 3010, 16, spectra=4, threads=2)
print(json.dumps({"extra": peak() - before, "told": told, "torch": "torch" in sys.modules}))
"""


def test_memory_of_the_largest_case_in_its_own_environment() -> None:
    """15,843 items, a product of 1 GB; random features have the largest neighbourhoods."""
    if positions.why_not("retrieval"):
        pytest.skip("no compiled room")
    run = subprocess.run(
        [sys.executable, "-c", LARGEST], capture_output=True, text=True, check=True, timeout=300
    )
    found = json.loads(run.stdout)
    assert found["extra"] < 1e9
    assert found["told"] < 1e9
    assert found["extra"] <= 1.05 * found["told"] + 2**24
    assert not found["torch"]


def test_forecast_of_the_dense_reference() -> None:
    import tracemalloc

    generator = np.random.default_rng(0)
    query, gallery = (generator.standard_normal((n, 8)).astype(np.float32) for n in (500, 300))
    for precision in ("float32", "float16"):
        with fastreid_vi.backend("reference"):
            tracemalloc.start()
            k_reciprocal_rerank(query, gallery, precision=precision)  # type: ignore[arg-type]
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            told = rerank_memory(500, 300, 8, precision=precision)  # type: ignore[arg-type]
        assert 0.4 * told < peak <= told


def test_forecast_grows_with_what_is_asked() -> None:
    with fastreid_vi.backend("retrieval"):
        masked = rerank_memory(3803, 301, 2048, neighbors="queries")
        assert masked < rerank_memory(3803, 301, 2048)
        assert masked < rerank_memory(3803, 3010, 2048, neighbors="queries")
        assert masked < rerank_memory(3803, 301, 2048, spectra=4)
        assert masked < rerank_memory(3803, 301, 2048, neighbors="queries", k1=40, k2=20)
        # Without copies of features: a matrix of distances takes 67 MB, the released code 500.
        assert masked - 4 * 2048 * (3803 + 301) < 5e7
    assert rerank_memory(3803, 301, 2048, precision="float16") > 5e8
