"""Queries in, their neighbours in a saved gallery out: what `fastreid-vi search` does."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastreid_vi import _neighbors
from fastreid_vi._neighbors import Neighbors
from fastreid_vi.evaluation import Embeddings, load_embeddings
from fastreid_vi.evaluation.embeddings import find_sides
from fastreid_vi.evaluation.exact_search import search as nearest

if TYPE_CHECKING:
    from fastreid_vi._console import Console
    from fastreid_vi.evaluation.nearest import Metric

TIMED = 100  # single queries that the latency is taken from


class SearchError(ValueError):
    """Queries cannot be searched for; one line that says why."""


def search(
    query: Path,
    gallery: Path,
    *,
    k: int,
    metric: Metric = "cosine",
    run: Path | None = None,
    recipe: str | None = None,
    modality: str | None = None,
    device: str | None = None,
    latency: bool = False,
    out: Path | None = None,
    console: Console,
) -> tuple[Neighbors, dict[str, Any]]:
    """Search a saved gallery for the neighbours of saved queries, of a folder or of an image.

    Returns:
        The neighbours, and what is said about the search, JSON-ready.
    Raises:
        SearchError, OutputError, EmbeddingsError: one line that says what does not fit.
    """
    _neighbors.check_suffix("--out", out, _neighbors.SUFFIXES)
    pool = open_side(gallery, "gallery")
    if find_sides(query):
        asking = open_side(query, "query")
    else:
        asking = _embedded(query, pool, gallery, run, recipe, modality, device, console)
    check_same(query, asking, gallery, pool)
    k = min(k, len(pool.ids))
    began = time.perf_counter()
    scores, indices = nearest(asking.features, pool.features, k, metric=metric)
    seconds = time.perf_counter() - began
    found = Neighbors(asking, pool, np.asarray(indices), np.asarray(scores))
    about: dict[str, Any] = {
        "gallery": str(gallery),
        "images": len(pool.ids),
        "dimensions": int(pool.features.shape[1]),
        "searched": len(asking.ids),
        "k": k,
        "metric": metric,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
    }
    if latency:
        about["latency_ms"] = _latency(asking, pool, k, metric)
    if out is not None:
        _neighbors.write(out, found, about)
        about["out"] = str(out)
    return found, about


def open_side(path: Path, wanted: str) -> Embeddings:
    """The side of saved embeddings that is meant: the only one, or the one called `wanted`.

    Raises:
        EmbeddingsError, SearchError: nothing there, or several sides of other names.
    """
    sides = load_embeddings(path)
    if len(sides) == 1:
        return next(iter(sides.values()))
    if wanted not in sides:
        names = ", ".join(str(path / name) for name in sides)
        raise SearchError(f"{path}: which side is the {wanted}? name one: {names}")
    return sides[wanted]


def check_same(query: Path, asking: Embeddings, gallery: Path, pool: Embeddings) -> None:
    """Raise a SearchError for features that cannot be compared."""
    if None not in (asking.checkpoint, pool.checkpoint) and asking.checkpoint != pool.checkpoint:
        raise SearchError(
            f"{query} and {gallery} were embedded by two networks ({str(asking.checkpoint)[:12]} "
            f"and {str(pool.checkpoint)[:12]}): distances between them mean nothing"
        )
    ours, theirs = asking.features.shape[1], pool.features.shape[1]
    if ours != theirs:
        raise SearchError(f"{query} has {ours} numbers for each image, {gallery} has {theirs}")
    for path, side in ((query, asking), (gallery, pool)):
        if not len(side.ids):
            raise SearchError(f"{path}: holds no image")


def _embedded(
    query: Path,
    pool: Embeddings,
    gallery: Path,
    run: Path | None,
    recipe: str | None,
    modality: str | None,
    device: str | None,
    console: Console,
) -> Embeddings:
    """Embed a folder of images or one image with the gallery's network."""
    from fastreid_vi.data.images import IMAGE_SUFFIXES

    image = query.is_file() and query.suffix.lower() in IMAGE_SUFFIXES
    if not image and not query.is_dir():
        what = "neither embeddings nor an image" if query.exists() else "no such file or folder"
        raise SearchError(f"{query}: {what}")
    known = (pool.details or {}).get("weights")
    if run is None and (known is None or not Path(known).is_file()):
        where = f"; {known}, which embedded {gallery}, is not there" if known else ""
        raise SearchError(f"{query}: images need a network: --run RUN{where}")
    from fastreid_vi import _embed
    from fastreid_vi._evaluate import open_target

    place = run or Path(str(known))
    images = _embed.images_of(query, modality)
    target = open_target(place, recipe=recipe, root=images.root, pack="none")
    if pool.checkpoint is not None and _embed.file_hash(target.weights) != pool.checkpoint:
        raise SearchError(f"{target.weights}: not the network that embedded {gallery}")
    made = _embed.embed_lists(target, {"query": images}, device=device, progress=console.progress)
    return made.sides["query"]


def _latency(asking: Embeddings, pool: Embeddings, k: int, metric: Metric) -> dict[str, float]:
    """Milliseconds of single queries: median and 95th percentile."""
    times = []
    for row in range(min(TIMED, len(asking.ids))):
        one = np.ascontiguousarray(asking.features[row : row + 1])
        began = time.perf_counter()
        nearest(one, pool.features, k, metric=metric)
        times.append(1000 * (time.perf_counter() - began))
    return {"p50": float(np.percentile(times, 50)), "p95": float(np.percentile(times, 95))}


def peak_memory() -> int:
    """The most memory that this process has had, bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def text(about: dict[str, Any]) -> str:
    """What was done, for people."""
    rate = about["searched"] / about["seconds"] if about["seconds"] else float("inf")
    line = (
        f"{about['searched']} queries in {about['images']} images of {about['dimensions']} "
        f"numbers, exact {about['metric']}: {about['seconds']:.3f} s, {rate:.0f} queries per "
        f"second, peak memory {about['peak_memory_bytes'] / 2**20:.0f} MiB"
    )
    if "latency_ms" in about:
        times = about["latency_ms"]
        line += f"; one query: p50 {times['p50']:.2f} ms, p95 {times['p95']:.2f} ms"
    return line
