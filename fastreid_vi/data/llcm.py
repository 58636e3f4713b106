"""The index of LLCM: training lists, and test folders by camera and person."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data.datasets import read_ids
from fastreid_vi.data.images import IMAGE_SUFFIXES, DataError
from fastreid_vi.data.index import Index, entries
from fastreid_vi.data.lists import (
    LabelOrder,
    Line,
    ListOrder,
    Row,
    check_orders,
    ordered,
    read_list,
    refuse_shared,
    require_folders,
    training_labels,
)

# Modality -> name of lists and training folder; the test folder is test_<name>.
SIDES = {VISIBLE: "vis", INFRARED: "nir"}
CAMERAS = {VISIBLE: (1, 2, 3, 4, 5, 6, 7, 8, 9), INFRARED: (1, 2, 4, 5, 6, 7, 8, 9)}

_FOLDER = re.compile(r"[0-9]+")
_CAMERA = re.compile(r"_c([0-9]+)_")
_FRAME = re.compile(r"_f([0-9]+)_")


class LLCM(Index):
    """LLCM, or any data set with its layout.

    Args:
        root: folder with `vis`, `nir`, `test_vis`, `test_nir` and `idx`.
        label_order: "sorted" numbers the training pids ascending; "file" takes the labels of the
            lists, as the released code does.
        image_order: "path" sorts the paths as text, so that infrared precedes visible; "file" keeps
            the training lists, visible first; "identity" by pid, camera and image with the
            modalities kept apart, visible first. Test images in the order "file" are in the one of
            the released evaluation, which is "identity".
        skip_broken: read every image and leave the unreadable ones out, with a warning that counts
            them; otherwise the first batch that needs one stops with its name.
    Attributes:
        train: labelled training images, cameras from the file names; `query`: infrared test images;
            `gallery`: visible test images; `num_ids`: training labels. Test images are those in the
            camera folders of the persons in test_id.txt. The other direction of the test exchanges
            query and gallery.
    Raises:
        DataError: a missing folder or list, a line that names no image, a person in both splits, a
            modality without test images; the message names the first offender.
    Spec: datasets 3.
    """

    name = "llcm"

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        label_order: LabelOrder = "sorted",
        image_order: ListOrder = "path",
        skip_broken: bool = False,
    ) -> None:
        check_orders(label_order, image_order)
        self.root = Path(root)
        folders = [f"{prefix}{name}" for prefix in ("", "test_") for name in SIDES.values()]
        require_folders(self.root, folders, "LLCM")
        train = {name: read_list(self.root, f"train_{name}", name) for name in SIDES.values()}
        test_ids = read_ids(self.root / "idx" / "test_id.txt")
        lines = [line for lines in train.values() for line in lines]
        refuse_shared(lines, test_ids, self.root, "a training list and test_id.txt")
        by_name = {f"train_{name}": lines for name, lines in train.items()}
        labels = training_labels(by_name, label_order, self.root)
        self.num_ids = len(labels)
        rows = [row for m, name in SIDES.items() for row in _rows(self.root, train[name], m)]
        self.train = ordered(self.root, rows, image_order, labels)
        of_test: ListOrder = "path" if image_order == "path" else "identity"
        self.query, self.gallery = (
            ordered(self.root, _test_rows(self.root, test_ids, m), of_test)
            for m in (INFRARED, VISIBLE)
        )
        if skip_broken:
            self._leave_out_broken()


def scan(root: Path, pids: Iterable[int], modality: int) -> list[Row]:
    """All test images of `pids` in the camera folders of a modality.

    Walks `test_<vis|nir>/cam<k>/<digits>/` only; whatever else lies around is ignored.

    Raises:
        DataError: two folders of one pid in a camera.
    """
    wanted, side = set(pids), f"test_{SIDES[modality]}"
    rows: list[Row] = []
    for cam in CAMERAS[modality]:
        place = root / side / f"cam{cam}"
        known: dict[int, str] = {}
        for entry in entries(place) if place.is_dir() else ():
            if not _FOLDER.fullmatch(entry.name) or not entry.is_dir():
                continue
            pid = int(entry.name)
            if pid not in wanted:
                continue
            if pid in known:
                raise DataError(f"{entry.path}: pid {pid} has a second folder {known[pid]}")
            known[pid] = entry.name
            folder = f"{side}/cam{cam}/{entry.name}"
            rows += [
                Row(modality, cam, pid, _frame(image.name), f"{folder}/{image.name}")
                for image in entries(Path(entry.path))
                if _is_image(image.name) and image.is_file()
            ]
    return rows


def camera_of(name: str) -> int | None:
    """Camera number in a file name, or None."""
    match = _CAMERA.search(name)
    return int(match[1]) if match else None


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _frame(name: str) -> int:
    match = _FRAME.search(name)
    return int(match[1]) if match else 0


def _rows(root: Path, lines: list[Line], modality: int) -> list[Row]:
    rows = []
    for line in lines:
        name = line.path.rpartition("/")[2]
        cam = camera_of(name)
        if cam is None:
            raise DataError(
                f"{root / 'idx'}/train_{SIDES[modality]}.txt: line {line.number}: expected a file "
                f"name with its camera, such as 0001_c01_s185535_f7010_nir.jpg, got {name}"
            )
        rows.append(Row(modality, cam, line.pid, _frame(name), line.path))
    return rows


def _test_rows(root: Path, pids: list[int], modality: int) -> list[Row]:
    rows = scan(root, pids, modality)
    if not rows:
        side = f"test_{SIDES[modality]}"
        raise DataError(f"{root / side}: empty split: no person of test_id.txt has an image")
    return rows
