"""Who is aligned with whom: a positive and a negative partner of every image of a batch.

Rows stand as [visible | infrared], both halves identity by identity with k images each and the
same identities in the same order.

Spec: lba 3 (pairing), quirks L4 and L8. Golden: lba/sampler_schedule (`pair_*`).
"""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastreid_vi.config import INFRARED, VISIBLE


class Pairs(NamedTuple):
    """Rows of the partners."""

    positive: Tensor  # [B] int64, same identity
    negative: Tensor  # [B] int64, another identity

    def to(self, device: torch.device) -> Pairs:
        """Both on `device`, without waiting for it."""
        both = torch.stack(self)
        if device.type == "cuda":
            both = both.pin_memory()  # a copy from pageable memory would wait
        return Pairs(*both.to(device, non_blocking=True).unbind())


class Arrangement(NamedTuple):
    """How the images of a batch stand."""

    identities: int
    """P."""
    images: int
    """k: images of an identity in each modality."""
    rows: Tensor | None = None
    """[B] int64 on the CPU: the rows as [visible | infrared]; None where they stand so already."""


def paired_arrangement(rows: int, images: int) -> Arrangement:
    """The arrangement that `Batch.paired` promises.

    Args:
        rows: B.
        images: k, `Batch.paired`.
    Raises:
        ValueError: B is not 2 P k.
    """
    if rows % (2 * images):
        raise ValueError(
            f"batch: paired={images} expects a multiple of {2 * images} rows, got {rows}"
        )
    return Arrangement(rows // (2 * images), images)


def check_paired(labels: Tensor, modality: Tensor, images: int) -> None:
    """Hold labels and modalities, whose values are read, against the promise of `Batch.paired`.

    Raises:
        ValueError: they break it.
    """
    identities = paired_arrangement(len(labels), images).identities
    halves = labels.reshape(2, identities, images)
    sides = modality.reshape(2, -1)
    kept = (
        bool((halves == halves[:1, :, :1]).all())
        and len(torch.unique(halves[0, :, 0])) == identities
        and bool((sides[0] == VISIBLE).all() and (sides[1] == INFRARED).all())
    )
    if not kept:
        raise ValueError(
            f"batch: paired={images} expects rows [visible | infrared], {images} of each identity "
            "in a row and equal labels in both halves; these differ"
        )


def arrange(labels: Tensor, modality: Tensor) -> Arrangement:
    """Find the pairs of a batch whose rows stand in any order.

    Labels and modalities are read, which waits for a CUDA device; a paired batch is spared that.

    Args:
        labels: [B] int64.
        modality: [B] int64.
    Raises:
        ValueError: an image without an identity, or identities that differ in their numbers of
            visible and infrared images.
    """
    labels, modality = torch.stack((labels, modality)).cpu()
    if bool((labels < 0).any()):
        raise ValueError("labels: expected an identity of every image to pair them, got -1")
    if bool(((modality != VISIBLE) & (modality != INFRARED)).any()):
        raise ValueError(f"modality: expected {VISIBLE} or {INFRARED}, got other values")
    names, group = torch.unique(labels, return_inverse=True)
    counts = torch.bincount(2 * group + modality, minlength=2 * len(names)).reshape(-1, 2)
    images = int(counts[0, VISIBLE]) if len(names) else 0
    if bool((counts != images).any()):
        odd = int((counts != images).any(1).nonzero()[0])
        visible, infrared = counts[odd].tolist()
        raise ValueError(
            "labels: expected as many visible as infrared images of every identity, and equally "
            f"many of each, to pair them; got {visible} visible and {infrared} infrared of label "
            f"{int(names[odd])}"
            + (f", {images} visible of label {int(names[0])}" if visible == infrared else "")
        )
    return Arrangement(
        len(names), images, torch.argsort(modality * len(names) + group, stable=True)
    )


def draw_pairs(
    arrangement: Arrangement,
    *,
    pairing: Literal["cross", "same"] = "cross",
    rng: Literal["own", "python"] = "own",
    generator: torch.Generator | None = None,
) -> Pairs:
    """Draw both partners of every row, on the CPU.

    Positive: in each half, the k images of an identity meet a random permutation of its k partner
    images. Negative: they meet one image each of k different other identities, and these images
    have the numbers 0..k-1 in random order.

    Args:
        arrangement: P, k and the order of the rows.
        pairing: partners from the other modality, or from the same ("same", L4).
        rng: "own" draws all at once; "python" calls `random.sample` as the official code does,
            once or twice for every identity.
        generator: for "own", of the CPU; None is torch's default one, whose state a checkpoint
            keeps.
    Raises:
        ValueError: fewer than k + 1 identities.

    >>> import torch
    >>> pairs = draw_pairs(Arrangement(3, 1), generator=torch.Generator().manual_seed(0))
    >>> pairs.positive.tolist()
    [3, 4, 5, 0, 1, 2]
    """
    identities, images, rows = arrangement
    if identities - 1 < images:
        raise ValueError(
            f"identities: expected at least {images + 1} in a batch (of one process), for its "
            f"{images} images per modality meet as many other identities, got {identities}"
        )
    draw = _drawn_by_python(identities, images) if rng == "python" else None
    same, others, numbers = draw or _drawn(identities, images, generator)
    # A row is (half * P + identity) * k + image.
    half = torch.arange(2).reshape(2, 1, 1)
    first = (half if pairing == "same" else 1 - half) * identities
    own = torch.arange(identities).reshape(1, -1, 1)
    positive = ((first + own) * images + same).flatten()
    negative = ((first + others) * images + numbers).flatten()
    if rows is None:
        return Pairs(positive, negative)
    back = torch.argsort(rows)
    return Pairs(rows[positive][back], rows[negative][back])


def _drawn(
    identities: int, images: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[2, P, k] each: images of the same identity; other identities, and the images of those."""

    def permutations(count: int) -> Tensor:
        keys = torch.rand(2, identities, count, generator=generator, device="cpu")
        return keys.argsort(dim=2, stable=True)

    same = permutations(images)
    others = permutations(identities - 1)[..., :images]
    others = others + (others >= torch.arange(identities).reshape(1, -1, 1))  # skip the own one
    return same, others, permutations(images)


def _drawn_by_python(identities: int, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_drawn`, by Python's `random` in the official order."""
    same, others, numbers = [], [], []
    for _half in range(2):
        same.append([random.sample(range(images), images) for _ in range(identities)])
        for identity in range(identities):
            rest = [other for other in range(identities) if other != identity]
            others.append(random.sample(rest, images))
            numbers.append(random.sample(range(images), images))
    shape = (2, identities, images)
    return (
        torch.tensor(same),
        torch.tensor(others).reshape(shape),
        torch.tensor(numbers).reshape(shape),
    )
