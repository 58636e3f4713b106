"""Embeddings in, the protocol's table out: plain, re-ranked and chance. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fastreid_vi import _console
from fastreid_vi.evaluation import (
    DIRECTION_NAMES,
    Embeddings,
    Evaluation,
    RankMetrics,
    chance_llcm,
    chance_regdb,
    chance_sysu,
    llcm_table,
    load_embeddings,
    regdb_table,
    save_embeddings,
    sysu_table,
)
from fastreid_vi.evaluation.protocols import SETTINGS
from fastreid_vi.evaluation.tensorfile import write_whole

if TYPE_CHECKING:
    from fastreid_vi._rerank import Reranking

EMBEDDINGS: Final = "embeddings"  # folder of a run
TRIALS: Final = 10
METRICS: Final = ("R1", "R5", "R10", "R20", "mAP", "mINP")
VISIBLE, INFRARED = 0, 1  # of `config`, which embeddings need nothing else of

# What decides a number besides the features.
PROTOCOLS: Final[Mapping[str, Mapping[str, str]]] = {
    "sysu": {
        "camera_rule": "location: no image from the query's own place (cameras 2 and 3 are one)",
        "cmc": "by identity",
        "galleries": "ten trials of the data set's permutation file",
    },
    "regdb": {
        "camera_rule": "none",
        "cmc": "by image",
        "galleries": "all images of the other modality, one of ten trials",
    },
    "llcm": {
        "camera_rule": "same_id_and_camera: no image of the query's person from its own camera",
        "cmc": "by identity",
        "galleries": "ten trials, one image of each person and camera",
    },
}
FEATURES: Final = "cosine of L2-normalised features, ties by gallery index"


class ScoreError(ValueError):
    """Embeddings cannot be evaluated; one line that says why."""


def open_saved(
    path: Path, *, data_root: Path | None = None, trial: int | None = None
) -> tuple[Embeddings, Embeddings]:
    """Query and gallery of a folder of embeddings, with what their protocol needs.

    Args:
        path: the folder.
        data_root: data set that the files are of, where they do not know it themselves.
        trial: of RegDB; must be the one of the files, and is chosen for files without one.
    Raises:
        EmbeddingsError, ScoreError: not whole, not of one network and data set, or nothing with a
            protocol.
    """
    sides = load_embeddings(path)
    for name in ("query", "gallery"):
        if name not in sides:
            raise ScoreError(
                f"{path}: expected query and gallery, got {', '.join(sides)} alone; embed a data "
                "set in its official layout, or use search"
            )
    query, gallery = sides["query"], sides["gallery"]
    if data_root is not None:
        query, gallery = _completed(path, query, gallery, data_root, trial)
    check_pair(str(path), query, gallery)
    if gallery.dataset not in PROTOCOLS:
        raise ScoreError(
            f"{path}: the files do not say which data set they are of; name its folder: --data-root"
        )
    if trial is not None and trial != gallery.trial:
        is_of = f"of trial {gallery.trial}" if gallery.trial else f"of {gallery.dataset!r}"
        raise ScoreError(f"{path}: embeddings {is_of}, cannot be evaluated on trial {trial}")
    return query, gallery


def check_pair(path: str, query: Embeddings, gallery: Embeddings) -> None:
    """Raise a ScoreError unless both are of one network, data set and trial."""
    for name, what in (("checkpoint", "networks"), ("dataset", "data sets"), ("trial", "trials")):
        ours, theirs = getattr(query, name), getattr(gallery, name)
        if ours != theirs:
            raise ScoreError(
                f"{path}: query and gallery are of two {what}, {_short(ours)} and {_short(theirs)}"
            )
    for name, side, expected in (("query", query, INFRARED), ("gallery", gallery, VISIBLE)):
        if side.modality is not None and not (np.asarray(side.modality) == expected).all():
            word = ("visible", "infrared")[expected]
            raise ScoreError(f"{path}: {name}: expected {word} images only; are they swapped?")


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)


def _completed(
    path: Path, query: Embeddings, gallery: Embeddings, root: Path, trial: int | None
) -> tuple[Embeddings, Embeddings]:
    from fastreid_vi.data.check import layout_of

    if not root.is_dir():
        raise ScoreError(f"{root}: no such folder")
    layout = layout_of(root)
    if gallery.dataset not in (None, layout):
        raise ScoreError(f"{path}: embeddings of {gallery.dataset!r}, but {root} is {layout!r}")
    facts: dict[str, Any] = {"dataset": layout, "root": str(root.resolve())}
    if layout == "regdb":
        facts["trial"] = gallery.trial or trial
        if facts["trial"] is None:
            raise ScoreError(f"{path}: which of RegDB's trials are they of? --trial N")
    elif layout == "sysu":
        from fastreid_vi.data.permutations import Permutations

        permutations = Permutations.from_mat(root / "exp" / "rand_perm_cam.mat")
        gallery = gallery._replace(permutations=permutations)
    return query._replace(**facts), gallery._replace(**facts)


def score(query: Embeddings, gallery: Embeddings) -> dict[str, Any]:
    """Every setting of the data set's protocol with chance beside it, JSON-ready.

    Args:
        query: infrared test images.
        gallery: visible test images, the whole pool; its `dataset` says which protocol.
    """
    table, chance = tables(query, gallery), _CHANCES[gallery.dataset or ""](query, gallery)
    settings = {
        name: {
            "mean": plain(found.mean),
            "std": plain(found.std),
            "chance": plain(chance[name]),
            "trials": [plain(trial) for trial in found.trials],
            "valid_queries": int(np.count_nonzero(found.mean.valid)),
        }
        for name, found in table.items()
    }
    names = {
        "sysu": "sysu-official",
        "regdb": f"regdb-trial-{gallery.trial}",
        "llcm": "llcm-paper",
    }
    name = gallery.dataset or ""
    return {
        "protocol": names[name],
        "rules": {**PROTOCOLS[name], "distance": FEATURES},
        "trials": 1 if name == "regdb" else TRIALS,
        "queries": len(query.ids),
        "gallery": len(gallery.ids),
        "identities": len(np.unique(query.ids)),
        "settings": settings,
    }


def add_reranked(
    result: dict[str, Any],
    query: Embeddings,
    gallery: Embeddings,
    reranking: Reranking,
    show: Callable[[int, int], None],
) -> dict[str, Any]:
    """The result of `score` with every setting's re-ranked figures beside the plain ones.

    Args:
        result: of `score`.
        query, gallery: as for `score`.
        reranking: what to do.
        show: called with (galleries done, galleries in all) where each is re-ranked by itself.
    """
    total = sum(len(found["trials"]) for found in result["settings"].values())
    table = tables(query, gallery, reranking.counted(show, total))
    settings = {
        name: {
            **found,
            "reranked": {
                "mean": plain(table[name].mean),
                "std": plain(table[name].std),
                "trials": [plain(trial) for trial in table[name].trials],
            },
        }
        for name, found in result["settings"].items()
    }
    return {**result, "rerank": reranking.facts(), "settings": settings}


def tables(query: Embeddings, gallery: Embeddings, rerank: Any = None) -> dict[str, Evaluation]:
    """Setting -> evaluation, of the protocol of the gallery's data set."""
    given: dict[str, Any] = {} if rerank is None else {"rerank": rerank}
    if gallery.dataset == "sysu":
        if gallery.permutations is None:
            raise ScoreError("gallery: no permutations kept; name the data set: --data-root")
        return sysu_table(query, gallery, gallery.permutations, trials=TRIALS, **given)
    if gallery.dataset == "regdb":
        return regdb_table(query, gallery, **given)
    return llcm_table(query, gallery, trials=TRIALS, **given)


def _chance_sysu(query: Embeddings, gallery: Embeddings) -> dict[str, RankMetrics]:
    of = (query.ids, query.cams, gallery.ids, gallery.cams)
    return {f"{m}/{k}": chance_sysu(*of, mode=m, shots=k) for m, k in SETTINGS}


def _chance_regdb(query: Embeddings, gallery: Embeddings) -> dict[str, RankMetrics]:
    return {
        "vis_to_ir": chance_regdb(gallery.ids, query.ids),
        "ir_to_vis": chance_regdb(query.ids, gallery.ids),
    }


def _chance_llcm(query: Embeddings, gallery: Embeddings) -> dict[str, RankMetrics]:
    infrared, visible = (query.ids, query.cams), (gallery.ids, gallery.cams)
    return {
        "ir_to_vis": chance_llcm(*infrared, *visible),
        "vis_to_ir": chance_llcm(*visible, *infrared),
        "vis_to_ir/released": chance_llcm(*visible, *infrared, vis_to_ir="released"),
    }


_CHANCES: Final = {"sysu": _chance_sysu, "regdb": _chance_regdb, "llcm": _chance_llcm}


def heading(result: dict[str, Any]) -> str:
    """What the table below it is about."""
    checkpoint, trials = result["checkpoint"], result["trials"]
    epoch = f", epoch {checkpoint['epoch']}" if "epoch" in checkpoint else ""
    values = f"mean ± std of {trials} trials, %" if trials > 1 else "one of ten trials, %"
    sysu = result["protocol"].startswith("sysu")
    queries, images = (
        ("queries", "gallery images") if sysu else ("infrared images", "visible images")
    )
    rules = result["rules"]
    return (
        f"{result['method']} ({checkpoint['path']}{epoch}) on {result['data_root']}\n"
        f"protocol {result['protocol']}: {result['queries']} {queries} of {result['identities']} "
        f"identities, {result['gallery']} {images}; {values}\n"
        f"galleries: {rules['galleries']}; CMC {rules['cmc']}; {rules['distance']}\n"
        f"camera rule {rules['camera_rule']}"
    )


def table_text(result: dict[str, Any]) -> str:
    """The result as a table for people, percent, chance below each setting."""
    rows: list[list[str]] = []
    one = result["trials"] == 1
    for setting, found in result["settings"].items():
        rows.append([setting_text(setting), *_cells(found, one)])
        chance = {"mean": found["chance"]}
        rows.append(["  chance", *_cells(chance, one)])
    return _table(rows, one)


def reranked_text(result: dict[str, Any]) -> str:
    """Plain and re-ranked figures under each other, percent."""
    rows: list[list[str]] = []
    one = result["trials"] == 1
    for setting, found in result["settings"].items():
        rows.append([f"{setting_text(setting)}, plain", *_cells(found, one)])
        rows.append(["  re-ranked", *_cells(found["reranked"], one)])
    return _table(rows, one)


def _table(rows: list[list[str]], one: bool) -> str:
    gap = "" if one else " " * 7  # as wide as a deviation
    return _console.table(["", *(f"{metric}{gap}" for metric in METRICS)], rows)


def _cells(found: Mapping[str, Any], one: bool) -> list[str]:
    """A mean and, where there is one, its deviation for every metric."""
    if one:
        return [f"{100 * found['mean'][m]:.2f}" for m in METRICS]
    if "std" not in found:
        return [f"{100 * found['mean'][m]:.2f}{' ' * 7}" for m in METRICS]
    return [f"{100 * found['mean'][m]:.2f} ± {100 * found['std'][m]:.2f}" for m in METRICS]


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
    """Inverse of `plain`."""
    nothing = np.zeros(0, dtype=bool)
    return RankMetrics(np.asarray(values["cmc"]), values["mAP"], values["mINP"], nothing)


def plain(metrics: RankMetrics) -> dict[str, Any]:
    """Metrics as JSON: R1, R5, R10, R20, mAP, mINP and the whole CMC, fractions."""
    ranks = {f"R{k}": float(metrics.cmc[k - 1]) for k in (1, 5, 10, 20)}
    cmc = [float(value) for value in metrics.cmc]
    return {**ranks, "mAP": float(metrics.mAP), "mINP": float(metrics.mINP), "cmc": cmc}


def about(path: Path, gallery: Embeddings) -> dict[str, Any]:
    """What the heading says of saved embeddings."""
    known = dict(gallery.details or {})
    weights = known.pop("weights", None)
    checkpoint = {"path": str(path), **known} if weights else {"path": str(path)}
    return {
        "method": gallery.method or "unknown method",
        "data_root": gallery.root or "an unknown folder",
        "checkpoint": checkpoint,
        "embeddings": str(path),
    }


def keep(folder: Path, query: Embeddings, gallery: Embeddings, result: dict[str, Any]) -> None:
    """Write the embeddings, and the result as `keep_result` does.

    Raises:
        EmbeddingsError, ScoreError: they cannot be written; earlier files stay whole.
    """
    save_embeddings(folder / EMBEDDINGS, query=query, gallery=gallery)
    keep_result(folder, result)


def keep_result(folder: Path, result: dict[str, Any]) -> None:
    """Write the result under "test" in result.json beside what is there.

    Raises:
        ScoreError: it cannot be written; an earlier file stays whole.
    """
    path = folder / "result.json"
    values = {**read_result(folder), "test": result}
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        write_whole(path, [text.encode()])
    except OSError as error:
        raise ScoreError(f"cannot write {path}: {error.strerror or error}") from error


def read_result(folder: Path) -> dict[str, Any]:
    """result.json, or nothing where there is none yet.

    Raises:
        ScoreError: not a JSON object.
    """
    path = folder / "result.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ScoreError(f"{path}: not JSON: {_console.one_line(error)}") from None
    if not isinstance(values, dict):
        raise ScoreError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
