"""Run folders and checkpoints: what they hold, their network, and the result kept beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastreid_vi import methods
from fastreid_vi._flags import packed, published
from fastreid_vi.config import Recipe

if TYPE_CHECKING:
    from fastreid_vi._console import Console
    from fastreid_vi.data import Index
    from fastreid_vi.evaluation import Embeddings
    from fastreid_vi.methods.base import Method


class RunError(ValueError):
    """A run cannot be evaluated or shown; one line that says why."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is evaluated: a recipe, where its weights are and where its data are."""

    recipe: Recipe
    weights: Path
    """Weights file."""
    root: Path
    """Data set."""
    num_ids: int
    folder: Path | None
    """Run folder; None for a checkpoint that lies elsewhere."""


def open_target(
    path: Path,
    *,
    recipe: str | None = None,
    root: Path | None = None,
    trial: int | None = None,
    pack: str | None = None,
) -> Target:
    """Find out what `path` stands for.

    Args:
        path: a run folder, a checkpoint folder or a weights file.
        recipe: run.json or the name of a recipe, for weights outside a run folder.
        root: data set, if not the one the run was trained on.
        trial: of RegDB; must be the one of run.json, and is chosen for weights without one.
        pack: where images are taken from, if not as the run did: "none" for their files.
    Raises:
        RunError, TrainError: nothing there, or not enough is known about it; says what to add.
    """
    from fastreid_vi.train.checkpoint import find, load_safetensors

    if not path.exists():
        raise RunError(f"{path}: no such run folder or checkpoint")
    folder = next(
        (p for p in (path, *path.resolve().parents[:3]) if (p / "run.json").is_file()), None
    )
    if recipe is None and folder is None:
        raise RunError(f"{path}: no run.json beside it; name the recipe of these weights: --recipe")
    weights = find(path)
    if recipe is not None and not Path(recipe).is_file():
        header = load_safetensors(weights)[1]
        found, num_ids, data = published(recipe), header.num_ids if header else 0, None
        found = of_trial(found, trial)
    else:
        record = read_record(Path(recipe) if recipe is not None else folder or path)
        found, num_ids, data = record.recipe, record.num_ids, record.root
        if of_trial(found, trial) != found:
            raise RunError(
                f"{path}: trained on trial {found.data.trial} of RegDB, cannot be evaluated on "
                f"trial {trial}: its test persons may have been trained on"
            )
    data = root or data
    if data is None:
        raise RunError(f"{path}: name the data set to evaluate on: --data-root")
    if pack is not None:
        images = dataclasses.replace(found.data, packed=packed(pack))
        found = dataclasses.replace(found, data=images)
    return Target(recipe=found, weights=weights, root=data, num_ids=num_ids, folder=folder)


def read_record(path: Path) -> Any:
    """run.json as `train.RunRecord`."""
    from fastreid_vi import train

    return train.read_run(path, lambda method, _: methods.recipe_type(method))


def of_trial(recipe: Recipe, trial: int | None) -> Recipe:
    """The recipe on another trial of RegDB; None leaves it as it is.

    Raises:
        RunError: the data set has no trials.
        ValueError: there is no such trial.
    """
    if trial is None:
        return recipe
    if recipe.dataset != "regdb":
        raise RunError(f"--trial {trial}: only RegDB has trials, not {recipe.dataset!r}")
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, trial=trial))


def open_dataset(recipe: Recipe, root: Path) -> Index:
    """The data set of a recipe.

    Raises:
        DataError: it is not there or not whole.
    """
    from fastreid_vi.data import LLCM, RegDB, SysuMM01

    data = recipe.data
    order, skip = data.label_order, data.skip_broken
    if recipe.dataset == "regdb":
        return RegDB(root, trial=data.trial, label_order=order, skip_broken=skip)
    if recipe.dataset == "llcm":
        return LLCM(root, label_order=order, skip_broken=skip)
    return SysuMM01(root, splits=data.splits, label_order=order, skip_broken=skip)


def load_method(target: Target, num_ids: int = 0) -> tuple[Method, Any]:
    """The network with its weights, and the checkpoint's header (None for a bare weights file).

    Args:
        target: what to load.
        num_ids: training identities, for weights that do not say it.
    Raises:
        RunError, TrainError: nobody says how many, or the weights do not fit.
    """
    from fastreid_vi import train

    num_ids = target.num_ids or num_ids
    if not num_ids:
        raise RunError(
            f"{target.weights}: does not say how many identities it was trained on; "
            "fastreid-vi convert writes files that do"
        )
    method = methods.from_recipe(target.recipe, num_ids, weights="none")
    header = train.load_weights(
        method, target.weights, method=target.recipe.method, num_ids=num_ids
    )
    return method, header


def embed_run(
    args: Any, console: Console
) -> tuple[Embeddings, Embeddings, dict[str, Any], Path | None]:
    """Embed the test images of a run or checkpoint, as the arguments of `eval` say.

    Returns:
        Query, gallery, what the table's heading says, and the folder that keeps the result.
    """
    from fastreid_vi._embed import embed_dataset

    target = open_target(
        args.run, recipe=args.recipe, root=args.data_root, trial=args.trial, pack=args.pack
    )
    made = embed_dataset(
        target,
        open_dataset(target.recipe, target.root),
        device=args.device,
        spectra=None if args.rerank == "auto" else args.rerank == "mser",
        progress=console.progress,
    )
    about = {
        "method": target.recipe.method,
        "data_root": str(target.root),
        "checkpoint": made.checkpoint,
    }
    return made.sides["query"], made.sides["gallery"], about, args.out or target.folder
