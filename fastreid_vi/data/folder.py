"""Batches out of image files: worker processes decode, flip and crop bytes; this one normalises.

Workers hand over uint8, a quarter of the float batch, so that shared memory stays small.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastreid_vi.augment.draws import draw_augmentation, draw_spectra
from fastreid_vi.config import VISIBLE, Batch, DataConfig
from fastreid_vi.data.images import Bytes, DataError, ImageList, Int64
from fastreid_vi.data.spectrum import View, view
from fastreid_vi.data.tasks import Task
from fastreid_vi.data.transform import erase, normalize, place_one, read_image

_log = logging.getLogger("fastreid_vi.data")

# Batches a worker prepares ahead.
_AHEAD = 2

# Positions, uint8 [B, 3, H, W], boxes to erase [B, 4] or None; a message instead if unreadable.
_Raw = tuple[Int64, Tensor, Int64 | None]


class FolderSource:
    """Decodes the files of a list.

    Args:
        images: the list.
        config: size, filter, augmentation, workers, cache.
        seed: of the augmentation; None for none.
        spectrum: what is shown of visible images without a seed.
    """

    def __init__(
        self,
        images: ImageList,
        config: DataConfig,
        *,
        seed: int | None = None,
        spectrum: View = "original",
    ) -> None:
        self.images, self.config = images, config
        self.place = f"files in {images.root}"
        self._reader = _Reader(images, config, seed=seed, spectrum=spectrum)
        self._columns = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(images, name)))
            for name in ("labels", "modality", "cams")
        }

    def batches(self, tasks: Sequence[Task], paired: int) -> Iterator[Batch]:
        """See `Source`."""
        if self.config.cache:
            self._reader.fill_cache()
        for raw in _run(self._reader, tasks, self.config.workers):
            yield self._finish(raw, paired)

    def batch(self, task: Task, paired: int) -> Batch:
        """See `Source`."""
        return self._finish(self._reader[task], paired)

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

    def __getitem__(self, task: Task) -> _Raw | str:
        # An exception would come back from a worker wrapped in its traceback: send one line.
        try:
            return self._do(task)
        except DataError as error:
            return str(error)

    def _do(self, task: Task) -> _Raw:
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
    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


def _run(reader: _Reader, tasks: Sequence[Task], workers: int) -> Iterator[_Raw | str]:
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
