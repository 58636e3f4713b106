"""The index of SYSU-MM01: which image is whose, in which order, and under which label."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data.images import DataError, ImageList, image_list, images_in
from fastreid_vi.data.index import Index, entries
from fastreid_vi.data.permutations import CAMERAS, Permutations

__all__ = ["DataError", "ImageList", "Permutations", "SysuMM01", "images_in"]

INFRARED_CAMERAS = (3, 6)
SPLITS = ("train", "val", "test")

LabelOrder = Literal["sorted", "file"]
ImageOrder = Literal["path", "identity"]

# (camera, pid, image number, relative path)
Record = tuple[int, int, int, str]

_FOLDER = re.compile(r"[0-9]+")
_IMAGE = re.compile(r"([0-9]+)\.jpe?g", re.IGNORECASE)


class SysuMM01(Index):
    """SYSU-MM01, or any data set with its layout.

    Args:
        root: folder with `cam1` .. `cam6` and `exp`.
        splits: identity lists trained on: ("train", "val") as everybody does, or ("train",).
        label_order: "sorted" numbers the training pids ascending (AGW, LbA, AlignGAN); "file" by
            position in train_id.txt followed by val_id.txt (MPANet, MCJA).
        image_order: "path" sorts by camera, pid, image; "identity" by pid, camera, image with
            visible and infrared images kept apart, visible first.
        skip_broken: read every image and leave the unreadable ones out, with a warning that counts
            them; otherwise the first batch that needs one stops with its name.
    Attributes:
        train: labelled training images; `query`: test images of cameras 3 and 6;
        `gallery`: test images of cameras 1, 2, 4, 5; `permutations`; `num_ids`: training labels.
    Raises:
        DataError: a missing folder, camera or list, an empty split, permutations that disagree
            with the files of a test person; the message names the first offender.
    Spec: datasets 1. Golden: eval/sysu_protocol.
    """

    name = "sysu"

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        splits: Sequence[str] = ("train", "val"),
        label_order: LabelOrder = "sorted",
        image_order: ImageOrder = "path",
        skip_broken: bool = False,
    ) -> None:
        _check_choices(splits, label_order, image_order)
        self.root = Path(root)
        require_cameras(self.root)
        ids = read_splits(self.root)
        train_ids = [pid for split in SPLITS if split in splits for pid in ids[split]]
        records = scan(self.root, {*train_ids, *ids["test"]})
        self.train = _training_list(self.root, records, train_ids, label_order, image_order)
        self.query, self.gallery = _test_lists(self.root, records, ids["test"], image_order)
        self.num_ids = len(train_ids)
        self.permutations = Permutations.from_mat(self.root / "exp" / "rand_perm_cam.mat")
        self.permutations.check(
            image_list_of(self.root, [r for r in records if r[1] in set(ids["test"])], {}),
            ids["test"],
            CAMERAS,
        )
        if skip_broken:
            self._leave_out_broken()

    def _strike(self, gallery: ImageList) -> None:
        self.permutations = self.permutations.without(gallery)


def require_cameras(root: Path) -> None:
    """Raise a DataError unless `root` and its six camera folders exist."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    for cam in CAMERAS:
        if not (root / f"cam{cam}").is_dir():
            inner = root / "SYSU-MM01"
            hint = f"; did you mean {inner}?" if inner.is_dir() else ""
            raise DataError(f"{root}: camera folder cam{cam} is missing{hint}")


def read_ids(path: Path) -> list[int]:
    """The pids of one list, in file order: numbers separated by commas.

    Raises:
        DataError: a missing or empty file, something that is not a pid, a pid listed twice.
    """
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    words = [word for word in re.split(r"[,\s]+", text) if word]
    if not words:
        raise DataError(f"{path}: empty split, expected pids separated by commas")
    ids: dict[int, None] = {}
    for word in words:
        if not _FOLDER.fullmatch(word) or int(word) < 1:
            raise DataError(f"{path}: expected pids separated by commas, got {word!r}")
        if int(word) in ids:
            raise DataError(f"{path}: pid {int(word)} is listed twice")
        ids[int(word)] = None
    return list(ids)


def read_splits(root: Path) -> dict[str, list[int]]:
    """`exp/{train,val,test}_id.txt`, checked to be disjoint."""
    ids = {split: read_ids(root / "exp" / f"{split}_id.txt") for split in SPLITS}
    owner: dict[int, str] = {}
    for split, pids in ids.items():
        for pid in pids:
            if pid in owner:
                raise DataError(
                    f"{root / 'exp'}: pid {pid} is in {owner[pid]}_id.txt and {split}_id.txt"
                )
            owner[pid] = split
    return ids


def scan(root: Path, pids: Iterable[int], cams: Iterable[int] = CAMERAS) -> list[Record]:
    """All images of `pids` in cameras `cams`, sorted by camera, pid, image number.

    Walks `cam[1-6]/<digits>/<digits>.jpg` only; whatever else lies around is ignored.

    Raises:
        DataError: two folders of one pid, or two files of one number.
    """
    wanted = set(pids)
    records: list[Record] = []
    for cam in cams:
        folders: dict[int, str] = {}
        for entry in entries(root / f"cam{cam}"):
            if not _FOLDER.fullmatch(entry.name) or not entry.is_dir():
                continue
            pid = int(entry.name)
            if pid not in wanted:
                continue
            if pid in folders:
                raise DataError(f"{entry.path}: pid {pid} has a second folder {folders[pid]}")
            folders[pid] = entry.name
            records += _images_of(Path(entry.path), cam, pid)
    records.sort()
    return records


def _images_of(folder: Path, cam: int, pid: int) -> list[Record]:
    numbers: dict[int, str] = {}
    for entry in entries(folder):
        match = _IMAGE.fullmatch(entry.name)
        if match is None or not entry.is_file():
            continue
        number = int(match[1])
        if number in numbers:
            raise DataError(f"{entry.path}: image {number} exists a second time, {numbers[number]}")
        numbers[number] = entry.name
    return [(cam, pid, n, f"cam{cam}/{folder.name}/{name}") for n, name in numbers.items()]


def image_list_of(
    root: Path, records: Sequence[Record], labels: dict[int, int], order: ImageOrder = "path"
) -> ImageList:
    """Records in the order asked for, with the label of each pid (-1 for one without)."""
    ordered = sorted(records)
    if order == "identity":
        ordered.sort(key=lambda r: (r[0] in INFRARED_CAMERAS, r[1], r[0], r[2]))
    return image_list(
        root,
        ordered,
        (INFRARED if cam in INFRARED_CAMERAS else VISIBLE for cam, *_ in ordered),
        (labels.get(pid, -1) for _, pid, *_ in ordered),
    )


def _training_list(
    root: Path, records: list[Record], ids: list[int], label_order: str, image_order: ImageOrder
) -> ImageList:
    labels = {pid: i for i, pid in enumerate(sorted(ids) if label_order == "sorted" else ids)}
    chosen = [record for record in records if record[1] in labels]
    if absent := sorted(set(ids) - {pid for _, pid, *_ in chosen}):
        raise DataError(f"{root}: training identity {absent[0]:04d} has no image in any camera")
    return image_list_of(root, chosen, labels, image_order)


def _test_lists(
    root: Path, records: list[Record], ids: list[int], order: ImageOrder
) -> tuple[ImageList, ImageList]:
    test = [record for record in records if record[1] in set(ids)]
    query = image_list_of(root, [r for r in test if r[0] in INFRARED_CAMERAS], {}, order)
    gallery = image_list_of(root, [r for r in test if r[0] not in INFRARED_CAMERAS], {}, order)
    if not len(query):
        raise DataError(f"{root}: empty split: no test identity has an image in cameras 3 and 6")
    if not len(gallery):
        raise DataError(
            f"{root}: empty split: no test identity has an image in cameras 1, 2, 4 and 5"
        )
    return query, gallery


def _check_choices(splits: Sequence[str], label_order: str, image_order: str) -> None:
    if isinstance(splits, str) or not splits or not set(splits) <= {"train", "val"}:
        raise ValueError(f'splits: expected ("train", "val") or a part of it, got {splits!r}')
    if label_order not in ("sorted", "file"):
        raise ValueError(f'label_order: expected "sorted" or "file", got {label_order!r}')
    if image_order not in ("path", "identity"):
        raise ValueError(f'image_order: expected "path" or "identity", got {image_order!r}')
