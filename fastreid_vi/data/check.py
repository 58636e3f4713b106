"""The verdict of `fastreid-vi data check`: SYSU-MM01 held against the known counts, or itself."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from fastreid_vi.config import INFRARED, VISIBLE, DatasetName
from fastreid_vi.data.datasets import SPLITS, image_list_of, read_ids, read_splits, scan
from fastreid_vi.data.findings import (
    Against,
    Finding,
    Progress,
    Report,
    broken_images,
    finding,
    opened,
)
from fastreid_vi.data.images import DataError, ImageList
from fastreid_vi.data.llcm_check import check_llcm
from fastreid_vi.data.permutations import CAMERAS, Permutations
from fastreid_vi.data.regdb_check import check_regdb

# Recounted from the published permutation file; spec datasets 1.2. Cameras 1 to 6.
OFFICIAL_IMAGES = {
    "train": (4721, 5753, 5929, 4821, 4989, 4000),
    "val": (0, 0, 1980, 990, 984, 0),
    "test": (1374, 1565, 1883, 1918, 1918, 1920),
}
OFFICIAL_PIDS = {
    "train": (194, 195, 293, 283, 294, 200),
    "val": (0, 0, 99, 99, 96, 0),
    "test": (56, 56, 93, 94, 95, 96),
}
OFFICIAL_IDENTITIES = {"train": 296, "val": 99, "test": 96}
# CRC-32 of the sorted pids joined by commas.
OFFICIAL_LISTS = {"train": 2339672211, "val": 3637585448, "test": 266589111}


SysuReport = Report


def check(
    root: str | os.PathLike[str],
    *,
    layout: Literal["auto", "sysu", "regdb", "llcm"] = "auto",
    against: Against = "auto",
    decode: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Hold a folder against what it should contain.

    Args:
        root: the data set.
        layout: how it is laid out; "auto" looks at its folders.
        against, decode, threads, progress: as for `check_sysu`.
    Raises:
        DataError: `root` is not a folder. Everything else is a finding of the report.
    """
    if layout not in ("auto", "sysu", "regdb", "llcm"):
        raise ValueError(f'layout: expected "auto", "sysu", "regdb" or "llcm", got {layout!r}')
    chosen = layout_of(Path(root)) if layout == "auto" else layout
    of_layout = {"sysu": check_sysu, "regdb": check_regdb, "llcm": check_llcm}[chosen]
    return of_layout(root, against=against, decode=decode, threads=threads, progress=progress)


def layout_of(root: Path) -> DatasetName:
    """The layout that most folders speak for; SYSU-MM01's where none does."""
    folders: dict[DatasetName, tuple[str, ...]] = {
        "sysu": ("exp", *(f"cam{cam}" for cam in CAMERAS)),
        "regdb": ("Visible", "Thermal"),
        "llcm": ("vis", "nir", "test_vis", "test_nir"),
    }
    share = {
        layout: sum((root / name).is_dir() for name in names) / len(names)
        for layout, names in folders.items()
    }
    return max(share, key=lambda layout: share[layout])


def check_sysu(
    root: str | os.PathLike[str],
    *,
    against: Against = "auto",
    decode: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Hold a folder with the SYSU-MM01 layout against what it should contain.

    Args:
        root: the data set.
        against: "official" compares with the counts of the real data set; "itself" only asks
            whether lists, folders, permutations and images agree; "auto" takes the former when at
            least one of the three identity lists is the real one.
        decode: also read every image of the three splits.
        threads: decoding threads; default one per core.
        progress: called with (images read, images in all).
    Raises:
        DataError: `root` is not a folder. Everything else is a finding of the report.
    Spec: datasets 1. Golden: eval/sysu_real_counts.
    """
    folder = opened(root, against)
    findings: list[Finding] = []
    present = [cam for cam in CAMERAS if (folder / f"cam{cam}").is_dir()]
    findings += [
        Finding(f"cam{cam}", "camera folder is missing") for cam in CAMERAS if cam not in present
    ]
    ids = _lists(folder, findings)
    official = against == "official" or (
        against == "auto" and any(_crc(pids) == OFFICIAL_LISTS[s] for s, pids in ids.items())
    )
    images, scanned = _index(folder, present, ids, findings)
    findings += _disagreements(folder, images, ids, scanned, every_split=official)
    findings += _missing_modalities(images, ids)
    counts, persons = _counts(images, ids)
    if official:
        findings += _against_official(ids, counts, persons)
    decoded = 0
    if decode:
        broken = broken_images(images, threads=threads, progress=progress)
        decoded = len(images) - len(broken)
        findings += [finding(folder, problem) for _, problem in sorted(broken.items())]
    return Report(
        root=str(folder),
        layout="sysu",
        official=official,
        identities={split: len(ids.get(split, ())) for split in SPLITS},
        images=counts,
        pids=persons,
        decoded=decoded,
        findings=tuple(findings),
    )


def _lists(root: Path, findings: list[Finding]) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = {}
    for split in SPLITS:
        try:
            ids[split] = read_ids(root / "exp" / f"{split}_id.txt")
        except DataError as error:
            findings.append(finding(root, error))
    if len(ids) == len(SPLITS):
        try:
            read_splits(root)
        except DataError as error:
            findings.append(finding(root, error))
    for split, pids in ids.items():
        twin = root / "exp" / f"{split}_id.mat"
        if twin.is_file() and (problem := _twin_problem(twin, pids)):
            findings.append(Finding(f"exp/{split}_id.mat", problem))
    return ids


def _twin_problem(twin: Path, pids: Sequence[int]) -> str | None:
    from scipy.io import loadmat

    try:
        with twin.open("rb") as stream:
            listed = np.asarray(loadmat(stream)["id"]).ravel().tolist()
    except Exception as error:  # scipy raises many kinds on a damaged file
        return f"not a MATLAB 5 file with the variable id: {error}"
    return None if listed == list(pids) else f"other pids than in {twin.stem}.txt"


def _index(
    root: Path, cams: Sequence[int], ids: dict[str, list[int]], findings: list[Finding]
) -> tuple[ImageList, list[int]]:
    """Images of all splits, and the cameras that could be listed."""
    wanted = {pid for pids in ids.values() for pid in pids}
    records, scanned = [], []
    for cam in cams:
        try:
            records += scan(root, wanted, [cam])
            scanned.append(cam)
        except DataError as error:
            findings.append(finding(root, error))
    return image_list_of(root, records, {}), scanned


def _disagreements(
    root: Path,
    images: ImageList,
    ids: dict[str, list[int]],
    cams: Sequence[int],
    *,
    every_split: bool,
) -> Iterator[Finding]:
    """A stand-in need only permute its test persons; the official file permutes everybody."""
    file = root / "exp" / "rand_perm_cam.mat"
    try:
        permutations = Permutations.from_mat(file)
    except DataError as error:
        yield finding(root, error)
        return
    pids = [pid for split in (SPLITS if every_split else ("test",)) for pid in ids.get(split, ())]
    for problem in permutations.disagreements(images, pids, cams):
        yield finding(root, problem)


def _missing_modalities(images: ImageList, ids: dict[str, list[int]]) -> Iterator[Finding]:
    names = {VISIBLE: "visible", INFRARED: "infrared"}
    seen = {m: set(images.pids[images.modality == m].tolist()) for m in names}
    for split in ("train", "val"):
        for pid in sorted(ids.get(split, ())):
            for modality, name in names.items():
                if pid not in seen[modality]:
                    yield Finding(
                        f"exp/{split}_id.txt", f"{split} identity {pid:04d} has no {name} image"
                    )
    for modality, name in names.items():
        if "test" in ids and not seen[modality] & set(ids["test"]):
            yield Finding("exp/test_id.txt", f"test identities have no {name} image at all")


def _counts(
    images: ImageList, ids: dict[str, list[int]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    counts, persons = {}, {}
    for split in SPLITS:
        member = np.isin(images.pids, ids.get(split, []))
        of_camera = [images.pids[member & (images.cams == cam)] for cam in CAMERAS]
        counts[split] = tuple(len(pids) for pids in of_camera)
        persons[split] = tuple(len(np.unique(pids)) for pids in of_camera)
    return counts, persons


def _against_official(
    ids: dict[str, list[int]],
    counts: dict[str, tuple[int, ...]],
    persons: dict[str, tuple[int, ...]],
) -> Iterator[Finding]:
    for split, pids in ids.items():
        if _crc(pids) != OFFICIAL_LISTS[split]:
            yield Finding(
                f"exp/{split}_id.txt",
                f"{len(pids)} identities, not the "
                f"{OFFICIAL_IDENTITIES[split]} of the official list",
            )
    for what, found, known in (
        ("images", counts, OFFICIAL_IMAGES),
        ("identities", persons, OFFICIAL_PIDS),
    ):
        for split in SPLITS:
            for cam, got, expected in zip(CAMERAS, found[split], known[split], strict=True):
                if got != expected:
                    yield Finding(f"cam{cam}", f"{got} {what} of {split}, expected {expected}")


def _crc(pids: Sequence[int]) -> int:
    return zlib.crc32(",".join(map(str, sorted(pids))).encode())
