"""Galleries of the SYSU-MM01 protocol: which images each trial searches."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np

from fastreid_vi.evaluation.arrays import Int, at_least_one, choice, integers, to_numpy

Mode = Literal["all", "indoor"]
PermutationTable: TypeAlias = Mapping[tuple[int, int], Any] | Literal["random"]

GALLERY_CAMERAS: Final[dict[str, tuple[int, ...]]] = {"all": (1, 2, 4, 5), "indoor": (1, 2)}


class _Images(NamedTuple):
    features: Any
    ids: Any
    cams: Any = None
    paths: Any = None


class Embeddings(_Images):
    """Features of n images and what is known about them; a tuple of the first four.

    Attributes:
        features: [n, D] real numbers.
        ids: [n] identities.
        cams: [n] camera numbers.
        paths: [n] paths; the file name of a gallery image is its number: cam1/0002/0001.jpg.
        modality: [n] 0 visible, 1 infrared.
        normalized: the rows are unit vectors.
        method: name of the method that embedded.
        checkpoint: SHA-256 of its weights file.
        dataset: data set whose protocol tests them: "sysu", "regdb" or "llcm".
        trial: of RegDB, 1 to 10.
        root: folder that the paths are relative to.
        permutations: SYSU-MM01's galleries, as for `evaluate_sysu`.
        spectra: further feature sets of the same images, for MSER: "r", "g", "b" -> [n, D].
        details: what else is known, JSON: the weights' path, epoch and step, versions.
    """

    modality: Any = None
    normalized: bool | None = None
    method: str | None = None
    checkpoint: str | None = None
    dataset: str | None = None
    trial: int | None = None
    root: str | None = None
    permutations: Any = None
    spectra: Mapping[str, Any] | None = None
    details: Mapping[str, Any] | None = None

    def __new__(
        cls,
        features: Any,
        ids: Any,
        cams: Any = None,
        paths: Any = None,
        modality: Any = None,
        normalized: bool | None = None,
        method: str | None = None,
        checkpoint: str | None = None,
        dataset: str | None = None,
        trial: int | None = None,
        root: str | None = None,
        permutations: Any = None,
        spectra: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Embeddings:
        """Four fields of a tuple and, beside them, the other attributes."""
        known = {name: value for name, value in locals().items() if name in FACTS}
        self = super().__new__(cls, features, ids, cams, paths)
        self.__dict__.update(known)
        return self

    def _replace(self, **changes: Any) -> Embeddings:
        """The same with other fields or attributes."""
        return Embeddings(**{**self._asdict(), **self.__dict__, **changes})


FACTS: Final = tuple(Embeddings.__annotations__)
"""Attributes of `Embeddings` beside its four fields."""


def ids_and_cams(name: str, images: Embeddings) -> tuple[Int, Int]:
    """Identities and cameras, one per image."""
    count = len(images.ids)
    if not count:
        raise ValueError(f"{name}: expected one image at least, got none")
    if images.cams is None:
        raise ValueError(f"{name}.cams: expected {count} camera numbers, got None")
    return integers(f"{name}.ids", images.ids, count), integers(f"{name}.cams", images.cams, count)


def sysu_galleries(
    gallery: Embeddings,
    permutations: PermutationTable,
    *,
    mode: Mode = "all",
    shots: int = 1,
    trials: int = 10,
) -> list[Int]:
    """Rows of `gallery` that each trial searches, arguments as for `evaluate_sysu`.

    Returns:
        One int64 vector per trial, ascending by (camera, pid, image number); for "random" by
        (pid, camera).
    Raises:
        ValueError: the folder or image that is not there.
    Spec: evaluation, 2.1 and 3.2.
    """
    return galleries_of(gallery, permutations, [(mode, shots)], trials)[0]


def galleries_of(
    gallery: Embeddings,
    permutations: PermutationTable,
    settings: Sequence[tuple[Mode, int]],
    trials: int,
) -> list[list[Int]]:
    """`sysu_galleries` of several (mode, shots), from one look at the pool."""
    at_least_one("trials", trials)
    for mode, shots in settings:
        choice("mode", mode, Mode)
        at_least_one("shots", shots)
        if isinstance(permutations, str) and shots != 1:
            raise ValueError(f'shots: permutations "random" are single-shot, got {shots}')
    if isinstance(permutations, str) and permutations != "random":
        raise ValueError(f'permutations: expected a mapping or "random", got {permutations!r}')
    cameras = sorted({camera for mode, _ in settings for camera in GALLERY_CAMERAS[mode]})
    pool = _folders(gallery, cameras)
    galleries = []
    for mode, shots in settings:
        folders = {key: pool[key] for key in pool if key[0] in GALLERY_CAMERAS[mode]}
        if not folders:
            raise ValueError(
                f"gallery.cams: none of {len(gallery.ids)} images is from cameras "
                f"{list(GALLERY_CAMERAS[mode])}, the gallery of {mode!r}"
            )
        if isinstance(permutations, str):
            galleries.append(_random_galleries(folders, trials))
            continue
        chosen = [
            _chosen(permutations, camera, pid, numbers, rows, shots, trials)
            for (camera, pid), (numbers, rows) in folders.items()
        ]
        galleries.append(list(np.concatenate(chosen, axis=1)))
    return galleries


_Folders: TypeAlias = dict[tuple[int, int], tuple[Int, Int]]


def _folders(gallery: Embeddings, cameras: Sequence[int]) -> _Folders:
    """(camera, pid), ascending -> image numbers, ascending, and their rows."""
    count = len(gallery.ids)
    ids, cams = ids_and_cams("gallery", gallery)
    if gallery.paths is None or len(gallery.paths) != count:
        got = "None" if gallery.paths is None else len(gallery.paths)
        raise ValueError(f"gallery.paths: expected {count} paths, got {got}")
    rows = np.flatnonzero(np.isin(cams, cameras))
    if not len(rows):
        return {}
    numbers = np.array([_number(str(gallery.paths[row])) for row in rows], np.int64)
    ids, cams = ids[rows], cams[rows]
    order = np.lexsort((numbers, ids, cams))
    rows, numbers, ids, cams = rows[order], numbers[order], ids[order], cams[order]
    new = (np.diff(cams) != 0) | (np.diff(ids) != 0)
    if (twice := ~new & (np.diff(numbers) == 0)).any():
        first, second = rows[twice.argmax()], rows[twice.argmax() + 1]
        raise ValueError(
            f"gallery.paths: {gallery.paths[first]} and {gallery.paths[second]} are one image of "
            f"camera {cams[twice.argmax()]}, pid {ids[twice.argmax()]}"
        )
    limits = [0, *(np.flatnonzero(new) + 1).tolist(), len(rows)]
    return {(int(cams[a]), int(ids[a])): (numbers[a:b], rows[a:b]) for a, b in pairwise(limits)}


def _number(path: str) -> int:
    """Image number: the file name without its suffix."""
    name = path.replace("\\", "/").rpartition("/")[2]
    stem = name.rpartition(".")[0] or name
    if not stem.isdecimal():
        raise ValueError(f"gallery.paths: expected a file name like 0001.jpg, got {path!r}")
    return int(stem)


def _chosen(
    permutations: Mapping[tuple[int, int], Any],
    camera: int,
    pid: int,
    numbers: Int,
    rows: Int,
    shots: int,
    trials: int,
) -> Int:
    """Rows of one folder in each trial, ascending by image number, [trials, min(shots, m)]."""
    name = f"permutations of camera {camera}, pid {pid}"
    if (camera, pid) not in permutations:
        raise ValueError(f"{name}: missing, but the gallery has {len(rows)} images of it")
    table = to_numpy(name, permutations[camera, pid])
    if table.ndim != 2 or table.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers [trials, m], got {table.dtype} {table.shape}")
    if len(table) < trials:
        raise ValueError(f"trials: {name} have {len(table)} rows, got {trials}")
    if not table.shape[1]:
        raise ValueError(f"{name}: empty, but the gallery has {len(rows)} images of it")
    wanted = np.sort(table[:trials, :shots].astype(np.int64), axis=1)
    at = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
    if (absent := numbers[at] != wanted).any():
        trial, slot = np.argwhere(absent)[0]
        raise ValueError(
            f"{name}: trial {trial} takes image {wanted[trial, slot]}, which is not among the "
            f"{len(rows)} in the gallery"
        )
    if (np.diff(at, axis=1) == 0).any():
        raise ValueError(f"{name}: a trial takes one image twice")
    return rows[at]


def _random_galleries(folders: _Folders, trials: int) -> list[Int]:
    """AGW's galleries: seed t, then one draw per person and camera."""
    galleries = []
    by_person = sorted(folders, key=lambda folder: folder[::-1])
    for trial in range(trials):
        draw = random.Random(trial)
        galleries.append(
            np.array([draw.choice(folders[folder][1].tolist()) for folder in by_person], np.int64)
        )
    return galleries
