"""Reading packs: decoded images in memory-mapped shards, whose pages all processes share.

A file that is mapped stays readable when somebody deletes it; one that is not whole, not of this
data set or not made for this recipe is refused before the first batch.
"""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastreid_vi.config import DataConfig
from fastreid_vi.data.images import Bytes, DataError, ImageList, Int64
from fastreid_vi.data.pack_format import CHANNELS, MANIFEST, PACK_AGAIN, Manifest, read_manifest

Progress = Callable[[int, int], None]


class Pixels(ABC):
    """Decoded images in a few arrays uint8 [n, H, W, 3], numbered through.

    Attributes:
        shards: the arrays, read-only.
        height, width: of every image.
        name: for people.
    """

    def __init__(self, shards: Sequence[Bytes], height: int, width: int, name: str) -> None:
        self.shards, self.height, self.width, self.name = tuple(shards), height, width, name
        self._starts = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Bytes:
        """One image, uint8 [H, W, 3], not copied."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        image: Bytes = self.shards[shard][row - int(self._starts[shard])]
        return image

    def gather(self, rows: Int64, out: Bytes) -> None:
        """Copy images into `out`, uint8 [len(rows), H, W, 3]."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        places = rows - self._starts[shards]
        for slot, (shard, place) in enumerate(zip(shards.tolist(), places.tolist(), strict=True)):
            out[slot] = self.shards[shard][place]

    @abstractmethod
    def rows_of(self, images: ImageList) -> Int64:
        """Where the images of a list are: int64 [n].

        Raises:
            DataError: an image that is not there, or not the same any more, named.
        """


class Pack(Pixels):
    """A pack that `fastreid-vi data pack` has written.

    Args:
        path: its folder.
    Attributes:
        recipe: size, filter, labels and identities it was made for.
        rows: its images with their checksums.
    Raises:
        DataError: no pack, of another format, or damaged; the message says what to do.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path / MANIFEST)
        self.recipe, self.rows = manifest.recipe, manifest.rows
        shards = map_shards(self.path, manifest)
        super().__init__(shards, self.recipe.height, self.recipe.width, f"pack {self.path}")
        self._row = {path: row for row, path in enumerate(self.rows.paths)}

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that is not forked maps the files itself: pickling would copy them.
        return Pack, (self.path,)

    def fit(self, config: DataConfig) -> Pack:
        """Itself, if it was made for such a recipe.

        Raises:
            DataError: names the first setting that differs, and says what to do.
        """
        problem = self.recipe.misfit(config)
        if problem is not None:
            raise DataError(f"{self.path}: foreign pack: {problem}: {PACK_AGAIN}")
        return self

    def rows_of(self, images: ImageList) -> Int64:
        """Where the images of a list are: int64 [n].

        Raises:
            DataError: an image that is not in the pack, belongs to somebody else there, or whose
                file has another size than when it was packed.
        """
        found = [self._row.get(path, -1) for path in images.paths]
        rows = np.array(found, dtype=np.int64)
        if (rows < 0).any():
            missing = images.paths[int(np.argmax(rows < 0))]
            raise DataError(
                f"{self.path}: foreign pack: {missing} of {images.root} is not in it: {PACK_AGAIN}"
            )
        for name in ("pids", "cams", "modality"):
            packed, here = getattr(self.rows, name)[rows], getattr(images, name)
            if (packed != here).any():
                at = int(np.argmax(packed != here))
                raise DataError(
                    f"{self.path}: foreign pack: {images.paths[at]} has {name[:-1]} {packed[at]} "
                    f"in it, {here[at]} in {images.root}: {PACK_AGAIN}"
                )
        self._refuse_changed(images, rows)
        return rows

    def _refuse_changed(self, images: ImageList, rows: Int64) -> None:
        sizes = self.rows.sizes[rows].tolist()
        root = os.fspath(images.root)
        for path, size in zip(images.paths, sizes, strict=True):
            try:
                now = os.stat(f"{root}/{path}").st_size
            except OSError:
                continue  # the pixels are here; the file is not needed
            if now != size:
                raise DataError(
                    f"{self.path}: foreign pack: {images.root}/{path} had {size} bytes when it was "
                    f"packed and has {now}: {PACK_AGAIN}"
                )

    def damaged(self, progress: Progress | None = None) -> list[str]:
        """Paths of images whose pixels and checksum disagree; reads everything."""
        broken = []
        for row, expected in enumerate(self.rows.crc32.tolist()):
            if checksum(self[row]) != expected:
                broken.append(self.rows.paths[row])
            if progress is not None:
                progress(row + 1, len(self))
        return broken


def checksum(image: Bytes) -> int:
    """CRC-32 of an image's bytes, contiguous."""
    return zlib.crc32(image.data.cast("B"))


def map_shards(folder: Path, manifest: Manifest) -> list[Bytes]:
    """The shards of a pack, read-only.

    Raises:
        DataError: one is missing, torn or of another shape.
    """
    recipe, shards = manifest.recipe, []
    for name, count in manifest.shards():
        file = folder / name
        shape = (count, recipe.height, recipe.width, CHANNELS)
        try:
            shard = np.load(file, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read: {error.strerror or error}: {PACK_AGAIN}"
            ) from None
        except (ValueError, EOFError):
            raise DataError(f"{file}: torn pack, the file is not whole: {PACK_AGAIN}") from None
        if shard.shape != shape or shard.dtype != np.uint8:
            raise DataError(
                f"{file}: torn pack: expected uint8 {list(shape)}, "
                f"got {shard.dtype} {list(shard.shape)}: {PACK_AGAIN}"
            )
        shards.append(shard)
    return shards


def open_pixels(images: ImageList, config: DataConfig) -> tuple[Pixels, Int64] | None:
    """What `config.packed` names for a list of images.

    Args:
        images: of a data set, or a part of it.
        config: `packed`; size, filter, splits and label order must be those of the pack.
    Returns:
        The pixels and the row of every image; None where files are to be read.
    Raises:
        DataError: a pack that is not there, damaged or foreign.
    """
    if not config.packed:
        return None
    if config.packed == "agw":
        from fastreid_vi.data.agw import AgwArrays

        arrays = AgwArrays(images.root, config)
        return (arrays, arrays.rows_of(images)) if arrays.holds(images) else None
    pack = Pack(config.packed).fit(config)
    return pack, pack.rows_of(images)
