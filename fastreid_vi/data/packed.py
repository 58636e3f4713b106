"""Batches out of a pack: bytes are gathered, and augmented by one op where they are needed.

Three ways, with the same result to the bit:

- on the CPU, threads gather and augment a little ahead of the training;
- for a CUDA device, a thread gathers into pinned memory, copies on a stream of its own and augments
  there, while the device is busy with the batch before;
- `resident`: the images lie on the device. What a stretch of batches will look like, images and
  random draws, is copied there at once, and a step is left with one launch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastreid_vi.augment import Plan, augment, level_table, view_plan
from fastreid_vi.augment.draws import NORMALIZE
from fastreid_vi.augment.sampling import batch_plan
from fastreid_vi.config import VISIBLE, Batch, DataConfig
from fastreid_vi.data.images import DataError, ImageList, Int64
from fastreid_vi.data.pack import Pixels
from fastreid_vi.data.slabs import Slabs
from fastreid_vi.data.spectrum import View
from fastreid_vi.data.tasks import Source, Task, ahead

# Batches whose plans travel to the device together.
STRETCH = 32
# Bytes of images that are copied to the device at a time.
_CHUNK = 64 << 20


def packed_source(
    pixels: Pixels,
    rows: Int64,
    images: ImageList,
    config: DataConfig,
    *,
    seed: int | None,
    spectrum: View,
    device: torch.device,
    spare: int,
) -> Source:
    """The way to take batches out of a pack that `config.resident` and the device allow.

    Args:
        pixels: the pack.
        rows: [n] where each image of `images` is in it.
        images: the list.
        config: augmentation, workers, `resident`.
        seed: of the augmentation; None for none.
        spectrum: what is shown of visible images without a seed.
        device: where batches are wanted.
        spare: bytes of a CUDA device that may be taken.
    """
    plans = Plans(images, config, seed=seed, spectrum=spectrum)
    need = len(images) * pixels.height * pixels.width * 3
    fits = device.type == "cuda" and need <= spare
    if config.resident == "always" or (config.resident == "auto" and fits):
        return Resident(pixels, rows, plans, device)
    return Streamed(pixels, rows, plans, device)


class Plans:
    """What happens to the images of a task."""

    def __init__(
        self, images: ImageList, config: DataConfig, *, seed: int | None, spectrum: View
    ) -> None:
        self.config, self._seed, self._spectrum = config, seed, spectrum
        self._modality = images.modality
        self._levels = level_table(*NORMALIZE[config.normalize])
        columns = [images.labels, images.modality, images.cams]
        self.columns = torch.from_numpy(np.stack(columns))  # [3, n]

    def of(self, task: Task, source: Int64) -> Plan:
        """The plan of a task whose images are the rows `source` of what `augment` will be given."""
        modality = self._modality[task.positions]
        if self._seed is not None:
            return batch_plan(
                source,
                modality,
                self.config,
                rows=task.rows,
                seed=self._seed,
                epoch=task.epoch,
                batch=task.number,
                slots=task.slots,
            )
        return view_plan(
            torch.from_numpy(source),
            self._spectrum,
            visible=torch.from_numpy(modality == VISIBLE),
            levels=self._levels,
            rounding=self.config.gray_rounding,
        )


class Streamed:
    """Gathers every batch on the host; see the module."""

    def __init__(self, pixels: Pixels, rows: Int64, plans: Plans, device: torch.device) -> None:
        self.pixels, self.rows, self.plans, self.device = pixels, rows, plans, device
        self.columns = plans.columns.to(device)
        self.place = f"{pixels.name}, batch by batch to {device}"
        self._slabs = _slabs(plans, device)
        self._own = threading.local()

    def batches(self, tasks: Sequence[Task], paired: int) -> Iterator[Batch]:
        """See `Source`."""
        workers = min(self.plans.config.workers, len(tasks))
        if workers == 0:
            for task in tasks:
                yield self.batch(task, paired)
            return
        ready = ahead(lambda task: self._make(task, paired), tasks, workers, workers + 1)
        try:
            for batch, event in ready:
                yield _taken_over(batch, event)
        finally:
            ready.close()

    def batch(self, task: Task, paired: int) -> Batch:
        """See `Source`."""
        return _taken_over(*self._make(task, paired))

    def _make(self, task: Task, paired: int) -> tuple[Batch, torch.cuda.Event | None]:
        lane = self._lane(len(task.positions))
        plan = self.plans.of(task, np.arange(len(task.positions), dtype=np.int64))
        pixels = lane.gathered(self.pixels, self.rows[task.positions])
        chosen = torch.from_numpy(task.positions)
        if lane.stream is None:
            return _batch(pixels, plan, self.columns[:, chosen], paired, self._slabs), None
        with torch.cuda.stream(lane.stream):
            moved = lane.copied(pixels, self.device)
            chosen = chosen.pin_memory().to(self.device, non_blocking=True)
            plan = plan.to(self.device, non_blocking=True)
            batch = _batch(moved, plan, self.columns[:, chosen], paired)
            return batch, lane.stream.record_event()

    def _lane(self, count: int) -> _Lane:
        """Of this thread, with room for `count` images."""
        lane: _Lane | None = getattr(self._own, "lane", None)
        if lane is None or len(lane.buffer) < count:
            shape = (count, self.pixels.height, self.pixels.width, 3)
            lane = self._own.lane = _Lane(shape, self.device)
        return lane


class _Lane:
    """What a thread gathers into; on CUDA also its stream."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.buffer = torch.empty(shape, dtype=torch.uint8, pin_memory=cuda)
        self.stream = _stream(device)
        self._free: torch.cuda.Event | None = None

    def gathered(self, pixels: Pixels, rows: Int64) -> Tensor:
        """[B, H, W, 3], valid until this thread gathers again."""
        if self._free is not None:
            self._free.synchronize()  # the copy before may still read the buffer
        out = self.buffer[: len(rows)]
        pixels.gather(rows, out.numpy())
        return out

    def copied(self, pixels: Tensor, device: torch.device) -> Tensor:
        """The same on the device, in the order of the stream."""
        moved = pixels.to(device, non_blocking=True)
        assert self.stream is not None
        self._free = self.stream.record_event()
        return moved


class _Stretch(NamedTuple):
    """Plans of a few batches, on the device."""

    plan: Plan
    columns: Tensor  # [3, rows]
    sizes: list[int]  # rows of every batch
    event: torch.cuda.Event | None


class Resident:
    """Keeps the images on the device; see the module."""

    def __init__(self, pixels: Pixels, rows: Int64, plans: Plans, device: torch.device) -> None:
        self.plans, self.device = plans, device
        self.columns = plans.columns.to(device)
        self.images = _upload(pixels, rows, device)
        self.place = f"{pixels.name}, {self.images.nbytes / 2**30:.2f} GiB of it on {device}"
        self._stream = _stream(device)
        self._slabs = _slabs(plans, device)

    def batches(self, tasks: Sequence[Task], paired: int) -> Iterator[Batch]:
        """See `Source`."""
        stretches = [tasks[i : i + STRETCH] for i in range(0, len(tasks), STRETCH)]
        if self.plans.config.workers == 0:
            for tasks in stretches:
                yield from self._batches(self._stretch(tasks), paired)
            return
        ready = ahead(self._stretch, stretches, 1, 2)
        try:
            for stretch in ready:
                yield from self._batches(stretch, paired)
        finally:
            ready.close()

    def batch(self, task: Task, paired: int) -> Batch:
        """See `Source`."""
        return next(self._batches(self._stretch([task]), paired))

    def _stretch(self, tasks: Sequence[Task]) -> _Stretch:
        plan = _joined([self.plans.of(task, task.positions) for task in tasks])
        sizes = [len(task.positions) for task in tasks]
        if self._stream is None:
            return _Stretch(plan, self.columns[:, plan.source], sizes, None)
        with torch.cuda.stream(self._stream):
            plan = plan.to(self.device, non_blocking=True)
            columns = self.columns[:, plan.source]
            return _Stretch(plan, columns, sizes, self._stream.record_event())

    def _batches(self, stretch: _Stretch, paired: int) -> Iterator[Batch]:
        _take_over([*stretch.plan, stretch.columns], stretch.event)
        start = 0
        for size in stretch.sizes:
            part = slice(start, start + size)
            plan = Plan._make(
                column if name == "levels" or column is None else column[part]
                for name, column in stretch.plan._asdict().items()
            )
            yield _batch(self.images, plan, stretch.columns[:, part], paired, self._slabs)
            start += size


def _joined(plans: Sequence[Plan]) -> Plan:
    """One plan after the other."""
    first = plans[0]
    return Plan._make(
        column if name == "levels" or column is None else torch.cat(parts)
        for name, column, parts in zip(Plan._fields, first, zip(*plans, strict=True), strict=True)
    )


def _upload(pixels: Pixels, rows: Int64, device: torch.device) -> Tensor:
    """The images `rows` on the device: uint8 [n, H, W, 3]."""
    shape = (pixels.height, pixels.width, 3)
    try:
        out = torch.empty((len(rows), *shape), dtype=torch.uint8, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        need = len(rows) * int(np.prod(shape)) / 2**30
        raise DataError(
            f'data.resident "always": {need:.2f} GiB of images do not fit on {device}: '
            "--data.resident never takes them batch by batch"
        ) from error
    if device.type == "cpu":
        pixels.gather(rows, out.numpy())
        return out
    size = max(_CHUNK // int(np.prod(shape)), 1)
    buffer = torch.empty((min(size, len(rows)), *shape), dtype=torch.uint8, pin_memory=True)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        pixels.gather(part, buffer[: len(part)].numpy())
        out[start : start + len(part)] = buffer[: len(part)]
    return out


def _slabs(plans: Plans, device: torch.device) -> Slabs | None:
    """Memory of batches on the CPU; a CUDA device has an allocator that keeps it."""
    return Slabs(plans.config.workers + 2) if device.type == "cpu" else None


def _batch(
    pixels: Tensor, plan: Plan, columns: Tensor, paired: int, slabs: Slabs | None = None
) -> Batch:
    labels, modality, cams = columns.unbind()
    out = None if slabs is None else slabs.take(len(labels), *pixels.shape[1:3])
    return Batch(augment(pixels, plan, out=out), labels, modality, cams, paired)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream beside the one that trains; None on the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _taken_over(batch: Batch, event: torch.cuda.Event | None) -> Batch:
    """A batch that another stream has made, for the current one."""
    _take_over(batch[:4], event)
    return batch


def _take_over(tensors: Sequence[Tensor | None], event: torch.cuda.Event | None) -> None:
    if event is None:
        return
    found = [tensor for tensor in tensors if tensor is not None]
    current = torch.cuda.current_stream(found[0].device)
    current.wait_event(event)
    for tensor in found:
        # Its memory must not be given away before this stream is through with it.
        tensor.record_stream(current)
