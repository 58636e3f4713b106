from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fastreid_vi.config import Batch, DataConfig
from fastreid_vi.data import DataError, SysuMM01, eval_loader, make_sampler, train_loader
from fastreid_vi.data.transform import augment, draw_augmentation, normalize, read_image
from tests.data.conftest import jpeg

CONFIG = DataConfig(
    height=40, width=20, identities=2, images=4, sampler="identity_random", erase=0.5, workers=0
)


@pytest.fixture
def train(sysu):
    return SysuMM01(sysu).train


def loader(train, *, seed=3, state=None, epoch=None, **change):
    config = dataclasses.replace(CONFIG, **change)
    sampler = make_sampler(
        config.sampler, train.labels, train.modality, identities=config.identities,
        images=config.images, seed=seed, pids=train.pids,
    )  # fmt: skip
    if state is not None:
        sampler.load_state_dict(state)
    if epoch is not None:
        sampler.set_epoch(epoch)
    return train_loader(train, sampler, config, seed=seed)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        x.paired == y.paired and all(map(torch.equal, x[:4], y[:4]))
        for x, y in zip(first, second, strict=True)
    )


def test_a_batch_is_the_plan_read_and_augmented(train):
    batches = loader(train, epoch=2)
    plan = batches.sampler.plan()
    assert len(batches) == len(plan)
    for number, batch in enumerate(batches):
        rows = plan[number]
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous()
        for name in ("labels", "modality", "cams"):
            column = getattr(batch, name)
            assert column.dtype == torch.int64
            np.testing.assert_array_equal(column.numpy(), getattr(train, name)[rows])
        pixels = np.stack([read_image(train.file(i), 40, 20) for i in rows])
        draws = draw_augmentation(len(rows), CONFIG, seed=3, epoch=2, batch=number)
        np.testing.assert_array_equal(batch.images.numpy(), augment(pixels, draws, CONFIG))
    assert number + 1 == len(plan)


@pytest.mark.parametrize("sampler", ["identity_random", "paired_identity"])
@pytest.mark.parametrize("cache", [False, True])
def test_workers_and_cache_change_nothing(train, sampler, cache):
    reference = list(loader(train, sampler=sampler))
    for workers in (0, 1, 2):
        assert same(reference, list(loader(train, sampler=sampler, workers=workers, cache=cache)))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_mid_epoch(train, workers):
    whole = list(loader(train, epoch=2))
    assert len(whole) >= 3
    first = loader(train, epoch=2, workers=workers)
    head = list(islice(first, 2))
    state = first.sampler.state_dict()
    # Workers have read ahead; the state counts what was handed out.
    assert (state["epoch"], state["batch"]) == (2, 2)
    tail = list(loader(train, state=state, epoch=2, workers=workers))
    assert same(whole, head + tail)


def test_the_cursor_counts_the_batch_in_hand(train):
    batches = loader(train)
    for number, _ in enumerate(batches, 1):
        assert batches.sampler.cursor == number
    assert batches.sampler.cursor == len(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_follow_each_other(train, workers):
    batches = loader(train, workers=workers)
    seen = []
    for epoch in (1, 2, 3):
        batches.sampler.set_epoch(epoch)
        seen.append(list(batches))
        assert len(seen[-1]) == len(batches)
        assert same(seen[-1], list(loader(train, epoch=epoch)))
    assert not same(seen[0], seen[1])
    # Without moving on, the same epoch again.
    assert same(seen[2], list(batches))


def test_seeds_differ(train):
    assert not same(list(loader(train, seed=1)), list(loader(train, seed=2)))


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_left_alone(train, workers):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader(train, workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_a_sampler_of_other_images_is_refused(train):
    batches = loader(train)
    with pytest.raises(ValueError, match="sampler: built on other labels"):
        train_loader(train.select(range(10)), batches.sampler, CONFIG, seed=1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_an_unreadable_image_is_named_in_one_line(train, workers, cache):
    batches = loader(train, workers=workers, cache=cache)
    path = train.file(batches.sampler.plan()[1, 2])
    path.write_bytes(jpeg(0)[:150])
    with pytest.raises(DataError, match=rf"{path}: unreadable image") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


def test_batches_before_an_unreadable_image_come_first(train):
    whole = list(loader(train))
    plan = loader(train).sampler.plan()
    victim = next(i for i in plan[2] if i not in plan[:2])
    train.file(victim).write_bytes(b"")
    for workers in (0, 2):
        seen = []
        with pytest.raises(DataError):
            seen.extend(loader(train, workers=workers))  # keeps what came before the error
        assert same(seen, whole[:2])


class TestEvalLoader:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("cache", [False, True])
    @pytest.mark.parametrize("batch_size", [1, 7, 1000])
    def test_all_images_in_order_without_augmentation(self, sysu, workers, cache, batch_size):
        images = SysuMM01(sysu).query
        config = dataclasses.replace(CONFIG, workers=workers, cache=cache, flip=1.0, erase=1.0)
        batches = eval_loader(images, config, batch_size=batch_size)
        for _ in range(2):
            found = list(batches)
            assert len(found) == len(batches)
            assert [len(b.labels) for b in found[:-1]] == [batch_size] * (len(found) - 1)
            pixels = np.stack([read_image(images.file(i), 40, 20) for i in range(len(images))])
            whole = torch.cat([b.images for b in found]).numpy()
            np.testing.assert_array_equal(whole, normalize(pixels))
            np.testing.assert_array_equal(torch.cat([b.cams for b in found]), images.cams)
            assert set(torch.cat([b.labels for b in found]).tolist()) == {-1}

    def test_no_images(self, sysu):
        images = SysuMM01(sysu).query.select([])
        for workers in (0, 2):
            config = dataclasses.replace(CONFIG, workers=workers)
            assert list(eval_loader(images, config, batch_size=4)) == []

    def test_batch_size(self, train):
        with pytest.raises(ValueError, match="batch_size: expected 1 or more, got 0"):
            eval_loader(train, CONFIG, batch_size=0)

    def test_unreadable(self, train):
        train.file(3).unlink()
        with pytest.raises(DataError, match="No such file"):
            list(eval_loader(train, CONFIG, batch_size=4))


def test_leaving_early_ends_the_workers(train):
    before = children_of(os.getpid())
    batches = iter(loader(train, workers=2))
    next(batches)
    children = [pid for pid in children_of(os.getpid()) if pid not in before]
    assert len(children) >= 2
    batches.close()
    assert gone(children)


SCRIPT = """
import sys, time
from fastreid_vi.config import DataConfig
from fastreid_vi.data import SysuMM01, make_sampler, train_loader
train = SysuMM01(sys.argv[1]).train
config = DataConfig(height=40, width=20, identities=2, images=4, sampler="identity_random",
                    workers=2)
sampler = make_sampler("identity_random", train.labels, train.modality, identities=2, images=4,
                       seed=1)
for batch in train_loader(train, sampler, config, seed=1):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads the process table of Linux")
def test_ctrl_c_leaves_no_process(sysu):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(sysu)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background of a shell inherits SIGINT ignored, as its children would.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        children = children_of(process.pid)
        assert len(children) >= 2
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1  # the training process's own, none from a worker
    assert gone(children)


def children_of(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def gone(pids: list[int], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
