"""Records of runs in one shape, whatever wrote them: pytest-benchmark on a CPU, `make gpu`.

    {"kind": "cpu", "date": ..., "commit": ..., "command": ..., "machine": {...}, "rows": [...]}

A row: op, shape, mode, precision, peer, seconds [q1, median, q3], and where known multiple (of our
time: quartiles over rounds in which the two took turns), fraction,
extra_memory, images_per_second, dispatched, waits, launches, graph. No torch here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"
Record = dict[str, Any]
Row = dict[str, Any]
Key = tuple[str, str, str, str]  # op, shape, mode, precision
COMMANDS = {"cpu": "make bench", "gpu": "make gpu"}
KEPT = (
    "op", "shape", "mode", "precision", "peer", "threads", "multiple", "fraction", "floor", "error",
    "extra_memory", "images_per_second", "dispatched", "waits", "launches",
)  # fmt: skip


def rounded(value: Any) -> Any:
    """Four digits: nothing here is known better."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def plain(value: Any) -> bool:
    """A number, or numbers by name."""
    if isinstance(value, dict):
        return all(plain(v) and not isinstance(v, dict) for v in value.values())
    return isinstance(value, (int, float))


def condensed(found: Record) -> Record:
    """The record of a file by pytest-benchmark, without its single rounds."""
    machine = found["machine_info"]
    rows = []
    for entry in found["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        if "peer" not in info:
            continue
        row = {name: info[name] for name in KEPT if info.get(name) is not None}
        if "op" not in row:  # not on the shared fixture: it says what it found in its own words
            row["op"] = entry["name"].removeprefix("bench_")
            row["found"] = {k: v for k, v in info.items() if k not in row and plain(v)}
        device = info.get("device")
        cold = device.get("cold") if isinstance(device, dict) else None
        seconds = cold or [stats["q1"], stats["median"], stats["q3"]]
        rows.append({**row, "seconds": seconds, "rounds": stats["rounds"]})
    names = (
        "class", "device", "vectors", "threads", "cores", "python_version", "torch", "fastreid_vi",
        "native", "ceilings",
    )  # fmt: skip
    return _tidy({
        "kind": "cpu",
        "date": found["datetime"][:10],
        "time": found["datetime"][11:19],
        "commit": found["commit_info"]["id"][:8],
        "command": COMMANDS["cpu"],
        "machine": {name: machine[name] for name in names if name in machine},
        "rows": rows,
    })  # fmt: skip


def _tidy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tidy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_tidy(v) for v in value]
    return rounded(value)


def flattened(found: Record) -> Record:
    """The same of a run on a GPU: timings, joined by what other sections say of the row."""
    sections = {name: section["rows"] for name, section in found["sections"].items()}
    rows = []
    for name in ("timings", "compiled", "autotuned"):
        for key, row in sections.get(name, {}).items():
            if "cold" not in row:
                continue
            more = {
                **{k: row[k] for k in KEPT if k in row},
                "seconds": row["cold"],
                "warm": row["warm"],
            }
            graph = sections.get("graphs", {}).get(key, {}).get("graph")
            counts = sections.get("counts", {}).get(key.replace("bfloat16", "float32"), {})
            more |= {k: counts[k] for k in ("dispatched", "waits", "launches") if k in counts}
            rows.append(more if graph is None else {**more, "graph": graph})
    for row in sections.get("steps", {}).values():
        rows.append({**{k: v for k, v in row.items() if k != "method"}, "op": "training_step",
                     "mode": "training"})  # fmt: skip
    ceilings = sections.get("ceilings", {}).get("ceilings", {})
    machine = {**found.get("machine", {}), "ceilings": ceilings}
    return _tidy({
        "kind": "gpu", "date": found["date"], "time": found.get("time", ""),
        "commit": found["commit"], "command": COMMANDS["gpu"], "machine": machine, "rows": rows,
    })  # fmt: skip


def read(path: Path) -> Record:
    """A file of any of the three kinds.

    Raises:
        ValueError: another file.
    """
    found: Record = json.loads(path.read_text())
    if "benchmarks" in found:
        return condensed(found)
    if "sections" in found:
        return flattened(found)
    if "rows" not in found or "kind" not in found:
        raise ValueError(f"{path}: expected a record of benchmarks, got keys {sorted(found)}")
    return found


def latest(kind: str, folder: Path = RESULTS) -> tuple[Path, Record] | None:
    """The newest committed record of a kind; rehearsals are none."""
    found = []
    for path in folder.glob("*/*.json"):
        if path.parent.name == "dry-run":
            continue
        record = read(path)
        if record["kind"] == kind:
            found.append((path, record))
    return max(found, key=_when) if found else None


class Multiple(NamedTuple):
    """Their time over ours: quartiles, or the least and the most that two rows allow."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, theirs: Row, ours: Row) -> Multiple:
        """As measured in turns, or from the quartiles of two rows of one run."""
        if "multiple" in theirs:
            return cls(*theirs["multiple"])
        (a, b, c), (x, y, z) = theirs["seconds"], ours["seconds"]
        return cls(a / z, b / y, c / x)

    def __str__(self) -> str:
        return f"{self.middle:.2f}x ({self.low:.2f}-{self.high:.2f})"


def before(path: Path) -> Record | None:
    """The newest record that is older than this one, of the same machine and kind."""
    of = read(path)
    older = [
        (other, record)
        for other in path.parent.glob("*.json")
        if (record := read(other))["kind"] == of["kind"]
        and _when((other, record)) < _when((path, of))
    ]
    return max(older, key=_when)[1] if older else None


def _when(item: tuple[Path, Record]) -> tuple[str, str, str]:
    path, record = item
    return record["date"], record.get("time", ""), path.name


def keep(path: Path, folder: Path = RESULTS) -> Path:
    """Put a record by pytest-benchmark among the committed ones, one of its day and commit."""
    record = read(path)
    target = folder / record["machine"]["class"] / f"{record['date']}-{record['commit']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in record.pop("rows")]
    head = json.dumps(record, indent=1).removesuffix("\n}")
    target.write_text(head + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")
    return target


def grouped(record: Record) -> dict[Key, dict[str, Row]]:
    """Peers of each op, shape, mode and precision."""
    groups: dict[Key, dict[str, Row]] = defaultdict(dict)
    for row in record["rows"]:
        key = (row["op"], row.get("shape", ""), row.get("mode", ""), row.get("precision", ""))
        groups[key][row["peer"]] = row
    return dict(sorted(groups.items()))
