"""LLCM held against its known counts, or against itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastreid_vi.config import INFRARED
from fastreid_vi.data.datasets import read_ids
from fastreid_vi.data.findings import (
    Against,
    Finding,
    Progress,
    Report,
    broken_images,
    finding,
    opened,
)
from fastreid_vi.data.images import DataError
from fastreid_vi.data.lists import Line, Row, ordered, read_list, refuse_shared, training_labels
from fastreid_vi.data.llcm import CAMERAS, SIDES, camera_of, scan
from fastreid_vi.data.regdb_check import on_disk

# Published; spec datasets 3. Visible, infrared.
OFFICIAL_IMAGES = {"train": (16_946, 13_975), "test": (8_680, 7_166)}
OFFICIAL_IDENTITIES = {"train": 713, "test": 351}

Lists = dict[tuple[str, int], list[Line]]  # split, modality
Disk = dict[tuple[str, int], dict[int, list[str]]]  # split, modality -> pid -> paths


def check_llcm(
    root: str | os.PathLike[str],
    *,
    against: Against = "auto",
    decode: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Hold a folder with the layout of LLCM against what it should contain.

    Args:
        root: the data set.
        against: "official" compares with the counts of the real data set; "itself" only asks
            whether folders, lists and images agree; "auto" takes the former when the training lists
            or test_id.txt have as many persons as the real ones.
        decode: also read every image.
        threads: decoding threads; default one per core.
        progress: called with (images read, images in all).
    Raises:
        DataError: `root` is not a folder. Everything else is a finding of the report.
    Spec: datasets 3.
    """
    folder = opened(root, against)
    findings = [
        Finding(name, "folder is missing")
        for name in (f"{prefix}{side}" for prefix in ("", "test_") for side in SIDES.values())
        if not (folder / name).is_dir()
    ]
    lists, test_ids = _lists(folder, findings)
    disk = _disk(folder, test_ids, findings)
    identities = {"train": len(_trained(lists)), "test": len(test_ids)}
    official = against == "official" or (
        against == "auto" and any(identities[s] == n for s, n in OFFICIAL_IDENTITIES.items())
    )
    findings += _labels(folder, lists, test_ids)
    findings += _missing_modalities(lists, disk, test_ids)
    findings += _unlisted(lists, disk)
    findings += _names(disk)
    findings += _stray_cameras(folder)
    images = {s: tuple(_size(disk[s, m]) for m in SIDES) for s in ("train", "test")}
    if official:
        findings += _against_official(identities, images)
    decoded = 0
    if decode:
        rows = [
            Row(m, 0, pid, 0, path)
            for (_, m), persons in disk.items()
            for pid, paths in persons.items()
            for path in paths
        ]
        broken = broken_images(ordered(folder, rows, "path"), threads=threads, progress=progress)
        decoded = len(rows) - len(broken)
        findings += [finding(folder, problem) for _, problem in sorted(broken.items())]
    return Report(
        root=str(folder),
        layout="llcm",
        official=official,
        identities=identities,
        images=images,
        pids={s: tuple(len(disk[s, m]) for m in SIDES) for s in ("train", "test")},
        decoded=decoded,
        findings=tuple(findings),
    )


def _list(split: str, modality: int) -> str:
    return f"{split}_{SIDES[modality]}"


def _lists(root: Path, findings: list[Finding]) -> tuple[Lists, list[int]]:
    lists: Lists = {}
    for split in ("train", "test"):
        for modality, side in SIDES.items():
            folder = side if split == "train" else f"test_{side}"
            try:
                lists[split, modality] = read_list(
                    root, _list(split, modality), folder, cameras=split == "test"
                )
            except DataError as error:
                findings.append(finding(root, error))
    try:
        return lists, read_ids(root / "idx" / "test_id.txt")
    except DataError as error:
        findings.append(finding(root, error))
        return lists, []


def _disk(root: Path, test_ids: Sequence[int], findings: list[Finding]) -> Disk:
    disk: Disk = {}
    for modality, side in SIDES.items():
        disk["train", modality] = on_disk(root / side, side)
        found: dict[int, list[str]] = {}
        try:
            for row in scan(root, test_ids, modality):
                found.setdefault(row.pid, []).append(row.path)
        except DataError as error:
            findings.append(finding(root, error))
        disk["test", modality] = found
    return disk


def _trained(lists: Lists) -> set[int]:
    return {line.pid for (split, _), lines in lists.items() if split == "train" for line in lines}


def _size(persons: dict[int, list[str]]) -> int:
    return sum(map(len, persons.values()))


def _labels(root: Path, lists: Lists, test_ids: Sequence[int]) -> Iterator[Finding]:
    for split in ("train", "test"):
        chosen = {_list(s, m): lines for (s, m), lines in lists.items() if s == split}
        try:
            training_labels(chosen, "file", root)
        except DataError as error:
            yield finding(root, error)
    train = [line for (split, _), lines in lists.items() if split == "train" for line in lines]
    try:
        refuse_shared(train, test_ids, root, "a training list and test_id.txt")
    except DataError as error:
        yield finding(root, error)


def _missing_modalities(lists: Lists, disk: Disk, test_ids: Sequence[int]) -> Iterator[Finding]:
    for modality in SIDES:
        if ("train", modality) not in lists:
            continue
        listed = {line.pid for line in lists["train", modality]}
        for pid in sorted(_trained(lists) - listed):
            yield Finding(
                f"idx/{_list('train', modality)}.txt", f"training identity {pid:04d} has no image"
            )
    for modality in SIDES:
        for pid in sorted(set(test_ids) - set(disk["test", modality])):
            yield Finding(
                f"test_{SIDES[modality]}", f"test identity {pid:04d} has no image in any camera"
            )


def _unlisted(lists: Lists, disk: Disk) -> Iterator[Finding]:
    for (split, modality), persons in disk.items():
        if (split, modality) not in lists:
            continue
        listed = {line.path for line in lists[split, modality]}
        for path in (path for paths in persons.values() for path in paths):
            if path not in listed:
                yield Finding(path, f"is not in idx/{_list(split, modality)}.txt")


def _names(disk: Disk) -> Iterator[Finding]:
    """Person and camera of a file name against its folders."""
    for (split, _), persons in disk.items():
        for pid, path in ((pid, path) for pid, paths in persons.items() for path in paths):
            *folders, name = path.split("/")
            cam, person = camera_of(name), name.partition("_")[0]
            if cam is None or not person.isdecimal():
                yield Finding(path, "expected a name like 0001_c01_s185535_f7010_vis.jpg")
            elif int(person) != pid:
                yield Finding(path, f"the name says person {int(person)}, the folder {pid}")
            elif split == "test" and folders[1] != f"cam{cam}":
                yield Finding(path, f"the name says camera {cam}, the folder {folders[1]}")


def _stray_cameras(root: Path) -> Iterator[Finding]:
    for modality, side in SIDES.items():
        for cam in sorted(set(range(1, 10)) - set(CAMERAS[modality])):
            if any((root / f"test_{side}" / f"cam{cam}").glob("*/*")):
                yield Finding(
                    f"test_{side}/cam{cam}",
                    f"no {'infrared' if modality == INFRARED else 'visible'} test image comes from "
                    f"camera {cam}; not read",
                )


def _against_official(
    identities: dict[str, int], images: dict[str, tuple[int, ...]]
) -> Iterator[Finding]:
    where = {"train": "idx", "test": "idx/test_id.txt"}
    for split, count in OFFICIAL_IDENTITIES.items():
        if identities[split] != count:
            yield Finding(
                where[split], f"{identities[split]} identities of {split}, expected {count}"
            )
    for split, counts in OFFICIAL_IMAGES.items():
        for side, got, expected in zip(SIDES.values(), images[split], counts, strict=True):
            if got != expected:
                folder = side if split == "train" else f"test_{side}"
                yield Finding(folder, f"{got} images, expected {expected}")
