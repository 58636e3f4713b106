"""The benchmark fixture, run as a user runs it, with tiny sizes."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastreid_vi.ops  # noqa: F401  # registers them
from benchmarks import workload
from benchmarks.clock import FEWEST, TEDIOUS, rounds_for
from benchmarks.memory import kept_memory

SIZE = 200 << 20  # bytes
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was recorded of each peer, by plain pytest-benchmark options."""
    path = tmp_path_factory.mktemp("fixture") / "found.json"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_pool.py",
        "-k", "map_separation and training and not compiled",
        "--benchmark-only", f"--benchmark-json={path}",
    ]  # fmt: skip
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # xdist's among them
    variables = {**own, "FASTREID_VI_BENCH_TINY": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text())
    return {row["extra_info"]["peer"]: row["extra_info"] for row in record["benchmarks"]}


class TestRun:
    """One op, all peers."""

    def test_peers(self, found: dict[str, dict[str, Any]]) -> None:
        """The reference is timed only where nothing faster is built."""
        room, *others = workload.rooms_of("map_separation_loss")
        assert not others
        assert set(found) == {room, "eager", "tidy"}

    def test_peers_take_turns_with_our_step(self, found: dict[str, dict[str, Any]]) -> None:
        room = workload.rooms_of("map_separation_loss")[0]
        assert "multiple" not in found[room]
        if workload.GPU:
            return
        for peer in ("eager", "tidy"):
            low, middle, high = found[peer]["multiple"]
            assert 0 < low <= middle <= high

    def test_every_row_is_checked_and_weighed(self, found: dict[str, dict[str, Any]]) -> None:
        for info in found.values():
            assert 0 <= info["error"] <= 1e-4
            assert info["extra_memory"] > 0


class TestRounds:
    """How often a step is timed."""

    def test_within_the_budget(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("benchmarks.clock.TINY", False)
        for seconds, rounds in ((1e-2, 20), (0.15, FEWEST), (TEDIOUS + 1, 2), (1e-9, 200)):
            monkeypatch.setattr("benchmarks.clock.host_seconds", lambda _, s=seconds: s)
            assert rounds_for(lambda: None, budget=0.2) == rounds


def test_a_checked_peer_is_not_computed_again() -> None:
    """In the other mode; a wrong one stays wrong."""
    calls = []

    def wrong(x: Any) -> Any:
        calls.append(x)
        return x + 1

    x = torch.ones(3, requires_grad=True)
    work = workload.Workload("gem_pool", lambda x: 2 * x, {"wrong": wrong}, (x,), 1e-6, 0)
    truth = workload.truth_of(work)
    for mode in ("forward", "training"):
        with (
            pytest.raises(workload.Wrong, match="wrong is wrong"),
            workload.prepared(work, "wrong", mode, truth),
        ):
            pass
    assert len(calls) == 1
    with workload.prepared(work, "reference", "training", truth) as (step, error):
        assert error == 0
        assert step()[0].tolist() == [2, 2, 2]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_has_no_new_pages() -> None:
    """A block that was freed is given out again, which it is not by default."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _ = b"x" * SIZE
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages = SIZE // resource.getpagesize()
    faults()
    assert min(faults() for _ in range(3)) > pages / 2
    with kept_memory():
        assert min(faults() for _ in range(3)) < pages / 100
