"""Who is where in a stand-in data set: the lists of each layout, and the pictures they name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data import llcm, regdb
from fastreid_vi.data.drawing.fabric import Rng
from fastreid_vi.data.drawing.pedestrian import draw_person
from fastreid_vi.data.drawing.roster import Entry, Range, draw_pids, draw_roster
from fastreid_vi.data.drawing.site import LLCM_SITES, REGDB_SITES, SYSU_SITES
from fastreid_vi.data.permutations import TRIALS, Permutations, folder_name, save_mat
from fastreid_vi.data.pictures import Folder, Sitting

Counts = Mapping[str, int]
Ranges = Mapping[str, Range]


class Layout(NamedTuple):
    """How a data set is laid out, and how large a stand-in is by default."""

    lists: str
    """Folder of the lists."""
    plan: Callable[[Path, Counts, Ranges, int], tuple[Sitting, ...]]
    """Writes the lists of a data set into a folder and says what to draw: (folder, identities of
    each split, pictures of a person in a camera, seed) -> sittings."""
    ids: Counts
    images: Range


def plan_sysu(root: Path, counts: Counts, ranges: Ranges, seed: int) -> tuple[Sitting, ...]:
    """SYSU-MM01: six cameras, identity lists, gallery permutations."""
    rng = np.random.default_rng([seed, 0])
    roster = draw_roster(counts, ranges, rng)
    _write_sysu_lists(root / "exp", roster, rng)
    return tuple(
        Sitting(
            entry.pid,
            tuple(
                Folder(
                    folder_name(cam, entry.pid),
                    tuple(f"{k + 1:04d}.jpg" for k in range(count)),
                    SYSU_SITES[cam],
                    cam,
                )
                for cam, count in entry.images.items()
            ),
        )
        for entry in roster
    )


def _write_sysu_lists(exp: Path, roster: Sequence[Entry], rng: Rng) -> None:
    exp.mkdir()
    ids = {s: [e.pid for e in roster if e.split == s] for s in ("train", "val", "test")}
    for split, pids in ids.items():
        save_mat(exp / f"{split}_id.mat", {"id": np.array([pids], np.uint16)})
    ids["available"] = sorted(pid for pids in ids.values() for pid in pids)
    for name, pids in ids.items():
        (exp / f"{name}_id.txt").write_text(",".join(map(str, pids)) + "\n", encoding="ascii")
    orders = {
        (cam, entry.pid): np.stack([rng.permutation(count) + 1 for _ in range(TRIALS)])
        for entry in roster
        for cam, count in entry.images.items()
    }
    Permutations(orders).to_mat(exp / "rand_perm_cam.mat")


def plan_regdb(root: Path, counts: Counts, ranges: Ranges, seed: int) -> tuple[Sitting, ...]:
    """RegDB: two cameras, and ten ways to split the same persons into training and test."""
    rng = np.random.default_rng([seed, 0])
    persons = range(1, counts["train"] + counts["test"] + 1)
    sittings = tuple(_regdb_sitting(pid, ranges["test"], seed, rng) for pid in persons)
    idx = root / "idx"
    idx.mkdir()
    files = {sitting.pid: sitting.folders for sitting in sittings}
    drawn: set[frozenset[int]] = set()
    for trial in range(1, regdb.TRIALS + 1):
        while True:
            order = (rng.permutation(len(persons)) + 1).tolist()
            half = frozenset(order[: counts["train"]])
            if half not in drawn:
                break
        drawn.add(half)
        for split, pids in (("train", order[: len(half)]), ("test", order[len(half) :])):
            for place, modality in enumerate(regdb.SIDES):
                lines = [(files[pid][place], label) for label, pid in enumerate(pids)]
                _write_list(idx / f"{regdb.list_name(split, modality, trial)}.txt", lines)
    return sittings


def _regdb_sitting(pid: int, images: Range, seed: int, rng: Rng) -> Sitting:
    person = draw_person(np.random.default_rng([seed, 1, pid]))
    sex = "female" if person.shoulder < 0.114 else "male"
    view = "front" if rng.random() < 0.5 else "back"
    count = int(rng.integers(images[0], images[1] + 1))
    folders = []
    for modality, (_, folder, cam) in regdb.SIDES.items():
        site = REGDB_SITES[modality] if view == "front" else REGDB_SITES[modality].turned()
        first = int(rng.integers(1, 99_999 - 3 * count))
        letter = "v" if modality == VISIBLE else "t"
        names = [f"{sex}_{view}_{letter}_{first + 3 * k:05d}_{pid}.bmp" for k in range(count)]
        folders.append(Folder(f"{folder}/{pid}", tuple(names), site, cam))
    return Sitting(pid, tuple(folders))


def plan_llcm(root: Path, counts: Counts, ranges: Ranges, seed: int) -> tuple[Sitting, ...]:
    """LLCM: nine cameras by day, eight of them by night; training lists and test folders."""
    rng = np.random.default_rng([seed, 0])
    total = counts["train"] + counts["test"]
    pids = draw_pids(total, rng)
    tested = set(rng.permutation(pids)[: counts["test"]].tolist())
    sittings = []
    for pid in pids.tolist():
        split = "test" if pid in tested else "train"
        sittings.append(_llcm_sitting(pid, split, ranges[split], rng))
    for modality, name in llcm.SIDES.items():
        (root / name).mkdir()
        for cam in llcm.CAMERAS[modality]:
            (root / f"test_{name}" / f"cam{cam}").mkdir(parents=True)
    idx = root / "idx"
    idx.mkdir()
    for split in ("train", "test"):
        chosen = [s for s in sittings if (s.pid in tested) == (split == "test")]
        # Not in the order of the pids: code that takes ranks for labels must fail.
        labels = rng.permutation(len(chosen)).tolist()
        for modality, name in llcm.SIDES.items():
            lines = [
                (folder, label)
                for sitting, label in zip(chosen, labels, strict=True)
                for folder in sitting.folders
                if folder.site.infrared == (modality == INFRARED)
            ]
            _write_list(idx / f"{split}_{name}.txt", lines)
    (idx / "test_id.txt").write_text(",".join(map(str, sorted(tested))) + "\n", encoding="ascii")
    return tuple(sittings)


def _llcm_sitting(pid: int, split: str, images: Range, rng: Rng) -> Sitting:
    """Two to four cameras by day and by night, one of them the same."""
    day = np.sort(rng.choice(llcm.CAMERAS[VISIBLE], int(rng.integers(2, 5)), replace=False))
    both = int(rng.choice([cam for cam in day.tolist() if cam in llcm.CAMERAS[INFRARED]]))
    others = [cam for cam in llcm.CAMERAS[INFRARED] if cam != both]
    night = sorted([both, *rng.choice(others, int(rng.integers(1, 4)), replace=False).tolist()])
    folders = []
    for modality, cams in ((VISIBLE, day.tolist()), (INFRARED, night)):
        side = llcm.SIDES[modality]
        for cam in cams:
            clock = "".join(f"{int(rng.integers(*r)):02d}" for r in ((7, 23), (0, 60), (0, 60)))
            first, count = int(rng.integers(10, 9000)), int(rng.integers(images[0], images[1] + 1))
            stem = f"{pid:04d}_c{cam:02d}_s{clock}_f"
            names = [f"{stem}{first + 5 * k}_{side}.jpg" for k in range(count)]
            place = side if split == "train" else f"test_{side}/cam{cam}"
            site = LLCM_SITES[modality, cam]
            key = cam + 100 * modality
            folders.append(Folder(f"{place}/{pid:04d}", tuple(names), site, key))
    return Sitting(pid, tuple(folders))


def _write_list(path: Path, folders: Sequence[tuple[Folder, int]]) -> None:
    """A path and a label on every line."""
    lines = [
        f"{folder.path}/{name} {label}\n" for folder, label in folders for name in folder.names
    ]
    path.write_text("".join(lines), encoding="ascii")


LAYOUTS = {
    "sysu": Layout("exp", plan_sysu, {"train": 60, "val": 12, "test": 30}, (2, 14)),
    "regdb": Layout("idx", plan_regdb, {"train": 60, "val": 0, "test": 60}, (10, 10)),
    "llcm": Layout("idx", plan_llcm, {"train": 60, "val": 0, "test": 30}, (2, 5)),
}
