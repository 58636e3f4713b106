"""The files of a pack while they are written: rows of pixels at fixed places in NumPy files."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

from fastreid_vi.data.images import Bytes
from fastreid_vi.data.pack_format import CHANNELS, Manifest


class Shards:
    """Reads and writes single rows of unfinished shards, one file open at a time.

    Nothing is mapped: a disk that fills up is an error of `write`, not a signal.

    Args:
        folder: where the files are.
        manifest: their names and shapes.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self._recipe, self._per_shard = folder, manifest.recipe, manifest.per_shard
        self._files = manifest.shards()
        self._shape = (manifest.recipe.height, manifest.recipe.width, CHANNELS)
        self._open: tuple[int, int] | None = None  # number and descriptor

    def read(self, row: int) -> Bytes | None:
        """uint8 [H, W, 3], or None where the file ends before."""
        file, place = self._find(row)
        size = self._recipe.image_bytes
        content = os.pread(file, size, place)
        if len(content) < size:
            return None
        return np.frombuffer(content, dtype=np.uint8).reshape(self._shape)

    def write(self, row: int, image: Bytes) -> None:
        """Put an image, contiguous uint8 [H, W, 3], in its place.

        Raises:
            OSError: the disk is full.
        """
        file, place = self._find(row)
        _write(file, place, image.data.cast("B"))

    def seal(self) -> None:
        """Give every file its header and its length, and see it to the disk."""
        self.close()
        for number, (_, count) in enumerate(self._files):
            file, _ = self._find(number * self._per_shard)
            header = _header(count, self._shape)
            os.ftruncate(file, len(header) + count * self._recipe.image_bytes)
            _write(file, 0, memoryview(header))
            os.fsync(file)
        self.close()

    def close(self) -> None:
        """Close the open file."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def _find(self, row: int) -> tuple[int, int]:
        number, within = divmod(row, self._per_shard)
        if self._open is None or self._open[0] != number:
            self.close()
            name = self.folder / self._files[number][0]
            self._open = number, os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        start = len(_header(self._files[number][1], self._shape))
        return self._open[1], start + within * self._recipe.image_bytes


def _header(count: int, shape: tuple[int, ...]) -> bytes:
    """Of a NumPy file uint8 [count, *shape]; as long for every count."""
    stream = io.BytesIO()
    described = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


def _write(file: int, place: int, content: memoryview) -> None:
    # A write that meets the end of the disk is short; only the next one says why.
    while content:
        written = os.pwrite(file, content, place)
        content, place = content[written:], place + written
