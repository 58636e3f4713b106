"""One self-contained, offline HTML page about one or several evaluated runs."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastreid_vi import figures
from fastreid_vi.evaluation import Embeddings, Evaluation, RankMetrics, rank_metrics
from fastreid_vi.figures import Curve, Tile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = ("R1", "R5", "R10", "R20", "mAP", "mINP")
INFRARED_CAMERAS = (3, 6)
HISTOGRAM_QUERIES = 500


class PatternMaps(NamedTuple):
    """Attention maps of a few images, one channel per pattern."""

    images: Sequence[NDArray[np.uint8]]  # M images [H, W, 3]
    maps: NDArray[Any]  # [M, P, h, w]
    captions: Sequence[str]  # M


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What the page shows of one run; everything but the name may be missing, and its section with it."""

    name: str
    """Name of the run in tables and legends."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Header lines: method, data set, protocol, checkpoint, seed, versions."""
    commands: Sequence[str] = ()
    """Commands that repeat the run."""
    results: Mapping[str, Evaluation] = field(default_factory=dict)
    """Setting ("all/1") -> evaluation."""
    chance: Mapping[str, RankMetrics] = field(default_factory=dict)
    """Setting -> what a random ranking scores."""
    losses: Mapping[str, Curve] = field(default_factory=dict)
    """Loss term -> curve over epochs."""
    validation: Mapping[str, Curve] = field(default_factory=dict)
    """Metric -> curve over epochs, fractions, on held-out training identities."""
    query: Embeddings | None = None
    """Query embeddings."""
    gallery: Embeddings | None = None
    """Embeddings of the whole gallery pool."""
    shown: NDArray[np.int64] | None = None
    """Rows of `gallery` that the rank lists use; None for all."""
    shown_name: str = "whole gallery pool"
    """What those rows are, in words."""
    image_root: Path | None = None
    """Folder that the embeddings' paths are relative to."""
    maps: PatternMaps | None = None
    """Pattern maps, for methods that have them."""


class Section(NamedTuple):
    """One block of the page."""

    title: str
    note: str
    body: str


def build_report(
    runs: Sequence[RunRecord],
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
    sections += [_histogram(runs, seed), _pattern_maps(runs)]
    blocks = "\n".join(
        f"<section><h2>{_text(s.title)}</h2><p class=note>{_text(s.note)}</p>{s.body}</section>"
        for s in sections
        if s is not None
    )
    cards = "".join(_card(run) for run in runs)
    page = PAGE.format(
        title=_text(title),
        style=STYLE.replace("MATCH", figures.MATCH).replace("WRONG", figures.WRONG),
        cards=cards,
        sections=blocks,
    )
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
    """"all/1" -> "all-search, single shot"."""
    mode, shots = setting.split("/")
    return f"{mode}-search, " + ("single shot" if shots == "1" else f"{shots} shots")


def pick_queries(
    average_precision: NDArray[Any], valid: NDArray[np.bool_], count: int, seed: int
) -> dict[str, list[int]]:
    """Best, median and worst queries by average precision.

    Args:
        average_precision: [Q], or [runs, Q] whose mean over runs decides.
        valid: [Q], queries with a match.
        count: queries of each kind; fewer where there are not enough.
        seed: orders ties.
    Returns:
        "best", "median", "worst" -> query rows, none twice.
    """
    score = np.atleast_2d(average_precision).mean(axis=0)
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(valid))
    order = rows[np.argsort(-score[rows], kind="stable")]
    count = min(count, len(order) // 3) or min(1, len(order))
    middle = max(count, (len(order) - count) // 2)
    kinds = {"best": order[:count], "median": order[middle : middle + count]}
    kinds["worst"] = order[max(middle + count, len(order) - count) :]
    return {kind: [int(row) for row in chosen] for kind, chosen in kinds.items() if len(chosen)}


def rank_list(run: RunRecord, row: int, *, top: int = 10) -> list[Tile]:
    """A query and its nearest gallery images, ascending cosine distance, as tiles.

    Args:
        run: a run with embeddings and `image_root`.
        row: query row.
        top: length of the list.
    Returns:
        The query's tile, then at most `top` gallery tiles, framed by whether the person matches.
        Images taken at the query's own location are left out, as the protocol asks.
    """
    query, gallery, shown = _embeddings(run)
    distance = _distances(query.features[row : row + 1], gallery.features[shown])[0]
    keep = _location(gallery.cams[shown]) != _location(query.cams[row])
    order = np.argsort(np.where(keep, distance, np.inf), kind="stable")[: min(top, keep.sum())]
    person = int(query.ids[row])
    tiles = [_tile(run, query, row, "query", None, person)]
    for rank, index in enumerate(order, 1):
        head = f"{rank}"
        tiles.append(_tile(run, gallery, int(shown[index]), head, float(distance[index]), person))
    return tiles


def rank_list_section(
    runs: Sequence[RunRecord], *, queries: int, top: int, seed: int
) -> Section | None:
    """Rank lists of the same queries under every run that embedded the same images."""
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in runs:
        if run.query is not None and run.gallery is not None:
            groups.setdefault(tuple(map(str, run.query.paths)), []).append(run)
    body = []
    for group in groups.values():
        scores = [_per_query(run) for run in group]
        precision = np.stack([score[0] for score in scores])
        for kind, rows in pick_queries(precision, scores[0][1], queries, seed).items():
            body.append(f"<h3>{kind.capitalize()} queries</h3>")
            for row in rows:
                for run, score in zip(group, precision[:, row], strict=True):
                    label = f"<b>{_text(run.name)}</b><br>AP {100 * score:.0f}&nbsp;%"
                    body.append(_tile_row(rank_list(run, row, top=top), label))
    if not body:
        return None
    first = next(iter(groups.values()))[0]
    note = (
        f"Sort order: ascending cosine distance, ties by gallery index; the {top} nearest. Gallery: "
        f"{first.shown_name}, {len(_embeddings(first)[2])} images, without those taken at the query's own "
        "location. Green frame and ✓: the same person; red frame and ✗: another. VIS is a visible, "
        "IR an infrared image. Queries are the best, median and worst by average precision "
        f"(mean over the runs shown), ties drawn with seed {seed}."
    )
    return Section("Rank lists", note, "".join(body))


def _table(runs: Sequence[RunRecord]) -> Section | None:
    settings = list(dict.fromkeys(setting for run in runs for setting in run.results))
    if not settings:
        return None
    head = "".join(f"<th scope=col>{name}</th>" for name in METRICS)
    rows = []
    for setting in settings:
        rows.append(f"<tr class=group><th colspan={len(METRICS) + 1}>{setting_name(setting)}</th></tr>")
        scored = {run.name: run.results[setting] for run in runs if setting in run.results}
        means = {name: metric_values(result.mean) for name, result in scored.items()}
        for name, result in scored.items():
            spread = metric_values(result.std)
            cells = ""
            for metric in METRICS:
                value = means[name][metric]
                best = len(scored) > 1 and value == max(m[metric] for m in means.values())
                number = f"{100 * value:.1f} <small>± {100 * spread[metric]:.1f}</small>"
                cells += f"<td>{f'<b>{number}</b>' if best else number}</td>"
            rows.append(f"<tr><th scope=row>{_text(name)}</th>{cells}</tr>")
        chance = next((run.chance[setting] for run in runs if setting in run.chance), None)
        if chance is not None:
            levels = metric_values(chance)
            cells = "".join(f"<td>{100 * levels[metric]:.1f}</td>" for metric in METRICS)
            rows.append(f"<tr class=chance><th scope=row>chance</th>{cells}</tr>")
    note = (
        "Percent: mean ± standard deviation over the protocol's trials (galleries). Chance is the expected "
        "score of a random ranking of the same galleries."
    )
    body = f"<div class=wide><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    return Section("Results", note, body)


def _losses(runs: Sequence[RunRecord]) -> Section | None:
    curves = {run.name: run.losses for run in runs if run.losses}
    if not curves:
        return None
    note = "Mean of each term over an epoch, unweighted; `total` is the weighted sum that was minimised."
    drawn = figures.small_multiples(curves)
    return Section("Training losses", note, _svg(drawn, "loss", _ends("Losses", curves)))


def _validation(runs: Sequence[RunRecord]) -> Section | None:
    curves = {run.name: run.validation for run in runs if run.validation}
    if not curves:
        return None
    note = (
        "Measured during training on identities held out from the training split, never on the test split "
        "unless the header says so; the table above is the test."
    )
    drawn = figures.small_multiples(curves, percent=True)
    return Section("Validation", note, _svg(drawn, "validation", _ends("Validation", curves)))


def _cmc(runs: Sequence[RunRecord]) -> Section | None:
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
        "Share of queries whose person is among the first k identities; band: one standard deviation over trials."
    )
    alt = "CMC curves. " + "; ".join(
        f"{setting}, {name}: rank 1 {100 * curve.y[0]:.1f} %, rank {len(curve.y)} {100 * curve.y[-1]:.1f} %"
        for setting, panel in settings.items()
        for name, curve in panel.items()
    )
    return Section("CMC", note, _svg(figures.cmc_curves(settings), "cmc", alt))


def _histogram(runs: Sequence[RunRecord], seed: int) -> Section | None:
    pairs: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for run in runs:
        if run.query is None or run.gallery is None:
            continue
        count = len(run.query.ids)
        chosen = np.random.default_rng(seed).permutation(count)[:HISTOGRAM_QUERIES]
        distance = _distances(run.query.features[chosen], run.gallery.features)
        same = run.query.ids[chosen][:, None] == run.gallery.ids[None, :]
        keep = _location(run.query.cams[chosen])[:, None] != _location(run.gallery.cams)[None, :]
        pairs[run.name] = (distance[same & keep], distance[~same & keep])
    if not pairs or any(not len(part) for both in pairs.values() for part in both):
        return None
    note = (
        "Cosine distances between infrared queries and the whole visible gallery pool, pairs of one location "
        f"left out; at most {HISTOGRAM_QUERIES} queries, drawn with seed {seed}. Each area is one: "
        "less overlap is better."
    )
    alt = "Distance histogram. " + "; ".join(
        f"{name}: median {np.median(same):.3f} same person, {np.median(other):.3f} different persons"
        for name, (same, other) in pairs.items()
    )
    return Section(
        "Distances across modalities", note, _svg(figures.distance_histogram(pairs), "distance", alt)
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


def _pattern_maps(runs: Sequence[RunRecord]) -> Section | None:
    body = [
        _tile_row(row, f"<b>{_text(run.name)}</b>")
        for run in runs
        if run.maps is not None
        for row in pattern_map_tiles(run.maps)
    ]
    note = (
        "Where each learned pattern looks. Heat is stretched from a map's smallest to its largest value on this "
        "image (written below it): bright means most, not much."
    )
    return Section("Pattern maps", note, "".join(body)) if body else None


def _embeddings(run: RunRecord) -> tuple[Embeddings, Embeddings, NDArray[np.int64]]:
    if run.query is None or run.gallery is None:
        raise ValueError(f"{run.name}: expected query and gallery embeddings, got none")
    shown = np.arange(len(run.gallery.ids)) if run.shown is None else run.shown
    return run.query, run.gallery, shown


def _per_query(run: RunRecord) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    query, gallery, shown = _embeddings(run)
    metrics = rank_metrics(
        _distances(query.features, gallery.features[shown]),
        query.ids,
        gallery.ids[shown],
        query.cams,
        gallery.cams[shown],
        protocol="sysu",
        per_query=True,
    )
    return np.nan_to_num(metrics.average_precision), metrics.valid


def _distances(queries: NDArray[Any], gallery: NDArray[Any]) -> NDArray[Any]:
    def unit(x: NDArray[Any]) -> NDArray[Any]:
        x = np.asarray(x, dtype=np.float32)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    return np.asarray(1.0 - unit(queries) @ unit(gallery).T)


def _location(cams: Any) -> Any:
    # Cameras 2 and 3 of SYSU-MM01 hang in the same room.
    return np.where(cams == 3, 2, cams)


def _tile(
    run: RunRecord, images: Embeddings, row: int, head: str, distance: float | None, person: int
) -> Tile:
    if run.image_root is None:
        raise ValueError(f"{run.name}: expected image_root, the folder of the embedded images")
    cam, found = int(images.cams[row]), int(images.ids[row])
    modality = "IR" if cam in INFRARED_CAMERAS else "VIS"
    correct = None if distance is None else found == person
    mark = "" if correct is None else " ✓" if correct else " ✗"
    lines = [f"{head}{mark}", f"{modality} cam {cam}", f"id {found}"]
    if distance is not None:
        lines.append(f"{distance:.3f}")
    match = "" if correct is None else ", same person" if correct else ", another person"
    away = "" if distance is None else f", distance {distance:.3f}"
    alt = f"{head}: {modality} image of person {found}, camera {cam}{away}{match}"
    return Tile(_read(run.image_root / str(images.paths[row])), tuple(lines), alt, correct)


def _read(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _tile_row(tiles: Iterable[Tile], label: str) -> str:
    cells = []
    for tile in tiles:
        frame = "" if tile.correct is None else " match" if tile.correct else " wrong"
        caption = "<br>".join(_text(line) for line in tile.lines)
        cells.append(
            f'<figure class="tile{frame}"><img src="{_jpeg(tile.image)}" alt="{_text(tile.alt)}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f"<div class=row><div class=label>{label}</div>{''.join(cells)}</div>"


def _jpeg(image: NDArray[np.uint8], *, height: int = 144) -> str:
    from PIL import Image

    picture = Image.fromarray(image)
    width = max(1, round(picture.width * height / picture.height))
    stream = io.BytesIO()
    picture.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _svg(figure: Figure, identifier: str, alt: str) -> str:
    return f"<div class=chart>{figures.to_svg(figure, identifier=identifier, alt=alt)}</div>"


def _ends(what: str, runs: Mapping[str, Mapping[str, Curve]]) -> str:
    parts = (
        f"{name} {term} from {curve.y[0]:.3g} to {curve.y[-1]:.3g}"
        for name, curves in runs.items()
        for term, curve in curves.items()
    )
    return f"{what} against epochs: " + "; ".join(parts)


def _card(run: RunRecord) -> str:
    facts = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in run.facts.items())
    commands = "\n".join(run.commands)
    repeat = f"<p>To repeat:</p><pre>{_text(commands)}</pre>" if commands else ""
    return f"<article class=card><h2>{_text(run.name)}</h2><dl>{facts}</dl>{repeat}</article>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
