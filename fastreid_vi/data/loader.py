"""Batches of images, out of their files or out of a pack: the same bits either way.

What a batch holds depends on (seed, epoch, batch, slot) only: not on workers, nor on where its
images come from, nor on where a run resumed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastreid_vi.config import Batch, DataConfig
from fastreid_vi.data.folder import FolderSource
from fastreid_vi.data.images import ImageList
from fastreid_vi.data.pack import open_pixels
from fastreid_vi.data.plan import IdentitySampler
from fastreid_vi.data.spectrum import View, check_view
from fastreid_vi.data.tasks import Source, Task

CPU = torch.device("cpu")


def train_loader(
    images: ImageList,
    sampler: IdentitySampler,
    config: DataConfig,
    *,
    seed: int,
    device: torch.device | None = None,
    spare: int = 0,
) -> TrainLoader:
    """Augmented batches of the sampler's current epoch, from its cursor on.

    Args:
        images: the list the sampler was built on; `labels` are trained on.
        sampler: its cursor moves just before a batch is handed out, so that its state saved after
            a training step continues with the next batch. After `sampler.shard(rank, world)` the
            loader reads the share of one process; augmentation goes by the row in the whole batch,
            so that the shares together are the batch of a single process, bit for bit.
        config: size, resize filter, augmentation, workers, cache; with `packed` images come from a
            pack and are augmented where they are needed, by threads instead of processes.
        seed: of the augmentation.
        device: where batches from a pack are wanted, the CPU by default. Those from files are
            always on the CPU.
        spare: bytes of a CUDA device that the images of a pack may take (`config.resident`).
    Raises:
        DataError: a pack that is missing, damaged or foreign; while iterating, an image that cannot
            be read, named.
    """
    return TrainLoader(images, sampler, config, seed=seed, device=device, spare=spare)


def eval_loader(
    images: ImageList,
    config: DataConfig,
    *,
    batch_size: int,
    spectrum: View = "original",
    device: torch.device | None = None,
) -> EvalLoader:
    """All images in order, resized and normalised only; the last batch may be smaller.

    Args:
        images: the list.
        config: size, resize filter, normalisation, workers, cache, pack.
        batch_size: images in a batch.
        spectrum: what is shown of visible images: "r", "g" or "b", one channel in all three planes,
            or "avg", their mean. MCJA's re-ranking embeds "original", "r", "g" and "b".
        device: as in `train_loader`.
    Raises:
        DataError: a pack that is missing, damaged or foreign; while iterating, an image that cannot
            be read, named.
        ValueError: an argument out of range.
    """
    return EvalLoader(images, config, batch_size=batch_size, spectrum=spectrum, device=device)


class TrainLoader:
    """See `train_loader`."""

    def __init__(
        self,
        images: ImageList,
        sampler: IdentitySampler,
        config: DataConfig,
        *,
        seed: int,
        device: torch.device | None = None,
        spare: int = 0,
    ) -> None:
        if not np.array_equal(sampler.labels, images.labels) or not np.array_equal(
            sampler.modality, images.modality
        ):
            raise ValueError("sampler: built on other labels or modalities than those of images")
        self.images, self.config, self.sampler = images, config, sampler
        self._source = _source(images, config, seed=seed, device=device, spare=spare)

    @property
    def place(self) -> str:
        """Where images come from, in words."""
        return self._source.place

    def __len__(self) -> int:
        """Batches of the sampler's current epoch, exactly, those already handed out included."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        self.sampler.set_epoch(self.sampler.epoch)
        epoch, start, length = self.sampler.epoch, self.sampler.cursor, len(self.sampler)
        tasks = [self._task(epoch, number) for number in range(start, length)]
        batches = self._source.batches(tasks, self.sampler.paired)
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
        return self._source.batch(self._task(epoch, number), self.sampler.paired)

    def _task(self, epoch: int, number: int) -> Task:
        whole, slots = self.sampler.plan(epoch)[number], self.sampler.slots
        return Task(epoch, number, whole[slots], slots, len(whole))


class EvalLoader:
    """See `eval_loader`."""

    def __init__(
        self,
        images: ImageList,
        config: DataConfig,
        *,
        batch_size: int,
        spectrum: View = "original",
        device: torch.device | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        check_view(spectrum)
        self.images, self.config, self.batch_size = images, config, batch_size
        self._source = _source(images, config, spectrum=spectrum, device=device)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(len(self.images), dtype=np.int64)
        parts = [order[i * self.batch_size :][: self.batch_size] for i in range(len(self))]
        tasks = [Task(0, i, part, part, len(order)) for i, part in enumerate(parts)]
        yield from self._source.batches(tasks, 0)


def _source(
    images: ImageList,
    config: DataConfig,
    *,
    seed: int | None = None,
    spectrum: View = "original",
    device: torch.device | None = None,
    spare: int = 0,
) -> Source:
    """Files, or the pack that the configuration names."""
    opened = open_pixels(images, config)
    if opened is None:
        return FolderSource(images, config, seed=seed, spectrum=spectrum)
    from fastreid_vi.data.packed import packed_source

    return packed_source(
        *opened, images, config, seed=seed, spectrum=spectrum, device=device or CPU, spare=spare
    )
