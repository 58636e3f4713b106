"""What a pack is on disk: a JSON manifest beside shards of pixels. NumPy only.

    pack.json           format, recipe and its hash, and a row for every image
    pixels-00000.npy    uint8 [n, H, W, 3], decoded and resized, in the order of the rows
    pixels-00001.npy    ...

A pack holds all images of a data set, training and test, at one size. Shards are plain NumPy files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastreid_vi.config import DataConfig, DatasetName
from fastreid_vi.data.images import DataError, Int64
from fastreid_vi.data.index import Index

FORMAT = 1
MANIFEST = "pack.json"
SHARD_BYTES = 1 << 30
CHANNELS = 3

PACK_AGAIN = "pack again (fastreid-vi data pack), or read the files (--pack none)"


@dataclass(frozen=True, kw_only=True)
class PackRecipe:
    """What decides whether a pack is the one that a run needs."""

    dataset: DatasetName
    height: int
    width: int
    resize: str
    """Pillow filter."""
    splits: tuple[str, ...]
    label_order: str
    image_order: str
    ids: tuple[int, ...]
    """Training identities in the order of their labels; of RegDB, whose ten trials share their
    images and therefore a pack, all identities."""

    @classmethod
    def of(cls, dataset: Index, config: DataConfig) -> PackRecipe:
        """What a run on `dataset` with `config` needs."""
        if dataset.name == "regdb":
            lists = (dataset.train, dataset.query, dataset.gallery)
            ids = np.unique(np.concatenate([images.pids for images in lists]))
        else:
            first = np.unique(dataset.train.labels, return_index=True)[1]
            ids = dataset.train.pids[first]
        return cls(
            dataset=dataset.name,
            height=config.height,
            width=config.width,
            resize=config.resize,
            splits=config.splits if dataset.name == "sysu" else (),
            label_order=config.label_order,
            image_order="path",
            ids=tuple(ids.tolist()),
        )

    @property
    def image_bytes(self) -> int:
        """Of one image, decoded."""
        return self.height * self.width * CHANNELS

    def digest(self) -> str:
        """32 hexadecimal digits that differ wherever a field does."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def misfit(self, config: DataConfig) -> str | None:
        """The first setting of `config` that the pack was not made for, with both values."""
        for name in ("height", "width", "resize", "label_order", "splits"):
            packed, asked = getattr(self, name), getattr(config, name)
            if packed != asked and not (name == "splits" and self.dataset != "sysu"):
                return f"it was made with data.{name} = {packed!r}, this recipe has {asked!r}"
        return None


class Rows(NamedTuple):
    """The images of a pack, one entry of every column for each."""

    paths: tuple[str, ...]
    """Relative to the data set's folder."""
    pids: Int64
    cams: Int64
    modality: Int64
    sizes: Int64
    """Bytes of the source file."""
    crc32: Int64
    """Of the pixels."""

    def first(self, count: int) -> Rows:
        """The first `count` of them."""
        return Rows._make(column[:count] for column in self)


def rows_of(dataset: Index) -> Rows:
    """Every image of a data set, with the size of its file; without checksums yet.

    Raises:
        DataError: a file is not there.
    """
    images: dict[str, tuple[Path, int, int, int]] = {}
    for listed in (dataset.train, dataset.query, dataset.gallery):
        columns = (listed.pids.tolist(), listed.cams.tolist(), listed.modality.tolist())
        for path, *numbers in zip(listed.paths, *columns, strict=True):
            images[path] = (listed.root / path, *numbers)
    if dataset.name == "regdb":  # whose trials deal the same images out differently
        images = dict(sorted(images.items()))
    sizes = [size_of(file) for file, *_ in images.values()]
    table = np.array([row[1:] for row in images.values()], dtype=np.int64).reshape(-1, 3)
    blank = np.full(len(images), -1, dtype=np.int64)
    pids, cams, modality = (np.ascontiguousarray(column) for column in table.T)
    return Rows(tuple(images), pids, cams, modality, np.array(sizes, dtype=np.int64), blank)


def size_of(file: Path) -> int:
    """Bytes of a file.

    Raises:
        DataError: it is not there.
    """
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: unreadable image: {error.strerror}") from None


class Manifest(NamedTuple):
    """pack.json."""

    recipe: PackRecipe
    rows: Rows
    per_shard: int
    """Images of every shard but the last, which holds the rest."""

    def shards(self) -> list[tuple[str, int]]:
        """Name of every shard and the images it holds."""
        total, size = len(self.rows.paths), self.per_shard
        counts = [min(size, total - start) for start in range(0, total, size)]
        return [(f"pixels-{number:05d}.npy", count) for number, count in enumerate(counts)]

    def to_json(self, made_by: str) -> bytes:
        """The file's content."""
        names = {"paths": list(self.rows.paths)}
        columns = {n: c.tolist() for n, c in self.rows._asdict().items() if n != "paths"}
        value = {
            "format": FORMAT,
            "made_by": made_by,
            "recipe_hash": self.recipe.digest(),
            "recipe": asdict(self.recipe),
            "per_shard": self.per_shard,
            "images": {**names, **columns},
        }
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def read_manifest(file: Path) -> Manifest:
    """Parse and check a manifest, also an unfinished one.

    Raises:
        DataError: not there, damaged, or of another format; the message says what to do.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{file.parent}: no pack here ({file.name} is missing): {PACK_AGAIN}"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise DataError(f"{file}: damaged, not JSON: {PACK_AGAIN}") from None
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{file}: a pack of format {found!r}, this version reads format {FORMAT}: {PACK_AGAIN}"
        )
    try:
        return _parse(value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{file}: damaged ({type(error).__name__}: {error}): {PACK_AGAIN}"
        ) from None


def _parse(value: dict[str, Any]) -> Manifest:
    described = dict(value["recipe"])
    described["splits"], described["ids"] = tuple(described["splits"]), tuple(described["ids"])
    recipe = PackRecipe(**described)
    if recipe.digest() != value["recipe_hash"]:
        raise ValueError("the recipe and its hash disagree")
    columns = dict(value["images"])
    paths = tuple(map(str, columns.pop("paths")))
    rows = Rows(paths=paths, **{n: np.array(c, dtype=np.int64) for n, c in columns.items()})
    if any(len(column) != len(paths) for column in rows):
        raise ValueError("columns of images differ in length")
    per_shard = value["per_shard"]
    if type(per_shard) is not int or per_shard < 1:
        raise ValueError(f"per_shard is {per_shard!r}")
    return Manifest(recipe, rows, per_shard)
