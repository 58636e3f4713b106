"""RegDB held against its known counts, or against itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data.findings import (
    Against,
    Finding,
    Progress,
    Report,
    broken_images,
    finding,
    opened,
)
from fastreid_vi.data.images import IMAGE_SUFFIXES, DataError
from fastreid_vi.data.index import entries
from fastreid_vi.data.lists import Line, Row, ordered, read_list, refuse_shared, training_labels
from fastreid_vi.data.regdb import SIDES, TRIALS, list_name

# Published; spec datasets 2.
PERSONS, EACH, HALF = 412, 10, 206

Disk = Mapping[int, Mapping[int, list[str]]]  # modality -> pid -> paths


class _Trial(NamedTuple):
    """The lists of one trial that could be read: (split, modality) -> lines."""

    number: int
    lists: dict[tuple[str, int], list[Line]]


def check_regdb(
    root: str | os.PathLike[str],
    *,
    against: Against = "auto",
    decode: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Hold a folder with the layout of RegDB against what it should contain.

    Args:
        root: the data set.
        against: "official" compares with the counts of the real data set; "itself" only asks
            whether folders, the forty lists and images agree; "auto" takes the former when there
            are as many persons, or in a training list, as in the real one.
        decode: also read every image.
        threads: decoding threads; default one per core.
        progress: called with (images read, images in all).
    Raises:
        DataError: `root` is not a folder. Everything else is a finding of the report.
    Spec: datasets 2.
    """
    folder = opened(root, against)
    findings = [
        Finding(name, "folder is missing")
        for _, name, _ in SIDES.values()
        if not (folder / name).is_dir()
    ]
    disk = {m: on_disk(folder / name, name) for m, (_, name, _) in SIDES.items()}
    trials = [_read(folder, number, findings) for number in range(1, TRIALS + 1)]
    official = against == "official" or (against == "auto" and _looks_official(disk, trials))
    findings += _without_twin(disk)
    findings += [f for trial in trials for f in _of_trial(folder, trial, disk)]
    findings += _repeated(trials)
    if official:
        findings += _against_official(disk, trials)
    decoded = 0
    if decode:
        rows = [
            Row(m, SIDES[m][2], pid, 0, path)
            for m, persons in disk.items()
            for pid, paths in persons.items()
            for path in paths
        ]
        broken = broken_images(ordered(folder, rows, "path"), threads=threads, progress=progress)
        decoded = len(rows) - len(broken)
        findings += [finding(folder, problem) for _, problem in sorted(broken.items())]
    images, pids = _counts(disk, trials)
    return Report(
        root=str(folder),
        layout="regdb",
        official=official,
        identities={split: max(count) for split, count in pids.items()},
        images=images,
        pids=pids,
        decoded=decoded,
        findings=tuple(findings),
    )


def on_disk(place: Path, prefix: str) -> dict[int, list[str]]:
    """Images of each person: `<prefix>/<digits>/<image>`; whatever else lies around is ignored."""
    persons: dict[int, list[str]] = {}
    for entry in entries(place) if place.is_dir() else ():
        if not entry.name.isdecimal() or not entry.is_dir():
            continue
        found = [
            f"{prefix}/{entry.name}/{image.name}"
            for image in entries(Path(entry.path))
            if image.name.lower().endswith(IMAGE_SUFFIXES) and not image.name.startswith(".")
        ]
        if found:
            persons.setdefault(int(entry.name), []).extend(found)
    return persons


def _read(root: Path, number: int, findings: list[Finding]) -> _Trial:
    lists = {}
    for split in ("train", "test"):
        for modality, (_, folder, _) in SIDES.items():
            try:
                lists[split, modality] = read_list(root, list_name(split, modality, number), folder)
            except DataError as error:
                findings.append(finding(root, error))
    return _Trial(number, lists)


def _looks_official(disk: Disk, trials: list[_Trial]) -> bool:
    halves = (_persons(lines) for t in trials for (s, _), lines in t.lists.items() if s == "train")
    return any(len(p) == PERSONS for p in disk.values()) or any(len(p) == HALF for p in halves)


def _persons(lines: list[Line]) -> set[int]:
    return {line.pid for line in lines}


def _without_twin(disk: Disk) -> Iterator[Finding]:
    for one, other in ((VISIBLE, INFRARED), (INFRARED, VISIBLE)):
        for pid in sorted(set(disk[one]) - set(disk[other])):
            yield Finding(
                f"{SIDES[other][1]}/{pid}",
                f"no image of a person with {len(disk[one][pid])} in {SIDES[one][1]}",
            )


def _of_trial(root: Path, trial: _Trial, disk: Disk) -> Iterator[Finding]:
    """Labels, overlap and completeness of one trial."""
    for split in ("train", "test"):
        lists = {
            list_name(split, m, trial.number): lines
            for (s, m), lines in trial.lists.items()
            if s == split
        }
        try:
            training_labels(lists, "file", root)
        except DataError as error:
            yield finding(root, error)
    everyone = {
        split: [line for (s, _), lines in trial.lists.items() if s == split for line in lines]
        for split in ("train", "test")
    }
    try:
        names = f"a training and a test list of trial {trial.number}"
        refuse_shared(everyone["train"], _persons(everyone["test"]), root, names)
    except DataError as error:
        yield finding(root, error)
    for modality, (_, folder, _) in SIDES.items():
        lists = {s: trial.lists[s, modality] for s in everyone if (s, modality) in trial.lists}
        if len(lists) < 2:
            continue  # one is missing or damaged, which is a finding already
        listed = {line.path for lines in lists.values() for line in lines}
        for pid, paths in sorted(disk[modality].items()):
            if left_out := len(set(paths) - listed):
                yield Finding(
                    f"{folder}/{pid}",
                    f"{left_out} of {len(paths)} images are in no list of trial {trial.number}",
                )


def _repeated(trials: list[_Trial]) -> Iterator[Finding]:
    first: dict[frozenset[int], int] = {}
    for trial in trials:
        if ("train", VISIBLE) not in trial.lists:
            continue
        half = frozenset(_persons(trial.lists["train", VISIBLE]))
        if first.setdefault(half, trial.number) != trial.number:
            yield Finding(
                f"idx/{list_name('train', VISIBLE, trial.number)}.txt",
                f"the persons of trial {first[half]} once more",
            )


def _counts(
    disk: Disk, trials: list[_Trial]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    images = {"all": tuple(sum(map(len, disk[m].values())) for m in SIDES)}
    pids = {"all": tuple(len(disk[m]) for m in SIDES)}
    for trial in trials:
        for split in ("train", "test"):
            lists = [trial.lists.get((split, m), []) for m in SIDES]
            images[f"{split} {trial.number}"] = tuple(map(len, lists))
            pids[f"{split} {trial.number}"] = tuple(len(_persons(lines)) for lines in lists)
    return images, pids


def _against_official(disk: Disk, trials: list[_Trial]) -> Iterator[Finding]:
    for modality, (_, folder, _) in SIDES.items():
        persons = disk[modality]
        if len(persons) != PERSONS:
            yield Finding(folder, f"{len(persons)} persons, expected {PERSONS}")
        for pid, paths in sorted(persons.items()):
            if len(paths) != EACH:
                yield Finding(f"{folder}/{pid}", f"{len(paths)} images, expected {EACH}")
    for trial in trials:
        for (split, modality), lines in trial.lists.items():
            where = f"idx/{list_name(split, modality, trial.number)}.txt"
            found = len(_persons(lines))
            if (len(lines), found) != (HALF * EACH, HALF):
                yield Finding(
                    where,
                    f"{len(lines)} images of {found} persons, expected {HALF * EACH} of {HALF}",
                )
