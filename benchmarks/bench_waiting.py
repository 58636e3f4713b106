"""How much of a training step is spent waiting for data: steps on fresh batches, and on one batch.

    pytest benchmarks/bench_waiting.py --benchmark-only

The share is 1 - (time of a step on a batch that is there) / (time of a step in the training loop's
way, batch after batch). From a pack whose images lie on the device, from one that is gathered on
the host, and from JPEG files. On a GPU the published size, on a CPU a small variant.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.steps import training
from fastreid_vi import methods
from fastreid_vi.config import Batch, DataConfig
from fastreid_vi.data import SysuMM01, make_sampler, synthesize, train_loader, write_pack

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PERSONS = 20  # of the training set, at least a batch's
MOST = 0.02  # of a step, on a GPU, with the images on it
WORKERS = 4  # the published loaders'
STEPS, ROUNDS = (12, 5) if GPU else (2, 2)
SOURCES: dict[str, dict[str, Any]] = {
    "resident": {"resident": "always"},
    "streamed": {"resident": "never"},
    "files": {"packed": ""},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("waiting") / "sysu"
    synthesize(folder, train_ids=PERSONS, val_ids=1, test_ids=5, images=(4, 4), workers=1,
               height=256 if GPU else 64, width=128 if GPU else 32)  # fmt: skip
    return folder


def endless(root: Path, config: DataConfig) -> Iterator[Batch]:
    """Batches of one epoch after the other."""
    images = SysuMM01(root, label_order=config.label_order).train
    sampler = make_sampler(
        config.sampler, images.labels, images.modality, identities=config.identities,
        images=config.images, seed=1, pids=images.pids, batches=4 * STEPS * (ROUNDS + 1),
        pixel_identities=config.pixel_identities,
    )  # fmt: skip
    loader = train_loader(images, sampler, config, seed=1, device=DEVICE)
    return itertools.chain.from_iterable(itertools.repeat(loader))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", methods.METHODS)
def bench_waiting(
    benchmark: Any,
    root: Path,
    name: str,
    source: str,
    rehearsal: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Steps with and without a loader, in turns."""
    work = training(name, DEVICE, small=not GPU)
    config = work.recipe.data
    out = root.parent / f"pack-{name}"
    write_pack(SysuMM01(root, label_order=config.label_order), config, out)
    change = {"packed": str(out), "workers": WORKERS if GPU else 1, **SOURCES[source]}
    batches = endless(root, dataclasses.replace(config, **change))

    def seconds(given: Iterator[Batch]) -> float:
        began = time.perf_counter()
        for batch in itertools.islice(given, STEPS):
            work.stepper(batch)
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    fed, ready = [], []

    benchmark.group = f"waiting for data {work.shape}"
    benchmark.pedantic(
        lambda: fed.append(seconds(batches)),
        setup=lambda: ready.append(seconds(itertools.repeat(work.batch))),
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    share = statistics.median(
        [1 - a / b for a, b in zip(ready[1:] or ready, fed[1:] or fed, strict=True)]
    )
    step = statistics.median(fed) / STEPS
    benchmark.extra_info.update(
        peer=source, shape=work.shape, share=share, seconds=step, rounds=[ready, fed]
    )
    with capsys.disabled():
        print(f"\n{work.shape}, {source}: {1e3 * step:.1f} ms a step, {share:.1%} of it waiting")
    if GPU and source == "resident" and not rehearsal:
        assert share <= MOST
