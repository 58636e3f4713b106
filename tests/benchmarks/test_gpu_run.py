"""`make gpu`: the rehearsal runs end to end, sections resume, a GPU's commands are planned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import clock, counts, device, gpu_run, gpu_sections, machine
from benchmarks.gpu_run import NAMES, SECTIONS, Plan, Section, plan

ROOT = machine.ROOT
EVERY = ",".join(name for name in NAMES if name != "build")


def rehearse(results: Path, only: str) -> tuple[str, dict[str, Any]]:
    """`make gpu DRY_RUN=1`, and the record that it leaves."""
    given = ("ONLY", "RESULTS", "SANITIZER")
    variables = {k: v for k, v in os.environ.items() if k not in given}
    variables["COMMIT"] = "0123abcd"  # whoever commits meanwhile
    done = subprocess.run(
        ["make", "-s", "gpu", "DRY_RUN=1", f"GPU_PYTHON={sys.executable}", f"ONLY={only}",
         f"RESULTS={results}"],
        cwd=ROOT, env=variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (path,) = (results / "dry-run").glob("*-0123abcd.json")
    return done.stdout, json.loads(path.read_text())


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: nothing to rehearse")


@needs_make
@no_gpu
def test_the_rehearsal_runs_every_section(tmp_path: Path) -> None:
    """Compiles kernels, lists the GPU's tests, and runs all other sections at tiny sizes."""
    said, record = rehearse(tmp_path, f"{EVERY},pool")
    sections = record["sections"]
    assert list(sections) == [name for name in NAMES if name != "build"]
    for name, found in sections.items():
        assert found["rows"], f"{name}: {found}"
        assert not any("failed" in row for row in found["rows"].values()), name
    # Sections that know families have seen one of many.
    by_family = {s.name for s in SECTIONS if s.by_family}
    for name, found in sections.items():
        assert found["state"] == ("cut" if name in by_family else "complete"), name
    kernels = sections["kernels"]["rows"]
    assert kernels["triton pool"]["kernels"] == [
        "_gem_pool_backward_kernel",
        "_gem_pool_forward_kernel",
    ]
    assert kernels["nvrtc pool.cuh"].keys() & {"bytes", "skipped"}
    assert {row["op"] for row in sections["timings"]["rows"].values()} == {
        "gem_pool",
        "map_separation_loss",
        "pattern_pool",
    }
    assert all("launches" in row for row in sections["counts"]["rows"].values())
    assert {row["peer"] for row in sections["steps"]["rows"].values()} == {
        "ours",
        "published",
        "reference",
        "backbone",
    }
    assert all(row["outcome"] == "planned" for row in sections["tests"]["rows"].values())
    assert "`gem_pool`" in said
    assert "timings" in said

    # One section again: it alone changes, and the others stay in the record.
    _, later = rehearse(tmp_path, "ceilings")
    assert list(later["sections"]) == list(sections)
    changed = {name for name in sections if later["sections"][name] != sections[name]}
    assert changed == {"ceilings"}


@no_gpu
def test_without_a_gpu_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_run.main(["--results", str(tmp_path)]) == 1
    assert "sees no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


class TestRecordFile:
    """One of this code is continued, another one never."""

    def file(self, folder: Path, monkeypatch: pytest.MonkeyPatch, commit: str) -> Path:
        monkeypatch.setattr(gpu_run, "commit", lambda: commit)
        return gpu_run.record_file(folder, dry=True)

    def test_the_same_code(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        earlier = tmp_path / "dry-run" / "2026-01-01-0123abcd.json"
        earlier.parent.mkdir()
        earlier.touch()
        assert self.file(tmp_path, monkeypatch, "0123abcd") == earlier
        assert self.file(tmp_path, monkeypatch, "0123abcd-99ff") != earlier
        assert self.file(tmp_path, monkeypatch, "unknown").name != "unknown.json"

    def test_changes_have_a_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("COMMIT", raising=False)
        answers = {"rev-parse": "0123abcd", "diff": ""}
        monkeypatch.setattr(machine, "_git", lambda *words: answers[words[0]])
        assert machine.commit() == "0123abcd"
        names = set()
        for change in ("+a", "+b"):
            answers["diff"] = change
            names.add(machine.commit())
        assert len(names) == 2
        assert all(name.startswith("0123abcd-") for name in names)
        monkeypatch.setattr(machine, "_git", lambda *words: None)
        assert machine.commit() == "unknown"


class TestPlan:
    def test_everything(self) -> None:
        assert [s.name for s in plan("", dry=False).sections] == [
            n for n in NAMES if n != "kernels"
        ]

    def test_the_sanitizer_is_switched_by_itself(self) -> None:
        without = plan("", dry=False, sanitizer=False)
        assert {s.name for s in plan("", dry=False).sections} - {
            s.name for s in without.sections
        } == {"sanitizer"}

    def test_sections(self) -> None:
        it = plan("ceilings, tests", dry=False)
        assert [s.name for s in it.sections] == ["ceilings", "tests"]
        assert it.again
        assert not it.families

    def test_a_family_in_all_its_sections(self) -> None:
        it = plan("alignment", dry=False)
        assert it.families == ("alignment",)
        assert "ceilings" not in {s.name for s in it.sections}
        assert {"tests", "timings", "sanitizer"} <= {s.name for s in it.sections}

    def test_another_name(self) -> None:
        with pytest.raises(ValueError, match=r"ONLY: expected sections .* got 'alignmnet'"):
            plan("alignmnet", dry=False)

    def test_it_fits_into_nine_minutes(self) -> None:
        """Up to the compiled peers, which take what is left."""
        assert gpu_run.TOTAL < 540
        first = ("environment", "ceilings", "tests", "counts", "graphs", "timings")
        needed = [s.seconds for s in SECTIONS if s.name in first]
        assert sum(needed) < gpu_run.TOTAL


class TestCommands:
    """What a real run starts, seen without one."""

    def of(self, section: str, **changes: Any) -> list[str]:
        it = Plan((), (), dry=False, again=False)._replace(**changes)
        return [" ".join(c) for c in gpu_run.commands(section, Path("rows"), 60, it)]

    def test_every_file_with_a_gpu_test(self) -> None:
        first, second = self.of("tests")
        assert "tests/ops tests/test_dispatch.py" in first
        assert "-m gpu" in second
        assert "tests/train/test_on_device.py" in second
        assert "tests/cuda/test_pattern_cluster_kernels.py" in second

    def test_a_family_runs_its_own(self) -> None:
        (command,) = self.of("tests", families=("pool",))
        assert command.endswith("tests/ops/test_pool.py")

    def test_the_sanitizer_watches_small_shapes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_run.shutil, "which", lambda name: f"/opt/{name}")
        memory, races = self.of("sanitizer")
        assert memory.startswith("/opt/compute-sanitizer --tool memcheck")
        assert races.startswith("/opt/compute-sanitizer --tool racecheck")
        it = Plan((), (), dry=False, again=False)
        variables = gpu_run.environment(it, "sanitizer", Path("rows"))
        assert variables["FASTREID_VI_BENCH_TINY"] == "1"
        assert variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert "FASTREID_VI_BENCH_TINY" not in gpu_run.environment(it, "timings", Path("rows"))

    def test_no_sanitizer_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_run.shutil, "which", lambda name: None)
        it = Plan((), (), dry=False, again=False)
        found = gpu_run.run_section(Section("sanitizer", 10), 10, it, {})
        assert found["state"] == "skipped"
        assert found["why"] == "compute-sanitizer is not installed"

    def test_only_the_device_at_hand_is_compiled_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FASTREID_VI_CUDA_ARCHS", raising=False)
        it = Plan((), (), dry=False, again=False)
        for capability, wanted in (((9, 0), "90a"), ((8, 0), "80"), ((10, 0), "100")):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
            variables = gpu_run.environment(it, "build", Path("rows"))
            assert variables["FASTREID_VI_CUDA_ARCHS"] == wanted


class TestSections:
    def section(self, monkeypatch: pytest.MonkeyPatch, *scripts: str, **changes: Any) -> Any:
        commands = [[sys.executable, "-c", script] for script in scripts]
        monkeypatch.setattr(gpu_run, "commands", lambda name, rows, *rest: [
            [*c, str(rows)] for c in commands
        ])  # fmt: skip
        it = Plan((), (), dry=True, again=False)._replace(**changes)
        return lambda seconds, before: gpu_run.run_section(
            Section("timings", seconds), seconds, it, before
        )

    ROW = 'import sys; open(sys.argv[1], \'a\').write(\'{"name": "new", "family": "pool"}\\n\')'

    def test_a_section_that_hangs_is_ended_with_its_children(self, monkeypatch) -> None:
        script = (
            f"{self.ROW}\nimport subprocess, time\n"
            "p = subprocess.Popen(['sleep', '600'])\n"
            "open(sys.argv[1] + '.pid', 'w').write(str(p.pid))\ntime.sleep(600)"
        )
        seen: list[int] = []
        whole = gpu_run.run_one

        def noted(command: list[str], *rest: Any) -> Any:
            result = whole(command, *rest)
            seen.append(int(Path(command[-1] + ".pid").read_text()))
            return result

        monkeypatch.setattr(gpu_run, "run_one", noted)
        found = self.section(monkeypatch, script)(8.0, {})
        assert found["state"] == "cut"
        assert found["rows"].keys() == {"new"}  # what was finished is kept
        for _ in range(50):
            if not _alive(seen[0]):
                break
            time.sleep(0.1)
        assert not _alive(seen[0])

    def test_an_earlier_run_is_continued(self, monkeypatch) -> None:
        before = {"state": "cut", "rows": {"old": {"family": "norm"}, "bad": {"failed": "x"}}}
        found = self.section(monkeypatch, self.ROW)(30.0, before)
        assert found["state"] == "complete"
        assert found["rows"].keys() == {"old", "new"}

    def test_a_family_replaces_its_rows_only(self, monkeypatch) -> None:
        rows = {"a": {"family": "norm"}, "b": {"family": "pool"},
                "tests/ops/test_pool.py::x": {}, "tests/ops/test_norm.py::x": {}}  # fmt: skip
        run = self.section(monkeypatch, self.ROW, families=("pool",), again=True)
        found = run(30.0, {"state": "complete", "rows": rows})
        assert found["rows"].keys() == {"a", "new", "tests/ops/test_norm.py::x"}
        assert found["state"] == "complete"

    def test_a_failure_does_not_stop_the_next_command(self, monkeypatch) -> None:
        found = self.section(monkeypatch, "raise SystemExit('no device')", self.ROW)(30.0, {})
        assert found["state"] == "failed"
        assert "no device" in found["commands"][0]["output"]
        assert found["rows"].keys() == {"new"}


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_wrong_room_fails_the_run() -> None:
    row = {"peer": "triton", "failed": "Wrong: relative error 0.5"}
    assert gpu_run.failures({"rows": {"a": row}})
    assert gpu_run.failures({"rows": {"a": {"outcome": "failed"}}})
    assert not gpu_run.failures({"rows": {"a": {**row, "peer": "compiled"}, "b": {"error": 1e-7}}})


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of `torch.cuda` to run what only a GPU runs."""

    class Nothing:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.steps: list[Any] = []

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: Any) -> None:
            pass

        def wait_stream(self, other: Any) -> None:
            pass

        def replay(self) -> None:
            FakeEvent.now += 2.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", Nothing)
    for name in ("Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(device, "GPU", True)


@pytest.mark.usefixtures("fake_device")
class TestClocksOfADevice:
    def test_events_are_around_the_step_only(self) -> None:
        def step() -> None:
            FakeEvent.now += 3.0

        def spoil() -> None:
            FakeEvent.now += 100.0

        assert clock.timed(step, spoil) == pytest.approx([3e-3] * 3)

    def test_a_graph_is_replayed(self) -> None:
        calls = []
        assert device.replayed(lambda: calls.append(1)) == pytest.approx([2e-3] * 3)
        assert len(calls) == 4  # three to warm up, one that is captured

    @pytest.mark.filterwarnings("ignore:called a synchronizing")
    def test_waits_are_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import warnings

        modes = []
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

        def step() -> None:
            for _ in range(3):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

        assert counts.waits(step) == 3
        assert modes == ["warn", "default"]


def test_host_reads_are_counted() -> None:
    x = torch.arange(6.0)

    def step() -> None:
        float(x.sum())
        x[x > 2]
        x + 1

    ops, waits = counts.dispatched(step)
    assert waits == 2
    assert ops >= 4


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def section(task: gpu_sections.Task) -> Any:
        yield "a", {"x": 1}
        assert "a" in rows.read_text()
        assert task.done == {"before"}
        raise TimeoutError

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"name": "before"}\n')
    monkeypatch.setitem(gpu_sections.SECTIONS, "timings", section)
    assert gpu_sections.main(["timings", "--rows", str(rows)]) == 75
    assert [json.loads(line)["name"] for line in rows.read_text().splitlines()] == ["before", "a"]
