"""Distances, ranked lists and the queries worth looking at, from the embeddings of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastreid_vi import _page
from fastreid_vi._page import Section
from fastreid_vi.evaluation import Embeddings, PerQuery, rank_metrics
from fastreid_vi.evaluation.directions import side_of
from fastreid_vi.figures import Tile

if TYPE_CHECKING:
    from fastreid_vi.report import ReportedRun

INFRARED_CAMERAS = (3, 6)
# What a query's gallery is without.
_RULES = {
    "sysu": ", without those taken at the query's own location",
    "regdb": "",
    "llcm": ", without those of the query's person from its own camera",
    "market": ", without those of the query's person from its own camera",
}


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


def rank_list(run: ReportedRun, row: int, *, top: int = 10) -> list[Tile]:
    """A query and its nearest gallery images, ascending cosine distance, as tiles.

    Args:
        run: a run with embeddings and `image_root`.
        row: query row.
        top: length of the list.
    Returns:
        The query's tile, then at most `top` gallery tiles, framed by whether the person matches.
        Images that the protocol's camera rule drops are left out.
    """
    query, gallery, shown = _embeddings(run)
    distance = distances(query.features[row : row + 1], gallery.features[shown])[0]
    keep = kept(run, np.array([row]), shown)[0]
    order = np.argsort(np.where(keep, distance, np.inf), kind="stable")[: min(top, keep.sum())]
    person = int(query.ids[row])
    tiles = [_tile(run, query, row, "query", None, person)]
    for rank, index in enumerate(order, 1):
        head = f"{rank}"
        tiles.append(_tile(run, gallery, int(shown[index]), head, float(distance[index]), person))
    return tiles


def rank_list_section(
    runs: Sequence[ReportedRun], *, queries: int, top: int, seed: int
) -> Section | None:
    """Rank lists of the same queries under every run that embedded the same images."""
    groups: dict[tuple[str, ...], list[ReportedRun]] = {}
    for run in runs:
        if run.query is not None and run.gallery is not None:
            groups.setdefault(tuple(map(str, run.query.paths)), []).append(run)
    body = []
    for group in groups.values():
        scores = [_per_query(run) for run in group]
        precision = np.stack([np.nan_to_num(score.AP) for score in scores])
        matches = scores[0].num_pos
        for kind, rows in pick_queries(precision, matches > 0, queries, seed).items():
            body.append(f"<h3>{kind.capitalize()} queries</h3>")
            for row in rows:
                for run, score in zip(group, precision[:, row], strict=True):
                    label = f"<b>{_page.text(run.name)}</b><br>AP {100 * score:.0f}&nbsp;%"
                    label += f"<br>{matches[row]} right in gallery"
                    body.append(_page.tile_row(rank_list(run, row, top=top), label))
    if not body:
        return None
    first = next(iter(groups.values()))[0]
    searched = f"{first.shown_name}, {len(_embeddings(first)[2])} test images"
    note = (
        f"Sort order: ascending cosine distance, ties by gallery index; the {top} nearest. "
        f"Gallery: {searched}{_RULES[first.protocol]}. "
        "Green frame and ✓: the same person; red frame and ✗: another. VIS "
        "is a visible, IR an infrared image. Queries are the best, median and worst by average "
        f"precision (mean over the runs shown), ties drawn with seed {seed}."
    )
    return Section("Rank lists", note, "".join(body))


def _embeddings(run: ReportedRun) -> tuple[Embeddings, Embeddings, NDArray[np.int64]]:
    if run.query is None or run.gallery is None:
        raise ValueError(f"{run.name}: expected query and gallery embeddings, got none")
    shown = np.arange(len(run.gallery.ids)) if run.shown is None else run.shown
    return run.query, run.gallery, shown


def _per_query(run: ReportedRun) -> PerQuery:
    query, gallery, shown = _embeddings(run)
    metrics = rank_metrics(
        distances(query.features, gallery.features[shown]),
        query.ids,
        gallery.ids[shown],
        query.cams,
        gallery.cams[shown],
        protocol=run.protocol,
        per_query=True,
    )
    assert metrics.per_query is not None
    return metrics.per_query


def distances(queries: NDArray[Any], gallery: NDArray[Any]) -> NDArray[Any]:
    """Cosine distances, [Q, D] and [G, D] -> [Q, G]."""

    def unit(x: NDArray[Any]) -> NDArray[Any]:
        x = np.asarray(x, dtype=np.float32)
        unit_x: NDArray[Any] = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        return unit_x

    return np.asarray(1.0 - unit(queries) @ unit(gallery).T)


def kept(run: ReportedRun, queries: NDArray[Any], images: NDArray[Any]) -> NDArray[np.bool_]:
    """Which gallery images each query keeps under the camera rule of the run's protocol.

    Args:
        run: a run with embeddings.
        queries: [Q] rows.
        images: [G] gallery rows.
    Returns:
        [Q, G].
    """
    query, gallery, _ = _embeddings(run)
    if run.protocol == "regdb":
        return np.ones((len(queries), len(images)), dtype=bool)
    cams, others = query.cams[queries][:, None], gallery.cams[images][None, :]
    if run.protocol == "sysu":
        return np.asarray(location(cams) != location(others))
    same = query.ids[queries][:, None] == gallery.ids[images][None, :]
    return np.asarray(~(same & (cams == others)))


def location(cams: Any) -> Any:
    """Place of each camera of SYSU-MM01."""
    # Cameras 2 and 3 of SYSU-MM01 hang in the same room.
    return np.where(cams == 3, 2, cams)


def _tile(
    run: ReportedRun, images: Embeddings, row: int, head: str, distance: float | None, person: int
) -> Tile:
    if run.image_root is None:
        raise ValueError(f"{run.name}: expected image_root, the folder of the embedded images")
    cam, found = int(images.cams[row]), int(images.ids[row])
    modality = "IR" if _infrared(run, cam, str(images.paths[row])) else "VIS"
    correct = None if distance is None else found == person
    mark = "" if correct is None else " ✓" if correct else " ✗"
    lines = [f"{head}{mark}", f"{modality} cam {cam}", f"id {found}"]
    if distance is not None:
        lines.append(f"{distance:.3f}")
    match = "" if correct is None else ", same person" if correct else ", another person"
    away = "" if distance is None else f", distance {distance:.3f}"
    alt = f"{head}: {modality} image of person {found}, camera {cam}{away}{match}"
    return Tile(_read(run.image_root / str(images.paths[row])), tuple(lines), alt, correct)


def _infrared(run: ReportedRun, cam: int, path: str) -> bool:
    """By the camera, or by the folder where both modalities share their cameras."""
    if run.protocol == "sysu":
        return cam in INFRARED_CAMERAS
    return side_of(path) == "infrared"


def _read(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
