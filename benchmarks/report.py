"""Benchmark JSON to the README's table.

    pytest benchmarks --benchmark-only --benchmark-json results.json
    python benchmarks/report.py results.json

A row is one op, shape and mode; every other formulation is given as a multiple of our time,
measured in the same run. Slower rows are printed like faster ones.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOMS = ("cuda", "triton", "cpu", "reference")  # ours: the first that was timed
OTHERS = ("eager", "tidy", "compiled")  # and third parties, where they were installed
Peers = dict[str, dict[str, Any]]


def statistics(entry: dict[str, Any]) -> dict[str, Any]:
    """Median and quartiles in seconds: on a GPU of the events with a cold cache."""
    device = entry["extra_info"].get("device")
    if device is None:
        return {name: entry["stats"][name] for name in ("q1", "median", "q3")}
    q1, median, q3 = device["cold"]
    more = {name: device[name] for name in ("graph", "fraction") if name in device}
    return {"q1": q1, "median": median, "q3": q3, **more}


def grouped(record: dict[str, Any]) -> dict[tuple[str, str, str], Peers]:
    """(op, shape, mode) -> peer -> statistics."""
    groups: dict[tuple[str, str, str], Peers] = defaultdict(dict)
    for entry in record["benchmarks"]:
        info = entry["extra_info"]
        if "peer" in info and "op" in info:
            groups[info["op"], info["shape"], info["mode"]][info["peer"]] = statistics(entry)
    return dict(sorted(groups.items()))


def third_party(peers: Peers, ours: dict[str, Any]) -> str:
    """The packages that were timed, each as a multiple of our time."""
    names = sorted(set(peers) - set(ROOMS) - set(OTHERS))
    return ", ".join(f"{n} {peers[n]['median'] / ours['median']:.1f}x" for n in names) or "-"


def on_device(ours: dict[str, Any]) -> str:
    """Time in a CUDA graph, and the fraction of the roofline where the floor is known."""
    graph = f"{1e6 * ours['graph'][1]:.1f}" if "graph" in ours else "-"
    return f"{graph} | " + (f"{ours['fraction']:.2f}" if "fraction" in ours else "-")


def table(record: dict[str, Any], only: str | None = None) -> str:
    """The Markdown table, of one mode if wanted; on a GPU with two columns more."""
    groups = {key: peers for key, peers in grouped(record).items() if only in (None, key[2])}
    gpu = any("device" in entry["extra_info"] for entry in record["benchmarks"])
    heads = ["op", "shape", "mode", "room", "ms (quartiles)", *OTHERS, "third parties"]
    heads += ["graph us", "of roofline"] if gpu else []
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for (op, shape, mode), peers in groups.items():
        room = next(r for r in ROOMS if r in peers)
        ours = peers[room]
        spread = f"{1e3 * ours['median']:.2f} ({1e3 * ours['q1']:.2f}-{1e3 * ours['q3']:.2f})"
        cells = [
            f"{peers[name]['median'] / ours['median']:.1f}x" if name in peers else "-"
            for name in OTHERS
        ]
        cells.append(third_party(peers, ours))
        cells += [on_device(ours)] if gpu else []
        lines.append(f"| `{op}` | {shape} | {mode} | {room} | {spread} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="written by pytest --benchmark-json")
    parser.add_argument("--mode", choices=("forward", "training"), help="default: both")
    arguments = parser.parse_args()
    record = json.loads(arguments.json.read_text())
    machine = record["machine_info"]
    print(table(record, arguments.mode))
    print(
        f"\n{record['datetime'][:10]}, commit {record['commit_info']['id'][:8]}, "
        f"{machine.get('device', '?')}, {machine.get('threads', '?')} threads, "
        f"PyTorch {machine.get('torch', '?')}"
    )


if __name__ == "__main__":
    main()
