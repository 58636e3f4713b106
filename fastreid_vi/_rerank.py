"""Which re-ranking belongs to which embeddings, what it takes and what is said beside it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np

from fastreid_vi import _neighbors, _score, evaluation
from fastreid_vi._neighbors import Neighbors
from fastreid_vi.evaluation import Embeddings, llcm_galleries, load_embeddings, sysu_galleries
from fastreid_vi.evaluation.features import Features

if TYPE_CHECKING:
    from fastreid_vi._console import Console

Asked = Literal["auto", "none", "k-reciprocal", "mser"]
Direction = Literal["i2v", "v2i"]

K_RECIPROCAL: Final[Mapping[str, Any]] = {"k1": 20, "k2": 6, "weight": 0.3, "neighbors": "all"}
MSER: Final[Mapping[str, Any]] = {"k1": 40, "k2": 20, "weight": 0.3, "neighbors": "queries"}
# (method, data set) -> what the released code of a method does there.
OFFICIAL: Final[Mapping[tuple[str, str], tuple[str, Mapping[str, Any]]]] = {
    ("mpanet", "sysu"): ("k-reciprocal", {**K_RECIPROCAL, "neighbors": "queries"}),
    ("mpanet", "regdb"): ("k-reciprocal", K_RECIPROCAL),
    ("mcja", "sysu"): ("mser", MSER),
    ("mcja", "regdb"): ("mser", {"k1": 50, "k2": 10, "weight": 0.2, "neighbors": "all"}),
}
SHARED = (
    "the neighbours of an image are looked for among the other queries: the result of one query "
    "depends on all of them, which single queries do not have"
)
WHOLE = (
    "queries and gallery together are searched for neighbours: the result of one query depends on "
    "the other queries"
)


class RerankError(ValueError):
    """Embeddings cannot be re-ranked so; one line that says why."""


class Reranking(NamedTuple):
    """A procedure, and what is said about it."""

    name: str
    """"k-reciprocal" or "mser"."""
    parameters: Mapping[str, Any]
    """k1, k2, weight, neighbors."""
    spectra: tuple[str, ...]
    """Feature sets of the visible side; empty for k-reciprocal."""
    source: str
    """Whose choice this is."""
    procedure: Any
    """For `rerank=` of the protocols."""
    memory: int
    """Bytes it takes, stated before it starts."""

    @property
    def note(self) -> str:
        """What must be said beside its numbers."""
        return SHARED if self.parameters["neighbors"] == "queries" else WHOLE

    def counted(self, show: Callable[[int, int], None], total: int) -> Any:
        """The procedure, telling `show` of every gallery it has done.

        Masked, and with several spectra, the galleries share work and are not done one by one.
        """
        if self.name != "k-reciprocal" or self.parameters["neighbors"] == "queries":
            return self.procedure
        numbers = itertools.count(1)

        def rerank(query: Any, gallery: Any) -> Any:
            distances = self.procedure(query, gallery)
            show(next(numbers), total)
            return distances

        return rerank

    def facts(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "method": self.name,
            **self.parameters,
            "expand": self.name == "k-reciprocal",
            "spectra": list(self.spectra),
            "source": self.source,
            "memory_bytes": self.memory,
            "note": self.note,
        }

    def text(self) -> str:
        """Name, parameters and note for people."""
        return described(self.facts())


def described(facts: Mapping[str, Any]) -> str:
    """`Reranking.facts` in words."""
    mode = "masked" if facts["neighbors"] == "queries" else "full"
    spectra = ", ".join(facts["spectra"])
    kind = f"spectra {spectra}" if spectra else "local expansion"
    return (
        f"re-ranked by {facts['method']} ({facts['source']}): k1 {facts['k1']}, k2 {facts['k2']}, "
        f"weight {facts['weight']}, {kind}, {mode}:\n{facts['note']}"
    )


def choose(
    asked: Asked,
    query: Embeddings,
    gallery: Embeddings,
    *,
    changes: Mapping[str, Any] | None = None,
    sizes: tuple[int, int] | None = None,
    direction: Direction = "i2v",
) -> Reranking | None:
    """The re-ranking of query and gallery.

    Args:
        asked: "auto" takes what the method's authors do on this data set, k-reciprocal encoding for
            the other methods.
        query, gallery: infrared and visible embeddings.
        changes: other values of k1, k2, weight, neighbors.
        sizes: images that search and that are searched, for `memory`; by default the protocol's.
        direction: which side searches, for `memory`; the protocols know it themselves.
    Returns:
        None for "none".
    Raises:
        RerankError: MSER without further spectra, parameters of no re-ranking.
    """
    if asked == "none":
        if changes:
            raise RerankError(f"--rerank none: there is no {next(iter(changes))} to set")
        return None
    name, parameters, source = _chosen(asked, gallery)
    parameters = {**parameters, **(changes or {})}
    if changes:
        source = "as asked for"
    further = dict(gallery.spectra or {})
    if name == "mser" and not further:
        raise RerankError(
            "mser: needs further spectra of the visible images; fastreid-vi embed --spectra keeps "
            "them, --rerank k-reciprocal does without"
        )
    spectra = ("original", *further) if name == "mser" else ()
    procedure: Any
    if name == "mser":
        procedure = evaluation.MultiSpectral(spectra=list(further.values()), **parameters)
    else:
        procedure = evaluation.KReciprocal(**parameters)
    dim = int(np.shape(gallery.features)[1])
    lists = {name: parameters[name] for name in ("k1", "k2", "neighbors")}
    lists["spectra"] = max(1, len(spectra))
    if sizes is not None:
        memory = evaluation.rerank_memory(*sizes, dim, direction=direction, **lists)
    else:
        memory = _of_protocol(query, gallery, dim, lists)
    return Reranking(name, parameters, spectra, source, procedure, memory)


def _chosen(asked: str, gallery: Embeddings) -> tuple[str, Mapping[str, Any], str]:
    official = OFFICIAL.get((gallery.method or "", gallery.dataset or ""))
    if official is not None and asked in ("auto", official[0]):
        if asked == "auto" and official[0] == "mser" and not gallery.spectra:
            return "k-reciprocal", K_RECIPROCAL, "as published; mser needs embed --spectra"
        return (*official, f"as {gallery.method}'s authors do on {gallery.dataset}")
    if asked == "mser" or (asked == "auto" and gallery.method == "mcja" and gallery.spectra):
        return "mser", MSER, "as MCJA's authors do on sysu"
    return "k-reciprocal", K_RECIPROCAL, "as published"


def _of_protocol(query: Embeddings, gallery: Embeddings, dim: int, lists: Mapping[str, Any]) -> int:
    """Bytes for all trials of a protocol, which share what they can."""
    most = pool = max(len(query.ids), len(gallery.ids))
    if gallery.dataset == "sysu" and gallery.permutations is not None:
        of: Any = {"mode": "all", "shots": 10, "trials": _score.TRIALS}
        trials = sysu_galleries(gallery, gallery.permutations, **of)
        most, pool = len(trials[0]), len(np.unique(np.concatenate(trials)))
    if lists["neighbors"] == "queries":
        return evaluation.rerank_memory(len(query.ids), pool, dim, **lists)
    copies = 4 * dim * pool * int(lists["spectra"])  # of all trials' images
    return copies + evaluation.rerank_memory(len(query.ids), most, dim, **lists)


def size_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(1, round(count / 2**20))} MiB"


def changes_of(args: Any) -> dict[str, Any]:
    """The parameters that flags change."""
    names = ("k1", "k2", "weight", "neighbors")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


class Asking(NamedTuple):
    """Who searches whom in `rerank`."""

    query: Embeddings
    gallery: Embeddings
    infrared: Embeddings
    """Whose images the method's authors query with."""
    rows: Any
    """Rows of `gallery` that are searched."""
    direction: Direction


def rerank(
    path: Path,
    *,
    asked: Asked,
    changes: Mapping[str, Any],
    direction: str,
    setting: str | None,
    trial: int,
    k: int,
    out: Path | None,
    ranking: Path | None,
    console: Console,
) -> tuple[dict[str, Any], str]:
    """Re-rank saved embeddings and write distances, the first k of every query, or both.

    Returns:
        What was done, JSON-ready, and how it is called.
    Raises:
        RerankError, ScoreError, OutputError, EmbeddingsError: one line that says what does not fit.
    """
    if out is None and ranking is None:
        raise RerankError("nothing to write: --out FILE.npy, --ranking FILE.json, or both")
    _neighbors.check_suffix("--out", out, (".npy", ".safetensors"))
    _neighbors.check_suffix("--ranking", ranking, _neighbors.SUFFIXES)
    asking = who(path, direction, setting, trial)
    sizes = (len(asking.query.ids), len(asking.rows))
    visible = asking.gallery if asking.direction == "i2v" else asking.query
    way = asking.direction
    chosen = choose(asked, asking.infrared, visible, changes=changes, sizes=sizes, direction=way)
    if chosen is None:
        raise RerankError("--rerank none: expected auto, k-reciprocal or mser")
    console.note(
        f"re-ranking {sizes[0]} x {sizes[1]} takes at most {size_text(chosen.memory)} of memory"
    )
    began = time.perf_counter()
    with console.waiting("re-ranking"):
        distances = distances_of(asking, chosen)
    seconds = time.perf_counter() - began
    about = {
        **chosen.facts(),
        "embeddings": str(path),
        "direction": direction,
        "setting": setting or "whole gallery",
        "trial": trial if setting else None,
        "query_images": sizes[0],
        "gallery_images": sizes[1],
        "seconds": seconds,
    }
    if out is not None:
        arrays = {
            "query_ids": np.asarray(asking.query.ids, np.int64),
            "gallery_ids": np.asarray(asking.gallery.ids, np.int64)[asking.rows],
            "gallery_rows": np.asarray(asking.rows, np.int64),
        }
        _neighbors.write_matrix(out, distances, arrays)
        about["out"] = str(out)
    if ranking is not None:
        near = np.argsort(distances, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(distances, near, axis=1)
        rows = np.asarray(asking.rows, np.int64)[near]
        _neighbors.write(ranking, Neighbors(asking.query, asking.gallery, rows, scores), about)
        about["ranking"] = str(ranking)
    return about, chosen.text()


def who(path: Path, direction: str, setting: str | None, trial: int) -> Asking:
    """Query, gallery and its rows out of a folder of saved embeddings."""
    sides = load_embeddings(path)
    if not {"query", "gallery"} <= set(sides):
        raise RerankError(f"{path}: expected query and gallery, got {', '.join(sides)} alone")
    infrared, visible = sides["query"], sides["gallery"]
    _score.check_pair(str(path), infrared, visible)
    if direction == "vis_to_ir":
        query, gallery, way = visible, infrared, "v2i"
    else:
        query, gallery, way = infrared, visible, "i2v"
    rows = np.arange(len(gallery.ids))
    if setting is not None:
        rows = gallery_rows(gallery, setting, trial)
    return Asking(query, gallery, infrared, rows, "v2i" if way == "v2i" else "i2v")


def distances_of(asking: Asking, chosen: Reranking) -> Any:
    """Re-ranked distances [Q, rows] of unit vectors, as the protocols have them."""
    everything = np.arange(len(asking.query.ids))
    query = Features("query", asking.query, normalize=True).rows(everything)
    gallery = Features("gallery", asking.gallery, normalize=True).rows(asking.rows)
    if chosen.name == "k-reciprocal":
        return evaluation.k_reciprocal_rerank(query, gallery, **chosen.parameters)
    i2v = asking.direction == "i2v"
    visible, rows = (asking.gallery, asking.rows) if i2v else (asking.query, everything)
    views = [
        Features(name, visible._replace(features=part), normalize=True).rows(rows)
        for name, part in (visible.spectra or {}).items()
    ]
    count = len(views) + 1
    queries = [query] * count if i2v else [query, *views]
    galleries = [gallery, *views] if i2v else [gallery] * count
    return evaluation.multi_spectral_rerank(
        queries, galleries, direction=asking.direction, **chosen.parameters
    )


def gallery_rows(gallery: Embeddings, setting: str, trial: int) -> Any:
    """Rows of the gallery that a setting searches in a trial, from 1.

    Raises:
        RerankError: the data set has no such setting.
    """
    mode, _, shots = setting.partition("/")
    if gallery.dataset == "sysu" and gallery.permutations is not None and shots in ("1", "10"):
        if mode in ("all", "indoor"):
            of: Any = {"mode": mode, "shots": int(shots), "trials": trial}
            return sysu_galleries(gallery, gallery.permutations, **of)[-1]
    elif gallery.dataset == "llcm" and setting == "drawn":
        return llcm_galleries(gallery, trial)[-1]
    raise RerankError(
        f"--setting {setting}: expected all/1, all/10, indoor/1 or indoor/10 of SYSU-MM01, or "
        f"drawn of LLCM, got embeddings of {gallery.dataset!r}"
    )
