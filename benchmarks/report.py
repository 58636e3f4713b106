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
OTHERS = ("eager", "tidy", "compiled")


def grouped(record: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, dict[str, float]]]:
    """(op, shape, mode) -> peer -> statistics in seconds."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, float]]] = defaultdict(dict)
    for entry in record["benchmarks"]:
        info = entry["extra_info"]
        if "peer" in info and "op" in info:
            groups[info["op"], info["shape"], info["mode"]][info["peer"]] = entry["stats"]
    return dict(sorted(groups.items()))


def table(record: dict[str, Any]) -> str:
    """The Markdown table."""
    lines = [
        "| op | shape | mode | room | ms (quartiles) | " + " | ".join(OTHERS) + " |",
        "|---|---|---|---|---|" + "---|" * len(OTHERS),
    ]
    for (op, shape, mode), peers in grouped(record).items():
        room = next(r for r in ROOMS if r in peers)
        ours = peers[room]
        spread = f"{1e3 * ours['median']:.2f} ({1e3 * ours['q1']:.2f}-{1e3 * ours['q3']:.2f})"
        cells = [
            f"{peers[name]['median'] / ours['median']:.1f}x" if name in peers else "-"
            for name in OTHERS
        ]
        lines.append(f"| `{op}` | {shape} | {mode} | {room} | {spread} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="written by pytest --benchmark-json")
    record = json.loads(parser.parse_args().json.read_text())
    machine = record["machine_info"]
    print(table(record))
    print(
        f"\n{record['datetime'][:10]}, commit {record['commit_info']['id'][:8]}, "
        f"{machine.get('device', '?')}, {machine.get('threads', '?')} threads, "
        f"PyTorch {machine.get('torch', '?')}"
    )


if __name__ == "__main__":
    main()
