"""Images a second: out of a pack, out of JPEG files, and by a torch DataLoader as usually written.

    pytest benchmarks/bench_loader.py --benchmark-only

JPEG files of the size of SYSU-MM01's, one processor for each of our ways, and two worker processes
for the DataLoader; all take turns, so that they see the same machine.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.loader_peers import usual_batches
from fastreid_vi.config import Batch, DataConfig
from fastreid_vi.data import SysuMM01, make_sampler, train_loader, write_pack
from fastreid_vi.data.loader import TrainLoader
from fastreid_vi.data.packing import Packed
from fastreid_vi.methods import recipe
from tests.data.conftest import jpeg, permutations_for, write_files, write_lists

PERSONS, IMAGES = 24, 4  # persons of the training set, images of each in every camera
SIZE = (288, 120)  # pixels of a file, height and width
LEAST = 8.0  # images from a pack, times those from files, on one processor
ROUNDS = 5
# Batches of a round: those that take turns should take about as long.
BATCHES = {"pack": 12, "files": 1, "usual": 2}
METHODS = ("mpanet", "mcja", "lba", "baseline", "aligngan")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader") / "sysu"
    pids = list(range(1, PERSONS + 2))
    counts = {(cam, pid): IMAGES for cam in range(1, 7) for pid in pids}
    height, width = SIZE

    def content(cam: int, pid: int, number: int) -> bytes:
        seed = (pid * 6 + cam) * 100 + number
        return jpeg(seed, height=height, width=width, grey=cam in (3, 6))

    write_files(folder, counts, content)
    write_lists(folder, {"train": pids[:-2], "val": pids[-2:-1], "test": pids[-1:]})
    permutations_for(counts).to_mat(folder / "exp" / "rand_perm_cam.mat")
    return folder


def loader(root: Path, config: DataConfig, **change: Any) -> TrainLoader:
    config = dataclasses.replace(config, workers=0, **change)
    images = SysuMM01(root, label_order=config.label_order).train
    sampler = make_sampler(
        config.sampler, images.labels, images.modality, identities=config.identities,
        images=config.images, seed=1, pids=images.pids, batches=400,
        pixel_identities=config.pixel_identities,
    )  # fmt: skip
    return train_loader(images, sampler, config, seed=1)


def rate(batches: Iterator[Any], count: int) -> float:
    """Images a second of the next `count` batches."""
    began, images = time.perf_counter(), 0
    for _ in range(count):
        batch = next(batches)
        images += len(batch.labels if isinstance(batch, Batch) else batch[1])
    return images / (time.perf_counter() - began)


@pytest.mark.parametrize("method", METHODS)
def bench_loader(
    benchmark: Any, root: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One processor from a pack and from files, two workers of a DataLoader, in turns."""
    data = recipe(method, "sysu").data
    identities = min(data.identities, PERSONS)
    config = dataclasses.replace(data, identities=identities)
    dataset = SysuMM01(root, label_order=config.label_order)
    packed = write_pack(dataset, config, root.parent / f"pack-{method}", workers=1)
    ours = {
        "pack": loader(root, config, packed=str(packed.path)),
        "files": loader(root, config),
    }
    for ready, expected in zip(*(ours[name].batch(1, 0)[:4] for name in ours), strict=True):
        assert torch.equal(ready, expected)  # no time without the right answer
    plan = ours["files"].sampler.plan(1).tolist()
    streams: dict[str, Callable[[], float]] = {}
    for name, batches in ours.items():
        stream = iter(batches)
        streams[name] = lambda stream=stream, name=name: rate(stream, BATCHES[name])
    usual = usual_batches(dataset.train, config, plan, 2)
    streams["usual"] = lambda: rate(usual, BATCHES["usual"])

    found: dict[str, list[float]] = {name: [] for name in streams}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in streams:
            streams[name]()  # workers begin, pages are read

        def turn() -> None:
            for name, measure in streams.items():
                found[name].append(measure())

        benchmark.group = "images from a pack, from files, by a DataLoader"
        benchmark.pedantic(turn, rounds=ROUNDS)
    finally:
        torch.set_num_threads(threads)
        usual.close()  # type: ignore[attr-defined]
    report(benchmark, f"{method} {config.height}x{config.width}", found, packed, capsys)


def report(
    benchmark: Any,
    shape: str,
    found: dict[str, list[float]],
    packed: Packed,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Record and print the medians; a pack that gains too little fails."""
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    against = {
        name: statistics.median([a / b for a, b in zip(found["pack"], found[name], strict=True)])
        for name in ("files", "usual")
    }
    benchmark.extra_info.update(
        peer="pack",
        shape=shape,
        threads=1,
        images_per_second=middle,
        ratio_to_files=against["files"],
        ratio_to_dataloader_of_two=against["usual"],
        rounds=found,
        packing_images_per_second=packed.images / packed.seconds,
    )
    with capsys.disabled():
        print(
            f"\n{shape}, images/s: pack {middle['pack']:.0f}, files {middle['files']:.0f} on one "
            f"processor, DataLoader with two workers {middle['usual']:.0f}: "
            f"{against['files']:.1f} and {against['usual']:.1f} times"
        )
    if not benchmark.disabled:
        assert against["files"] >= LEAST
