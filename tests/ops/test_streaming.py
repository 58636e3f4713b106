"""Batches above 512 rows, where no room holds all pairs at once.

In Triton's interpreter the strips are made 16 rows long, so that 27 rows need two of them.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreid_vi.ops  # noqa: F401  fills the table
from fastreid_vi._dispatch import OPS
from tests.contract import GPU, device_of

MODULES = ("centres", "cluster", "gram", "pairs", "triplet", "weighted")
DTYPES = (torch.float32, torch.float64)
SIZE = 19  # components: fills no vector


def rooms(op: str) -> list[Any]:
    marks = {"cuda": pytest.mark.gpu}
    return [pytest.param(r, marks=marks.get(r, ())) for r in OPS[op].backends]


def rows_of(room: str) -> int:
    return 27 if room == "triton" and not GPU else 515


@pytest.fixture(autouse=True)
def _short_strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.callspec.params.get("room") == "triton" and not GPU:
        for name in MODULES:
            module = importlib.import_module(f"fastreid_vi.kernels.{name}")
            if hasattr(module, "SMALL"):
                monkeypatch.setattr(module, "SMALL", 16)


def drawn(rows: int, dtype: torch.dtype, *, far: float = 0.0, seed: int = 0) -> Tensor:
    """Rows with copies of the first one among them, about a common point that is `far` away."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, SIZE, generator=generator, dtype=torch.float64) / SIZE**0.5
    x[[1, rows // 2, rows - 1]] = x[0].clone()
    x[3] = x[2] + 1e-3 * x[4]
    return (x + far).to(dtype)


def labels_for(rows: int, identities: int) -> Tensor:
    return torch.randint(identities, (rows,), generator=torch.Generator().manual_seed(rows))


def run(op: str, room: str, *args: Any) -> tuple[Tensor, ...]:
    """Outputs of a room, on the CPU."""
    entry = OPS[op].room(room)
    if isinstance(entry, str):
        pytest.skip(entry)
    device = device_of(room)
    placed = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    result = entry(*placed)
    results = result if isinstance(result, tuple) else (result,)
    return tuple(r.cpu() for r in results)


def exact(op: str, *args: Any) -> tuple[Tensor, ...]:
    """The reference in float64, on the same rounded arguments."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    return run(op, "reference", *wide)


def agree(got: tuple[Tensor, ...], want: tuple[Tensor, ...], relative: float) -> None:
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        if not g.is_floating_point():
            assert torch.equal(g, w), f"output {i}"
        elif g.numel():
            scale = w.abs().max().clamp_min(1e-30)
            error = ((g.double() - w).abs().max() / scale).item()
            assert error <= relative, f"output {i}: relative error {error:.3g}"


def both_ways(op: str, room: str, dtype: torch.dtype, *args: Any, saved: Any) -> None:
    """Forward and backward of a room; `saved` makes the arguments of the backward op."""
    forward, backward = (1e-5, 3e-5) if dtype == torch.float32 else (1e-12, 1e-11)
    want = exact(op, *args)
    agree(run(op, room, *args), want, forward)
    kept = [t.to(dtype) if t.is_floating_point() else t for t in want]
    given = saved(torch.tensor(1.7, dtype=dtype), kept)
    agree(run(f"{op}_backward", room, *given), exact(f"{op}_backward", *given), backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", rooms("batch_hard_triplet_loss"))
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_batch_hard(metric: str, room: str, dtype: torch.dtype) -> None:
    rows = rows_of(room)
    x, labels = drawn(rows, dtype), labels_for(rows, 7)
    both_ways(
        "batch_hard_triplet_loss", room, dtype, x, labels, None, None, 0.3, metric,
        saved=lambda grad, kept: (grad, x, None, *kept[2:], metric),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", rooms("batch_hard_triplet_loss"))
@pytest.mark.parametrize("anchors", [3, 515])
def test_batch_hard_against_references(anchors: int, room: str, dtype: torch.dtype) -> None:
    rows = rows_of(room)
    x, y = drawn(min(anchors, rows + 2) + 2, dtype)[:-2], drawn(rows, dtype, seed=1)
    labels, others = labels_for(len(x), 3), labels_for(rows, 3)
    both_ways(
        "batch_hard_triplet_loss", room, dtype, x, labels, y, others, 0.3, "euclidean",
        saved=lambda grad, kept: (grad, x, y, *kept[2:], "euclidean"),
    )  # fmt: skip


@pytest.mark.parametrize("room", rooms("batch_hard_triplet_loss"))
def test_a_large_common_part_costs_no_precision(room: str) -> None:
    rows = rows_of(room)
    x, labels = drawn(rows, torch.float32, far=100.0), labels_for(rows, 7)
    both_ways(
        "batch_hard_triplet_loss", room, torch.float32, x, labels, None, None, 0.3, "euclidean",
        saved=lambda grad, kept: (grad, x, None, *kept[2:], "euclidean"),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", rooms("weighted_triplet_loss"))
@pytest.mark.parametrize("stable", [False, True])
def test_weighted(stable: bool, room: str, dtype: torch.dtype) -> None:
    rows = rows_of(room)
    x, labels = drawn(rows, dtype), labels_for(rows, 7)
    both_ways(
        "weighted_triplet_loss", room, dtype, x, labels, stable,
        saved=lambda grad, kept: (grad, x, labels, *kept[2:], stable),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", rooms("center_cluster_loss"))
@pytest.mark.parametrize("identities", [7, 100_000])  # the latter: nearly one for each row
def test_center_cluster(identities: int, room: str, dtype: torch.dtype) -> None:
    rows = rows_of(room)
    x, labels = drawn(rows, dtype), labels_for(rows, identities)
    both_ways(
        "center_cluster_loss", room, dtype, x, labels, 1.3,
        saved=lambda grad, kept: (grad, -0.3 * grad, x, *kept[3:], 1.3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("op", "room"),
    [
        pytest.param(op, *room.values, marks=room.marks)
        for op in ("batch_hard_triplet_loss", "weighted_triplet_loss", "center_cluster_loss")
        for room in rooms(op)
    ],
)
def test_nan_gives_a_nan_loss(op: str, room: str) -> None:
    rows = rows_of(room)
    x, labels = drawn(rows, torch.float32), labels_for(rows, 7)
    x[rows - 2, 4] = float("nan")
    options = {
        "batch_hard_triplet_loss": (None, None, 0.3, "euclidean"),
        "weighted_triplet_loss": (False,),
        "center_cluster_loss": (0.7,),
    }
    assert run(op, room, x, labels, *options[op])[0].isnan()
