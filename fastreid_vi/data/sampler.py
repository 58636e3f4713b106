"""Batch samplers: P identities, K images of each, both modalities in every identity.

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
        images: K, images of each identity in a batch, half of them of each modality.
        seed: of the generator; 0 or more.
        replay: draw as the released code does after `numpy.random.seed(seed)` before epoch 1,
            to the same bits; epochs then continue one legacy stream.
        pids: [n] identity numbers on disk, for messages; default `labels`.
    Raises:
        DataError: an identity lacks a modality (named), or P exceeds the number of identities.
        ValueError: an argument of another shape or range.
    """

    name: ClassVar[SamplerName]

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
    ) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.modality = np.asarray(modality, dtype=np.int64)
        self.identities, self.images = int(identities), int(images)
        self.seed, self.replay = int(seed), bool(replay)
        self._check(self.labels if pids is None else np.asarray(pids))
        self._members = {
            m: {
                int(c): np.flatnonzero((self.labels == c) & (self.modality == m))
                for c in self._classes
            }
            for m in (VISIBLE, INFRARED)
        }
        self._epoch, self._cursor, self._exhausted = 1, 0, False
        self._plan: tuple[int, Int64] | None = None
        self._stream: tuple[int, np.random.RandomState] | None = None

    @property
    def epoch(self) -> int:
        """Current epoch, from 1."""
        return self._epoch

    @property
    def cursor(self) -> int:
        """Batches of the current epoch already handed out."""
        return self._cursor

    def __len__(self) -> int:
        """Number of batches of the current epoch, exactly."""
        return len(self.plan())

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from the cursor on."""
        self._restart_if_exhausted()
        epoch, plan = self._epoch, self.plan()
        for number in range(self._cursor, len(plan)):
            self.advance(epoch, number + 1)
            yield plan[number].tolist()
        self.finish(epoch)

    def plan(self) -> Int64:
        """All batches of the current epoch: int64 [batches, P * K], read-only."""
        if self._plan is None or self._plan[0] != self._epoch:
            rows = self._draw(self._random())
            rows.setflags(write=False)
            self._plan = self._epoch, rows
        return self._plan[1]

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
    def _draw(self, random: Random) -> Int64:
        """One epoch: int64 [batches, P * K]."""

    def _restart_if_exhausted(self) -> None:
        if self._exhausted:
            self._cursor, self._exhausted = 0, False

    def _identity(self) -> dict[str, Any]:
        data = zlib.crc32(self.modality.tobytes(), zlib.crc32(self.labels.tobytes()))
        return {
            "sampler": self.name,
            "identities": self.identities,
            "images": self.images,
            "seed": self.seed,
            "replay": self.replay,
            "data": data,
        }

    def _random(self) -> Random:
        if not self.replay:
            key = np.array([self.seed, self._epoch], dtype=np.uint64)
            return np.random.Generator(np.random.Philox(key=key))
        # One legacy stream runs through all epochs: catch up with it, from the start if need be.
        if self._stream is None or self._stream[0] > self._epoch:
            self._stream = 1, np.random.RandomState(self.seed)
        epoch, random = self._stream
        for _ in range(epoch, self._epoch):
            self._draw(random)
        self._stream = self._epoch + 1, random
        return random

    def _check(self, pids: Int64) -> None:
        n = len(self.labels)
        for name, array in (("labels", self.labels), ("modality", self.modality), ("pids", pids)):
            if array.shape != (n,):
                raise ValueError(f"{name}: expected shape [{n}], got {list(array.shape)}")
        if not np.isin(self.modality, (VISIBLE, INFRARED)).all():
            raise ValueError(f"modality: expected {VISIBLE} or {INFRARED} for every image")
        if self.identities < 1 or self.images < 2 or self.images % 2:
            raise ValueError(
                "identities, images: expected P >= 1 and an even K >= 2, "
                f"got {self.identities} and {self.images}"
            )
        if not 0 <= self.seed < (2**32 if self.replay else 2**63):
            raise ValueError(f"seed: expected a number from 0, got {self.seed}")
        if n and self.labels.min() < 0:
            raise ValueError("labels: expected training labels, got a negative one")
        self._classes = np.unique(self.labels)
        for modality, name in ((VISIBLE, "visible"), (INFRARED, "infrared")):
            lacking = ~np.isin(self.labels, self.labels[self.modality == modality])
            if lacking.any():
                raise DataError(
                    f"identity {int(pids[lacking].min()):04d} has no {name} image: "
                    f"{self.name} needs both modalities of every training identity"
                )
        if self.identities > len(self._classes):
            raise DataError(
                f"a batch of {self.identities} identities cannot be drawn from "
                f"{len(self._classes)} training identities"
            )


class PairedIdentity(IdentitySampler):
    """AGW, CAJ and LbA: all visible, then all infrared images, in the same order of labels.

    Images are drawn with replacement, so that an epoch sees as many as the larger modality has.

    Spec: datasets 5.1. Golden: eval/samplers `agw_*`, lba/sampler_schedule.
    """

    name = "paired_identity"

    def _draw(self, random: Random) -> Int64:
        half = self.images // 2
        larger = max(int((self.modality == m).sum()) for m in (VISIBLE, INFRARED))
        batches = larger // (self.identities * half) + 1
        rows = np.empty((batches, 2, self.identities, half), dtype=np.int64)
        for batch in range(batches):
            drawn = random.choice(self._classes, self.identities, replace=False)
            for slot, label in enumerate(drawn.tolist()):
                rows[batch, 0, slot] = random.choice(self._members[VISIBLE][label], half)
                rows[batch, 1, slot] = random.choice(self._members[INFRARED][label], half)
        return rows.reshape(batches, -1)


class IdentityRandom(IdentitySampler):
    """MPANet: identity by identity, infrared and visible images alternating.

    The larger modality of an identity is thinned to the size of the smaller and both are cut into
    chunks of K; an epoch ends when fewer than P identities have a chunk left, so its length varies.
    A modality with fewer than K/2 images is resampled with replacement; the released code fails
    when that happens to one modality only.

    Spec: datasets 5.3, mpanet M19. Golden: eval/samplers `mpanet_identity_random`,
    mpanet/sampler_schedule.
    """

    name = "identity_random"

    def _draw(self, random: Random) -> Int64:
        chunks = [self._chunks(random, label) for label in self._order()]
        left = list(range(len(chunks)))
        used = [0] * len(chunks)
        rows: list[Int64] = []
        while len(left) >= self.identities:
            for i in random.choice(left, self.identities, replace=False).tolist():
                rows.append(chunks[i][used[i]])
                used[i] += 1
                if used[i] == len(chunks[i]):
                    left.remove(i)
        return np.concatenate(rows).reshape(-1, self.identities * self.images)

    def _order(self) -> list[int]:
        """Labels in the order of their first infrared image."""
        infrared = self.labels[self.modality == INFRARED]
        labels, first = np.unique(infrared, return_index=True)
        return [int(c) for c in labels[np.argsort(first)]]

    def _chunks(self, random: Random, label: int) -> Int64:
        """int64 [chunks, K] of one identity, at least one."""
        half = self.images // 2
        infrared, visible = self._members[INFRARED][label], self._members[VISIBLE][label]
        if len(infrared) < half:
            infrared = random.choice(infrared, half, replace=True)
        if len(visible) < half:
            visible = random.choice(visible, half, replace=True)
        size = min(len(infrared), len(visible))
        if len(infrared) > size:
            infrared = random.choice(infrared, size, replace=False)
        if len(visible) > size:
            visible = random.choice(visible, size, replace=False)
        infrared, visible = infrared.copy(), visible.copy()
        random.shuffle(infrared)
        random.shuffle(visible)
        alternating = np.stack([infrared, visible], axis=1).reshape(-1)
        whole = len(alternating) // self.images * self.images
        return alternating[:whole].reshape(-1, self.images)


SAMPLERS: dict[str, type[IdentitySampler]] = {
    "paired_identity": PairedIdentity,
    "identity_random": IdentityRandom,
}


def make_sampler(
    name: str,
    labels: ArrayLike,
    modality: ArrayLike,
    *,
    identities: int,
    images: int,
    seed: int,
    replay: bool = False,
    pids: ArrayLike | None = None,
) -> IdentitySampler:
    """The sampler called `name` in the data set specification; arguments as `IdentitySampler`."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {sorted(SAMPLERS)}, got {name!r}")
    return SAMPLERS[name](
        labels, modality, identities=identities, images=images, seed=seed, replay=replay, pids=pids
    )
