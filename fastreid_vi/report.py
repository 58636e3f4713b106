"""One self-contained, offline HTML page about one or several evaluated runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastreid_vi import _page, figures
from fastreid_vi._page import Section
from fastreid_vi.evaluation import DIRECTION_NAMES, Embeddings, Evaluation, RankMetrics
from fastreid_vi.evaluation.ranking import ProtocolName
from fastreid_vi.figures import Curve, Tile
from fastreid_vi.ranklists import distances, kept, rank_list_section

METRICS = ("R1", "R5", "R10", "R20", "mAP", "mINP")
HISTOGRAM_QUERIES = 500


class PatternMaps(NamedTuple):
    """Attention maps of a few images, one channel per pattern."""

    images: Sequence[NDArray[np.uint8]]  # M images [H, W, 3]
    maps: NDArray[Any]  # [M, P, h, w]
    captions: Sequence[str]  # M


class Translations(NamedTuple):
    """Images of one modality as images of the other one, and translated back."""

    pictures: NDArray[np.uint8]  # [M, 3, H, W, 3] image, translation, translation back
    captions: Sequence[str]  # M


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """What the page shows of one run; a missing part leaves its section out."""

    name: str
    """Name of the run in tables and legends."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Header lines: method, data set, protocol, checkpoint, seed, versions."""
    commands: Sequence[str] = ()
    """Commands that repeat the run."""
    results: Mapping[str, Evaluation] = field(default_factory=dict)
    """Setting ("all/1") -> evaluation."""
    reranked: Mapping[str, Evaluation] = field(default_factory=dict)
    """Setting -> evaluation after re-ranking, shown below the plain one."""
    rerank: str = ""
    """How that was done, and what it makes use of."""
    chance: Mapping[str, RankMetrics] = field(default_factory=dict)
    """Setting -> what a random ranking scores."""
    losses: Mapping[str, Curve] = field(default_factory=dict)
    """Loss term -> curve over epochs."""
    validation: Mapping[str, Curve] = field(default_factory=dict)
    """Metric -> curve over epochs, fractions."""
    validation_split: str = "validation"
    """Where `validation` was measured: "validation", held-out training identities, or "test"."""
    query: Embeddings | None = None
    """Query embeddings."""
    gallery: Embeddings | None = None
    """Embeddings of the whole gallery pool."""
    shown: NDArray[np.int64] | None = None
    """Rows of `gallery` that the rank lists use; None for all."""
    shown_name: str = "whole gallery pool"
    """What those rows are, in words."""
    protocol: ProtocolName = "sysu"
    """Whose camera rule rank lists and distances follow."""
    image_root: Path | None = None
    """Folder that the embeddings' paths are relative to."""
    maps: PatternMaps | None = None
    """Pattern maps, for methods that have them."""
    translations: Translations | None = None
    """Translated images, for methods with generators."""


def build_report(
    runs: Sequence[ReportedRun],
    path: str | Path,
    *,
    title: str = "fastreid-vi report",
    queries: int = 3,
    top: int = 10,
    seed: int = 0,
) -> Path:
    """Write the page.

    Args:
        runs: the runs, shown side by side in this order.
        path: the HTML file; its folder must exist.
        title: heading of the page.
        queries: rank lists shown from each of the best, the median and the worst queries.
        top: length of a rank list.
        seed: breaks ties among the queries and draws the histogram's sample.
    Returns:
        `path`.
    Raises:
        ValueError: no run, two runs of one name, or embeddings without the folder of their images.
        OSError: an image cannot be read or the page not be written.
        figures.MissingExtra: matplotlib is not installed.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) != len(names):
        raise ValueError(f"runs: expected at least one run, names distinct, got {names}")
    makers = (_table, _losses, _validation, _cmc)
    sections = [make(runs) for make in makers]
    sections += [rank_list_section(runs, queries=queries, top=top, seed=seed)]
    sections += [_histogram(runs, seed), _pattern_maps(runs), _translations(runs)]
    cards = [_page.card(run.name, run.facts, run.commands) for run in runs]
    page = _page.render(title, cards, [section for section in sections if section is not None])
    path = Path(path)
    # Written beside and renamed: an interrupted report never replaces a good one.
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def metric_values(metrics: RankMetrics) -> dict[str, float]:
    """R1, R5, R10, R20, mAP, mINP as fractions, by name."""
    ranks = {f"R{k}": float(metrics.cmc[min(k, len(metrics.cmc)) - 1]) for k in (1, 5, 10, 20)}
    return {**ranks, "mAP": float(metrics.mAP), "mINP": float(metrics.mINP)}


def setting_name(setting: str) -> str:
    """ "all/1" -> "all-search, single shot"; directions in words."""
    if setting in DIRECTION_NAMES:
        return DIRECTION_NAMES[setting]
    mode, shots = setting.split("/")
    return f"{mode}-search, " + ("single shot" if shots == "1" else f"{shots} shots")


def _table(runs: Sequence[ReportedRun]) -> Section | None:
    settings = list(dict.fromkeys(setting for run in runs for setting in run.results))
    if not settings:
        return None
    head = "".join(f"<th scope=col>{name}</th>" for name in METRICS)
    single = {run.name for run in runs if run.protocol == "regdb"}  # one gallery, no deviation
    rows = []
    for setting in settings:
        rows.append(
            f"<tr class=group><th colspan={len(METRICS) + 1}>{setting_name(setting)}</th></tr>"
        )
        rows += _rows({run.name: run.results.get(setting) for run in runs}, single, "")
        rows += _rows({run.name: run.reranked.get(setting) for run in runs}, single, ", re-ranked")
        chance = next((run.chance[setting] for run in runs if setting in run.chance), None)
        if chance is not None:
            levels = metric_values(chance)
            cells = "".join(f"<td>{100 * levels[metric]:.1f}</td>" for metric in METRICS)
            rows.append(f"<tr class=chance><th scope=row>chance</th>{cells}</tr>")
    note = (
        "Percent: mean ± standard deviation over the protocol's trials (galleries). Chance is the "
        "expected score of a random ranking of the same galleries."
    )
    for how in dict.fromkeys(run.rerank for run in runs if run.reranked):
        note += f" {how}"
    table = f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return Section("Results", note, f"<div class=wide><table>{table}</table></div>")


def _rows(results: Mapping[str, Evaluation | None], single: set[str], kind: str) -> Iterator[str]:
    """One row of the table for each run that has a result; the best of several is bold."""
    scored = {name: result for name, result in results.items() if result is not None}
    means = {name: metric_values(result.mean) for name, result in scored.items()}
    for name, result in scored.items():
        spread = metric_values(result.std)
        cells = ""
        for metric in METRICS:
            value = means[name][metric]
            best = len(scored) > 1 and value == max(m[metric] for m in means.values())
            number = f"{100 * value:.1f}"
            if name not in single:
                number += f" <small>± {100 * spread[metric]:.1f}</small>"
            cells += f"<td>{f'<b>{number}</b>' if best else number}</td>"
        yield f"<tr><th scope=row>{_page.text(name)}{kind}</th>{cells}</tr>"


def _losses(runs: Sequence[ReportedRun]) -> Section | None:
    curves = {run.name: run.losses for run in runs if run.losses}
    if not curves:
        return None
    note = "Mean of each logged term over an epoch; total is the weighted sum that was minimised."
    drawn = figures.small_multiples(curves)
    return Section("Training losses", note, _page.chart(drawn, "loss", _ends("Losses", curves)))


def _validation(runs: Sequence[ReportedRun]) -> Section | None:
    curves = {run.name: run.validation for run in runs if run.validation}
    if not curves:
        return None
    note = (
        "Measured during training on identities held out from the training split, which are fewer "
        "than the test's: compare runs here, not with the table above."
    )
    tuned = [run.name for run in runs if run.validation and run.validation_split == "test"]
    if tuned:
        note = (
            f"Measured during training; for {', '.join(tuned)} on the TEST split, as was asked: "
            "the epoch was chosen on the test, so the table above is too good."
        )
    drawn = figures.small_multiples(curves, percent=True)
    return Section(
        "Validation", note, _page.chart(drawn, "validation", _ends("Validation", curves))
    )


def _cmc(runs: Sequence[ReportedRun]) -> Section | None:
    settings: dict[str, dict[str, Curve]] = {}
    for run in runs:
        for setting, result in run.results.items():
            panel = settings.setdefault(setting_name(setting), {})
            ranks = np.arange(1, len(result.mean.cmc) + 1)
            panel[run.name] = Curve(ranks, result.mean.cmc, result.std.cmc)
            if setting in run.chance:
                panel["chance"] = Curve(ranks, run.chance[setting].cmc[: len(ranks)])
    if not settings:
        return None
    note = (
        "Share of queries whose person is among the first k identities (RegDB: images). Band: one "
        "standard deviation over trials."
    )
    alt = "CMC curves. " + "; ".join(
        f"{setting}, {name}: rank 1 {100 * curve.y[0]:.1f} %, "
        f"rank {len(curve.y)} {100 * curve.y[-1]:.1f} %"
        for setting, panel in settings.items()
        for name, curve in panel.items()
    )
    return Section("CMC", note, _page.chart(figures.cmc_curves(settings), "cmc", alt))


def _histogram(runs: Sequence[ReportedRun], seed: int) -> Section | None:
    pairs: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for run in runs:
        if run.query is None or run.gallery is None:
            continue
        count = len(run.query.ids)
        chosen = np.random.default_rng(seed).permutation(count)[:HISTOGRAM_QUERIES]
        distance = distances(run.query.features[chosen], run.gallery.features)
        same = run.query.ids[chosen][:, None] == run.gallery.ids[None, :]
        keep = kept(run, chosen, np.arange(len(run.gallery.ids)))
        pairs[run.name] = (distance[same & keep], distance[~same & keep])
    if not pairs or any(not len(part) for both in pairs.values() for part in both):
        return None
    note = (
        "Cosine distances between infrared queries and the whole visible gallery pool (test "
        "identities), without the pairs that the protocol leaves out; at most "
        f"{HISTOGRAM_QUERIES} queries, drawn with seed {seed}. Each area is one: less overlap is "
        "better."
    )
    alt = "Distance histogram. " + "; ".join(
        f"{name}: median {np.median(same):.3f} same person, "
        f"{np.median(other):.3f} different persons"
        for name, (same, other) in pairs.items()
    )
    return Section(
        "Distances across modalities",
        note,
        _page.chart(figures.distance_histogram(pairs), "distance", alt),
    )


def pattern_map_tiles(maps: PatternMaps) -> list[list[Tile]]:
    """Rows of tiles: an image, then each of its pattern maps laid over it."""
    rows = []
    for image, stack, caption in zip(maps.images, maps.maps, maps.captions, strict=True):
        row = [Tile(image, tuple(caption.split(", ")), caption)]
        for part, attention in enumerate(stack, 1):
            values = f"{attention.min():.2f}-{attention.max():.2f}"
            alt = f"pattern {part} over {caption}, map values {values}"
            row.append(Tile(figures.overlay(image, attention), (f"pattern {part}", values), alt))
        rows.append(row)
    return rows


def _pattern_maps(runs: Sequence[ReportedRun]) -> Section | None:
    body = [
        _page.tile_row(row, f"<b>{_page.text(run.name)}</b>")
        for run in runs
        if run.maps is not None
        for row in pattern_map_tiles(run.maps)
    ]
    note = (
        "Where each learned pattern looks, on test images. Heat is stretched from a map's smallest "
        "to its largest value on this image (written below it): bright means most, not much."
    )
    return Section("Pattern maps", note, "".join(body)) if body else None


def translation_tiles(translations: Translations) -> list[list[Tile]]:
    """Rows of tiles: an image, its translation, and that translated back."""
    kinds = ("translated", "and back")
    return [
        [
            Tile(pictures[0], tuple(caption.split(", ")), caption),
            *(
                Tile(picture, (kind,), f"{caption}, {kind}")
                for picture, kind in zip(pictures[1:], kinds, strict=True)
            ),
        ]
        for pictures, caption in zip(translations.pictures, translations.captions, strict=True)
    ]


def _translations(runs: Sequence[ReportedRun]) -> Section | None:
    body = [
        _page.tile_row(row, f"<b>{_page.text(run.name)}</b>")
        for run in runs
        if run.translations is not None
        for row in translation_tiles(run.translations)
    ]
    note = (
        "Test images as the generators see and make them: infrared images made visible, visible "
        "ones made infrared, and both translated back."
    )
    return Section("Translations", note, "".join(body)) if body else None


def _ends(what: str, runs: Mapping[str, Mapping[str, Curve]]) -> str:
    parts = (
        f"{name} {term} from {curve.y[0]:.3g} to {curve.y[-1]:.3g}"
        for name, curves in runs.items()
        for term, curve in curves.items()
    )
    return f"{what} against epochs: " + "; ".join(parts)
