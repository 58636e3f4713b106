"""Batch samplers of the four methods: P identities, K images of each; `make_sampler` picks one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data.images import DataError, Int64
from fastreid_vi.data.plan import IdentitySampler, PassSampler, Random
from fastreid_vi.data.streams import Uniform, draw_images

__all__ = [
    "SAMPLERS",
    "CrossModalityIdentity",
    "IdentityRandom",
    "IdentitySampler",
    "IdentityUniform",
    "ModalityRandom",
    "NormTriplet",
    "PairedIdentity",
    "Uniform",
    "make_sampler",
]


class PairedIdentity(PassSampler):
    """AGW, CAJ and LbA: all visible, then all infrared images, in the same order of labels.

    Images are drawn with replacement, so that an epoch sees as many as the larger modality has.

    Spec: datasets 5.1. Golden: eval/samplers `agw_*`, lba/sampler_schedule.
    """

    name = "paired_identity"
    halves = True

    @property
    def paired(self) -> int:
        """Half of `images`."""
        return self.images // 2

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


class IdentityRandom(PassSampler):
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
        infrared = self.labels[self.modality == INFRARED]
        chunks = [self._chunks(random, label) for label in _by_appearance(infrared)]
        return _hand_out(random, chunks, self.identities)

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


class NormTriplet(PassSampler):
    """MCJA: identity by identity, whatever the modality; an identity may come with one only.

    All images of an identity are cut into chunks of K (drawn with replacement if fewer than K); an
    epoch ends when fewer than P identities have a chunk left.

    Spec: datasets 5.4, mcja 4. Golden: eval/samplers `*_norm_triplet`, mcja/sampler_metrics.
    """

    name = "norm_triplet"
    both_modalities = False

    def _draw(self, random: Random) -> Int64:
        chunks = [self._chunks(random, label) for label in _by_appearance(self.labels)]
        return _hand_out(random, chunks, self.identities)

    def _chunks(self, random: Random, label: int) -> Int64:
        """int64 [chunks, K] of one identity, at least one."""
        members = np.sort(np.concatenate([self._members[m][label] for m in (VISIBLE, INFRARED)]))
        if len(members) < self.images:
            members = random.choice(members, self.images, replace=True)
        random.shuffle(members)
        whole = len(members) // self.images * self.images
        return members[:whole].reshape(-1, self.images)


class _Grouped(PassSampler):
    """Passes over all labels: [visible | infrared] of P identities at a time, K/2 images each."""

    halves = True

    def _groups(self, random: Random) -> list[Int64]:
        """One pass: P * K rows of every group, fewer of an incomplete last one."""
        order = random.permutation(self._classes).tolist()
        groups = [order[i : i + self.identities] for i in range(0, len(order), self.identities)]
        half = self.images // 2
        return [
            np.concatenate(
                [draw_images(random, self._members[m], g, half) for m in (VISIBLE, INFRARED)]
            ).reshape(-1)
            for g in groups
        ]

    def _whole(self, random: Random) -> Int64:
        """One pass without its incomplete group: int64 [batches, P * K]."""
        rows = self.identities * self.images
        return np.stack([group for group in self._groups(random) if len(group) == rows])


class IdentityUniform(_Grouped):
    """MPANet's alternative: every identity once in a pass, K/2 images of each modality.

    All visible, then all infrared images, in the same order of labels; the incomplete last group
    of identities is left out. K/2 images without replacement where there are as many.

    Spec: datasets 5.5. Golden: eval/samplers `mpanet_identity_uniform`.
    """

    name = "identity_uniform"

    @property
    def paired(self) -> int:
        """Half of `images`."""
        return self.images // 2

    def _draw(self, random: Random) -> Int64:
        return self._whole(random)


class CrossModalityIdentity(_Grouped):
    """MCJA's form of `identity_uniform`: an epoch has as many passes as the images suffice for.

    With `replay` the incomplete group of a pass is kept, as the released code does: all later
    batches straddle two groups, so that their halves are mixed.

    Spec: datasets 5.5, mcja Q16. Golden: eval/samplers `mcja_cross_modality_identity`.
    """

    name = "cross_modality_identity"

    @property
    def paired(self) -> int:
        """Half of `images`; 0 for batches that straddle groups."""
        straddling = self.replay and len(self._classes) % self.identities
        return 0 if straddling else self.images // 2

    def _draw(self, random: Random) -> Int64:
        passes = max(len(self.labels) // (len(self._classes) * self.images), 1)
        if not self.replay:
            return np.concatenate([self._whole(random) for _ in range(passes)])
        stream = np.concatenate([group for _ in range(passes) for group in self._groups(random)])
        rows = self.identities * self.images
        return stream[: len(stream) // rows * rows].reshape(-1, rows)


class ModalityRandom(PassSampler):
    """MPANet's and MCJA's `random`: P * K / 2 visible, then as many infrared images, any identity.

    The shorter modality is repeated, in further permutations, to the length of the longer one.

    Spec: datasets 5.6. Golden: eval/samplers `mpanet_random`, `mcja_cross_modality_random`.
    """

    name = "random"
    halves = True

    def _draw(self, random: Random) -> Int64:
        own = [np.flatnonzero(self.modality == m) for m in (VISIBLE, INFRARED)]
        shuffled = [random.permutation(members) for members in own]
        length, half = max(map(len, own)), self.identities * self.images // 2
        whole = length // half * half
        rows = [
            _extended(random, members, start, length)[:whole].reshape(-1, half)
            for members, start in zip(own, shuffled, strict=True)
        ]
        return np.concatenate(rows, axis=1)

    def _check_size(self) -> None:
        half, counts = self.identities * self.images // 2, np.bincount(self.modality, minlength=2)
        if counts.max() < half:
            raise DataError(
                f"a batch of {half} + {half} images cannot be drawn from {counts[VISIBLE]} visible "
                f"and {counts[INFRARED]} infrared images"
            )


def _by_appearance(labels: Int64) -> list[int]:
    """Distinct labels in the order of their first image."""
    distinct, first = np.unique(labels, return_index=True)
    return [int(c) for c in distinct[np.argsort(first)]]


def _hand_out(random: Random, chunks: Sequence[Int64], identities: int) -> Int64:
    """Batches of the next chunk of P drawn identities, while as many have one left.

    Args:
        random: draws the identities.
        chunks: of every identity, int64 [at least one, K].
        identities: P, at most `len(chunks)`.
    """
    left = list(range(len(chunks)))
    used = [0] * len(chunks)
    rows: list[Int64] = []
    while len(left) >= identities:
        for i in random.choice(left, identities, replace=False).tolist():
            rows.append(chunks[i][used[i]])
            used[i] += 1
            if used[i] == len(chunks[i]):
                left.remove(i)
    return np.concatenate(rows).reshape(-1, identities * chunks[0].shape[1])


def _extended(random: Random, members: Int64, start: Int64, length: int) -> Int64:
    """`start`, then permutations of `members`, then a last part of one, `length` together."""
    missing = length - len(start)
    more = [random.permutation(members) for _ in range(missing // len(members))]
    if missing:
        more.append(random.choice(members, missing % len(members), replace=False))
    return np.concatenate([start, *more])


SAMPLERS: dict[str, type[IdentitySampler]] = {
    sampler.name: sampler
    for sampler in (
        PairedIdentity,
        IdentityRandom,
        NormTriplet,
        Uniform,
        IdentityUniform,
        CrossModalityIdentity,
        ModalityRandom,
    )
}

# MCJA's names of what MPANet has too.
ALIASES: dict[str, str] = {
    "identity_cross_modality": "identity_random",
    "cross_modality_random": "random",
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
    pixel_identities: int = 0,
    batches: int = 0,
) -> IdentitySampler:
    """The sampler called `name` in the data set specification; arguments as `IdentitySampler`."""
    name = ALIASES.get(name, name)
    if name not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {sorted(SAMPLERS)}, got {name!r}")
    return SAMPLERS[name](
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
