"""A pool that stays on disk, and bootstrap intervals at the size of SYSU-MM01.

    pytest benchmarks/bench_streaming.py --benchmark-only

2,000 queries against 100,000 images of 1024 float32 numbers, a file of 410 MB: blocks against
taking the file into memory, both against the product of the blocks alone.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.bench_ranking import threads
from fastreid_vi.evaluation import (
    Embeddings,
    PerQuery,
    RankMetrics,
    bootstrap_interval,
    evaluate_regdb,
    products,
    streaming,
)

QUERIES, IMAGES, FEATURES, PERSONS, NOISE = 2000, 100_000, 1024, 5000, 3.0
SYSU_QUERIES, SYSU_PERSONS, TRIALS, SAMPLES = 3803, 96, 10, 1000
MOST_PRODUCTS = 2.5
MOST_MEMORY = 0.5  # of the whole file's


def planted(path: Path) -> Embeddings:
    """Queries; the pool is written to `path`, identities beside it."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((PERSONS, FEATURES), dtype=np.float32)

    def around(ids: np.ndarray) -> np.ndarray:
        noise = generator.standard_normal((len(ids), FEATURES), dtype=np.float32)
        return centres[ids] + np.float32(NOISE) * noise

    ids = generator.integers(0, PERSONS, IMAGES)
    pool = np.lib.format.open_memmap(path, "w+", np.float32, (IMAGES, FEATURES))
    for begin in range(0, IMAGES, 10_000):
        pool[begin : begin + 10_000] = around(ids[begin : begin + 10_000])
    np.save(path.with_suffix(".ids.npy"), ids)
    wanted = generator.integers(0, PERSONS, QUERIES)
    np.save(path.with_suffix(".query.npy"), around(wanted))
    np.save(path.with_suffix(".wanted.npy"), wanted)
    return sides(path)[0]


def sides(path: Path) -> tuple[Embeddings, Embeddings]:
    query, wanted, ids = (
        np.load(path.with_suffix(f".{name}.npy")) for name in ("query", "wanted", "ids")
    )
    return Embeddings(query, wanted), Embeddings(np.load(path, mmap_mode="r"), ids)


def evaluated(path: Path, way: str) -> Any:
    """By blocks, or with the whole file in memory."""
    products.MEMORY_BYTES = 0 if way == "blocks" else 2**62  # type: ignore[misc]
    return evaluate_regdb(*sides(path))


def product(path: Path) -> None:
    query, gallery = sides(path)
    for begin in range(0, IMAGES, streaming.MOST_IMAGES):
        query.features @ gallery.features[begin : begin + streaming.MOST_IMAGES].T


def bench_pool_on_disk(
    benchmark: Any, tmp_path: Path, rehearsal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pool.npy"
    planted(path)
    extra, means = {}, {}
    for way in ("blocks", "whole"):
        extra[way], means[way] = traced(path, way)
    # Neighbours within a rounding error of each other may stand either way.
    for name in ("mAP", "mINP"):
        found, expected = (getattr(means[way], name) for way in ("blocks", "whole"))
        assert found == pytest.approx(expected, abs=1e-6)
    seconds: dict[str, list[float]] = {"product": [], "blocks": [], "whole": []}

    def step(way: str) -> None:
        began = time.perf_counter()
        product(path) if way == "product" else evaluated(path, way)
        seconds[way].append(time.perf_counter() - began)

    benchmark.group = "a pool of 410 MB on disk"
    benchmark.pedantic(
        lambda: step("blocks"),
        setup=lambda: [step(way) for way in ("product", "whole")] and None,
        rounds=3,
    )
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    ratio = medians["blocks"] / medians["product"]
    benchmark.extra_info.update(
        peer="retrieval",
        shape=f"{QUERIES} x {IMAGES} x {FEATURES}",
        threads=threads(),
        ratio_to_product=ratio,
        median_seconds=medians,
        extra_megabytes=extra,
    )
    with capsys.disabled():
        print(f"\n{medians} s, {ratio:.2f} times the product; extra memory {extra} MB")
    assert rehearsal or ratio <= MOST_PRODUCTS
    assert extra["blocks"] <= MOST_MEMORY * extra["whole"]


def traced(path: Path, way: str) -> tuple[float, Any]:
    """Most megabytes of NumPy's at one time, whose pages of the file are the system's to drop; the
    metrics."""
    tracemalloc.start()
    mean = evaluated(path, way).mean
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 1e6, mean


def bench_bootstrap(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten trials, a thousand samples: against gathering every sample's queries."""
    generator = np.random.default_rng(0)
    trials = [random_trial(generator) for _ in range(TRIALS)]
    values = np.stack([[t.per_query.first_image == 1, t.per_query.AP, t.per_query.INP]
                       for t in trials])  # fmt: skip
    began = time.perf_counter()
    figures = []
    for _ in range(SAMPLES):
        drawn = generator.integers(0, SYSU_QUERIES, SYSU_QUERIES)
        figures.append(values[:, :, drawn].mean(axis=(0, 2)))
    naive = time.perf_counter() - began
    limits = np.quantile(figures, [0.025, 0.975], axis=0)
    found = bootstrap_interval(trials)
    width = limits[1] - limits[0]
    assert [part.high - part.low for part in found] == pytest.approx(width, rel=0.2)

    benchmark.group = "bootstrap intervals"
    benchmark.pedantic(bootstrap_interval, (trials,), rounds=7, warmup_rounds=1)
    ids = np.arange(SYSU_QUERIES) % SYSU_PERSONS
    began = time.perf_counter()
    bootstrap_interval(trials, identities=ids)
    persons = time.perf_counter() - began
    benchmark.extra_info.update(
        peer="ours",
        shape=f"{SYSU_QUERIES} x {TRIALS}, {SAMPLES} samples",
        threads=threads(),
        gathering_seconds=naive,
        persons_seconds=persons,
    )
    with capsys.disabled():
        print(f"\ngathering {naive:.2f} s, by persons {persons:.3f} s")


def random_trial(generator: np.random.Generator) -> Any:
    first = generator.integers(1, 4, SYSU_QUERIES)
    precision, penalty = generator.random((2, SYSU_QUERIES))
    detail = PerQuery(precision, penalty, first, first, first, np.ones_like(first))
    cmc = np.array([(first <= k).mean() for k in range(1, 21)])
    valid = np.ones(SYSU_QUERIES, bool)
    return RankMetrics(cmc, precision.mean(), penalty.mean(), valid, detail)
