"""Images a second: out of a pack, out of JPEG files, and by a torch DataLoader as usually written.

    pytest benchmarks/bench_loader.py --benchmark-only

Drawn persons in JPEG files of 400 x 160 pixels: larger files take longer to read, a pack does not
care. One thread for our two ways, two worker processes for the
DataLoader. All take turns, so that they see the same machine. Rates are per second of processor
time, which other work on the machine does not slow, and per second of the clock.
"""

from __future__ import annotations

import dataclasses
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.clock import TINY
from benchmarks.loader_peers import usual_batches
from fastreid_vi.config import Batch, DataConfig
from fastreid_vi.data import SysuMM01, make_sampler, synthesize, train_loader, write_pack
from fastreid_vi.data.loader import TrainLoader
from fastreid_vi.data.packing import Packed
from fastreid_vi.methods import recipe

PERSONS = 20  # of the training set
SIZE, SMALL = (400, 160), (64, 32)  # pixels of a file, height and width
LEAST = 6.0  # images from a pack, times those from files, on one processor; 10 to 30 are measured
ROUNDS = 1 if TINY else 5
# Batches of a round.
BATCHES = {"pack": 8, "files": 1, "dataloader": 6}
METHODS = ("mpanet", "mcja", "lba", "baseline", "aligngan")


class Rate(NamedTuple):
    """Images a second."""

    processor: float
    """Of processor time, of all threads and processes together."""
    clock: float


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("loader") / "sysu"
    quick = TINY or request.config.getoption("benchmark_disable")
    height, width = SMALL if quick else SIZE
    synthesize(
        folder, train_ids=PERSONS, val_ids=1, test_ids=5, images=(1, 2), height=height,
        width=width, workers=1,
    )  # fmt: skip
    return folder


def loader(root: Path, config: DataConfig, **change: Any) -> TrainLoader:
    config = dataclasses.replace(config, workers=0, **change)
    images = SysuMM01(root, label_order=config.label_order).train
    sampler = make_sampler(
        config.sampler, images.labels, images.modality, identities=config.identities,
        images=config.images, seed=1, pids=images.pids, batches=100,
        pixel_identities=config.pixel_identities,
    )  # fmt: skip
    return train_loader(images, sampler, config, seed=1)


def processor_seconds() -> float:
    """Of this process and of those that it has seen end."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, kinds))


def rate(batches: Iterator[Any]) -> Rate:
    """Of all these batches."""
    clock, processor, images = time.perf_counter(), processor_seconds(), 0
    for batch in batches:
        images += len(batch.labels if isinstance(batch, Batch) else batch[1])
    clock, processor = time.perf_counter() - clock, processor_seconds() - processor
    return Rate(images / processor, images / clock)


@pytest.mark.parametrize("method", METHODS)
def bench_loader(
    benchmark: Any, root: Path, method: str, rehearsal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """One thread from a pack and from files, two workers of a DataLoader, in turns."""
    data = recipe(method, "sysu").data
    config = dataclasses.replace(data, identities=min(data.identities, PERSONS))
    dataset = SysuMM01(root, label_order=config.label_order)
    packed = write_pack(dataset, config, root.parent / f"pack-{method}", workers=1)
    pack, files = loader(root, config, packed=str(packed.path)), loader(root, config)
    for ready, expected in zip(pack.batch(1, 0)[:4], files.batch(1, 0)[:4], strict=True):
        assert torch.equal(ready, expected)  # no time without the right answer
    endless = {
        name: itertools.chain.from_iterable(itertools.repeat(ours))
        for name, ours in (("pack", pack), ("files", files))
    }
    plan = files.sampler.plan(1)[: BATCHES["dataloader"]].tolist()
    ways: dict[str, Callable[[], Iterator[Any]]] = {
        "pack": lambda: itertools.islice(endless["pack"], BATCHES["pack"]),
        "files": lambda: itertools.islice(endless["files"], BATCHES["files"]),
        # Its workers begin and end with every turn: they would work on through those of others.
        "dataloader": lambda: usual_batches(dataset.train, config, plan, 2),
    }
    found: dict[str, list[Rate]] = {name: [] for name in ways}

    def turn(*names: str) -> None:
        for name in names:
            found[name].append(rate(ways[name]()))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark.group = "images from a pack, from files, by a DataLoader"
        benchmark.pedantic(
            lambda: turn("pack"),
            setup=lambda: turn("files", "dataloader"),
            rounds=ROUNDS,
            warmup_rounds=1,
        )
    finally:
        torch.set_num_threads(threads)
    ratio = report(benchmark, f"{method} {config.height}x{config.width}", found, packed, capsys)
    assert rehearsal or ratio >= LEAST


def report(
    benchmark: Any,
    shape: str,
    found: dict[str, list[Rate]],
    packed: Packed,
    capsys: pytest.CaptureFixture[str],
) -> float:
    """Record and print the medians; images from the pack, times those from files."""
    middle = {
        name: Rate(*map(statistics.median, zip(*rates[-ROUNDS:], strict=True)))
        for name, rates in found.items()
    }
    pack, files, usual = middle["pack"], middle["files"], middle["dataloader"]
    ratio = pack.processor / files.processor
    benchmark.extra_info.update(
        peer="pack",
        shape=shape,
        threads=1,
        per_processor_second={name: rates.processor for name, rates in middle.items()},
        per_second={name: rates.clock for name, rates in middle.items()},
        ratio_to_files=ratio,
        rounds=found,
        packing_images_per_second=packed.images / packed.seconds,
    )
    with capsys.disabled():
        print(
            f"\n{shape}, images a second of processor time: pack {pack.processor:.0f}, files "
            f"{files.processor:.0f} ({ratio:.1f} times), DataLoader {usual.processor:.0f} "
            f"({pack.processor / usual.processor:.1f} times); of the clock: pack, one thread "
            f"{pack.clock:.0f}, files, one process {files.clock:.0f}, DataLoader, two workers "
            f"{usual.clock:.0f}"
        )
    return ratio
