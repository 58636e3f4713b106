"""AGW's preprocessed training set of SYSU-MM01: four `.npy` files beside the images.

train_rgb_resized_img.npy and train_ir_resized_img.npy hold uint8 [N, 288, 144, 3], resized with
Lanczos; train_rgb_resized_label.npy and train_ir_resized_label.npy the rank of the person. No row
says which file it came from: it follows from the order, person by person, camera by camera, image
by image. Test images are not in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastreid_vi.config import INFRARED, VISIBLE, DataConfig
from fastreid_vi.data.datasets import SysuMM01
from fastreid_vi.data.images import DataError, ImageList, Int64
from fastreid_vi.data.pack import Pixels

HEIGHT, WIDTH, RESIZE = 288, 144, "lanczos"
SIDES = {VISIBLE: "rgb", INFRARED: "ir"}

_MAKE = "make them again from these images, or use a pack of ours (fastreid-vi data pack)"


class AgwArrays(Pixels):
    """AGW's arrays in the folder of a data set, memory-mapped.

    Args:
        root: the data set, laid out as SYSU-MM01, with the arrays in it.
        config: must be of AGW's size and filter.
    Raises:
        DataError: a recipe that does not fit, a missing file, or arrays of other images.
    Spec: datasets 4.
    """

    def __init__(self, root: Path, config: DataConfig) -> None:
        self.root, self.config = root, config
        asked = (config.height, config.width, config.resize)
        if asked != (HEIGHT, WIDTH, RESIZE):
            raise DataError(
                f'data.packed "agw": its arrays are {HEIGHT} x {WIDTH} by {RESIZE}, this recipe '
                f"needs {asked[0]} x {asked[1]} by {asked[2]}: use a pack of ours "
                "(fastreid-vi data pack)"
            )
        everything = SysuMM01(root, splits=config.splits, image_order="identity").train
        shards = []
        self._row: dict[str, int] = {}
        for modality, side in SIDES.items():
            part = everything.select(everything.modality == modality)
            shards.append(self._side(side, part))
            start = len(self._row)
            self._row |= {path: start + i for i, path in enumerate(part.paths)}
        super().__init__(shards, HEIGHT, WIDTH, f"AGW's arrays in {root}")

    def __reduce__(self) -> tuple[Any, ...]:
        return AgwArrays, (self.root, self.config)

    def _side(self, side: str, images: ImageList) -> Any:
        file = self.root / f"train_{side}_resized_img.npy"
        pixels = _load(file)
        shape = (len(images), HEIGHT, WIDTH, 3)
        if pixels.dtype != np.uint8 or pixels.shape != shape:
            raise DataError(
                f"{file}: expected uint8 {list(shape)} for the {len(images)} training images of "
                f"{self.root}, got {pixels.dtype} {list(pixels.shape)}: {_MAKE}"
            )
        file = self.root / f"train_{side}_resized_label.npy"
        labels = np.asarray(_load(file)).reshape(-1)
        if labels.shape != images.labels.shape or (labels != images.labels).any():
            differ = labels[: len(images)] != images.labels[: len(labels)]
            at = int(np.argmax(differ)) if differ.any() else min(len(labels), len(images))
            raise DataError(
                f"{file}: the labels are those of other images, first at row {at}: {_MAKE}"
            )
        return pixels

    def holds(self, images: ImageList) -> bool:
        """Whether all images of a list are training images."""
        return all(path in self._row for path in images.paths)

    def rows_of(self, images: ImageList) -> Int64:
        """Where the images of a list are: int64 [n].

        Raises:
            DataError: an image that is none of the training set.
        """
        for path in images.paths:
            if path not in self._row:
                raise DataError(f'data.packed "agw": {path} is no training image of {self.root}')
        return np.array([self._row[path] for path in images.paths], dtype=np.int64)


def _load(file: Path) -> Any:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f'{file}: missing, needed for data.packed "agw": {_MAKE}') from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError):
        raise DataError(f"{file}: damaged or not an array of numbers: {_MAKE}") from None
