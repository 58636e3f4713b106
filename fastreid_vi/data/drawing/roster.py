"""Who exists in a stand-in data set: pids, splits, cameras, number of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastreid_vi.data.drawing.fabric import Rng

Range = tuple[int, int]
Cameras = tuple[int, ...]

_ALL = (1, 2, 3, 4, 5, 6)
_GALLERY = (1, 2, 4, 5)
# Cameras that saw a test person, with the number of such persons among the 96 real ones; the two
# common patterns first.
TEST_PATTERNS: Mapping[Cameras, int] = {
    _ALL: 53,
    (3, 4, 5, 6): 37,
    (1, 2, 4, 5, 6): 2,
    (1, 2, 3, 5, 6): 1,
    (4, 5, 6): 1,
    (3, 4, 6): 1,
    (3, 5, 6): 1,
}
_TRAIN_PATTERNS: Mapping[Cameras, int] = {
    _ALL: 190,
    (3, 4, 5): 92,
    (1, 2, 3, 5, 6): 4,
    (1, 2, 4, 5, 6): 3,
    (2, 3, 4, 5, 6): 7,
}
_INDOOR = 20  # identities in the indoor gallery: the released evaluation reads rank 20 unchecked
_SHOTS = 10  # of multi-shot search


@dataclass(frozen=True)
class Entry:
    """One person."""

    pid: int
    split: str  # train, val, test or outside
    images: dict[int, int]  # camera -> number of pictures


def _test_cameras(count: int) -> list[Cameras]:
    """One pattern for each test identity, in the real proportions as far as so few allow."""
    (everywhere, outdoors), rare = list(TEST_PATTERNS)[:2], list(TEST_PATTERNS)[2:]
    share = count / sum(TEST_PATTERNS.values())
    chosen = [p for p in rare for _ in range(max(1, round(TEST_PATTERNS[p] * share)))]
    full = max(round(TEST_PATTERNS[everywhere] * share), _INDOOR - sum(1 in p for p in chosen))
    if len(chosen) + full + 1 > count:  # a tiny set: mostly persons seen everywhere
        full = -(-7 * count // 10)
        chosen = [rare[0], outdoors, *rare[1:]][: count - full]
    chosen += [everywhere] * full
    return chosen + [outdoors] * (count - len(chosen))


def _train_cameras(count: int, rng: Rng) -> list[Cameras]:
    names = list(_TRAIN_PATTERNS)
    weights = np.array([_TRAIN_PATTERNS[name] for name in names], float)
    chosen = [names[k] for k in rng.choice(len(names), count, p=weights / weights.sum())]
    if count > 2:  # somebody without camera 3, whatever the draw
        chosen[0] = (1, 2, 4, 5, 6)
    return chosen


def draw_pids(count: int, rng: Rng) -> NDArray[np.int64]:
    """Ascending pids with gaps, and never a pid 1: code that takes pids for positions must fail."""
    pids = np.sort(rng.choice(np.arange(2, 4 + count * 5 // 4), count, replace=False))
    if pids[-1] == count + 1:  # a few persons may come out without a gap
        pids[-1] += 1
    return pids


def draw_roster(
    counts: Mapping[str, int], images: Mapping[str, Range], rng: Rng
) -> tuple[Entry, ...]:
    """Persons of a data set with the habits of SYSU-MM01, sorted by pid.

    Args:
        counts: identities of the splits "train", "val" and "test", >= 1 each; a few more persons
            outside every split are added.
        images: fewest and most pictures of a person in a camera, for each split.
        rng: generator.
    """
    train, val, test = counts["train"], counts["val"], counts["test"]
    outside = max(1, round(0.04 * (train + val + test)))
    total = train + val + test + outside
    pids = draw_pids(total, rng)
    others = rng.permutation(["train"] * train + ["test"] * test + ["outside"] * outside)
    # As in the real lists, val is one block inside the range of train.
    before = (total - val) * 5 // 8
    splits = [*others[:before], *["val"] * val, *others[before:]]
    for_test = _test_cameras(test)
    cameras: dict[str, list[tuple[int, ...]]] = {
        "train": _train_cameras(train, rng),
        "val": [(3, 4, 5)] * val,
        "test": [for_test[k] for k in rng.permutation(test)],
        "outside": [(2, 3, 5)] * outside,
    }
    roster = []
    for pid, split in zip(pids, splits, strict=True):
        low, high = images["train" if split == "outside" else str(split)]
        seen = {cam: int(rng.integers(low, high + 1)) for cam in cameras[str(split)].pop()}
        roster.append(Entry(int(pid), str(split), seen))
    _hold_both_sizes(roster, images["test"])
    return tuple(roster)


def _hold_both_sizes(roster: list[Entry], images: Range) -> None:
    """Multi-shot search takes ten pictures: some gallery folders must hold fewer, some not."""
    low, high = images
    folders = [
        (entry, cam)
        for entry in roster
        if entry.split == "test"
        for cam in entry.images
        if cam in _GALLERY
    ]
    if not low < _SHOTS <= high:
        return
    sizes = [entry.images[cam] for entry, cam in folders]
    if min(sizes) >= _SHOTS:
        entry, cam = folders[0]
        entry.images[cam] = low
    if max(sizes) < _SHOTS:
        entry, cam = folders[-1]
        entry.images[cam] = high
