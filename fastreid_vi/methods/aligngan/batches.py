"""What a batch is to AlignGAN: two halves, a feature part and a pixel part, kept fakes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from fastreid_vi._distributed import joined, world_size
from fastreid_vi.config import INFRARED, VISIBLE, Batch


class Halves(NamedTuple):
    """A batch by modality."""

    visible: Tensor  # [n, 3, H, W]
    visible_labels: Tensor  # [n]
    infrared: Tensor  # [m, 3, H, W]
    infrared_labels: Tensor  # [m]
    paired: int  # as in `Batch`


def halves(batch: Batch, *, even: bool) -> Halves:
    """Split a batch by modality.

    A `paired` batch is cut in the middle, without asking the device. Of another one the rows are
    found by their values and sorted by label, so that persons meet persons.

    Args:
        batch: rows in any order if not `paired`.
        even: whether both halves must have equally many rows.
    Raises:
        ValueError: a paired batch without whole persons, or halves of different size.
    """
    rows = batch.labels.shape[0]
    if batch.paired:
        if rows % (2 * batch.paired):
            raise ValueError(
                f"batch: expected a multiple of {2 * batch.paired} rows (paired={batch.paired}), "
                f"got {rows}"
            )
        n = rows // 2
        images, labels = batch.images, batch.labels
        return Halves(images[:n], labels[:n], images[n:], labels[n:], batch.paired)
    found = []
    for modality in (VISIBLE, INFRARED):
        at = (batch.modality == modality).nonzero()[:, 0]
        at = at[batch.labels[at].argsort(stable=True)]
        found += [batch.images[at], batch.labels[at]]
    parts = Halves(found[0], found[1], found[2], found[3], 0)
    counts = parts.visible_labels.shape[0], parts.infrared_labels.shape[0]
    if even and counts[0] != counts[1]:
        raise ValueError(
            f"modality: expected as many visible as infrared rows, got {counts[0]} and {counts[1]}"
        )
    return parts


def pixel_rows(batch: Batch, pixel_images: int) -> int:
    """Rows at the end of a loader's batch that are the pixel batch; 0 if it is not cut.

    Args:
        batch: of one process.
        pixel_images: of all processes together.
    Raises:
        ValueError: the rows do not fit the batch.
    """
    if not batch.paired or not pixel_images:
        return 0
    rows, processes, person = batch.labels.shape[0], world_size(), 2 * batch.paired
    if pixel_images % (processes * person):
        raise ValueError(
            f"pixel_images: expected a multiple of {processes * person} ({person} rows of a person"
            f" times {processes} processes), got {pixel_images}"
        )
    pixel = pixel_images // processes
    if rows <= pixel:
        raise ValueError(
            f"pixel_images: expected fewer than the {rows} rows of the batch, got {pixel}"
        )
    return pixel


def next_persons(parts: Halves, features: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """For each infrared image, features of an image of another person.

    Args:
        parts: the batch; paired: the same image of the next person, over all processes; else the
            next row with another label.
        features: [n, ...] of the own infrared images.
        branch: computes features of images that belong to other processes.
    Raises:
        ValueError: a paired batch of one person.
    """
    rows, step = parts.infrared.shape[0], parts.paired
    if not step:
        return features[_other_rows(parts.infrared_labels)]
    if world_size() == 1:
        if rows == step:
            raise ValueError("wrong_pair: expected images of at least two persons, got one")
        return features.roll(-step, 0)
    with torch.no_grad():  # the next person's images may belong to the next process
        (everyone,) = joined(parts.infrared.flatten(1), equal_sizes=True)
        first = dist.get_rank() * rows
        following = everyone.roll(-step, 0)[first : first + rows].view_as(parts.infrared)
    return branch(following)


def _other_rows(labels: Tensor) -> Tensor:
    """For every row the first one after it, around the end, that has another label."""
    rows = torch.arange(labels.shape[0], device=labels.device)
    after = (rows[:, None] + rows) % labels.shape[0]
    first = (labels[after] != labels[:, None]).int().argmax(dim=1, keepdim=True)
    return after.gather(1, first)[:, 0]


class Fakes(NamedTuple):
    """What the generators' phase leaves for the discriminators' phases of the same iteration."""

    visible: Tensor  # [m, 3, H, W] infrared images made visible
    infrared: Tensor  # [n, 3, H, W] visible images made infrared
    real_map: Tensor  # [m, C, h, w] encoder's map of the infrared images
    fake_map: Tensor  # [n, C, h, w] of `infrared`


class FakesInWaiting:
    """Keeps fakes, detached, until both discriminators have seen them.

    Several batches may be under way (gradient accumulation). No part of the state: a checkpoint
    falls between iterations.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[Tensor, Fakes, set[str]]] = {}
        self._taken = False

    def put(self, images: Tensor, fakes: Fakes, phases: Iterable[str]) -> None:
        """Keep the fakes of a batch for the phases that will ask."""
        if self._taken:  # another iteration: nobody comes for what an interrupted one has left
            self.clear()
        # The images are kept as well: while they live, nothing else is stored in their place.
        detached = Fakes(*(tensor.detach() for tensor in fakes))
        self._kept[_place(images)] = images, detached, set(phases)

    def take(self, images: Tensor, phase: str) -> Fakes:
        """Hand the fakes of a batch to a discriminator's phase, once.

        Raises:
            RuntimeError: the generators' phase did not come before, with this batch.
        """
        generators = "generators_warmup" if phase.endswith("_warmup") else "generators"
        place = _place(images)
        kept = self._kept.get(place)
        if kept is None or phase not in kept[2]:
            raise RuntimeError(
                f"phase {phase!r}: expected the phase {generators!r} on the same batch before it"
            )
        _, fakes, pending = kept
        self._taken = True
        pending.discard(phase)
        if not pending:
            del self._kept[place]
        return fakes

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._taken = False


def _place(images: Tensor) -> tuple[int, int]:
    """Where the images are stored: the same for all slices of the same rows."""
    return images.untyped_storage()._cdata, int(images.storage_offset())
