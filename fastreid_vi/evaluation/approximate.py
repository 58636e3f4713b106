"""Approximate search with a FAISS index, for galleries where reading all of it takes too long.

Needs the extra `faiss` (pip install fastreid-vi[faiss]); loaded when an index is built or read.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from fastreid_vi.evaluation.arrays import Real, at_least_one, choice, like, real_matrix
from fastreid_vi.evaluation.exact_search import Rows, SearchResult, finite_norms, search
from fastreid_vi.evaluation.nearest import Metric
from fastreid_vi.evaluation.positions import cores

Kind = Literal["hnsw", "ivf"]

LINKS: Final = 32  # of a vector in the HNSW graph
BUILD_EFFORT: Final = 200  # candidates looked at for the links of a new vector
EFFORT: Final[dict[str, int]] = {"hnsw": 128, "ivf": 32}
PER_LIST: Final = 64  # vectors that train one list of IVF
BLOCK: Final = 2**14  # gallery rows read at once
SINGLE: Final = np.dtype(np.float32)


def build_index(
    gallery: Any, *, metric: Metric = "cosine", kind: Kind = "hnsw", effort: int | None = None
) -> ApproximateIndex:
    """Index a gallery for approximate search.

    "hnsw" is a graph of neighbours: fast and accurate, slow to build. "ivf" sorts the vectors into
    4 sqrt(G) lists around k-means centres: quick to build, larger `effort` for the same recall.
    Both keep the vectors in float32. Measure what you lose with `ApproximateIndex.recall`.

    Args:
        gallery: [G, D]; slices of rows are read, see `search`.
        metric: "cosine", "inner" or "euclidean".
        kind: "hnsw" or "ivf".
        effort: candidates of a search in the graph, or lists that it opens; by default 128 and 32.
            It can be changed later: `index.effort = 500`.
    Returns:
        An `ApproximateIndex`.
    Raises:
        ImportError: FAISS is not installed.
        TypeError, ValueError: as `search`.
    """
    choice("metric", metric, Metric)
    choice("kind", kind, Kind)
    faiss = _faiss()
    rows = Rows(gallery)
    count, dim = rows.shape
    rows.check(dim, 1)
    measure = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, LINKS, measure)
        index.hnsw.efConstruction = BUILD_EFFORT
    else:
        lists = max(1, min(round(4 * count**0.5), count))
        centres = faiss.IndexFlat(dim, measure)
        index = faiss.IndexIVFFlat(centres, dim, lists, measure)
        centres.this.disown()
        index.own_fields = True
        index.train(_every(rows, max(1, count // (PER_LIST * lists)), metric))
    for first in range(0, count, BLOCK):
        index.add(_vectors("gallery", rows.read(first, first + BLOCK, SINGLE), metric, first))
    return ApproximateIndex(index, kind, metric, EFFORT[kind] if effort is None else effort)


def load_index(path: str | os.PathLike[str]) -> ApproximateIndex:
    """Read what `ApproximateIndex.save` wrote.

    Raises:
        ImportError: FAISS is not installed.
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged, or the two do not belong together.
    """
    faiss, path = _faiss(), Path(path)
    for file in (path, _record(path)):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; an index is {path} and {_record(path)}")
    try:
        record = json.loads(_record(path).read_text(encoding="utf-8"))
        kind, metric, effort, shape = (record[n] for n in ("kind", "metric", "effort", "shape"))
        choice("kind", kind, Kind)
        choice("metric", metric, Metric)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{_record(path)}: not the record of an index ({error})") from None
    try:
        index = faiss.read_index(os.fspath(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path}: not a FAISS index ({reason})") from None
    if [index.ntotal, index.d] != shape:
        raise ValueError(f"{path}: expected {shape} vectors, got {[index.ntotal, index.d]}")
    return ApproximateIndex(index, kind, metric, effort)


class ApproximateIndex:
    """A FAISS index of a gallery; `build_index` and `load_index` make it.

    Attributes:
        kind: "hnsw" or "ivf".
        metric: "cosine", "inner" or "euclidean".
        effort: more finds more and takes longer; may be set.
        shape: (G, D).
    """

    def __init__(self, index: Any, kind: Kind, metric: Metric, effort: int) -> None:
        self._index, self.kind, self.metric = index, kind, metric
        self.effort = effort

    @property
    def shape(self) -> tuple[int, int]:
        """Vectors and their length."""
        return int(self._index.ntotal), int(self._index.d)

    @property
    def effort(self) -> int:
        """Candidates of a search in the graph, or lists that it opens."""
        return self._effort

    @effort.setter
    def effort(self, value: int) -> None:
        at_least_one("effort", value)
        self._effort = int(value)

    def search(self, query: Any, k: int) -> SearchResult:
        """About the k nearest gallery rows of every query.

        Args:
            query: [Q, D].
            k: 1 to G.
        Returns:
            `SearchResult(scores, indices)` as from `search`, scores in float32. A place that the
            index could not fill (IVF with few lists open) has the index -1 and the worst score.
        Raises:
            TypeError, ValueError: as `search`.
        """
        at_least_one("k", k)
        queries = real_matrix("query", query, "[Q, D]")
        count, dim = self.shape
        if not queries.size or queries.shape[1] != dim:
            raise ValueError(f"query: expected shape [Q, {dim}], got {list(queries.shape)}")
        if k > count:
            raise ValueError(f"k: expected at most the {count} rows of the gallery, got {k}")
        vectors = _vectors("query", queries.astype(np.float32, copy=False), self.metric, 0)
        scores, indices = self._index.search(vectors, k, params=self._options(k))
        if self.metric == "euclidean":
            scores = np.sqrt(np.maximum(scores, 0))
        scores[indices < 0] = np.inf if self.metric == "euclidean" else -np.inf
        return SearchResult(like(query, scores), like(query, indices.astype(np.int64)))

    def recall(
        self, query: Any, gallery: Any, k: int, *, sample: int = 200, seed: int = 0
    ) -> float:
        """The share of the true k nearest rows that this index finds, measured.

        Args:
            query: [Q, D]; a seeded sample of them is searched exactly, in one pass over `gallery`.
            gallery: the very rows that were indexed.
            k: as for `search`.
            sample: queries at most.
            seed: of their choice.
        Returns:
            A fraction in [0, 1]: mean over queries of |found and true| / k.
        Raises:
            TypeError, ValueError: as `search`; another gallery than the one indexed.
        """
        at_least_one("sample", sample)
        rows = Rows(gallery)
        if rows.shape != self.shape:
            raise ValueError(f"gallery: expected {list(self.shape)}, got {list(rows.shape)}")
        queries = real_matrix("query", query, "[Q, D]")
        chosen = np.random.default_rng(seed).permutation(len(queries))[:sample]
        queries = queries[np.sort(chosen)]
        found = self.search(queries, k).indices
        true = search(queries, gallery, k, metric=self.metric).indices
        hits = [np.isin(a, b).sum() for a, b in zip(found, true, strict=True)]
        return float(np.mean(hits) / k)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to `path` (FAISS's own format) and what it is to `path`.json."""
        path = Path(path)
        record = {
            "kind": self.kind, "metric": self.metric, "effort": self.effort,
            "shape": list(self.shape), "faiss": _faiss().__version__,
        }  # fmt: skip
        unfinished = path.with_name(path.name + ".part")
        try:
            _faiss().write_index(self._index, os.fspath(unfinished))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise OSError(f"{path}: cannot be written ({reason})") from None
        os.replace(unfinished, path)
        _record(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def _options(self, k: int) -> Any:
        faiss = _faiss()
        if self.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(self.effort, k))
        return faiss.SearchParametersIVF(nprobe=min(self.effort, self._index.nlist))


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            f"approximate search needs FAISS ({error}): pip install fastreid-vi[faiss]"
        ) from None


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _vectors(name: str, rows: Real, metric: Metric, first: int) -> Real:
    """Finite rows in float32, of length one for "cosine"; a zero row stays zero."""
    norms = finite_norms(name, rows, first, cores())
    if metric == "cosine":
        lengths = np.where(norms > 0, norms, 1)[:, None]
        rows = (rows.astype(np.float64) / lengths).astype(np.float32)
    return np.ascontiguousarray(rows, np.float32)


def _every(rows: Rows, step: int, metric: Metric) -> Real:
    """Every step-th row, to train the lists."""
    parts = []
    for first in range(0, len(rows), BLOCK):
        part = rows.read(first, first + BLOCK, SINGLE)
        begin = -first % step
        parts.append(_vectors("gallery", part, metric, first)[begin::step])
    return np.concatenate(parts)
