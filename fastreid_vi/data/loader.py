"""Batches of images: worker processes decode, flip and crop bytes; this process normalises.

Workers hand over uint8, a quarter of the float batch, so that shared memory stays small. What a
batch holds depends on (seed, epoch, batch, slot) only: not on workers, nor on where a run resumed.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastreid_vi.config import Batch, DataConfig
from fastreid_vi.data.images import DataError, ImageList, Int64
from fastreid_vi.data.sampler import IdentitySampler
from fastreid_vi.data.transform import (
    Bytes,
    draw_augmentation,
    erase,
    flip_pad_crop,
    mix_channels,
    normalize,
    read_image,
)

_log = logging.getLogger("fastreid_vi.data")

# Batches a worker prepares ahead.
_AHEAD = 2

# Epoch, batch number, image positions.
_Task = tuple[int, int, Int64]
# Positions, uint8 [B, 3, H, W], boxes to erase [B, 4] or None; a message instead if unreadable.
_Raw = tuple[Int64, Tensor, Int64 | None]


def train_loader(
    images: ImageList, sampler: IdentitySampler, config: DataConfig, *, seed: int
) -> TrainLoader:
    """Augmented batches of the sampler's current epoch, from its cursor on.

    Args:
        images: the list the sampler was built on; `labels` are trained on.
        sampler: its cursor moves just before a batch is handed out, so that its state saved after
            a training step continues with the next batch.
        config: size, resize filter, augmentation, workers, cache.
        seed: of the augmentation.
    Raises:
        DataError: while iterating, an image that cannot be read, named.
    """
    return TrainLoader(images, sampler, config, seed=seed)


def eval_loader(images: ImageList, config: DataConfig, *, batch_size: int) -> EvalLoader:
    """All images in order, resized and normalised only; the last batch may be smaller.

    Raises:
        DataError: while iterating, an image that cannot be read, named.
    """
    return EvalLoader(images, config, batch_size=batch_size)


class _Loader:
    def __init__(
        self, images: ImageList, config: DataConfig, augmentation_seed: int | None
    ) -> None:
        self.images, self.config = images, config
        self._reader = _Reader(images, config, augmentation_seed)
        self._columns = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(images, name)))
            for name in ("labels", "modality", "cams")
        }

    def _batches(self, tasks: list[_Task]) -> Iterator[Batch]:
        if self.config.cache:
            self._reader.fill_cache()
        for raw in _run(self._reader, tasks, self.config.workers):
            if isinstance(raw, str):
                raise DataError(raw)
            yield self._finish(*raw)

    def _finish(self, positions: Int64, pixels: Tensor, boxes: Int64 | None) -> Batch:
        floats = normalize(pixels.numpy())
        if boxes is not None:
            erase(floats, boxes)
        chosen = torch.tensor(positions)
        return Batch(
            images=torch.from_numpy(floats),
            labels=self._columns["labels"][chosen],
            modality=self._columns["modality"][chosen],
            cams=self._columns["cams"][chosen],
        )


class TrainLoader(_Loader):
    """See `train_loader`."""

    def __init__(
        self, images: ImageList, sampler: IdentitySampler, config: DataConfig, *, seed: int
    ) -> None:
        if not np.array_equal(sampler.labels, images.labels) or not np.array_equal(
            sampler.modality, images.modality
        ):
            raise ValueError("sampler: built on other labels or modalities than those of images")
        super().__init__(images, config, seed)
        self.sampler = sampler

    def __len__(self) -> int:
        """Batches of the sampler's current epoch, exactly, those already handed out included."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        self.sampler.set_epoch(self.sampler.epoch)
        epoch, start, plan = self.sampler.epoch, self.sampler.cursor, self.sampler.plan()
        tasks = [(epoch, number, plan[number]) for number in range(start, len(plan))]
        for (_, number, _), batch in zip(tasks, self._batches(tasks), strict=True):
            self.sampler.advance(epoch, number + 1)
            yield batch
        self.sampler.finish(epoch)


class EvalLoader(_Loader):
    """See `eval_loader`."""

    def __init__(self, images: ImageList, config: DataConfig, *, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        super().__init__(images, config, None)
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(len(self.images), dtype=np.int64)
        size = self.batch_size
        yield from self._batches(
            [(0, i, order[i * size : (i + 1) * size]) for i in range(len(self))]
        )


class _Reader(Dataset["_Raw | str"]):
    """Does a task: reads its images and, for training, flips and crops them."""

    def __init__(self, images: ImageList, config: DataConfig, seed: int | None) -> None:
        self.images, self.config, self.seed = images, config, seed
        self._cache: Bytes | None = None

    def fill_cache(self) -> None:
        """Read everything once, with threads, before workers start: they share it by forking."""
        if self._cache is not None:
            return
        shape = (len(self.images), 3, self.config.height, self.config.width)
        pixels = np.empty(shape, dtype=np.uint8)

        def fill(position: int) -> None:
            pixels[position] = self._read(position)

        pool = ThreadPoolExecutor(os.cpu_count() or 1)
        try:
            for _ in pool.map(fill, range(len(self.images))):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        _log.info("cached %d images, %.1f MiB", len(self.images), pixels.nbytes / 2**20)
        self._cache = pixels

    def __getitem__(self, task: _Task) -> _Raw | str:
        # An exception would come back from a worker wrapped in its traceback: send one line.
        try:
            return self._do(*task)
        except DataError as error:
            return str(error)

    def _do(self, epoch: int, number: int, positions: Int64) -> _Raw:
        config = self.config
        pixels = torch.empty((len(positions), 3, config.height, config.width), dtype=torch.uint8)
        out = pixels.numpy()
        if self.seed is None:
            for slot, position in enumerate(positions):
                out[slot] = self._image(int(position))
            return positions, pixels, None
        draws = draw_augmentation(len(positions), config, seed=self.seed, epoch=epoch, batch=number)
        for slot, position in enumerate(positions):
            flip_pad_crop(
                mix_channels(self._image(int(position)), draws.mix[slot]),
                out[slot],
                flip=bool(draws.flip[slot]),
                top=int(draws.top[slot]),
                left=int(draws.left[slot]),
                pad=config.pad,
                value=config.pad_value,
            )
        return positions, pixels, draws.boxes

    def _image(self, position: int) -> Bytes:
        return self._read(position) if self._cache is None else self._cache[position]

    def _read(self, position: int) -> Bytes:
        config = self.config
        return read_image(self.images.file(position), config.height, config.width, config.resize)


class _Tasks(Sampler[Any]):
    def __init__(self, tasks: list[_Task]) -> None:
        self.tasks = tasks

    def __iter__(self) -> Iterator[_Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


def _run(reader: _Reader, tasks: list[_Task], workers: int) -> Iterator[_Raw | str]:
    """Results of the tasks, in their order."""
    workers = min(workers, len(tasks))
    if workers == 0:
        yield from map(reader.__getitem__, tasks)
        return
    loader: DataLoader[_Raw | str] = DataLoader(
        reader,
        batch_size=None,
        sampler=_Tasks(tasks),
        num_workers=workers,
        collate_fn=_as_is,
        prefetch_factor=_AHEAD,
        multiprocessing_context=_start_method(),
        worker_init_fn=functools.partial(_begin_worker, os.getpid()),
        # The default would draw from, and so move, the global generator of the training run.
        generator=torch.Generator(),
    )
    yield from loader


def _as_is(raw: Any) -> Any:
    return raw


def _start_method() -> str:
    """Forked workers start at once and share the cache; elsewhere the platform's own way."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"


def _begin_worker(parent: int, worker: int) -> None:
    # Ctrl-C reaches the whole process group. The training process decides what to do and ends its
    # workers; should it die, they notice and leave by themselves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # They notice a change of parent: one killed while this process started would never be missed.
    if os.getppid() != parent:
        os._exit(1)
