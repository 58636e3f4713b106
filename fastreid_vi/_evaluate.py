"""A run folder or checkpoint in, the protocol's table out: what `fastreid-vi eval` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastreid_vi import _console, methods
from fastreid_vi._flags import published
from fastreid_vi.config import Batch, Recipe
from fastreid_vi.evaluation import Embeddings, Evaluation, RankMetrics, sysu_table
from fastreid_vi.evaluation.chance import chance_sysu
from fastreid_vi.evaluation.protocols import SETTINGS

if TYPE_CHECKING:
    from fastreid_vi.data import SysuMM01
    from fastreid_vi.methods.base import Method

PROTOCOL = "sysu-official"
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


def open_target(path: Path, *, recipe: str | None = None, root: Path | None = None) -> Target:
    """Find out what `path` stands for.

    Args:
        path: a run folder, a checkpoint folder or a weights file.
        recipe: run.json or the name of a recipe, for weights outside a run folder.
        root: data set, if not the one the run was trained on.
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
    else:
        record = read_record(Path(recipe) if recipe is not None else folder or path)
        found, num_ids, data = record.recipe, record.num_ids, record.root
    data = root or data
    if data is None:
        raise RunError(f"{path}: name the data set to evaluate on: --data-root")
    return Target(recipe=found, weights=weights, root=data, num_ids=num_ids, folder=folder)


def read_record(path: Path) -> Any:
    """run.json as `train.RunRecord`."""
    from fastreid_vi import train

    return train.read_run(path, lambda method, _: methods.recipe_type(method))


def open_dataset(recipe: Recipe, root: Path) -> SysuMM01:
    """The data set of a recipe.

    Raises:
        RunError: a layout that is not read.
        DataError: it is not there or not whole.
    """
    from fastreid_vi.data import SysuMM01

    if recipe.dataset != "sysu":
        raise RunError(f"data set {recipe.dataset!r}: this version reads SYSU-MM01 (sysu) only")
    data = recipe.data
    return SysuMM01(
        root, splits=data.splits, label_order=data.label_order, skip_broken=data.skip_broken
    )


def load_method(target: Target, dataset: SysuMM01 | None = None) -> tuple[Method, Any]:
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
    dataset: SysuMM01,
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
    checkpoint = {"path": str(weights.parent if header else weights)}
    checkpoint |= {"epoch": header.epoch, "step": header.step} if header else {}
    return found[0], found[1], checkpoint


def score(query: Embeddings, gallery: Embeddings, permutations: Any) -> dict[str, Any]:
    """All four settings with chance beside them, JSON-ready."""
    table = sysu_table(query, gallery, permutations, trials=TRIALS)
    settings = {}
    for mode, shots in SETTINGS:
        found = table[f"{mode}/{shots}"]
        chance = chance_sysu(
            query.ids, query.cams, gallery.ids, gallery.cams, mode=mode, shots=shots
        )
        settings[f"{mode}/{shots}"] = {
            "mean": _plain(found.mean),
            "std": _plain(found.std),
            "chance": _plain(chance),
            "trials": [_plain(trial) for trial in found.trials],
            "valid_queries": int(np.count_nonzero(found.mean.valid)),
        }
    return {
        "protocol": PROTOCOL,
        "trials": TRIALS,
        "queries": len(query.ids),
        "gallery": len(gallery.ids),
        "identities": len(np.unique(query.ids)),
        "settings": settings,
    }


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
    return (
        f"{result['method']} ({checkpoint['path']}{epoch}) on {result['data_root']}\n"
        f"protocol {result['protocol']}: {result['queries']} queries of {result['identities']} "
        f"identities, {result['gallery']} gallery images; "
        f"mean ± std of {result['trials']} trials, %"
    )


def table_text(result: dict[str, Any]) -> str:
    """The result as a table for people, percent, chance below each setting."""
    rows: list[list[str]] = []
    for setting, found in result["settings"].items():
        mean, std, chance = found["mean"], found["std"], found["chance"]
        rows.append([setting_text(setting)])
        rows[-1] += [f"{100 * mean[m]:.2f} ± {100 * std[m]:.2f}" for m in METRICS]
        rows.append(["  chance", *(f"{100 * chance[m]:.2f}       " for m in METRICS)])
    return _console.table(["", *(f"{metric}       " for metric in METRICS)], rows)


def setting_text(setting: str) -> str:
    """ "all/10" -> "all, 10 shots"."""
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
