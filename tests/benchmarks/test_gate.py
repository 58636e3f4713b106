"""The regression gate catches a kernel slowed by 20 % and forgives noise."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gate, paired, slowed
from benchmarks.gate import GATED, Pair, Verdict
from benchmarks.paired import Ratio
from fastreid_vi import ops
from fastreid_vi._dispatch import OPS

BASELINES = sorted(p for p in gate.BASELINES.glob("*.json") if not p.name.endswith(".proof.json"))
PROOFS = sorted(gate.BASELINES.glob("*.proof.json"))


def busy(seconds: float) -> Callable[[], None]:
    def step() -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    return step


class TestPairedMeasurement:
    def test_the_ratio_of_two_steps(self) -> None:
        found = paired.paired(busy(1e-3), busy(2e-3), seconds=0.3)
        assert found.ratio == pytest.approx(0.5, rel=0.1)
        assert found.ours == pytest.approx(1e-3, rel=0.1)
        assert found.rounds >= paired.FEWEST

    def test_quick_steps_are_timed_in_blocks(self) -> None:
        calls, _ = paired.calls_of(busy(2e-5))
        assert 40 <= calls <= 110

    def test_interruptions_of_either_side_do_not_count(self) -> None:
        """Three quarters of the rounds are disturbed: the low quantile is not."""
        rounds = iter(range(10**6))

        def disturbed() -> None:
            busy(1e-3 if next(rounds) % 4 == 0 else 5e-3)()

        found = paired.paired(disturbed, busy(1e-3), seconds=0.5)
        assert found.ratio < 2.0

    def test_sides_take_turns(self) -> None:
        order: list[str] = []

        def side(name: str) -> Callable[[], None]:
            return lambda: (order.append(name), busy(3e-3)())[0]

        paired.paired(side("a"), side("b"), seconds=0.0)
        assert "".join(order[-8:]) in ("abbaabba", "baabbaab")

    def test_time_without_the_core_does_not_count(self) -> None:
        def interrupted() -> None:
            busy(1e-3)()
            time.sleep(3e-3)

        assert paired.block_seconds(interrupted, 3) < 6e-3


def rows(**changes: Any) -> dict[str, Any]:
    row = {"ratio": 0.5, "tolerance": 0.1, "gated": True, **changes}
    return {"gem_pool x forward": row}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """One row whose measurements are given; what was asked for comes back."""

    def script(*ratios: float) -> list[list[str]]:
        values, asked = iter(ratios), []

        def pairs(only: Any = ()) -> Iterator[Pair]:
            asked.append(list(only))
            yield Pair("gem_pool x forward", "gem_pool", lambda: None, lambda: None)

        monkeypatch.setattr(gate, "pairs", pairs)
        monkeypatch.setattr(gate, "paired", lambda *args: Ratio(next(values), 1.0, 1.0, 1))
        return asked

    return script


class TestVerdict:
    def test_as_before(self, scripted) -> None:
        asked = scripted(0.51)
        (verdict,) = gate.check(rows())
        assert not verdict.failed
        assert asked == [[]]

    def test_slower_by_a_fifth(self, scripted) -> None:
        asked = scripted(0.6, 0.6, 0.6)
        (verdict,) = gate.check(rows())
        assert verdict.failed
        assert asked == [[], ["gem_pool"], ["gem_pool"]]  # measured again by itself
        text = gate.text([Verdict("a", 1.0, 1.1, 1.0, True), verdict])
        assert "SLOWER" in text.splitlines()[1]  # what failed stands first
        assert "+20 %" in text

    def test_a_disturbance_that_passes(self, scripted) -> None:
        scripted(0.9, 0.7, 0.52)
        (verdict,) = gate.check(rows())
        assert not verdict.failed
        assert verdict.ratio == 0.52

    def test_not_a_number_fails(self, scripted) -> None:
        scripted(*[float("nan")] * 3)
        assert gate.check(rows())[0].failed

    def test_noisy_rows_are_shown_only(self, scripted) -> None:
        scripted(5.0)
        (verdict,) = gate.check(rows(gated=False))
        assert not verdict.failed
        assert "not gated: noisy" in gate.text([verdict])

    def test_a_row_that_the_baseline_lacks(self, scripted) -> None:
        scripted(0.5)
        with pytest.raises(LookupError, match="record it anew"):
            gate.check({})


class TestBaseline:
    def runs(self, *values: float) -> dict[str, Any]:
        return gate.baseline_of([{"row": value} for value in values])["row"]

    def test_quiet_rows_get_the_least_tolerance(self) -> None:
        row = self.runs(0.50, 0.51, 0.505)
        assert row["ratio"] == 0.505
        assert (row["tolerance"], row["gated"]) == (gate.LEAST, True)

    def test_tolerance_follows_the_spread(self) -> None:
        row = self.runs(0.50, 0.48, 0.53, 0.53, 0.50)
        assert row["tolerance"] == pytest.approx(0.12)
        assert row["gated"]

    def test_too_noisy_to_gate(self) -> None:
        assert not self.runs(0.5, 0.5, 0.5, 0.6, 0.6)["gated"]

    def test_one_disturbed_run_is_forgiven(self) -> None:
        row = self.runs(0.5, 0.5, 0.5, 0.5, 0.9)
        assert (row["tolerance"], row["highest"]) == (gate.LEAST, 0.9)

    def test_a_fifth_is_beyond_every_gated_tolerance(self) -> None:
        assert gate.MOST < 0.2 / (1 + gate.MOST)


class TestSlowed:
    def test_a_room_takes_longer_and_is_put_back(self) -> None:
        room = gate.rooms_of("pattern_pool")[0]
        if room == "reference":
            pytest.skip("no room of our own to slow down")
        before = OPS["pattern_pool"].room(room)
        x, weight = torch.rand(2, 64, 8, 4), torch.rand(6, 64, 1, 1)
        with slowed.slowed("pattern_pool"):
            assert OPS["pattern_pool"].room(room) is not before
            ops.pattern_pool(x, weight)
        assert OPS["pattern_pool"].room(room) is before

    def test_the_share_is_that_of_the_time_it_took(self) -> None:
        later = slowed._later(busy(5e-3), 0.2)
        best = min(paired.block_seconds(later, 1) for _ in range(5))
        assert best == pytest.approx(6e-3, rel=0.1)


def attempt(share: float, rows: dict[str, Any]) -> bool:
    """Whether the gate fires with the op slowed by that share."""
    with slowed.slowed("pattern_pool", share):
        return any(v.failed for v in gate.check(rows, ["pattern_pool"], seconds=0.4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="timed on a CPU here")
def test_the_gate_catches_a_kernel_slowed_by_a_fifth() -> None:
    """Really measured. Other processes may spoil a trial, not several in a row."""
    if gate.rooms_of("pattern_pool")[0] == "reference":
        pytest.skip("no room of our own to slow down")
    seen = []
    for _ in range(4):
        runs = [gate.measured(["pattern_pool"], seconds=0.4) for _ in range(2)]
        baseline = gate.baseline_of(runs)
        for row in baseline.values():
            row.update(tolerance=0.08, gated=True)
        seen.append((attempt(0.0, baseline), attempt(0.2, baseline)))
        if seen[-1] == (False, True):
            return
    pytest.fail(f"(fired clean, fired slowed): {seen}")


def test_every_op_with_a_kernel_worth_timing_is_gated() -> None:
    public = OPS.keys() & set(ops.__all__)
    assert public - GATED.keys() == {"map_separation_loss"}
    assert GATED.keys() <= public


class TestCommand:
    def test_a_class_without_a_baseline(self, tmp_path: Path, capsys) -> None:
        assert gate.main(["check", "--baseline", str(tmp_path / "none.json")]) == 2
        assert "no baseline for this device class" in capsys.readouterr().err

    @pytest.mark.parametrize(("ratio", "code"), [(0.5, 0), (0.7, 1)])
    def test_exit_status(self, scripted, tmp_path: Path, capsys, ratio: float, code: int) -> None:
        scripted(*[ratio] * 3)
        path = tmp_path / "class.json"
        path.write_text(json.dumps({"rows": rows()}))
        assert gate.main(["check", "--baseline", str(path)]) == code
        assert f"{code} of 1 gated rows are slower" in capsys.readouterr().out


@pytest.mark.parametrize("path", BASELINES, ids=lambda p: p.stem)
def test_committed_baselines_cover_the_gate(path: Path) -> None:
    record = json.loads(path.read_text())
    assert record["runs"] >= 5
    named = {name.split()[0] for name in record["rows"]}
    assert named == set(GATED)
    for name, row in record["rows"].items():
        assert row["gated"] == (row["tolerance"] <= gate.MOST), name


@pytest.mark.parametrize("path", PROOFS, ids=lambda p: p.name)
def test_committed_proofs(path: Path) -> None:
    """Ten clean runs that did not fire, and every op caught when slowed by a fifth."""
    proof = json.loads(path.read_text())
    assert proof["clean_runs"] == len(proof["clean"]) >= 10
    assert proof["clean_runs_that_fired"] == 0
    assert not any(run["fired"] for run in proof["clean"])
    assert proof["missed_slow_downs"] == []
    baseline = json.loads((path.parent / proof["baseline"]).read_text())["rows"]
    held = {name.split()[0] for name, row in baseline.items() if row["gated"]}
    fired = {
        op for op, rows in proof["slowed"].items() if any(row["fired"] for row in rows.values())
    }
    assert held == fired
