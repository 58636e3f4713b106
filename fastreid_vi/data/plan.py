"""What every batch sampler shares: plans, a cursor, and the share of one process.

A plan, all batches of one epoch, is a pure function of (seed, epoch). NumPy only.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from fastreid_vi.config import INFRARED, VISIBLE, SamplerName
from fastreid_vi.data.images import DataError, Int64

Random = np.random.RandomState | np.random.Generator


class IdentitySampler(ABC):
    """Yields the image positions of one batch after the other, from a cursor on.

    The cursor counts the batches handed out in the current epoch. Iterating moves it; iterating
    again after the end starts the epoch over. A training loop calls `set_epoch` before each epoch.

    Args:
        labels: [n] training label of every image.
        modality: [n] VISIBLE or INFRARED.
        identities: P, identities in a batch.
        images: K, images of each identity in a batch, both modalities together.
        seed: of the generator; 0 or more.
        replay: draw as the released code does after `numpy.random.seed(seed)` before epoch 1,
            to the same bits; epochs then continue one legacy stream.
        pids: [n] identity numbers on disk, for messages; default `labels`.
        pixel_identities: identities of a second batch behind the first one; `uniform` only.
        batches: of an epoch: passes follow each other and the last one is cut; 0 for one pass.
    Raises:
        DataError: an identity lacks a modality (named), or a batch is too large for the data.
        ValueError: an argument of another shape or range.
    """

    name: ClassVar[SamplerName]
    halves: ClassVar[bool] = False
    """Rows are [visible | infrared]; otherwise identity by identity."""
    both_modalities: ClassVar[bool] = True
    """Every identity must have images of both modalities."""

    def __init__(
        self,
        labels: ArrayLike,
        modality: ArrayLike,
        *,
        identities: int,
        images: int,
        seed: int,
        replay: bool = False,
        pids: ArrayLike | None = None,
        pixel_identities: int = 0,
        batches: int = 0,
    ) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.modality = np.asarray(modality, dtype=np.int64)
        self.identities, self.images = int(identities), int(images)
        self.pixel_identities, self.batches = int(pixel_identities), int(batches)
        self.seed, self.replay = int(seed), bool(replay)
        self._check_arguments()
        self._check_data(self.labels if pids is None else np.asarray(pids))
        self._members = {
            m: {
                int(c): np.flatnonzero((self.labels == c) & (self.modality == m))
                for c in self._classes
            }
            for m in (VISIBLE, INFRARED)
        }
        self._epoch, self._cursor, self._exhausted = 1, 0, False
        self._plan: tuple[int, Int64] | None = None
        self.shard(0, 1)

    @property
    def epoch(self) -> int:
        """Current epoch, from 1."""
        return self._epoch

    @property
    def cursor(self) -> int:
        """Batches of the current epoch already handed out."""
        return self._cursor

    @property
    def paired(self) -> int:
        """What `Batch.paired` promises of these batches: k, or 0 for nothing."""
        return 0

    @property
    def slots(self) -> Int64:
        """Rows of the global batch that this process hands out, ascending; all without `shard`."""
        return self._slots

    def __len__(self) -> int:
        """Number of batches of the current epoch, exactly."""
        return len(self.plan())

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from the cursor on, of each the rows `slots`."""
        self._restart_if_exhausted()
        epoch, plan = self._epoch, self.plan()
        for number in range(self._cursor, len(plan)):
            self.advance(epoch, number + 1)
            yield plan[number, self._slots].tolist()
        self.finish(epoch)

    def plan(self, epoch: int | None = None) -> Int64:
        """All batches of an epoch, by default the current one.

        Returns:
            int64 [batches, rows], read-only; the rows of all processes.
        """
        epoch = self._epoch if epoch is None else epoch
        if epoch < 1:
            raise ValueError(f"epoch: expected 1 or more, got {epoch}")
        if self._plan is None or self._plan[0] != epoch:
            rows = self._rows(epoch)
            rows.setflags(write=False)
            self._plan = epoch, rows
        return self._plan[1]

    def shard(self, rank: int, world: int) -> None:
        """Hand out the share of process `rank` of `world`: identities rank * P / world and on.

        A share has the layout of the whole batch with P / world identities: halves stay halves.
        Plans, lengths and the cursor are those of the whole batch, so that a state saved by one
        process continues on any number of them.

        Raises:
            ValueError: no such rank, or the identities cannot be divided evenly.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 to {world - 1}, got {rank}")
        for name, count in (
            ("identities", self.identities),
            ("pixel_identities", self.pixel_identities),
        ):
            if count % world:
                raise ValueError(
                    f"{name}: expected a multiple of the {world} processes, got {count}"
                )
        self._slots = self._share(rank, world)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; an epoch that is under way keeps its cursor."""
        if epoch < 1:
            raise ValueError(f"epoch: expected 1 or more, got {epoch}")
        if epoch != self._epoch:
            self._epoch, self._cursor, self._exhausted = int(epoch), 0, False
        self._restart_if_exhausted()

    def advance(self, epoch: int, cursor: int) -> None:
        """Record that `cursor` batches of `epoch` are out, unless the epoch has changed since."""
        if epoch == self._epoch:
            self._cursor = cursor

    def finish(self, epoch: int) -> None:
        """Record that `epoch` is over; its next iteration starts from the beginning."""
        if epoch == self._epoch:
            self._exhausted = True

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands, JSON-ready, with what it must be loaded into."""
        return {**self._identity(), "epoch": self._epoch, "batch": self._cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved cursor.

        Raises:
            ValueError: the state of another sampler, seed or data set.
        """
        # States saved before these existed lack them.
        state = {"pixel_identities": 0, "batches": 0, **state}
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise ValueError(
                    f"sampler state: {name}: expected {own!r}, got {state.get(name)!r}"
                )
        epoch, batch = int(state["epoch"]), int(state["batch"])
        if epoch < 1 or batch < 0:
            raise ValueError(f"sampler state: no such cursor: epoch {epoch}, batch {batch}")
        self._epoch, self._cursor, self._exhausted = epoch, batch, False
        if batch > len(self.plan()):
            raise ValueError(
                f"sampler state: batch {batch} is beyond the {len(self.plan())} of epoch {epoch}"
            )

    @abstractmethod
    def _rows(self, epoch: int) -> Int64:
        """One epoch: int64 [batches, rows], at least one batch."""

    def _share(self, rank: int, world: int) -> Int64:
        return share(self.identities, self.images, self.halves, rank, world)

    def _restart_if_exhausted(self) -> None:
        if self._exhausted:
            self._cursor, self._exhausted = 0, False

    def _identity(self) -> dict[str, Any]:
        data = zlib.crc32(self.modality.tobytes(), zlib.crc32(self.labels.tobytes()))
        return {
            "sampler": self.name,
            "identities": self.identities,
            "images": self.images,
            "pixel_identities": self.pixel_identities,
            "batches": self.batches,
            "seed": self.seed,
            "replay": self.replay,
            "data": data,
        }

    def _check_arguments(self) -> None:
        if not np.isin(self.modality, (VISIBLE, INFRARED)).all():
            raise ValueError(f"modality: expected {VISIBLE} or {INFRARED} for every image")
        if self.identities < 1 or self.images < 2 or self.images % 2:
            raise ValueError(
                "identities, images: expected P >= 1 and an even K >= 2, "
                f"got {self.identities} and {self.images}"
            )
        if not 0 <= self.seed < (2**32 if self.replay else 2**63):
            raise ValueError(f"seed: expected a number from 0, got {self.seed}")
        if self.batches < 0:
            raise ValueError(f"batches: expected 0 or more, got {self.batches}")
        if self.pixel_identities < 0:
            raise ValueError(f"pixel_identities: expected 0 or more, got {self.pixel_identities}")
        if self.pixel_identities and self.name != "uniform":
            raise ValueError(
                "pixel_identities: only the sampler uniform has a second batch, "
                f"got {self.pixel_identities} for {self.name}"
            )

    def _check_data(self, pids: Int64) -> None:
        n = len(self.labels)
        for name, array in (("labels", self.labels), ("modality", self.modality), ("pids", pids)):
            if array.shape != (n,):
                raise ValueError(f"{name}: expected shape [{n}], got {list(array.shape)}")
        if n and self.labels.min() < 0:
            raise ValueError("labels: expected training labels, got a negative one")
        self._classes = np.unique(self.labels)
        for modality, name in ((VISIBLE, "visible"), (INFRARED, "infrared")):
            lacking = ~np.isin(self.labels, self.labels[self.modality == modality])
            if self.both_modalities and lacking.any():
                raise DataError(
                    f"identity {int(pids[lacking].min()):04d} has no {name} image: "
                    f"{self.name} needs both modalities of every training identity"
                )
        self._check_size()

    def _check_size(self) -> None:
        for count in (self.identities, self.pixel_identities):
            if count > len(self._classes):
                raise DataError(
                    f"a batch of {count} identities cannot be drawn from "
                    f"{len(self._classes)} training identities"
                )


class PassSampler(IdentitySampler):
    """A sampler whose epoch is a pass over the data, or as many as `batches` takes."""

    _legacy: tuple[int, np.random.RandomState] | None = None

    @abstractmethod
    def _draw(self, random: Random) -> Int64:
        """One pass: int64 [batches, rows], at least one batch."""

    def _rows(self, epoch: int) -> Int64:
        if not self.replay:
            key = np.array([self.seed, epoch], dtype=np.uint64)
            return self._passes(np.random.Generator(np.random.Philox(key=key)))
        # One legacy stream runs through all epochs: catch up with it, from the start if need be.
        if self._legacy is None or self._legacy[0] > epoch:
            self._legacy = 1, np.random.RandomState(self.seed)
        reached, random = self._legacy
        for _ in range(reached, epoch):
            self._passes(random)
        self._legacy = epoch + 1, random
        return self._passes(random)

    def _passes(self, random: Random) -> Int64:
        passes = [self._draw(random)]
        while sum(map(len, passes)) < self.batches:
            passes.append(self._draw(random))
        return np.concatenate(passes)[: self.batches or None]


def share(identities: int, images: int, halves: bool, rank: int, world: int) -> Int64:
    """Rows of a batch of P identities, K images each, that belong to process `rank`: int64."""
    shape = (2, identities, images // 2) if halves else (1, identities, images)
    slots = np.arange(identities * images, dtype=np.int64).reshape(shape)
    first, stop = rank * identities // world, (rank + 1) * identities // world
    return slots[:, first:stop].reshape(-1)
