"""The C++ rooms of the metric losses beyond the contract: threads, strips, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastreid_vi.ops  # noqa: F401  fills the table
from fastreid_vi._dispatch import OPS
from fastreid_vi.ops import pairwise_distance

NATIVE = OPS["pairwise_distance"].room("cpu")
pytestmark = pytest.mark.skipif(isinstance(NATIVE, str), reason=str(NATIVE))
CAPABILITIES = ("default", "avx2", "avx512")


def values(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Seeded numbers. Not randn: its numbers follow the instruction set."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-300, 301, size, generator=generator) / 128).to(dtype)


def called(op: str, *args: object, room: str = "cpu") -> list[Tensor]:
    result = OPS[op].room(room)(*args)
    return list(result) if isinstance(result, tuple) else [result]


def everything(
    rows: int, width: int, dtype: torch.dtype = torch.float32, room: str = "cpu"
) -> list[Tensor]:
    """Forward and backward of all four ops of the room on seeded data."""

    def run(op: str, *args: object) -> list[Tensor]:
        return called(op, *args, room=room)

    x, y = values(rows, width, dtype=dtype), values(rows // 2 + 1, width, dtype=dtype, seed=1)
    labels = torch.arange(rows) * 7 % max(rows // 4, 2)
    one = torch.ones((), dtype=torch.promote_types(dtype, torch.float32))
    kept = []
    for metric in ("euclidean", "sqeuclidean", "cosine"):
        for other in (None, y):
            distance = run("pairwise_distance", x, other, metric)[0]
            grad = values(*distance.shape, dtype=one.dtype, seed=2)
            back = run("pairwise_distance_backward", grad, x, other, distance, metric)
            kept += [distance, *back]
        hard = run("batch_hard_triplet_loss", x, labels, None, None, 0.3, metric)
        hard += run("batch_hard_triplet_loss_backward", one, x, None, *hard[2:], metric)
        kept += [hard[0], hard[4], *hard[5:]]
    unit = torch.nn.functional.normalize(x.double()).to(dtype)
    for stable in (False, True):
        soft = run("weighted_triplet_loss", unit, labels, stable)
        soft += run("weighted_triplet_loss_backward", one, unit, labels, *soft[2:], stable)
        kept += [soft[0], *soft[4:]]
    for margin in (0.7, 100.0):
        cluster = run("center_cluster_loss", x, labels, margin)
        back = run("center_cluster_loss_backward", one, one, x, *cluster[3:], margin)
        kept += [*cluster[:3], cluster[4], *back]
    return kept


def close(got: list[Tensor], want: list[Tensor], allowed: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        if a.numel():
            scale = b.double().abs().max().item()
            assert (a.double() - b.double()).abs().max().item() <= allowed * scale + 1e-9


def test_results_do_not_follow_the_threads() -> None:
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(everything(70, 1100))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("width", [1, 15, 64, 513, 1040])
@pytest.mark.parametrize("rows", [5, 33])
def test_every_tail(rows: int, width: int) -> None:
    exact = everything(rows, width, torch.float64, "reference")
    close(everything(rows, width, torch.float64), exact, 1e-12)
    close(everything(rows, width), exact, 2e-5)


def test_strips_equal_the_whole() -> None:
    # More than 1024 rows are never compared all at once.
    x, labels = values(1100, 17, dtype=torch.float64), torch.arange(1100) % 50
    one = torch.ones((), dtype=torch.float64)
    soft = called("weighted_triplet_loss", x, labels, True)
    soft += called("weighted_triplet_loss_backward", one, x, labels, *soft[2:], True)
    want = list(OPS["weighted_triplet_loss"].reference(x, labels, True))
    backward = OPS["weighted_triplet_loss_backward"].reference
    want.append(backward(one, x, labels, *want[2:], True))
    close(soft, want, 1e-11)
    for metric in ("euclidean", "cosine"):
        distance = called("pairwise_distance", x, None, metric)[0]
        grad = values(1100, 1100, dtype=torch.float64)
        got = called("pairwise_distance_backward", grad, x, None, distance, metric)[0]
        arguments = (grad, x, None, distance, metric)
        close([got], [OPS["pairwise_distance_backward"].reference(*arguments)[0]], 1e-11)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_a_nan_stays_in_its_row(metric: str) -> None:
    # 21 columns fill no vector: the tail of a row lies beside its neighbour.
    x, y = values(6, 21), values(9, 21, seed=1)
    clean = pairwise_distance(x, y, metric=metric)
    x[2, 0], y[4, 20] = float("nan"), float("nan")
    got = called("pairwise_distance", x, y, metric)[0]
    assert got[2].isnan().all()
    assert got[:, 4].isnan().all()
    keep = torch.ones_like(got, dtype=torch.bool)
    keep[2], keep[:, 4] = False, False
    assert torch.equal(got[keep], clean[keep])


def test_equal_rows_are_equal_to_their_centre() -> None:
    # The mean of three equal floats need not be that float: taken as an offset it is.
    x = values(1, 300).expand(7, 300) / 3
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    loss, pull, push, _, radius = called("center_cluster_loss", x, labels, 0.7)
    assert radius.count_nonzero() == 0
    assert pull.item() == 0
    assert loss.item() == push.item() == pytest.approx(0.7, abs=1e-5)


def test_close_rows_keep_their_digits() -> None:
    # |x|^2 + |y|^2 - 2 x.y would leave nothing of these distances in float32.
    x = values(12, 14336) + 3
    x[1:] = x[0] + values(11, 14336, seed=1) * 2**-12
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    got = called("pairwise_distance", x, None, "euclidean")[0].double()
    off = ~torch.eye(12, dtype=torch.bool)
    assert ((got - exact)[off] / exact[off]).abs().max() < 4e-7
    unit = torch.nn.functional.normalize(x.double())
    cosine = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
    got = called("pairwise_distance", x, None, "cosine")[0].double()
    assert ((got - cosine)[off] / cosine[off]).abs().max() < 1e-3


def digest(path: str) -> None:
    """What a process with other instruction sets computes (see the test below)."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    torch.save([everything(37, 90, dtype) for dtype in dtypes], path)


def test_instruction_sets_agree(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    saved = []
    for capability in CAPABILITIES:
        file = tmp_path / f"{capability}.pt"
        code = f"from tests.ops.test_pair_tiles import digest; digest({str(file)!r})"
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(root)}
        subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, check=True)
        saved.append(torch.load(file))
    for other in saved[1:]:
        for run, reference in zip(other, saved[0], strict=True):
            for got, want in zip(run, reference, strict=True):
                close([got], [want], 64 * torch.finfo(got.dtype).eps)
