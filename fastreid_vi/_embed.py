"""Images to embeddings: what `fastreid-vi embed` does, and the first half of `eval`."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from fastreid_vi._evaluate import RunError, Target, load_method, open_dataset, open_target
from fastreid_vi.config import INFRARED, VISIBLE, Batch, DatasetName
from fastreid_vi.evaluation import Embeddings, save_embeddings
from fastreid_vi.evaluation.embeddings import find_sides

if TYPE_CHECKING:
    from fastreid_vi._console import Console
    from fastreid_vi.data import ImageList, Index

Layout = Literal["auto", "folder", "sysu", "regdb", "llcm"]
MODALITIES = {"visible": VISIBLE, "infrared": INFRARED}
ORIGINAL = "original"
# The further ones of MCJA's test, for a method that names none itself.
SPECTRA = ("r", "g", "b")
# What a folder of a layout must have.
MARKS: dict[DatasetName, tuple[str, ...]] = {
    "sysu": ("exp", "cam1", "cam3"),
    "regdb": ("idx", "Visible", "Thermal"),
    "llcm": ("idx", "test_vis", "test_nir"),
}
# How far from 1 the norms of unit vectors may be: those of a 16-bit network are.
UNIT = 1e-2


class Embedded(NamedTuple):
    """What a network made of lists of images."""

    sides: dict[str, Embeddings]
    checkpoint: dict[str, Any]
    """Path of the weights, their SHA-256, epoch and step where they are known."""
    seconds: float
    """Time for all images, without loading the network."""


def embed_lists(
    target: Target,
    lists: Mapping[str, ImageList],
    *,
    device: str | None = None,
    spectra: bool | None = False,
    num_ids: int = 0,
    batch_size: int | None = None,
    progress: Callable[[str], Any],
) -> Embedded:
    """Embed lists of images with one network.

    Args:
        target: the network; its recipe says how images are read.
        lists: side -> images.
        device: as in `train.choose_device`.
        spectra: also embed visible images' single channels, for MSER; None for a method that is
            tested so.
        num_ids: training identities, for weights that do not say it.
        batch_size: images in a batch; by default as many as in training.
        progress: title -> context manager with a function of (done, total).
    Raises:
        RunError, TrainError, DataError: weights, device or an image that does not fit.
    """
    from fastreid_vi import train
    from fastreid_vi.data import eval_loader
    from fastreid_vi.train.checkpoint import WEIGHTS

    place = train.choose_device(device)
    method, header = load_method(target, num_ids)
    method.to(place)
    own = tuple(name for name in getattr(method, "spectra", ()) if name != ORIGINAL)
    further = (own or SPECTRA) if spectra or (spectra is None and own) else ()
    run, data = target.recipe.run, target.recipe.data
    size = batch_size or data.identities * data.images

    def features(title: str, images: ImageList, spectrum: Any) -> Embeddings:
        batches = eval_loader(images, data, batch_size=size, spectrum=spectrum, device=place)
        with progress(title) as show:
            return train.embed_all(
                method,
                _counted(batches, len(images), show),
                images,
                device=place,
                precision=run.precision,
                channels_last=run.channels_last,
            )

    sides, began = {}, time.perf_counter()
    for side, images in lists.items():
        found = features(f"embedding {side}", images, ORIGINAL)
        if further and (images.modality == VISIBLE).all():
            parts = {n: features(f"embedding {side}, {n}", images, n).features for n in further}
            found = found._replace(spectra=parts)
        sides[side] = found._replace(root=str(images.root.resolve()))
    seconds = time.perf_counter() - began

    weights = target.weights.resolve()  # `best` and `last` are links that move
    checkpoint: dict[str, Any] = {
        "path": str(weights.parent if weights.name == WEIGHTS else weights),
        "sha256": file_hash(weights),
    }
    if header and header.epoch:  # a converted file knows no epoch
        checkpoint |= {"epoch": header.epoch, "step": header.step}
    facts = {
        "method": target.recipe.method,
        "checkpoint": checkpoint["sha256"],
        "details": {"weights": str(weights), **checkpoint},
    }
    sides = {
        name: side._replace(normalized=are_unit(side.features), **facts)
        for name, side in sides.items()
    }
    return Embedded(sides, checkpoint, seconds)


def embed_dataset(target: Target, dataset: Index, **options: Any) -> Embedded:
    """Embed queries and gallery pool of a data set, arguments as for `embed_lists`.

    Returns:
        The sides "query" and "gallery", with what the protocol needs to know of the data set.
    """
    lists = {"query": dataset.query, "gallery": dataset.gallery}
    found = embed_lists(target, lists, num_ids=dataset.num_ids, **options)
    facts: dict[str, Any] = {"dataset": dataset.name, "trial": getattr(dataset, "trial", None)}
    sides = {name: side._replace(**facts) for name, side in found.sides.items()}
    permutations = getattr(dataset, "permutations", None)
    sides["gallery"] = sides["gallery"]._replace(permutations=permutations)
    return found._replace(sides=sides)


def detect(root: Path) -> Literal["folder", "sysu", "regdb", "llcm"]:
    """The official layout of a folder, or "folder" for any other one."""
    for layout, marks in MARKS.items():
        if all((root / name).is_dir() for name in marks):
            return layout
    return "folder"


def embed(
    run: Path,
    folder: Path,
    *,
    out: Path,
    recipe: str | None = None,
    layout: Layout = "auto",
    modality: str | None = None,
    trial: int | None = None,
    spectra: bool | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Embed a folder of images, or the test images of a data set, and keep the embeddings.

    Returns:
        What was done, JSON-ready.
    Raises:
        RunError, EmbeddingsError, TrainError, DataError: one line that says what does not fit.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder")
    earlier = find_sides(out) if out.is_dir() else {}
    if (earlier or (out.is_dir() and any(out.iterdir()))) and not overwrite:
        raise RunError(f"{out}: is not empty; --overwrite replaces the embeddings in it")
    found = detect(folder) if layout == "auto" else layout
    target = open_target(run, recipe=recipe, root=folder, pack="none")
    if found == "folder":
        if trial is not None:
            raise RunError(f"--trial {trial}: {folder} is not RegDB, which alone has trials")
        images = images_of(folder, modality)
        out.mkdir(parents=True, exist_ok=True)  # before the long work
        made = embed_lists(
            target,
            {"images": images},
            device=device,
            spectra=spectra,
            batch_size=batch_size,
            progress=console.progress,
        )
    else:
        if modality is not None:
            raise RunError(
                f"--modality: {folder} has both, as {found!r} is laid out; --layout folder for one"
            )
        dataset = open_dataset(of_layout(target, found, trial), folder)
        out.mkdir(parents=True, exist_ok=True)
        made = embed_dataset(
            target,
            dataset,
            device=device,
            spectra=spectra,
            batch_size=batch_size,
            progress=console.progress,
        )
    save_embeddings(out, **made.sides)
    for name in set(earlier) - set(made.sides):
        for suffix in (".safetensors", ".json"):
            (out / f"{name}{suffix}").unlink(missing_ok=True)
    return summary(out, folder, found, made)


def images_of(place: Path, modality: str | None) -> ImageList:
    """One image, or every image below a folder, of one modality.

    Raises:
        RunError: the modality is neither given nor told by the folders' names.
        DataError: no image.
    """
    from fastreid_vi.data.images import image_list, images_in
    from fastreid_vi.evaluation.directions import side_of

    if place.is_file():
        images = image_list(place.parent, [(0, -1, 0, place.name)], [VISIBLE], [-1])
    else:
        images = images_in(place)
    if modality is None:
        told = {side_of(images.file(row).resolve().as_posix()) for row in range(len(images))}
        modality = told.pop() if len(told) == 1 else None
        if modality is None:
            raise RunError(
                f"{place}: visible or infrared? The folders' names do not say it: "
                "--modality visible or --modality infrared"
            )
    wanted = np.full(len(images), MODALITIES[modality], np.int64)
    return dataclasses.replace(images, modality=wanted)


def of_layout(target: Target, layout: DatasetName, trial: int | None) -> Any:
    """The target's recipe on another data set, or on the trial it may be tested on.

    Raises:
        RunError: RegDB without a trial, or with another one than the network was trained on.
    """
    recipe = target.recipe
    if layout != "regdb":
        if trial is not None:
            raise RunError(f"--trial {trial}: only RegDB has trials, not {layout!r}")
        return dataclasses.replace(recipe, dataset=layout)
    if recipe.dataset == "regdb":
        if target.folder is not None and trial not in (None, recipe.data.trial):
            raise RunError(
                f"{target.weights}: trained on trial {recipe.data.trial} of RegDB, cannot be "
                f"embedded on trial {trial}: its test persons may have been trained on"
            )
        trial = trial or recipe.data.trial
    elif trial is None:
        raise RunError("which of RegDB's ten trials? --trial N")
    data = dataclasses.replace(recipe.data, trial=trial)
    return dataclasses.replace(recipe, dataset=layout, data=data)


def summary(out: Path, folder: Path, layout: str, made: Embedded) -> dict[str, Any]:
    """What `embed` did, JSON-ready."""
    sides: dict[str, dict[str, Any]] = {}
    for name, side in made.sides.items():
        modality = np.unique(side.modality).tolist()
        sides[name] = {
            "images": len(side.ids),
            "dimensions": int(side.features.shape[1]),
            "modality": [word for word, value in MODALITIES.items() if value in modality],
            "normalized": side.normalized,
            "spectra": [ORIGINAL, *(side.spectra or ())],
        }
    passes = sum(side["images"] * len(side["spectra"]) for side in sides.values())
    first = next(iter(made.sides.values()))
    return {
        "out": str(out),
        "root": str(folder),
        "layout": layout,
        "method": first.method,
        "checkpoint": made.checkpoint,
        "sides": sides,
        "seconds": made.seconds,
        "images_per_second": passes / made.seconds,
    }


def text(made: Mapping[str, Any]) -> str:
    """The summary for people."""
    lines = [f"{made['method']} ({made['checkpoint']['path']}) on {made['root']}"]
    for name, side in made["sides"].items():
        unit = "unit vectors" if side["normalized"] else "not normalised"
        views = f", spectra {', '.join(side['spectra'])}" if len(side["spectra"]) > 1 else ""
        lines.append(
            f"{name}: {side['images']} {' and '.join(side['modality'])} images, "
            f"{side['dimensions']} numbers each, {unit}{views}"
        )
    lines.append(
        f"{made['images_per_second']:.0f} images per second, {made['seconds']:.1f} s; "
        f"kept in {made['out']}"
    )
    return "\n".join(lines)


def are_unit(features: Any) -> bool:
    """Whether all rows are unit vectors."""
    norms = np.sqrt(np.einsum("nd,nd->n", features, features, dtype=np.float64))
    return bool((np.abs(norms - 1) < UNIT).all())


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _counted(
    batches: Iterable[Batch], total: int, show: Callable[[int, int], None]
) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.labels)
        show(done, total)
