"""Exact search in a big gallery, against matmul + topk and FAISS.

    pytest benchmarks/bench_search.py --benchmark-only
    python -m benchmarks.bench_search PEER      # seconds and extra memory of one peer, alone

2,000 queries, 100,000 images, 512 float32 numbers each, k = 100. The peers take turns, so that all
see the same machine; every one of them uses OMP_NUM_THREADS threads.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.bench_ranking import threads
from fastreid_vi.evaluation import search

ROOT = Path(__file__).resolve().parent.parent
QUERIES, IMAGES, FEATURES, K = 2000, 100_000, 512, 100
CHUNK = 250  # queries at once of the chunked peer
ROUNDS = 3
# Seconds, ours over theirs. FAISS has a faster BLAS than NumPy, whose products alone take longer.
MOST_OF_FAISS, MOST_OF_TOPK = 1.25, 1.0
MOST_MEMORY = 0.25  # bytes, ours over matmul + topk
PEERS = ("search", "matmul + topk", "chunked", "faiss")
Step = Callable[[], Any]


def unit(rows: int, seed: int) -> np.ndarray:
    """Unit rows, made in place: the peak of the process must not lie here."""
    features = np.random.default_rng(seed).standard_normal((rows, FEATURES), dtype=np.float32)
    for begin in range(0, rows, 1000):
        part = features[begin : begin + 1000]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return features


def steps(query: np.ndarray, gallery: np.ndarray, only: str | None = None) -> dict[str, Step]:
    """Peer -> (scores, indices); FAISS where it is installed, its index made before."""
    left, right = torch.from_numpy(query), torch.from_numpy(gallery)

    def chunked() -> list[Any]:
        parts = [torch.topk(part @ right.T, K) for part in left.split(CHUNK)]
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    found: dict[str, Step] = {
        "search": lambda: search(query, gallery, K, threads=threads()),
        "matmul + topk": lambda: torch.topk(left @ right.T, K),
        "chunked": chunked,
    }
    if only in (None, "faiss"):
        try:
            import faiss
        except ImportError:
            return found
        faiss.omp_set_num_threads(threads())
        index = faiss.IndexFlatIP(FEATURES)
        index.add(gallery)
        found["faiss"] = lambda: index.search(query, K)
    return found


def check(found: Any, expected: Any) -> None:
    """The same neighbours but for near ties, which a product decides by its rounding."""
    scores, indices = (np.asarray(part) for part in found)
    np.testing.assert_allclose(scores, expected.scores, atol=2e-6)
    assert (indices == expected.indices).mean() > 0.999


def measured(peer: str) -> dict[str, float]:
    """Seconds and extra bytes of one call in this process."""
    torch.set_num_threads(threads())
    query, gallery = unit(QUERIES, 0), unit(IMAGES, 1)
    step = steps(query, gallery, peer)[peer]
    steps(query[:200], gallery[:2000], peer)[peer]()  # loads what is loaded at the first call
    before = resident("VmRSS")
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": resident("VmHWM") - before}


def resident(name: str) -> int:
    """Bytes of this program: now (VmRSS), or the most there were (VmHWM, unlike ru_maxrss without
    what its parent had)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def in_its_own_process(peer: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.bench_search", peer]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    record: dict[str, float] = json.loads(result.stdout)
    return record


def bench_search(benchmark: Any, rehearsal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds in turns, ratios within a turn; memory of each peer alone."""
    torch.set_num_threads(threads())
    query, gallery = unit(QUERIES, 0), unit(IMAGES, 1)
    peers = steps(query, gallery)
    expected = peers["search"]()
    for step in peers.values():
        check(step(), expected)
    seconds: dict[str, list[float]] = {name: [] for name in peers}

    def others() -> None:
        for name, step in peers.items():
            if name != "search":
                began = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - began)

    def ours() -> None:
        began = time.perf_counter()
        peers["search"]()
        seconds["search"].append(time.perf_counter() - began)

    benchmark.group = f"search, {QUERIES} x {IMAGES} x {FEATURES}, k = {K}"
    benchmark.pedantic(ours, setup=others, rounds=ROUNDS)
    memory = {name: in_its_own_process(name)["bytes"] for name in peers}
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds["search"], times, strict=True))
        for name, times in seconds.items()
    }
    benchmark.extra_info.update(
        peer="search", shape=f"{QUERIES} x {IMAGES} x {FEATURES}", threads=threads(),
        bytes=memory, ratios=ratios,
        seconds={name: statistics.median(times) for name, times in seconds.items()},
    )  # fmt: skip
    with capsys.disabled():
        print(f"\n{benchmark.group}, {threads()} threads, medians of {ROUNDS} turns")
        for name, times in seconds.items():
            print(
                f"{name:14s} {statistics.median(times):6.2f} s, extra {memory[name] / 1e6:6.0f} MB"
                f", search takes {ratios[name]:.2f} of it"
            )
    if not rehearsal:
        assert ratios["matmul + topk"] < MOST_OF_TOPK
        assert ratios.get("faiss", 0) < MOST_OF_FAISS
    assert memory["search"] < MOST_MEMORY * memory["matmul + topk"]


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1])))
