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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastreid_vi.config import VISIBLE, Batch, DataConfig
from fastreid_vi.data.images import Bytes, DataError, ImageList, Int64
from fastreid_vi.data.plan import IdentitySampler
from fastreid_vi.data.spectrum import View, check_view, draw_spectra, view
from fastreid_vi.data.transform import (
    draw_augmentation,
    erase,
    normalize,
    place_one,
    read_image,
)

_log = logging.getLogger("fastreid_vi.data")

# Batches a worker prepares ahead.
_AHEAD = 2


class _Task(NamedTuple):
    """A batch, or the share of it that one process reads."""

    epoch: int
    number: int
    positions: Int64  # [B] of the images
    slots: Int64  # [B] rows of the global batch
    rows: int  # of the global batch


# Positions, uint8 [B, 3, H, W], boxes to erase [B, 4] or None; a message instead if unreadable.
_Raw = tuple[Int64, Tensor, Int64 | None]


def train_loader(
    images: ImageList, sampler: IdentitySampler, config: DataConfig, *, seed: int
) -> TrainLoader:
    """Augmented batches of the sampler's current epoch, from its cursor on.

    Args:
        images: the list the sampler was built on; `labels` are trained on.
        sampler: its cursor moves just before a batch is handed out, so that its state saved after
            a training step continues with the next batch. After `sampler.shard(rank, world)` the
            loader reads the share of one process; augmentation goes by the row in the whole batch,
            so that the shares together are the batch of a single process, bit for bit.
        config: size, resize filter, augmentation, workers, cache.
        seed: of the augmentation.
    Raises:
        DataError: while iterating, an image that cannot be read, named.
    """
    return TrainLoader(images, sampler, config, seed=seed)


def eval_loader(
    images: ImageList, config: DataConfig, *, batch_size: int, spectrum: View = "original"
) -> EvalLoader:
    """All images in order, resized and normalised only; the last batch may be smaller.

    Args:
        images: the list.
        config: size, resize filter, normalisation, workers, cache.
        batch_size: images in a batch.
        spectrum: what is shown of visible images: "r", "g" or "b", one channel in all three planes,
            or "avg", their mean. MCJA's re-ranking embeds "original", "r", "g" and "b".
    Raises:
        DataError: while iterating, an image that cannot be read, named.
        ValueError: an argument out of range.
    """
    return EvalLoader(images, config, batch_size=batch_size, spectrum=spectrum)


class _Loader:
    def __init__(self, images: ImageList, config: DataConfig, reader: _Reader) -> None:
        self.images, self.config = images, config
        self._reader = reader
        self._columns = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(images, name)))
            for name in ("labels", "modality", "cams")
        }

    def _batches(self, tasks: list[_Task], paired: int) -> Iterator[Batch]:
        if self.config.cache:
            self._reader.fill_cache()
        for raw in _run(self._reader, tasks, self.config.workers):
            yield self._finish(raw, paired)

    def _finish(self, raw: _Raw | str, paired: int) -> Batch:
        if isinstance(raw, str):
            raise DataError(raw)
        positions, pixels, boxes = raw
        floats = normalize(pixels.numpy(), self.config.normalize)
        if boxes is not None:
            erase(floats, boxes)
        chosen = torch.tensor(positions)
        return Batch(
            images=torch.from_numpy(floats),
            labels=self._columns["labels"][chosen],
            modality=self._columns["modality"][chosen],
            cams=self._columns["cams"][chosen],
            paired=paired,
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
        super().__init__(images, config, _Reader(images, config, seed=seed))
        self.sampler = sampler

    def __len__(self) -> int:
        """Batches of the sampler's current epoch, exactly, those already handed out included."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        self.sampler.set_epoch(self.sampler.epoch)
        epoch, start, length = self.sampler.epoch, self.sampler.cursor, len(self.sampler)
        tasks = [self._task(epoch, number) for number in range(start, length)]
        batches = self._batches(tasks, self.sampler.paired)
        for task, batch in zip(tasks, batches, strict=True):
            self.sampler.advance(epoch, task.number + 1)
            yield batch
        self.sampler.finish(epoch)

    def batch(self, epoch: int, number: int) -> Batch:
        """One batch, read again in this process, to the same bits; no cursor moves.

        Args:
            epoch: from 1.
            number: from 0 in its epoch; the batch in hand is number `sampler.cursor - 1`.
        Raises:
            DataError: an image that cannot be read, named.
            ValueError: no such batch.
        """
        length = len(self.sampler.plan(epoch))
        if not 0 <= number < length:
            raise ValueError(f"number: expected 0 to {length - 1} in epoch {epoch}, got {number}")
        return self._finish(self._reader[self._task(epoch, number)], self.sampler.paired)

    def _task(self, epoch: int, number: int) -> _Task:
        whole, slots = self.sampler.plan(epoch)[number], self.sampler.slots
        return _Task(epoch, number, whole[slots], slots, len(whole))


class EvalLoader(_Loader):
    """See `eval_loader`."""

    def __init__(
        self,
        images: ImageList,
        config: DataConfig,
        *,
        batch_size: int,
        spectrum: View = "original",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        check_view(spectrum)
        super().__init__(images, config, _Reader(images, config, spectrum=spectrum))
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(len(self.images), dtype=np.int64)
        parts = [order[i * self.batch_size :][: self.batch_size] for i in range(len(self))]
        tasks = [_Task(0, i, part, part, len(order)) for i, part in enumerate(parts)]
        yield from self._batches(tasks, 0)


class _Reader(Dataset["_Raw | str"]):
    """Does a task: reads its images, then augments them, if it has a seed, or shows `spectrum`."""

    def __init__(
        self,
        images: ImageList,
        config: DataConfig,
        *,
        seed: int | None = None,
        spectrum: View = "original",
    ) -> None:
        self.images, self.config, self.seed, self.spectrum = images, config, seed, spectrum
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
            return self._do(task)
        except DataError as error:
            return str(error)

    def _do(self, task: _Task) -> _Raw:
        config, positions = self.config, task.positions
        pixels = torch.empty((len(positions), 3, config.height, config.width), dtype=torch.uint8)
        out = pixels.numpy()
        visible = self.images.modality[positions] == VISIBLE
        if self.seed is None:
            for slot, position in enumerate(positions):
                spectrum = self.spectrum if visible[slot] else "original"
                out[slot] = view(self._image(int(position)), spectrum, config.gray_rounding)
            return positions, pixels, None
        at = {"seed": self.seed, "epoch": task.epoch, "batch": task.number}
        draws = draw_augmentation(task.rows, config, **at).rows(task.slots)
        spectra = draw_spectra(task.rows, config, **at)
        if spectra is not None:
            spectra = spectra.rows(task.slots)
        for slot, position in enumerate(positions):
            shown = spectra if visible[slot] else None
            place_one(self._image(int(position)), out[slot], slot, draws, config, shown)
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
