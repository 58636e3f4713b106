"""Exact search over a gallery whose rows lie in several processes."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

from fastreid_vi.evaluation.arrays import (
    Int,
    Real,
    at_least_one,
    described,
    like,
    real_matrix,
    to_numpy,
)
from fastreid_vi.evaluation.exact_search import SearchResult, search
from fastreid_vi.evaluation.nearest import Metric


class _Part(NamedTuple):
    """What one process found in its shard, or why it could not."""

    problem: str | None
    first: int = 0
    rows: int = 0
    query: str = ""  # type, shape and digest of the queries
    scores: Real | None = None  # [Q, min(k, rows)]
    indices: Int | None = None  # the same shape, rows of the whole gallery


def sharded_search(
    query: Any,
    shard: Any,
    k: int,
    *,
    offset: int,
    metric: Metric = "cosine",
    group: Any = None,
    threads: int | None = None,
) -> SearchResult:
    """`search` in a gallery of which every process holds some rows.

    Each process searches its shard; the lists, Q x k numbers from each, are exchanged and merged by
    (score, index). The result is that of one `search` in the whole gallery to the bit, in every
    process, for scores do not depend on where a row lies.

    Args:
        query: [Q, D], the same in every process; see `search`.
        shard: [G_r, D], the rows of this process; it may have none.
        k: neighbours wanted, 1 to the rows of all shards.
        offset: index of the shard's first row in the whole gallery. Shards do not overlap; they
            may leave gaps.
        metric: "cosine", "inner" or "euclidean".
        group: process group of `torch.distributed`; None is the default one. Objects are
            exchanged, so with NCCL every process sets its device first.
        threads: see `search`.
    Returns:
        `SearchResult(scores, indices)`, [Q, k] each, the kind of array that `query` is; indices
        count the rows of the whole gallery.
    Raises:
        RuntimeError: `torch.distributed` has no process group, or another process failed; it says
            which and why, so that no process waits for one that has stopped.
        TypeError, ValueError: as `search`; overlapping shards, queries that differ between
            processes.
    Spec: evaluation, 4.6. Backends: retrieval.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("sharded_search: torch.distributed.init_process_group comes first")
    failure: Exception | None = None
    try:
        part = _search_shard(query, shard, k, offset, metric, threads)
    except Exception as error:  # the others wait for an answer
        failure, part = error, _Part(f"{type(error).__name__}: {error}")
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, part, group=group)
    if failure is not None:
        raise failure
    for rank, other in enumerate(parts):
        if other.problem is not None:
            raise RuntimeError(f"sharded_search: process {rank} of the group: {other.problem}")
    _check_fit(parts, k)
    scores, indices = _merged(parts, k, falling=metric != "euclidean")
    return SearchResult(like(query, scores), like(query, indices))


def _search_shard(
    query: Any, shard: Any, k: int, offset: int, metric: Metric, threads: int | None
) -> _Part:
    at_least_one("k", k)
    if isinstance(offset, bool) or not isinstance(offset, int | np.integer):
        raise TypeError(f"offset: expected an integer, got {type(offset).__name__}")
    if offset < 0:
        raise ValueError(f"offset: expected >= 0, got {offset}")
    queries = real_matrix("query", query, "[Q, D]")
    digest = hashlib.blake2b(np.ascontiguousarray(queries).data, digest_size=6).hexdigest()
    mark = f"{described(queries)} {digest}"
    shape = tuple(getattr(shard, "shape", None) or np.shape(shard))
    rows = int(shape[0]) if len(shape) == 2 else k
    if rows:
        found = search(query, shard, min(k, rows), metric=metric, threads=threads)
        scores, indices = (to_numpy("query", part) for part in found)
        return _Part(None, int(offset), rows, mark, scores, indices + int(offset))
    # One zero row in place of none: the queries and names are checked all the same.
    search(queries, np.zeros((1, shape[1]), queries.dtype), 1, metric=metric, threads=threads)
    return _Part(None, int(offset), 0, mark)


def _check_fit(parts: list[_Part], k: int) -> None:
    if len({part.query for part in parts}) > 1:
        given = "; ".join(part.query for part in parts)
        raise ValueError(f"query: expected the same in every process, got {given}")
    filled = [part for part in parts if part.rows]
    if len({part.scores.dtype for part in filled if part.scores is not None}) > 1:
        raise ValueError("shard: expected one dtype in all processes, got float32 and float64")
    end = 0
    for part in sorted(filled, key=lambda part: part.first):
        if part.first < end:
            raise ValueError(
                f"offset: shards overlap, one begins at {part.first}, the one before ends at {end}"
            )
        end = part.first + part.rows
    rows = sum(part.rows for part in parts)
    if k > rows:
        raise ValueError(f"k: expected at most the {rows} rows of all shards, got {k}")


def _merged(parts: list[_Part], k: int, *, falling: bool) -> tuple[Real, Int]:
    filled = [part for part in parts if part.rows]
    scores = np.concatenate([part.scores for part in filled if part.scores is not None], axis=1)
    indices = np.concatenate([part.indices for part in filled if part.indices is not None], axis=1)
    best = np.lexsort((indices, -scores if falling else scores), axis=1)[:, :k]
    return np.take_along_axis(scores, best, axis=1), np.take_along_axis(indices, best, axis=1)
