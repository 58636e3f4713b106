"""Lists of image files: what an index hands to samplers, loaders and evaluation. NumPy only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastreid_vi.config import INFRARED, VISIBLE

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png")

Int64 = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class DataError(ValueError):
    """A data set, folder or image that cannot be used: one line that names the offender."""


@dataclass(frozen=True, eq=False)
class ImageList:
    """n images below one folder, in a fixed order. All arrays are int64 [n]."""

    root: Path
    """Folder the paths are relative to."""
    paths: tuple[str, ...]
    """Relative, with forward slashes: "cam1/0001/0001.jpg"."""
    pids: Int64
    """Identity number on disk; -1 where unknown."""
    cams: Int64
    """Camera number on disk; 0 where unknown."""
    numbers: Int64
    """Image number inside its folder, from the file name; 0 where unknown."""
    modality: Int64
    """VISIBLE or INFRARED."""
    labels: Int64
    """Contiguous training label; -1 outside the training set."""

    def __post_init__(self) -> None:
        for name in ("pids", "cams", "numbers", "modality", "labels"):
            shape = getattr(self, name).shape
            if shape != (len(self.paths),):
                raise ValueError(f"{name}: expected shape [{len(self.paths)}], got {list(shape)}")

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_ids(self) -> int:
        """Number of different identities on disk in this list."""
        return len(np.unique(self.pids))

    def file(self, index: int) -> Path:
        """Full path of image `index`."""
        return self.root / self.paths[index]

    def select(self, indices: ArrayLike) -> ImageList:
        """The images at `indices` (int positions or a boolean mask [n]), in that order."""
        chosen = np.asarray(indices)
        if chosen.dtype == np.bool_:
            if chosen.shape != (len(self),):
                raise ValueError(f"indices: expected a mask of shape [{len(self)}], "
                                 f"got {list(chosen.shape)}")  # fmt: skip
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64).reshape(-1)
        return ImageList(
            self.root,
            tuple(self.paths[i] for i in chosen),
            self.pids[chosen],
            self.cams[chosen],
            self.numbers[chosen],
            self.modality[chosen],
            self.labels[chosen],
        )

    def with_labels(self, labels: ArrayLike) -> ImageList:
        """The same images under other training labels [n]."""
        values = np.asarray(labels, dtype=np.int64)
        return ImageList(
            self.root, self.paths, self.pids, self.cams, self.numbers, self.modality, values
        )


def relabel(labels: ArrayLike) -> Int64:
    """Contiguous labels 0..C-1 in the order of the given ones, which may have gaps."""
    return np.unique(np.asarray(labels), return_inverse=True)[1].astype(np.int64).reshape(-1)


def images_in(folder: str | os.PathLike[str], *, modality: int = VISIBLE) -> ImageList:
    """Every image file at any depth below `folder`, sorted by path: for embedding, not training.

    Args:
        folder: searched for .jpg, .jpeg, .png and .bmp files; hidden files are left out.
        modality: VISIBLE or INFRARED, given to all of them.
    Returns:
        A list without identities (pid -1, camera 0, label -1).
    Raises:
        DataError: `folder` is not a folder or holds no image.
        ValueError: unknown `modality`.
    """
    if modality not in (VISIBLE, INFRARED):
        raise ValueError(
            f"modality: expected {VISIBLE} (visible) or {INFRARED} (infrared), got {modality}"
        )
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    found: list[str] = []
    for parent, folders, files in os.walk(root, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            (Path(parent) / name).relative_to(root).as_posix()
            for name in files
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    if not found:
        raise DataError(f"{root}: no image file ({', '.join(IMAGE_SUFFIXES)}) in this folder")
    found.sort()
    unknown = np.full(len(found), -1, dtype=np.int64)
    zeros = np.zeros(len(found), dtype=np.int64)
    return ImageList(root, tuple(found), unknown, zeros, zeros, zeros + modality, unknown)


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed: {error.strerror}")


def image_list(
    root: Path,
    records: Sequence[tuple[int, int, int, str]],
    modality: Iterable[int],
    labels: Iterable[int],
) -> ImageList:
    """Columns out of (camera, pid, number, path) rows."""
    columns = np.array([row[:3] for row in records], dtype=np.int64).reshape(-1, 3)
    return ImageList(
        root,
        tuple(row[3] for row in records),
        columns[:, 1].copy(),
        columns[:, 0].copy(),
        columns[:, 2].copy(),
        np.fromiter(modality, dtype=np.int64, count=len(records)),
        np.fromiter(labels, dtype=np.int64, count=len(records)),
    )
