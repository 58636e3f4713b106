"""A run folder or checkpoint in, the protocol's table out: what `fastreid-vi eval` does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastreid_vi import _console, methods
from fastreid_vi._flags import published
from fastreid_vi.config import Batch, Recipe
from fastreid_vi.evaluation import (
    DIRECTION_NAMES,
    Embeddings,
    Evaluation,
    RankMetrics,
    chance_llcm,
    chance_regdb,
    chance_sysu,
    llcm_table,
    regdb_table,
    sysu_table,
)
from fastreid_vi.evaluation.protocols import SETTINGS

if TYPE_CHECKING:
    from fastreid_vi.data import Index
    from fastreid_vi.methods.base import Method

TRIALS = 10
METRICS = ("R1", "R5", "R10", "R20", "mAP", "mINP")
EMBEDDINGS = "embeddings"


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
    path: Path, *, recipe: str | None = None, root: Path | None = None, trial: int | None = None
) -> Target:
    """Find out what `path` stands for.

    Args:
        path: a run folder, a checkpoint folder or a weights file.
        recipe: run.json or the name of a recipe, for weights outside a run folder.
        root: data set, if not the one the run was trained on.
        trial: of RegDB; must be the one of run.json, and is chosen for weights without one.
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


def load_method(target: Target, dataset: Index | None = None) -> tuple[Method, Any]:
    """The network with its weights, and the checkpoint's header (None for a bare weights file)."""
    from fastreid_vi import train

    num_ids = target.num_ids or (dataset.num_ids if dataset is not None else 0)
    method = methods.from_recipe(target.recipe, num_ids, weights="none")
    header = train.load_weights(
        method, target.weights, method=target.recipe.method, num_ids=num_ids
    )
    return method, header


def embed(
    target: Target,
    dataset: Index,
    *,
    device: str | None,
    progress: Callable[[str], Any],
) -> tuple[Embeddings, Embeddings, dict[str, Any]]:
    """Embed queries and gallery pool.

    Args:
        target: what is evaluated.
        dataset: its data.
        device: as in `train.choose_device`.
        progress: title -> context manager with a function of (done, total).
    Returns:
        Query and gallery embeddings, and what is known about the checkpoint.
    """
    from fastreid_vi import train
    from fastreid_vi.data import eval_loader
    from fastreid_vi.train.checkpoint import WEIGHTS

    place = train.choose_device(device)
    method, header = load_method(target, dataset)
    method.to(place)
    run, data = target.recipe.run, target.recipe.data
    found = []
    for title, images in (("queries", dataset.query), ("gallery", dataset.gallery)):
        batches = eval_loader(images, data, batch_size=data.identities * data.images)
        with progress(f"embedding {title}") as show:
            found.append(
                train.embed_all(
                    method,
                    _counted(batches, len(images), show),
                    images,
                    device=place,
                    precision=run.precision,
                    channels_last=run.channels_last,
                )
            )
    weights = target.weights.resolve()  # `best` and `last` are links that move
    checkpoint = {"path": str(weights.parent if weights.name == WEIGHTS else weights)}
    if header and header.epoch:  # a converted file knows no epoch
        checkpoint |= {"epoch": header.epoch, "step": header.step}
    return found[0], found[1], checkpoint


def score(dataset: Index, query: Embeddings, gallery: Embeddings) -> dict[str, Any]:
    """Every setting of the data set's protocol with chance beside it, JSON-ready.

    Args:
        dataset: says which protocol.
        query: infrared test images.
        gallery: visible test images, the whole pool.
    """
    protocol, trials, table, chance = _SCORES[dataset.name](dataset, query, gallery)
    settings = {
        name: {
            "mean": _plain(found.mean),
            "std": _plain(found.std),
            "chance": _plain(chance[name]),
            "trials": [_plain(trial) for trial in found.trials],
            "valid_queries": int(np.count_nonzero(found.mean.valid)),
        }
        for name, found in table.items()
    }
    return {
        "protocol": protocol,
        "trials": trials,
        "queries": len(query.ids),
        "gallery": len(gallery.ids),
        "identities": len(np.unique(query.ids)),
        "settings": settings,
    }


_Scored = tuple[str, int, dict[str, Evaluation], dict[str, RankMetrics]]


def _score_sysu(dataset: Any, query: Embeddings, gallery: Embeddings) -> _Scored:
    table = sysu_table(query, gallery, dataset.permutations, trials=TRIALS)
    of = (query.ids, query.cams, gallery.ids, gallery.cams)
    chance = {f"{m}/{k}": chance_sysu(*of, mode=m, shots=k) for m, k in SETTINGS}
    return "sysu-official", TRIALS, table, chance


def _score_regdb(dataset: Any, query: Embeddings, gallery: Embeddings) -> _Scored:
    chance = {
        "vis_to_ir": chance_regdb(gallery.ids, query.ids),
        "ir_to_vis": chance_regdb(query.ids, gallery.ids),
    }
    return f"regdb-trial-{dataset.trial}", 1, regdb_table(query, gallery), chance


def _score_llcm(dataset: Any, query: Embeddings, gallery: Embeddings) -> _Scored:
    infrared, visible = (query.ids, query.cams), (gallery.ids, gallery.cams)
    chance = {
        "ir_to_vis": chance_llcm(*infrared, *visible),
        "vis_to_ir": chance_llcm(*visible, *infrared),
        "vis_to_ir/released": chance_llcm(*visible, *infrared, vis_to_ir="released"),
    }
    return "llcm-paper", TRIALS, llcm_table(query, gallery, trials=TRIALS), chance


_SCORES = {"sysu": _score_sysu, "regdb": _score_regdb, "llcm": _score_llcm}


def keep(folder: Path, query: Embeddings, gallery: Embeddings, result: dict[str, Any]) -> None:
    """Write the embeddings, and the result under "test" in result.json beside what is there.

    Raises:
        TrainError: they cannot be written; earlier files stay whole.
    """
    from fastreid_vi import train
    from fastreid_vi.train.files import write_json

    for name, embeddings in (("query", query), ("gallery", gallery)):
        train.save_embeddings(folder / EMBEDDINGS / name, embeddings)
    write_json(folder / "result.json", {**read_result(folder), "test": result})


def read_result(folder: Path) -> dict[str, Any]:
    """result.json, or nothing where there is none yet.

    Raises:
        RunError: not a JSON object.
    """
    path = folder / "result.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunError(f"{path}: not JSON: {_console.one_line(error)}") from None
    if not isinstance(values, dict):
        raise RunError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def heading(result: dict[str, Any]) -> str:
    """What the table below it is about."""
    checkpoint = result["checkpoint"]
    epoch = f", epoch {checkpoint['epoch']}" if "epoch" in checkpoint else ""
    trials = result["trials"]
    values = f"mean ± std of {trials} trials, %" if trials > 1 else "one of ten trials, %"
    sysu = result["protocol"].startswith("sysu")
    queries, images = (
        ("queries", "gallery images") if sysu else ("infrared images", "visible images")
    )
    return (
        f"{result['method']} ({checkpoint['path']}{epoch}) on {result['data_root']}\n"
        f"protocol {result['protocol']}: {result['queries']} {queries} of {result['identities']} "
        f"identities, {result['gallery']} {images}; {values}"
    )


def table_text(result: dict[str, Any]) -> str:
    """The result as a table for people, percent, chance below each setting."""
    rows: list[list[str]] = []
    one = result["trials"] == 1
    gap = "" if one else "       "  # as wide as a deviation
    for setting, found in result["settings"].items():
        mean, std, chance = found["mean"], found["std"], found["chance"]
        rows.append([setting_text(setting)])
        spread = {m: "" if one else f" ± {100 * std[m]:.2f}" for m in METRICS}
        rows[-1] += [f"{100 * mean[m]:.2f}{spread[m]}" for m in METRICS]
        rows.append(["  chance", *(f"{100 * chance[m]:.2f}{gap}" for m in METRICS)])
    return _console.table(["", *(f"{metric}{gap}" for metric in METRICS)], rows)


def setting_text(setting: str) -> str:
    """ "all/10" -> "all, 10 shots"; directions in words."""
    if setting in DIRECTION_NAMES:
        return DIRECTION_NAMES[setting]
    mode, shots = setting.split("/")
    return f"{mode}, {shots} shot" + ("" if shots == "1" else "s")


def evaluation_of(found: dict[str, Any]) -> Evaluation:
    """Mean and deviation of one setting of `score`'s result."""
    return Evaluation(metrics_of(found["mean"]), metrics_of(found["std"]), [])


def metrics_of(values: dict[str, Any]) -> RankMetrics:
    """Inverse of `_plain`."""
    nothing = np.zeros(0, dtype=bool)
    return RankMetrics(np.asarray(values["cmc"]), values["mAP"], values["mINP"], nothing)


def _plain(metrics: RankMetrics) -> dict[str, Any]:
    ranks = {f"R{k}": float(metrics.cmc[k - 1]) for k in (1, 5, 10, 20)}
    cmc = [float(value) for value in metrics.cmc]
    return {**ranks, "mAP": float(metrics.mAP), "mINP": float(metrics.mINP), "cmc": cmc}


def _counted(
    batches: Iterable[Batch], total: int, show: Callable[[int, int], None]
) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.labels)
        show(done, total)
