"""Ranking and search on a GPU, at the sizes of bench_ranking and bench_search, against PyTorch.

    pytest benchmarks/bench_device_evaluation.py --benchmark-only

Features lie on the device. Peers take turns; each is synchronised before the clock stops.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bench_ranking, bench_search
from fastreid_vi.evaluation import Embeddings, evaluate_sysu, search, sysu_table
from fastreid_vi.evaluation.device import full_precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROUNDS = 10
Step = Callable[[], Any]


def in_turns(benchmark: Any, ours: str, peers: dict[str, Step]) -> None:
    """Median seconds of each peer, and ours over theirs within a turn."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}

    def timed(name: str) -> None:
        torch.cuda.synchronize()
        began = time.perf_counter()
        peers[name]()
        torch.cuda.synchronize()
        seconds[name].append(time.perf_counter() - began)

    def others() -> None:
        for name in peers:
            if name != ours:
                timed(name)

    with full_precision():
        benchmark.pedantic(lambda: timed(ours), setup=others, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(
        peer=ours,
        device=torch.cuda.get_device_name(),
        seconds={name: statistics.median(times[1:]) for name, times in seconds.items()},
        ratios={
            name: statistics.median(
                a / b for a, b in zip(seconds[ours][1:], times[1:], strict=True)
            )
            for name, times in seconds.items()
        },
    )


def there(images: Embeddings) -> Embeddings:
    return images._replace(features=torch.from_numpy(images.features).cuda())


def bench_sysu_table_on_a_gpu(benchmark: Any) -> None:
    """Ten trials x four settings, against the one product they need."""
    query, gallery, permutations = bench_ranking.planted()
    left, right = there(query), there(gallery)
    expected = evaluate_sysu(query, gallery, permutations, trials=1)
    found = evaluate_sysu(left, right, permutations, trials=1)
    assert found.mean.mAP == pytest.approx(expected.mean.mAP, abs=1e-4)  # near ties
    benchmark.group = "SYSU-MM01, 10 trials x 4 settings, on a GPU"
    in_turns(
        benchmark,
        "sysu_table",
        {
            "sysu_table": lambda: sysu_table(left, right, permutations),
            "product": lambda: left.features @ right.features.T,
            "product + sort": lambda: (left.features @ right.features.T).sort(dim=1, stable=True),
        },
    )


@pytest.mark.parametrize("k", [10, bench_search.K, 1000])
def bench_search_on_a_gpu(benchmark: Any, k: int) -> None:
    """Exact to the bit, against matmul + topk, which is not."""
    query = torch.from_numpy(bench_search.unit(bench_search.QUERIES, 0)).cuda()
    gallery = torch.from_numpy(bench_search.unit(bench_search.IMAGES, 1)).cuda()
    host = search(query[:50].cpu().numpy(), gallery.cpu().numpy(), k)
    found = search(query[:50], gallery, k)
    assert np.array_equal(found.indices.cpu().numpy(), host.indices)
    benchmark.group = f"search on a GPU, {len(query)} x {len(gallery)}, k = {k}"
    in_turns(
        benchmark,
        "search",
        {
            "search": lambda: search(query, gallery, k),
            "matmul + topk": lambda: torch.topk(query @ gallery.T, k),
        },
    )
