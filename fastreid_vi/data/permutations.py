"""The fixed gallery permutations of the SYSU-MM01 protocol (`exp/rand_perm_cam.mat`)."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastreid_vi.data.images import DataError, ImageList, Int64

CAMERAS = (1, 2, 3, 4, 5, 6)
TRIALS = 10
VARIABLE = "rand_perm_cam"
HEADER = b"MATLAB 5.0 MAT-file, written by fastreid_vi"


def save_mat(path: str | os.PathLike[str], variables: Mapping[str, Any]) -> None:
    """Write a MATLAB 5 file, whole or not at all; equal variables give equal bytes.

    Args:
        path: the file.
        variables: name -> array.
    Raises:
        OSError: the file cannot be written.
    """
    from scipy.io import savemat

    stream = io.BytesIO()
    savemat(stream, dict(variables))
    # The text of the header, 116 bytes, holds the time of writing.
    content = HEADER.ljust(116) + stream.getvalue()[116:]
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


class Permutations(Mapping[tuple[int, int], Int64]):
    """Mapping (camera, pid) -> int64 [10, m]: row t orders the m images of that folder in trial t.

    Values are image numbers as in the file names, from 1. A person never seen by a camera has a
    value of shape [10, 0]; a pid beyond the last cell of a camera is not a key.

    Args:
        values: the folders that exist; cells between them are filled with [10, 0].
        cells: number of cells of each of the six cameras; by default every camera reaches the
            largest pid, and at least 2 (the released readers need two).
    Raises:
        DataError: a row that is not a permutation of 1..m, named with its folder and trial.
        ValueError: a camera or pid out of range.
    Spec: datasets 1.4. Golden: eval/sysu_protocol.
    """

    def __init__(
        self,
        values: Mapping[tuple[int, int], Any],
        cells: Iterable[int] | None = None,
    ) -> None:
        largest = max([pid for _, pid in values], default=0)
        self.cells = tuple(cells) if cells is not None else (max(largest, 2),) * len(CAMERAS)
        if len(self.cells) != len(CAMERAS):
            raise ValueError(f"cells: expected {len(CAMERAS)} numbers, got {len(self.cells)}")
        for cam, pid in values:
            if cam not in CAMERAS or not 1 <= pid <= self.cells[cam - 1]:
                raise ValueError(
                    f"values: camera {cam}, pid {pid} is outside the {self.cells} cells"
                )
        self._values: dict[tuple[int, int], Int64] = {}
        for cam in CAMERAS:
            for pid in range(1, self.cells[cam - 1] + 1):
                self._values[cam, pid] = _rows(values.get((cam, pid)), cam, pid)

    def __getitem__(self, folder: tuple[int, int]) -> Int64:
        return self._values[folder]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @classmethod
    def from_mat(cls, path: str | os.PathLike[str]) -> Permutations:
        """Read the MATLAB 5 file of the official evaluation package.

        Raises:
            DataError: missing or unreadable file, another nesting, a row that is no permutation.
        """
        from scipy.io import loadmat

        file = Path(path)
        if not file.is_file():
            raise DataError(
                f"{file}: missing; it is the file {VARIABLE}.mat of the official SYSU-MM01 "
                "evaluation package (folder evaluation/data_split, 297,740 bytes)"
            )
        try:
            with file.open("rb") as stream:
                content = loadmat(stream)
        except Exception as error:  # scipy raises many kinds on a damaged file
            raise DataError(f"{file}: not a readable MATLAB 5 file: {error}") from error
        if VARIABLE not in content:
            names = sorted(name for name in content if not name.startswith("__"))
            raise DataError(f"{file}: expected the variable {VARIABLE}, got {names}")
        outer = content[VARIABLE]
        if outer.dtype != np.object_ or outer.size != len(CAMERAS):
            raise DataError(
                f"{file}: {VARIABLE}: expected a 6 x 1 cell, one entry per camera, "
                f"got {outer.dtype} {list(outer.shape)}"
            )
        values: dict[tuple[int, int], Any] = {}
        cells = []
        for cam, inner in zip(CAMERAS, outer.ravel(), strict=True):
            if not isinstance(inner, np.ndarray) or inner.dtype != np.object_:
                raise DataError(
                    f"{file}: {VARIABLE}: camera {cam}: expected a cell with one matrix per pid"
                )
            cells.append(inner.size)
            values.update(((cam, pid), matrix) for pid, matrix in enumerate(inner.ravel(), 1))
        try:
            return cls(values, cells)
        except DataError as error:
            raise DataError(f"{file}: {error}") from None

    def to_mat(self, path: str | os.PathLike[str]) -> None:
        """Write the file with the official nesting; uint8, or uint16 above 255 images in a folder.

        The file appears whole or not at all.
        """
        # Cell by cell: NumPy would stack equal-sized matrices into one numeric array.
        outer = np.empty((len(CAMERAS), 1), dtype=object)
        for cam in CAMERAS:
            inner = np.empty((self.cells[cam - 1], 1), dtype=object)
            for pid in range(1, self.cells[cam - 1] + 1):
                rows = self._values[cam, pid]
                inner[pid - 1, 0] = rows.astype(np.uint8 if rows.shape[1] <= 255 else np.uint16)
            outer[cam - 1, 0] = inner
        save_mat(path, {VARIABLE: outer})

    @classmethod
    def draw(cls, images: ImageList, *, seed: int) -> Permutations:
        """Fresh orders for the folders of `images`, for persons the official file does not know.

        Their image numbers may have gaps, unlike those of a file.
        """
        random = np.random.default_rng(seed)
        folders = folders_of(images)
        blank = cls({}, (max([pid for _, pid in folders], default=2),) * len(CAMERAS))
        return blank._replaced(
            {
                folder: np.stack([random.permutation(numbers) for _ in range(TRIALS)])
                for folder, numbers in folders.items()
            }
        )

    def check(
        self,
        images: ImageList,
        pids: Iterable[int] | None = None,
        cams: Iterable[int] | None = None,
    ) -> None:
        """Compare every folder with the files on disk; see `disagreements`.

        Raises:
            DataError: the first folder that disagrees.
        """
        for problem in self.disagreements(images, pids, cams):
            raise DataError(problem)

    def disagreements(
        self,
        images: ImageList,
        pids: Iterable[int] | None = None,
        cams: Iterable[int] | None = None,
    ) -> Iterator[str]:
        """One line for every folder whose files are not the images its rows permute.

        Args:
            images: all files of the persons and cameras to compare.
            pids: persons to compare, also where they have no file; default those of `images`.
            cams: cameras to compare; default those of `images`.
        """
        files = folders_of(images)
        persons = sorted({int(p) for p in (images.pids if pids is None else pids)})
        cameras = sorted({int(c) for c in (images.cams if cams is None else cams)})
        for cam in cameras:
            for pid in persons:
                numbers = files.get((cam, pid), np.empty(0, dtype=np.int64))
                rows = self._values.get((cam, pid))
                expected = 0 if rows is None else rows.shape[1]
                name = folder_name(cam, pid)
                if len(numbers) != expected:
                    yield (
                        f"{name}: {len(numbers)} images on disk, "
                        f"but {VARIABLE}.mat permutes {expected}"
                    )
                elif rows is not None and not np.array_equal(numbers, np.sort(rows[0])):
                    yield f"{name}: image numbers on disk are not 1..{expected}"

    def without(self, images: ImageList) -> Permutations:
        """The same orders with the images in `images` (unreadable ones) struck out."""
        left = {}
        for folder, numbers in folders_of(images).items():
            rows = self._values[folder]
            left[folder] = rows[~np.isin(rows, numbers)].reshape(TRIALS, -1)
        return self._replaced(left)

    def _replaced(self, values: Mapping[tuple[int, int], Int64]) -> Permutations:
        """Some folders replaced by rows that need not be permutations of 1..m."""
        other = object.__new__(Permutations)
        other.cells, other._values = self.cells, {**self._values, **values}
        return other


def folder_name(cam: int, pid: int) -> str:
    """The folder of one person and camera as the official tree writes it."""
    return f"cam{cam}/{pid:04d}"


def folders_of(images: ImageList) -> dict[tuple[int, int], Int64]:
    """(camera, pid) -> sorted image numbers."""
    order = np.lexsort((images.numbers, images.pids, images.cams))
    cams, pids, numbers = images.cams[order], images.pids[order], images.numbers[order]
    starts = np.flatnonzero((np.diff(cams, prepend=-1) != 0) | (np.diff(pids, prepend=-1) != 0))
    ends = [*starts[1:].tolist(), len(order)]
    return {
        (int(cams[start]), int(pids[start])): numbers[start:end]
        for start, end in zip(starts, ends, strict=True)
    }


def _rows(matrix: Any, cam: int, pid: int) -> Int64:
    if matrix is None or np.size(matrix) == 0:
        return np.empty((TRIALS, 0), dtype=np.int64)
    rows = np.asarray(matrix)
    name = folder_name(cam, pid)
    if rows.ndim != 2 or rows.shape[0] != TRIALS or rows.dtype.kind not in "iuf":
        raise DataError(f"{name}: expected a numeric {TRIALS} x m matrix, "
                        f"got {rows.dtype} {list(rows.shape)}")  # fmt: skip
    size = rows.shape[1]
    for trial, wrong in enumerate((np.sort(rows, axis=1) != np.arange(1, size + 1)).any(axis=1)):
        if wrong:
            raise DataError(f"{name}: trial {trial} is not a permutation of 1..{size}")
    return rows.astype(np.int64)
