"""The regression gate: our rooms against tidy eager PyTorch, ratios held to a committed baseline.

    python -m benchmarks.gate check              make bench-check: exits 1 with a table if slower
    python -m benchmarks.gate record             writes baselines/<class>.json from repeated runs
    python -m benchmarks.gate prove              ten clean checks, then every op slowed by 20 %

Times of one machine say nothing about another, and not much about themselves an hour later; the
ratio of two steps that took turns does. A row fails when its ratio is above the baseline's by more
than its tolerance in every one of three measurements: twice the deviation that at most one of the
recorded clean runs exceeded, at least 8 %. A row that would need more than 14 % is shown but not
held to anything.
On a CPU one thread is measured, by the seconds that it computed: neighbours hardly matter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastreid_vi
from benchmarks import catalogue
from benchmarks.machine import ROOT, commit, cpu_model, slug, vectors
from benchmarks.memory import kept_memory
from benchmarks.paired import SECONDS, paired
from benchmarks.slowed import slowed
from benchmarks.workload import (
    Workload,
    floats,
    function_of,
    prepared,
    rooms_of,
    truth_of,
    tuple_of,
)
from fastreid_vi._console import table

BASELINES = ROOT / "benchmarks" / "baselines"
LEAST, MOST = 0.08, 0.14  # tolerance
ATTEMPTS = 3
PEER = "tidy"
# One size of each op, large enough that the kernel and not the call is what is timed; of the
# separation loss there is none.
GATED = {
    "gem_pool": "lba_288x144_layer4",
    "pattern_pool": "mpanet_384x128_layer4",
    "modality_alleviation": "mpanet_384x128_layer3",
    "distribution_adapter": "mcja_384x192_stage3_m2",
    "instance_norm_act": "aligngan_128_residual_relu_contiguous",
    "resize_normalize": "aligngan_encoder_input_contiguous",
    "pairwise_distance": "mpanet_128x14336",
    "batch_hard_triplet_loss": "mpanet_128x14336",
    "weighted_triplet_loss": "mpanet_128x14336",
    "center_cluster_loss": "mpanet_128x14336",
    "soft_rank": "2048x2048_closed_form",
    "cross_modality_retrieval_loss": "512x2048",
    "feature_mask": "lba_alignment_layer4",
    "correspondence_probability": "lba_alignment_layer4",
    "correspondence_warp": "lba_alignment_layer4",
    "align_features": "lba_alignment_layer4",
    "dense_triplet_loss": "lba_alignment_layer4",
    "dense_alignment": "lba_alignment_layer3",
}
Step = Callable[[], Any]


class Pair(NamedTuple):
    """A gated row: our step and the peer's, on the same arguments."""

    name: str
    op: str
    ours: Step
    peer: Step


class Verdict(NamedTuple):
    """What a check found of one row."""

    name: str
    baseline: float
    limit: float
    ratio: float
    gated: bool

    @property
    def failed(self) -> bool:
        """Slower than the limit in every attempt."""
        return self.gated and not self.ratio <= self.limit


def device_class() -> str:
    """As `machine.device_class`, of one thread."""
    if torch.cuda.is_available():
        return slug(torch.cuda.get_device_name())
    return slug(f"cpu {cpu_model()} {vectors()}")


def baseline_file() -> Path:
    """The committed baseline of this device class."""
    return BASELINES / f"{device_class()}.json"


def backward_of(work: Workload, peer: str) -> Step:
    """The gradient alone, over and over on one graph: a slow backward room has nowhere to hide."""
    function, room = function_of(work, peer)
    with fastreid_vi.backend(room):
        outputs = [o for o in tuple_of(function(*work.args)) if o.is_floating_point()]
    wanted = [a for a in floats(work.args) if a.requires_grad]
    grads = [torch.ones_like(o) for o in outputs]

    def step() -> None:
        with fastreid_vi.backend(room):
            torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

    return step


def forward_of(work: Workload, peer: str) -> Step:
    """The results alone."""
    function, room = function_of(work, peer)

    def step() -> None:
        with fastreid_vi.backend(room), torch.no_grad():
            function(*work.args)

    return step


def pairs(only: Sequence[str] = ()) -> Iterator[Pair]:
    """Gated rows, checked against float64, one after the other so that memory stays small.

    Raises:
        Wrong: a room or the peer has another result than the reference.
    """
    seen = set()
    for row in catalogue.rows():
        if row.peer != PEER or row.mode != "forward":
            continue
        case = row.case()
        op = case.work.op
        if GATED.get(op) != case.shape or op in seen or (only and op not in only):
            continue
        seen.add(op)
        room, truth = rooms_of(op)[0], truth_of(case.work)
        for peer in (room, PEER):
            with prepared(case.work, peer, "forward", truth):
                pass
        del truth
        name = f"{op} {case.shape}"
        yield Pair(f"{name} forward", op, forward_of(case.work, room), forward_of(case.work, PEER))
        if any(a.requires_grad for a in floats(case.work.args)):
            steps = (backward_of(case.work, p) for p in (room, PEER))
            yield Pair(f"{name} backward", op, *steps)
    if missing := (set(only) or set(GATED)) - seen:
        raise LookupError(f"gated rows that no benchmark has: {sorted(missing)}")


@contextmanager
def quiet_threads() -> Iterator[None]:
    """One thread on a CPU, and memory that stays."""
    before = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    try:
        with kept_memory():
            yield
    finally:
        torch.set_num_threads(before)


def measured(only: Sequence[str] = (), seconds: float = SECONDS) -> dict[str, float]:
    """Ratio of every gated row, once."""
    with quiet_threads():
        return {p.name: paired(p.ours, p.peer, seconds).ratio for p in pairs(only)}


def baseline_of(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Median ratio and tolerance of every row over clean runs.

    One of them may have been disturbed: a check would have measured it again.
    """
    rows = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        middle = statistics.median(values)
        above = sorted(values)[-2:][0] / middle - 1
        tolerance = max(LEAST, 2 * above)
        rows[name] = {
            "ratio": round(middle, 4),
            "lowest": round(min(values), 4),
            "highest": round(max(values), 4),
            "tolerance": round(tolerance, 3),
            "gated": tolerance <= MOST,
        }
    return rows


def check(
    rows: dict[str, dict[str, Any]], only: Sequence[str] = (), seconds: float = SECONDS
) -> list[Verdict]:
    """Measure the gated rows and hold them to a baseline.

    Ops with a row above its limit are measured again when all others are done, so that whatever
    held the machine up may have gone; of all attempts the lowest ratio counts.

    Args:
        rows: of a baseline.
        only: ops; all by default.
        seconds: of one measurement.
    Raises:
        LookupError: the baseline lacks a row.
    """
    found: dict[str, Verdict] = {}
    waiting = list(only)
    with quiet_threads():
        for _ in range(ATTEMPTS):
            again = []
            for pair in pairs(waiting):
                if pair.name not in rows:
                    raise LookupError(f"the baseline has no row {pair.name!r}: record it anew")
                row = rows[pair.name]
                limit = row["ratio"] * (1 + row["tolerance"])
                ratio = paired(pair.ours, pair.peer, seconds).ratio
                if pair.name in found:
                    ratio = min(ratio, found[pair.name].ratio)
                verdict = Verdict(pair.name, row["ratio"], limit, ratio, row["gated"])
                found[pair.name] = verdict
                again += [pair.op] if verdict.failed else []
            waiting = sorted(set(again))
            if not waiting:
                break
    return list(found.values())


def text(verdicts: Sequence[Verdict]) -> str:
    """The table, what failed first."""
    shown = sorted(verdicts, key=lambda v: (not v.failed, v.name))
    cells = [
        [
            v.name,
            f"{v.baseline:.3f}",
            f"{v.limit:.3f}",
            f"{v.ratio:.3f}",
            f"{100 * (v.ratio / v.baseline - 1):+.0f} %",
            "SLOWER" if v.failed else "ok" if v.gated else "not gated: noisy",
        ]
        for v in shown
    ]
    head = ["ours / tidy eager", "baseline", "limit", "now", "change", "verdict"]
    return table(head, cells)


def header() -> dict[str, Any]:
    """What a record says of itself."""
    return {
        "class": device_class(),
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "peer": PEER,
        "seconds": SECONDS,
        "attempts": ATTEMPTS,
    }


def _save(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


def _record(path: Path, runs: int) -> int:
    found = []
    for i in range(runs):
        began = time.perf_counter()
        found.append(measured())
        print(f"run {i + 1} of {runs}: {time.perf_counter() - began:.0f} s", flush=True)
    rows = baseline_of(found)
    command = "python -m benchmarks.gate record"
    _save(path, {**header(), "command": command, "runs": runs, "rows": rows})
    cells = [
        [n, f"{r['ratio']:.3f}", f"{100 * r['tolerance']:.0f} %", "yes" if r["gated"] else "NO"]
        for n, r in rows.items()
    ]
    print(table(["ours / tidy eager", "ratio", "tolerance", "gated"], cells))
    return 0


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no baseline for this device class ({path.name}); on a quiet machine, from a commit "
            "that you trust: python -m benchmarks.gate record"
        )
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _check(path: Path, slow: str | None) -> int:
    rows = _load(path)["rows"]
    with slowed(slow or ""):
        verdicts = check(rows, [slow] if slow else ())
    print(text(verdicts))
    failed = [v.name for v in verdicts if v.failed]
    held = sum(v.gated for v in verdicts)
    print(f"{len(failed)} of {held} gated rows are slower than {path.name} allows")
    return 1 if failed else 0


def _prove(path: Path, runs: int) -> int:
    """Ten clean checks, then each op slowed: the record that the gate is neither shy nor deaf."""
    rows = _load(path)["rows"]
    clean = []
    for i in range(runs):
        verdicts = check(rows)
        fired = [v.name for v in verdicts if v.failed]
        clean.append({"fired": fired, "ratios": {v.name: round(v.ratio, 4) for v in verdicts}})
        print(f"clean run {i + 1} of {runs}: {fired or 'nothing fired'}", flush=True)
    caught: dict[str, dict[str, Any]] = {}
    for op in GATED:
        with slowed(op):
            held = [v for v in check(rows, [op]) if v.gated]
        caught[op] = {
            v.name: {"change": round(v.ratio / v.baseline - 1, 3), "fired": v.failed} for v in held
        }
        fired_rows = sum(v.failed for v in held)
        print(f"{op} slowed by 20 %: {fired_rows} of {len(held)} rows fired", flush=True)
    # Part of a gradient may be computed outside its room: one row that fires is enough.
    missed = [
        op for op, held in caught.items() if held and not any(r["fired"] for r in held.values())
    ]
    fired = sum(bool(run["fired"]) for run in clean)
    _save(path.with_suffix(".proof.json"), {
        **header(), "command": "python -m benchmarks.gate prove", "baseline": path.name,
        "clean_runs": runs, "clean_runs_that_fired": fired, "missed_slow_downs": missed,
        "slowed": caught, "clean": clean,
    })  # fmt: skip
    return 1 if fired or missed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("check", "record", "prove"))
    parser.add_argument("--baseline", type=Path, help="file (baselines/<class>.json)")
    parser.add_argument("--runs", type=int, help="of record (7) and prove (10)")
    parser.add_argument("--slow", metavar="OP", choices=GATED, help="check it slowed by 20 %%")
    arguments = parser.parse_args(argv)
    path = arguments.baseline or baseline_file()
    try:
        if arguments.what == "record":
            return _record(path, arguments.runs or 7)
        if arguments.what == "prove":
            return _prove(path, arguments.runs or 10)
        return _check(path, arguments.slow)
    except (FileNotFoundError, LookupError) as error:
        print(f"bench-check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
