"""AlignGAN's sampler: endless streams of batches that hold the same identities in both halves."""

from __future__ import annotations

import random as legacy
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data.images import Int64
from fastreid_vi.data.plan import IdentitySampler, Random, share

SEEDS = 9999
"""Shuffle seeds of the released code; they start over after the last."""

Members = Mapping[int, Int64]


class Uniform(IdentitySampler):
    """AlignGAN: a batch for the features and, behind it, a smaller one for the pixels.

    Rows: [feature visible | feature infrared | pixel visible | pixel infrared], P * k, P * k, p * k
    and p * k of them, k = images / 2, identity by identity. The two streams are independent; each
    passes over all identities again and again, leaving the incomplete last group of a pass out.
    An epoch takes the next `batches` batches of both, by default as many as a pass of the first.

    Args:
        labels, modality, identities, images, seed, pids, batches: see `IdentitySampler`.
        replay: draw as the released code, every stream from `numpy.random.RandomState(seed)`:
            visible and infrared images at construction (unused), then of every pass.
        pixel_identities: p; 0 for the first stream alone.
        seeds: with `replay`, the list that shuffles the identities of one pass after the other;
            default one drawn from Python's `random.Random(seed)`.

    Spec: datasets 5.2, aligngan 4. Golden: eval/samplers `align_*`, aligngan/sampler_evaluation.
    """

    name = "uniform"
    halves = True

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
        seeds: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            labels,
            modality,
            identities=identities,
            images=images,
            seed=seed,
            replay=replay,
            pids=pids,
            pixel_identities=pixel_identities,
            batches=batches,
        )
        if seeds is not None and (not replay or not len(seeds)):
            raise ValueError("seeds: expected at least one, and with replay only")
        if replay and seeds is None:
            drawn = legacy.Random(self.seed)
            seeds = [drawn.randrange(10**8) for _ in range(SEEDS)]
        self._streams = [
            _Stream(self._members, count, self.images // 2, self.seed, number, seeds)
            for number, count in enumerate((self.identities, self.pixel_identities))
            if count
        ]

    @property
    def paired(self) -> int:
        """Half of `images`: holds of the feature rows and of the pixel rows, each by themselves."""
        return self.images // 2

    def _rows(self, epoch: int) -> Int64:
        length = self.batches or self._streams[0].pass_length
        first = (epoch - 1) * length
        rows = [stream.batches(first, first + length) for stream in self._streams]
        return np.concatenate(rows, axis=1)

    def _share(self, rank: int, world: int) -> Int64:
        features = share(self.identities, self.images, True, rank, world)
        pixels = share(self.pixel_identities, self.images, True, rank, world)
        return np.concatenate([features, pixels + self.identities * self.images])


class _Stream:
    """Batches 0, 1, ... of P identities, k visible and k infrared images of each."""

    def __init__(
        self,
        members: Mapping[int, Members],
        identities: int,
        half: int,
        seed: int,
        number: int,
        seeds: Sequence[int] | None,
    ) -> None:
        self.members, self.identities, self.half = members, identities, half
        self.seed, self.number, self.seeds = seed, number, seeds
        self.pass_length = len(members[VISIBLE]) // identities
        self._legacy: tuple[int, np.random.RandomState] | None = None
        self._last: tuple[int, Int64] | None = None

    def batches(self, start: int, stop: int) -> Int64:
        """int64 [stop - start, 2 * P * k]."""
        first, last = start // self.pass_length, -(-stop // self.pass_length)
        rows = np.concatenate([self._pass(number) for number in range(first, last)])
        return rows[start - first * self.pass_length :][: stop - start]

    def _pass(self, number: int) -> Int64:
        # An epoch may begin in the pass that the one before has ended in.
        if self._last is None or self._last[0] != number:
            draw = self._draw if self.seeds is None else self._replay
            self._last = number, draw(number)
        return self._last[1]

    def _draw(self, number: int) -> Int64:
        key = np.array([self.seed, number + 1], dtype=np.uint64)
        # Augmentation, with the same kind of key, leaves the highest word of the counter at 0.
        counter = np.array([0, 0, 0, 1 + self.number], dtype=np.uint64)
        random = np.random.Generator(np.random.Philox(key=key, counter=counter))
        return self._batched(random, random.permutation(sorted(self.members[VISIBLE])).tolist())

    def _replay(self, number: int) -> Int64:
        # One legacy stream runs through all passes: catch up with it, from the start if need be.
        # Its first list is drawn at construction and never used.
        if self._legacy is None or self._legacy[0] > number + 1:
            self._legacy = 0, np.random.RandomState(self.seed)
        reached, random = self._legacy
        seeds = self.seeds or ()
        for skipped in range(reached, number + 1):
            self._batched(random, shuffled(self.members[VISIBLE], seeds, skipped))
        self._legacy = number + 2, random
        return self._batched(random, shuffled(self.members[VISIBLE], seeds, number + 1))

    def _batched(self, random: Random, order: Sequence[int]) -> Int64:
        p, k = self.identities, self.half
        images = [draw_images(random, self.members[m], order, k) for m in (VISIBLE, INFRARED)]
        whole = [part[: self.pass_length * p].reshape(self.pass_length, p * k) for part in images]
        return np.concatenate(whole, axis=1)


def shuffled(labels: Iterable[int], seeds: Sequence[int], number: int) -> list[int]:
    """Sorted labels in the order that Python's `random` gives them with seed `number` of a list."""
    order = sorted(labels)
    legacy.Random(int(seeds[number % len(seeds)])).shuffle(order)
    return order


def draw_images(random: Random, members: Members, order: Sequence[int], count: int) -> Int64:
    """int64 [identities, count]: without replacement where an identity has as many images."""
    drawn = [
        random.choice(members[label], count, replace=len(members[label]) < count) for label in order
    ]
    return np.stack(drawn)
