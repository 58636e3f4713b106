"""What the indexes of all data sets share: lists of images, held-out persons, unreadable files."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import ClassVar

import numpy as np

from fastreid_vi.config import INFRARED, VISIBLE, DatasetName
from fastreid_vi.data.images import DataError, ImageList, relabel

_log = logging.getLogger("fastreid_vi.data")


class Index:
    """Which image is whose. Subclasses read a layout and fill the attributes.

    Attributes:
        name: the layout, as recipes name it.
        root: folder of the data set.
        train: labelled training images.
        query: infrared test images.
        gallery: visible test images.
        num_ids: training labels.
    """

    name: ClassVar[DatasetName]
    root: Path
    train: ImageList
    query: ImageList
    gallery: ImageList
    num_ids: int

    def hold_out(self, n: int, seed: int) -> tuple[ImageList, ImageList]:
        """Split `n` training identities off for validation.

        Only identities with images of both modalities are drawn; the draw depends on `seed` only.

        Returns:
            (training images relabelled 0..C-n-1, validation images with label -1).
        Raises:
            DataError: fewer than `n` identities can be drawn, or none would be left to train on.
        """
        if n < 0:
            raise ValueError(f"n: expected >= 0, got {n}")
        pids = np.unique(self.train.pids)
        both = np.intersect1d(
            self.train.pids[self.train.modality == VISIBLE],
            self.train.pids[self.train.modality == INFRARED],
        )
        if n > len(both) or n >= len(pids):
            raise DataError(
                f"cannot hold out {n} identities: {len(pids)} training identities, "
                f"{len(both)} of them in both modalities, and at least one must stay"
            )
        # Key word 0 is the seed, word 1 the epoch elsewhere: epoch 0 is never trained.
        random = np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)))
        held = np.isin(self.train.pids, random.choice(both, n, replace=False))
        train, validation = self.train.select(~held), self.train.select(held)
        return train.with_labels(relabel(train.labels)), validation.with_labels(
            np.full(len(validation), -1)
        )

    def _strike(self, gallery: ImageList) -> None:
        """Forget these gallery images, which cannot be read, in whatever else names them."""

    def _leave_out_broken(self) -> None:
        from fastreid_vi.data.findings import broken_images

        broken: dict[str, str] = {}
        for name in ("train", "query", "gallery"):
            images: ImageList = getattr(self, name)
            found = broken_images(images)
            broken |= {images.paths[i]: problem for i, problem in found.items()}
            if name == "gallery" and found:
                self._strike(images.select(list(found)))
            setattr(self, name, images.select(np.setdiff1d(np.arange(len(images)), list(found))))
        if broken:
            first = min(broken)
            _log.warning(
                "%s: left out %d unreadable images, first %s (%s)",
                self.root, len(broken), first, broken[first],
            )  # fmt: skip
            missing = set(range(self.num_ids)) - set(self.train.labels.tolist())
            if missing or not len(self.query) or not len(self.gallery):
                raise DataError(
                    f"{self.root}: unreadable images leave a training identity, "
                    f"the queries or the gallery empty, first {first}"
                )


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name.

    Raises:
        DataError: it cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}") from None
