"""One GPU run: everything that needs a device, in one command and under nine minutes.

    make gpu                            python -m benchmarks.gpu_run
    make gpu ONLY=ceilings,tests        these sections again
    make gpu ONLY=alignment             this family in all its sections again
    make gpu SANITIZER=0                without compute-sanitizer
    make gpu DRY_RUN=1                  a rehearsal without a GPU: compiles, plans, launches nothing

Each section is a process with a time of its own and writes row by row; the record is saved after
each one under benchmarks/results/<device>/<date>-<commit>.json. A second run of the same commit
takes up what is not complete, so that little device time goes a long way. Nothing is downloaded,
and no setting of the device is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import RESULTS, ROOT, commit, machine, slug

TOTAL = 530.0  # seconds of a whole run
SANITIZERS = ("memcheck", "racecheck")
PATIENCE = 8.0  # of a rehearsal, which costs no device time
CUT = (75, 124)  # exit status of a section whose time was up
SEVERITY = ("skipped", "complete", "cut", "failed")


class Section(NamedTuple):
    """A part of the run: at most so many seconds, and less when the whole run's time is short."""

    name: str
    seconds: float
    by_family: bool = True  # `ONLY=pool` means something to it


SECTIONS = (
    Section("environment", 25, by_family=False),
    Section("build", 150, by_family=False),
    Section("kernels", 150),
    Section("ceilings", 25, by_family=False),
    Section("tests", 150),
    Section("counts", 45),
    Section("graphs", 45),
    Section("timings", 150),
    Section("steps", 75, by_family=False),
    Section("sanitizer", 75),
    Section("compiled", 120),
    Section("autotuned", 120),
)
NAMES = tuple(section.name for section in SECTIONS)


class Plan(NamedTuple):
    """What this run does."""

    sections: tuple[Section, ...]
    families: tuple[str, ...]
    dry: bool
    again: bool  # sections named by hand start anew


def families() -> list[str]:
    """Of ops: files bench_<family>.py with benchmarks on the shared fixture."""
    files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    return [p.stem.removeprefix("bench_") for p in files if catalogue_has(p)]


def catalogue_has(path: Path) -> bool:
    """As `catalogue.rows` decides, without loading it."""
    return re.search(r"\brun: ", path.read_text()) is not None


def plan(only: str, *, dry: bool, sanitizer: bool = True) -> Plan:
    """Read ONLY: names of sections, of families of ops, or both.

    Raises:
        ValueError: a name that is neither.
    """
    names = [name for name in only.replace(" ", ",").split(",") if name]
    known = families()
    for name in names:
        if name not in NAMES and name not in known:
            raise ValueError(
                f"ONLY: expected sections ({', '.join(NAMES)}) or families ({', '.join(known)}), "
                f"got {name!r}"
            )
    chosen = tuple(name for name in names if name in known)
    wanted = [s for s in SECTIONS if s.name in names] or [
        s for s in SECTIONS if s.by_family or not chosen
    ]
    left_out = {"build" if dry else "kernels", *(() if sanitizer else ("sanitizer",))}
    sections = tuple(s for s in wanted if s.name not in left_out)
    return Plan(sections, chosen, dry, bool(names))


def record_file(folder: Path | None, dry: bool) -> Path:
    """Of this device, day and commit; an earlier one of the same commit is continued."""
    name = "dry-run" if dry else slug(torch.cuda.get_device_name())
    place = (folder or RESULTS) / name
    place.mkdir(parents=True, exist_ok=True)
    now = commit()
    if now == "unknown":  # it cannot be told whether an earlier record is of this code
        return place / time.strftime("%Y-%m-%d-unknown-%H%M%S.json")
    earlier = sorted(place.glob(f"*-{now}.json"))
    return earlier[-1] if earlier else place / f"{date.today().isoformat()}-{now}.json"


def load(path: Path) -> dict[str, Any]:
    """The record so far, or a new one."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {"kind": "gpu", "date": date.today().isoformat(), "commit": commit(), "sections": {}}


def save(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def commands(section: str, rows: Path, seconds: float, it: Plan) -> list[list[str]]:
    """What a section runs, one after the other."""
    python = [sys.executable, "-m"]
    part = [*python, "benchmarks.gpu_sections"]
    common = ["--rows", str(rows), "--seconds", f"{seconds:.0f}"]
    if it.families:
        common += ["--families", *it.families]
    if section == "build":
        return [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]]
    if section == "tests":
        return [[*python, "pytest", *arguments] for arguments in _tests(it)]
    if section == "sanitizer":
        watched = [*part, "small", *common]
        tool = shutil.which("compute-sanitizer")
        if it.dry or tool is None:
            return [watched] if it.dry else []
        return [[tool, "--tool", kind, "--error-exitcode", "86", *watched] for kind in SANITIZERS]
    return [[*part, section, *common]]


def _tests(it: Plan) -> list[list[str]]:
    """Every test that a GPU runs: all rooms of the ops, and whatever is marked elsewhere."""
    common = ["-q", "-p", "benchmarks.outcomes", "-p", "no:cacheprovider"]
    if it.dry:
        common += ["--collect-only", "-m", "gpu"]
    elif _has("xdist"):
        common += ["-n", "6", "--dist", "worksteal"]
    if it.families:
        return [[*common, *(f"tests/ops/test_{family}.py" for family in it.families)]]
    marked = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text() and path.parent.name != "ops"
    ]
    return [[*common, "tests/ops", "tests/test_dispatch.py"], [*common, "-m", "gpu", *marked]]


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def environment(it: Plan, section: str, rows: Path) -> dict[str, str]:
    """Of a section's process."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), "FASTREID_VI_BENCH_ROWS": str(rows)}
    if it.dry or section == "sanitizer":
        found["FASTREID_VI_BENCH_TINY"] = "1"
    if section == "kernels":
        found.pop("TRITON_INTERPRET", None)
    if section == "sanitizer" and not it.dry:
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # a write beyond a tensor leaves its block
    if section == "build" and not it.dry:
        major, minor = torch.cuda.get_device_capability()
        found.setdefault("FASTREID_VI_CUDA_ARCHS", f"{major}{minor}" + ("a" if major == 9 else ""))
        found.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    return found


def run_one(command: list[str], seconds: float, variables: dict[str, str]) -> tuple[int, str]:
    """Run a process and all that it starts, no longer than that; its status and last words."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return status, output.read()[-4000:]


def state_of(status: int) -> str:
    """In a word: 75 and 124 are a section whose time was up, 5 a family without such tests."""
    if status in (0, 5):
        return "complete"
    return "cut" if status in CUT else "failed"


def run_section(
    section: Section, seconds: float, it: Plan, before: dict[str, Any]
) -> dict[str, Any]:
    """Run it; what it found joins what an earlier run had."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        kept = kept_rows(section, it, before)
        rows.write_text("".join(json.dumps({"name": n, **r}) + "\n" for n, r in kept.items()))
        found: dict[str, Any] = {"state": "skipped", "why": "nothing to run"}
        words = []
        todo = commands(section.name, rows, seconds - 5, it)
        if section.name == "sanitizer" and not todo:
            found["why"] = "compute-sanitizer is not installed"
        for command in todo:
            if section.name == "sanitizer":  # every tool watches every op
                rows.write_text("")
            left = max(1.0, seconds - (time.monotonic() - began))
            status, last = run_one(command, left, environment(it, section.name, rows))
            words.append({"command": " ".join(command), "status": status, "output": last[-1500:]})
            found = {"state": max(state_of(status), found["state"], key=SEVERITY.index)}
            if status in CUT:
                break
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
    if words:
        found["commands"] = (
            words
            if found["state"] != "complete"
            else [{"command": w["command"], "status": w["status"]} for w in words]
        )
    part = it.families and section.by_family and before.get("state") != "complete"
    if part and found["state"] == "complete":
        found["state"] = "cut"  # other families have not had their turn
    found["seconds"] = round(time.monotonic() - began, 1)
    found["rows"] = {line.pop("name"): line for line in lines}
    return found


def kept_rows(section: Section, it: Plan, before: dict[str, Any]) -> dict[str, Any]:
    """Rows of an earlier run that this one need not repeat: tests run again as a whole."""
    rows: dict[str, Any] = before.get("rows", {})
    if it.families and section.by_family:
        files = tuple(f"tests/ops/test_{family}.py" for family in it.families)
        return {
            name: row
            for name, row in rows.items()
            if row.get("family") not in it.families and not name.startswith(files)
        }
    if it.again or section.name in ("tests", "build", "sanitizer"):
        return {}
    return {name: row for name, row in rows.items() if "failed" not in row}


def text(record: dict[str, Any]) -> str:
    """The short table: sections, then what the timings say of each op."""
    from benchmarks import tables

    lines = []
    for name, found in record["sections"].items():
        rows = found["rows"].values()
        bad = sum("failed" in row or row.get("outcome") == "failed" for row in rows)
        note = f", {bad} failed" if bad else ""
        lines.append(
            f"{name:12} {found['state']:9} {found['seconds']:6.1f} s  {len(rows)} rows{note}"
        )
        why = found.get("why")
        lines += [f"{'':12} {why}"] if why else []
        for word in found.get("commands", []):
            tail = word.get("output", "").strip().splitlines()
            lines += [f"{'':12} | {line[:140]}" for line in tail[-3:]]
    return "\n".join([*lines, "", tables.gpu_summary(record)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=os.environ.get("ONLY", ""), help="sections, families")
    parser.add_argument("--dry-run", action="store_true", help="a rehearsal without a GPU")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--results", type=Path, help="folder (benchmarks/results)")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="of the whole run (530)")
    arguments = parser.parse_args(argv)
    try:
        it = plan(arguments.only, dry=arguments.dry_run, sanitizer=not arguments.no_sanitizer)
    except ValueError as error:
        parser.error(str(error))
    if not it.dry and not torch.cuda.is_available():
        print("make gpu: python3 sees no CUDA device (torch.cuda.is_available() is False); nothing "
              "was run. DRY_RUN=1 rehearses the run without one")  # fmt: skip
        return 1
    path = record_file(arguments.results, it.dry)
    record = load(path)
    record.update(machine=machine(), time=time.strftime("%H:%M:%S"))
    patience = PATIENCE if it.dry else 1.0
    until = time.monotonic() + arguments.seconds * patience
    for section in it.sections:
        before = record["sections"].get(section.name, {})
        if before.get("state") == "complete" and not it.again:
            print(f"{section.name}: complete in {path.name}", flush=True)
            continue
        seconds = min(section.seconds * patience, until - time.monotonic())
        if seconds < 10:
            print(f"{section.name}: no time left; the next run takes it up", flush=True)
            continue
        found = run_section(section, seconds, it, before)
        record["sections"][section.name] = found
        save(path, record)
        print(f"{section.name}: {found['state']}, {found['seconds']} s", flush=True)
    print(text(record))
    print(f"kept in {path}")
    return int(any(s["state"] == "failed" or failures(s) for s in record["sections"].values()))


def failures(section: dict[str, Any]) -> bool:
    """Whether a test failed, or a room of ours was wrong."""
    return any(
        row.get("outcome") == "failed"
        or ("failed" in row and row.get("peer") in ("cuda", "triton"))
        for row in section["rows"].values()
    )


if __name__ == "__main__":
    sys.exit(main())
