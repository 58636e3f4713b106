"""Index files of RegDB and LLCM: one image and its label on every line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from fastreid_vi.data.images import DataError, ImageList, image_list

LabelOrder = Literal["sorted", "file"]
ListOrder = Literal["path", "identity", "file"]

_NUMBER = re.compile(r"[0-9]+")


class Line(NamedTuple):
    """One line of an index file."""

    number: int
    """In the file, from 1, blank lines counted."""
    path: str
    """Below the root; the folder is that of the person."""
    pid: int
    label: int


class Row(NamedTuple):
    """One image, as an `ImageList` has it."""

    modality: int
    cam: int
    pid: int
    number: int
    path: str


def require_folders(root: Path, folders: Sequence[str], inner: str) -> None:
    """Raise a DataError unless `root` and these folders in it exist.

    Args:
        root: the data set.
        folders: their names.
        inner: name of the data set's own folder, hinted at where `root` is one level too high.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    for folder in folders:
        if not (root / folder).is_dir():
            hint = f"; did you mean {root / inner}?" if (root / inner).is_dir() else ""
            raise DataError(f"{root}: folder {folder} is missing{hint}")


def read_list(root: Path, name: str, folder: str, *, cameras: bool = False) -> list[Line]:
    """The lines of `idx/<name>.txt`; blank ones are skipped.

    Args:
        root: the data set.
        name: of the list.
        folder: first folder of every path in it, such as "Visible".
        cameras: the folders of persons are in folders of cameras.
    Raises:
        DataError: a missing or empty file, a line that is not a path and a label, an image that is
            listed twice or does not exist; the message names the first such line.
    """
    file = root / "idx" / f"{name}.txt"
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    lines: list[Line] = []
    first: dict[str, int] = {}
    for number, words in enumerate(text.split("\n"), 1):
        if not words.strip():
            continue
        line = _line(words.strip(), number, folder, cameras, file)
        if line.path in first:
            raise DataError(
                f"{file}: line {number}: {line.path} was on line {first[line.path]} already"
            )
        first[line.path] = number
        lines.append(line)
    if not lines:
        raise DataError(f"{file}: empty split, expected a path and a label on every line")
    if absent := missing_images(root, lines):
        line = absent[0]
        raise DataError(f"{file}: line {line.number}: {line.path} does not exist")
    return lines


def _line(text: str, number: int, folder: str, cameras: bool, file: Path) -> Line:
    path, _, label = text.rpartition(" ")
    path = path.rstrip()
    if not path or not _NUMBER.fullmatch(label):
        raise DataError(f"{file}: line {number}: expected a path and a label, got {text!r}")
    parts = path.split("/")
    pattern = [folder, r"cam[0-9]", "[0-9]+", ".+"] if cameras else [folder, "[0-9]+", ".+"]
    if not re.fullmatch("/".join(pattern), path) or len(parts) != len(pattern):
        form = f"{folder}/cam<k>/<pid>/<image>" if cameras else f"{folder}/<pid>/<image>"
        raise DataError(f"{file}: line {number}: expected {form}, got {path!r}")
    return Line(number, path, int(parts[-2]), int(label))


def missing_images(root: Path, lines: Iterable[Line]) -> list[Line]:
    """The lines whose image does not exist; every folder is listed once."""
    known: dict[str, set[str]] = {}
    absent = []
    for line in lines:
        folder, _, name = line.path.rpartition("/")
        if folder not in known:
            try:
                known[folder] = set(os.listdir(root / folder))
            except OSError:
                known[folder] = set()
        if name not in known[folder]:
            absent.append(line)
    return absent


def training_labels(
    lists: Mapping[str, Sequence[Line]], order: LabelOrder, root: Path
) -> dict[int, int]:
    """Label of each pid.

    Args:
        lists: name -> lines of the training lists of both modalities.
        order: "sorted" numbers the pids ascending, "file" takes the labels of the lists.
        root: the data set, for messages.
    Raises:
        DataError: order "file" with two labels for one person, two persons with one label, or
            labels that are not 0..C-1; names the list and line.
    """
    if order == "sorted":
        pids = sorted({line.pid for lines in lists.values() for line in lines})
        return {pid: label for label, pid in enumerate(pids)}
    labels: dict[int, int] = {}
    owner: dict[int, int] = {}
    for name, lines in lists.items():
        for line in lines:
            where = f"{root / 'idx' / name}.txt: line {line.number}"
            if labels.setdefault(line.pid, line.label) != line.label:
                raise DataError(
                    f"{where}: label {line.label} for pid {line.pid}, which had {labels[line.pid]}"
                )
            if owner.setdefault(line.label, line.pid) != line.pid:
                raise DataError(
                    f"{where}: label {line.label} for pid {line.pid}, but pid {owner[line.label]} "
                    "has it"
                )
    gap = next((i for i, label in enumerate(sorted(owner)) if i != label), None)
    if gap is not None:
        first = next(iter(lists))
        raise DataError(
            f"{root / 'idx' / first}.txt: expected labels 0..{len(owner) - 1}, {gap} is missing"
        )
    return labels


def refuse_shared(train: Iterable[Line], test: Iterable[int], root: Path, names: str) -> None:
    """Raise a DataError if a test person is trained on."""
    if shared := {line.pid for line in train} & set(test):
        raise DataError(f"{root / 'idx'}: pid {min(shared)} is in {names}")


def check_orders(label_order: str, image_order: str) -> None:
    """Raise a ValueError for an order that there is not."""
    if label_order not in ("sorted", "file"):
        raise ValueError(f'label_order: expected "sorted" or "file", got {label_order!r}')
    if image_order not in ("path", "identity", "file"):
        raise ValueError(f'image_order: expected "path", "identity" or "file", got {image_order!r}')


def ordered(
    root: Path, rows: Sequence[Row], order: ListOrder, labels: Mapping[int, int] | None = None
) -> ImageList:
    """Images in the order asked for, with the label of each pid (-1 for one without).

    Args:
        root: folder the paths are relative to.
        rows: the images in the order of their lists, visible ones first.
        order: "path" sorts the paths as text, so that infrared folders come first; "identity" by
            pid, camera and image with the modalities kept apart, visible first; "file" as given.
        labels: pid -> training label.
    """
    if order == "path":
        rows = sorted(rows, key=lambda row: row.path)
    elif order == "identity":
        rows = sorted(rows, key=lambda r: (r.modality, r.pid, r.cam, r.number, r.path))
    known = labels or {}
    return image_list(
        root,
        [row[1:] for row in rows],
        (row.modality for row in rows),
        (known.get(row.pid, -1) for row in rows),
    )
