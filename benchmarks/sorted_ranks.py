"""Ranking by a vectorised sort, as it is usually written: a peer, and the extra memory of either.

python -m benchmarks.sorted_ranks ours|argsort     # in a process of its own
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastreid_vi.evaluation import Embeddings, sysu_galleries, sysu_table

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (("all", 1), ("all", 10), ("indoor", 1), ("indoor", 10))


def argsort_table(
    query: Embeddings, gallery: Embeddings, permutations: Any, trials: int
) -> dict[str, list[list[float]]]:
    """[R1, mAP, mINP] of each trial of each setting: a product, a sort and masks per trial."""
    unit, pool = (
        x.features / np.linalg.norm(x.features, axis=1, keepdims=True) for x in (query, gallery)
    )
    place = np.where(query.cams == 3, 2, query.cams)[:, None]
    table = {}
    for mode, shots in SETTINGS:
        chosen = sysu_galleries(gallery, permutations, mode=mode, shots=shots, trials=trials)
        results = []
        for rows in chosen:
            order = np.argsort(-(unit @ pool[rows].T), axis=1, kind="stable")
            kept = gallery.cams[rows][order] != place
            match = (gallery.ids[rows][order] == query.ids[:, None]) & kept
            position = np.cumsum(kept, axis=1)
            count = np.cumsum(match, axis=1)
            total = count[:, -1]
            valid = total > 0
            precision = (count / np.maximum(position, 1) * match).sum(axis=1)[valid]
            last = (position * match).max(axis=1)[valid]
            first = (match & (position == 1)).any(axis=1)[valid]
            results.append(
                [
                    float(first.mean()),
                    float((precision / total[valid]).mean()),
                    float((total[valid] / last).mean()),
                ]
            )
        table[f"{mode}/{shots}"] = results
    return table


def alone(peer: str) -> dict[str, float]:
    """Seconds and extra bytes of one call in a process of its own, by the process' size."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.sorted_ranks", peer],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def status(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def main(peer: str) -> None:
    from benchmarks.bench_ranking import TRIALS, planted

    data = planted()
    step = {"ours": sysu_table, "argsort": argsort_table}[peer]
    small = data[0]._replace(features=data[0].features[:, :8])
    sysu_table(small, data[1]._replace(features=data[1].features[:, :8]), data[2], trials=1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    began = time.perf_counter()
    step(*data, trials=TRIALS)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "extra_bytes": status("VmHWM") - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
