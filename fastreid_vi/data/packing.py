"""Writing a pack: every image decoded and resized once, as the folder path would do it.

All files are written in a folder beside the pack, which gets the pack's name when everything is on
the disk. Images are appended in the order of the manifest's rows; a journal keeps the checksum of
each. A process that is killed, or that fills the disk, leaves this folder: the next one compares
checksums from the start and goes on behind the last whole image.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastreid_vi.config import DataConfig
from fastreid_vi.data.images import Bytes, DataError
from fastreid_vi.data.index import Index
from fastreid_vi.data.pack import Pack, Progress, checksum
from fastreid_vi.data.pack_format import (
    MANIFEST,
    SHARD_BYTES,
    Manifest,
    PackRecipe,
    Rows,
    read_manifest,
    rows_of,
)
from fastreid_vi.data.shards import Shards
from fastreid_vi.data.tasks import ahead
from fastreid_vi.data.transform import read_image
from fastreid_vi.version import __version__

_log = logging.getLogger("fastreid_vi.data")

_UNFINISHED, _OLD = ".packing-", ".replaced-"
_JOURNAL, _PLAN, _LOCK = "journal", "plan.json", "lock"
_ENTRY = struct.Struct("<II")  # row, CRC-32 of its pixels
# Images decoded ahead of the one that is written, for every thread.
_AHEAD = 4
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Packed(NamedTuple):
    """What `write_pack` did."""

    path: Path
    recipe: PackRecipe
    images: int
    shards: int
    bytes: int
    """Of pixels."""
    decoded: int
    """Images decoded now; the others were there already."""
    seconds: float
    """Spent on those."""


def write_pack(
    dataset: Index,
    config: DataConfig,
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Decode and resize all images of a data set into a pack.

    Done again, it does nothing; after an interruption it goes on where it stopped.

    Args:
        dataset: training images, queries and gallery are packed.
        config: size and filter; splits and label order are recorded.
        out: folder to create.
        workers: decoding threads; default one per core.
        shard_bytes: largest shard; at least one image is in each.
        overwrite: replace another pack, or the unfinished one of another recipe.
        progress: called with (images done, images in all).
    Raises:
        DataError: an unreadable image, a full disk, something else in the place of `out`; one line
            that says what to do.
    """
    path, recipe = Path(out), PackRecipe.of(dataset, config)
    rows = rows_of(dataset)
    manifest = Manifest(recipe, rows, max(shard_bytes // recipe.image_bytes, 1))
    done, seconds = len(rows.paths), 0.0
    try:
        if not _already(path, manifest, config, overwrite):
            with _unfinished(path) as folder:
                writer = _Writer(folder, manifest, overwrite)
                done = writer.resume()
                _warn_if_full(folder, (_length(rows) - done) * recipe.image_bytes)
                began = time.monotonic()
                writer.fill(done, _reader(dataset, manifest), workers, progress)
                seconds = time.monotonic() - began
                writer.seal()
                _put_in_place(folder, path)
    except OSError as error:
        raise DataError(_full_or_failed(error, path, manifest)) from error
    return Packed(
        path=path,
        recipe=recipe,
        images=len(rows.paths),
        shards=len(manifest.shards()),
        bytes=len(rows.paths) * recipe.image_bytes,
        decoded=len(rows.paths) - done,
        seconds=seconds,
    )


def _already(path: Path, manifest: Manifest, config: DataConfig, overwrite: bool) -> bool:
    """Whether `path` is this very pack; raises where it is something that must stay."""
    if not os.path.lexists(path):
        return False
    if not (path / MANIFEST).is_file():
        raise DataError(f"{path}: exists and is no pack: choose another name")
    try:
        old = Pack(path)
    except DataError:
        if overwrite:
            return False
        raise DataError(f"{path}: holds a damaged pack: replace it with --overwrite") from None
    if old.recipe == manifest.recipe and _shared(old.rows, manifest.rows) == _length(
        old.rows, manifest.rows
    ):
        return True
    if not overwrite:
        other = old.recipe.misfit(config) or "it is of other images"
        raise DataError(
            f"{path}: holds another pack: {other}: choose another name, or replace it with "
            "--overwrite"
        )
    return False


def _length(*rows: Rows) -> int:
    return max(len(r.paths) for r in rows)


def _shared(old: Rows, new: Rows) -> int:
    """Leading images that two lists have in common: path, person, camera, modality, file size."""
    pairs = zip(zip(*old[:5], strict=True), zip(*new[:5], strict=True), strict=False)
    shortest = min(len(old.paths), len(new.paths))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shortest)


def _reader(dataset: Index, manifest: Manifest) -> Callable[[int], Bytes]:
    recipe, paths = manifest.recipe, manifest.rows.paths

    def read(row: int) -> Bytes:
        file = dataset.root / paths[row]
        planes = read_image(file, recipe.height, recipe.width, recipe.resize)
        return np.ascontiguousarray(planes.transpose(1, 2, 0))

    return read


def _warn_if_full(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        _log.warning(
            "%s: %.2f GiB are free, %.2f GiB will be written: the disk may fill",
            folder, free / 2**30, need / 2**30,
        )  # fmt: skip


def _full_or_failed(error: OSError, path: Path, manifest: Manifest) -> str:
    reason = error.strerror or str(error)
    if error.errno not in _FULL:
        return f"{error.filename or path}: cannot be written: {reason}"
    need = _length(manifest.rows) * manifest.recipe.image_bytes
    return (
        f"{path}: cannot be written: {reason}; the pack needs {need / 2**30:.2f} GiB in all. What "
        "is done is kept: make room and run the same command again, it continues"
    )


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """The folder to write in, for one process at a time."""
    folder = path.with_name(_UNFINISHED + path.name)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is packing there") from None
        yield folder


def _put_in_place(folder: Path, path: Path) -> None:
    """Give the finished folder its name; the pack that it replaces goes away afterwards."""
    old = path.with_name(_OLD + path.name)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(folder, path)
    _flush_folder(path.parent)
    for name in (_JOURNAL, _PLAN, _LOCK):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


class _Writer:
    """Fills the folder of an unfinished pack."""

    def __init__(self, folder: Path, manifest: Manifest, overwrite: bool) -> None:
        self.folder, self.manifest, self._overwrite = folder, manifest, overwrite
        self._shards = Shards(folder, manifest)
        self._crc32 = manifest.rows.crc32.copy()

    def resume(self) -> int:
        """Images that an earlier process has left whole, from the first one on."""
        done = 0
        try:
            for row, crc32 in enumerate(self._entries()[: self._planned()]):
                image = self._shards.read(row)
                if image is None or checksum(image) != crc32:
                    break
                self._crc32[row] = crc32
                done = row + 1
        finally:
            self._shards.close()
        with open(self.folder / _JOURNAL, "ab") as journal:
            journal.truncate(done * _ENTRY.size)
        _replace(self.folder / _PLAN, self.manifest.to_json(__version__))
        return done

    def _planned(self) -> int:
        """Leading images that the process before was to write, too."""
        if not (self.folder / _PLAN).is_file():
            return 0
        old, here = read_manifest(self.folder / _PLAN), self.manifest
        if (old.recipe, old.per_shard) == (here.recipe, here.per_shard):
            return _shared(old.rows, here.rows)
        if self._overwrite:
            return 0
        raise DataError(
            f"{self.folder}: unfinished pack of another recipe: remove it, or start over with "
            "--overwrite"
        )

    def _entries(self) -> list[int]:
        """Checksums in the journal, up to the first entry that is torn or out of order."""
        file = self.folder / _JOURNAL
        content = file.read_bytes() if file.is_file() else b""
        found: list[int] = []
        for row, crc32 in _ENTRY.iter_unpack(content[: len(content) // _ENTRY.size * _ENTRY.size]):
            if row != len(found):
                break
            found.append(crc32)
        return found

    def fill(
        self,
        done: int,
        read: Callable[[int], Bytes],
        workers: int | None,
        progress: Progress | None,
    ) -> None:
        """Decode with threads what is left, and write it in order."""
        total = len(self._crc32)
        threads = workers or os.cpu_count() or 1
        images = ahead(read, range(done, total), threads, threads * _AHEAD)
        with (
            open(self.folder / _JOURNAL, "ab", buffering=0) as journal,
            contextlib.closing(images),
            contextlib.closing(self._shards),
        ):
            for row, image in enumerate(images, done):
                self._shards.write(row, image)
                self._crc32[row] = checksum(image)
                journal.write(_ENTRY.pack(row, self._crc32[row]))
                if progress is not None:
                    progress(row + 1, total)

    def seal(self) -> None:
        """See shards and manifest to the disk."""
        self._shards.seal()
        rows = self.manifest.rows._replace(crc32=self._crc32)
        whole = self.manifest._replace(rows=rows)
        _replace(self.folder / MANIFEST, whole.to_json(__version__))


def _replace(file: Path, content: bytes) -> None:
    """Write a small file so that a crash leaves the old one or the new one."""
    temporary = file.with_name(f".{file.name}")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    _flush_folder(file.parent)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
