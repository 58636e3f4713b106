"""Run folders in, the records of the report page out: what `fastreid-vi report` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastreid_vi import _evaluate, _rerank, _score
from fastreid_vi._evaluate import RunError, Target
from fastreid_vi._score import EMBEDDINGS
from fastreid_vi.evaluation import Embeddings, llcm_galleries, sysu_galleries
from fastreid_vi.evaluation.embeddings import read_side
from fastreid_vi.figures import Curve
from fastreid_vi.report import PatternMaps, ReportedRun, Translations

if TYPE_CHECKING:
    from fastreid_vi.config import Batch
    from fastreid_vi.data import Index
    from fastreid_vi.methods.base import Method

MAP_PERSONS = 4
_RULES = {
    "sysu": "10 trials, infrared queries, location rule",
    "regdb": "one of ten trials, both directions, no camera rule",
    "llcm": "10 trials, both directions, images of the query's person and camera left out",
}


def reported_run(folder: Path, name: str, *, root: Path | None = None) -> ReportedRun:
    """Everything a run folder has to show.

    Args:
        folder: an evaluated run.
        name: its name on the page.
        root: data set, if not the one the run was trained on.
    Raises:
        RunError: not evaluated yet, or a damaged file.
        EmbeddingsError, TrainError, DataError: run, embeddings or data cannot be read.
    """
    target = _evaluate.open_target(folder, root=root)
    test = _score.read_result(folder).get("test")
    if test is None:
        raise RunError(f"{folder}: not evaluated yet; run: fastreid-vi eval {folder}")
    dataset = _evaluate.open_dataset(target.recipe, target.root)
    query, gallery = (read_side(folder / EMBEDDINGS / name) for name in ("query", "gallery"))
    records = read_metrics(folder / "metrics.jsonl")
    shown, shown_name = shown_gallery(dataset, gallery)
    maps, translated = _pictures(target, dataset, query, gallery)
    return ReportedRun(
        name=name,
        facts=_facts(folder, target, test),
        commands=(
            f"fastreid-vi train --recipe {folder / 'run.json'} --run-dir {folder}-again",
            f"fastreid-vi eval {folder}-again",
        ),
        results={s: _score.evaluation_of(found) for s, found in test["settings"].items()},
        reranked={
            s: _score.evaluation_of(found["reranked"])
            for s, found in test["settings"].items()
            if "reranked" in found
        },
        rerank=f"{name}: {_rerank.described(test['rerank'])}." if "rerank" in test else "",
        chance={s: _score.metrics_of(v["chance"]) for s, v in test["settings"].items()},
        losses=curves(records, "epoch", "terms"),
        validation=curves(records, "eval", "metrics", ("R1", "mAP", "mINP")),
        validation_split=next((r["split"] for r in records if r["kind"] == "eval"), "validation"),
        query=query,
        gallery=gallery,
        shown=shown,
        shown_name=shown_name,
        protocol=dataset.name,
        image_root=target.root,
        maps=maps,
        translations=translated,
    )


def shown_gallery(dataset: Any, gallery: Embeddings) -> tuple[NDArray[np.int64] | None, str]:
    """Rows of the gallery that rank lists search, and what they are in words."""
    if dataset.name == "regdb":
        return None, f"the visible images of trial {dataset.trial}"
    if dataset.name == "llcm":
        return llcm_galleries(gallery, 1)[0], "one image of each person and camera, trial 1"
    rows = sysu_galleries(gallery, dataset.permutations, mode="all", shots=1, trials=1)[0]
    return rows, "all-search, single shot, trial 1"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that was cut off is left out.

    Raises:
        RunError: another line is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                records.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise RunError(f"{path}: line {number} is not JSON") from None
    return records


def curves(
    records: list[dict[str, Any]], kind: str, group: str, names: tuple[str, ...] | None = None
) -> dict[str, Curve]:
    """Quantity -> curve over epochs, `total` first, out of the records of one kind."""
    chosen = [record for record in records if record["kind"] == kind]
    found = list(dict.fromkeys(name for record in chosen for name in record[group]))
    if names is not None:
        found = [name for name in names if name in found]
    found.sort(key=lambda name: name != "total")
    points = {
        name: [(r["epoch"], r[group][name]) for r in chosen if name in r[group]] for name in found
    }
    return {name: Curve(*np.array(xy, dtype=float).T) for name, xy in points.items()}


class Shown(NamedTuple):
    """A test image, alone in its batch."""

    batch: Batch
    path: Path
    caption: str


def _pictures(
    target: Target, dataset: Index, query: Embeddings, gallery: Embeddings
) -> tuple[PatternMaps | None, Translations | None]:
    import torch

    method, _ = _evaluate.load_method(target, dataset.num_ids)
    shown = shown_images(target, dataset, query, gallery)
    with torch.inference_mode():
        return pattern_maps(method, shown), translations(method, shown)


def pattern_maps(method: Method, shown: Sequence[Shown]) -> PatternMaps | None:
    """Pattern maps of test images, for a method that has them."""
    maps_of = getattr(method, "pattern_maps", None)
    if maps_of is None:
        return None
    stacks = np.stack([maps_of(batch.images)[0].float().numpy() for batch, _, _ in shown])
    return PatternMaps([_read(path) for _, path, _ in shown], stacks, [c for _, _, c in shown])


def translations(method: Method, shown: Sequence[Shown]) -> Translations | None:
    """Test images as the other modality, and back again, for a method that translates."""
    preview = getattr(method, "preview", None)
    if preview is None:
        return None
    rows = np.stack([preview(b.images, b.modality)[0].float().numpy() for b, _, _ in shown])
    pictures = np.rint(127.5 * (rows.transpose(0, 1, 3, 4, 2) + 1)).clip(0, 255)
    return Translations(pictures.astype(np.uint8), [caption for _, _, caption in shown])


def shown_images(
    target: Target, dataset: Index, query: Embeddings, gallery: Embeddings
) -> list[Shown]:
    """An infrared and a visible image of a few test persons."""
    from fastreid_vi.data import eval_loader

    found = []
    for person in np.intersect1d(query.ids, gallery.ids)[:MAP_PERSONS]:
        for part, kind in ((dataset.query, "IR"), (dataset.gallery, "VIS")):
            first = part.select([int(np.flatnonzero(part.pids == person)[0])])
            batch = next(iter(eval_loader(first, _alone(target), batch_size=1)))
            caption = f"{kind} cam {first.cams[0]}, id {person}"
            found.append(Shown(batch, first.file(0), caption))
    return found


def _alone(target: Target) -> Any:
    import dataclasses

    return dataclasses.replace(target.recipe.data, workers=0, cache=False, packed="")


def _read(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _facts(folder: Path, target: Target, test: dict[str, Any]) -> dict[str, str]:
    recipe, checkpoint = target.recipe, test["checkpoint"]
    record = _evaluate.read_record(folder)
    depth = getattr(getattr(recipe, "model", None), "depth", None)
    facts = {
        "Method": recipe.method + (f", ResNet-{depth}" if depth else ""),
        "Data set": f"{target.root}: {record.num_ids} training, {test['identities']} test "
        f"identities, {test['queries']} queries, {test['gallery']} gallery images",
        "Input": f"{recipe.data.height} x {recipe.data.width} pixels",
        "Protocol": f"{test['protocol']}: {_RULES[recipe.dataset]}",
        "Checkpoint": checkpoint["path"],
    }
    made = next(target.root.glob("*/synthetic.json"), None)
    if made is not None:
        seed = json.loads(made.read_text(encoding="utf-8")).get("seed")
        facts["Data set"] += f"; drawn (data synth, seed {seed}), no real persons"
    if "epoch" in checkpoint:
        facts["Checkpoint"] += f", epoch {checkpoint['epoch']} of {recipe.schedule.epochs}"
    best = folder / "best.json"
    if best.is_file():
        facts["Chosen by"] = str(json.loads(best.read_text(encoding="utf-8"))["chosen"])
    facts["Seed"] = str(record.seed)
    facts["Versions"] = ", ".join(f"{k} {v}" for k, v in record.versions.items() if v)
    return facts
