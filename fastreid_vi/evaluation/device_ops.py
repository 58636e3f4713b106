"""Ranking and search on tensors: the ops under `fastreid_vi.evaluation.device`.

The only files of this package that import torch are these two; nothing imports them before an
array on a device comes. The reference rooms are the definition, in plain PyTorch.
"""

from __future__ import annotations

import itertools
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fastreid_vi._dispatch import register

LONGEST_LIST: Final = 4096  # what the CUDA room of merge_top_k keeps
LANES: Final = 32
PAIRS: Final = 2**14  # scored at once by the reference

Ranked = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# Ranking.


def _rank_rows_reference(
    distance: Tensor,
    query_ids: Tensor,
    query_places: Tensor,
    pool_ids: Tensor,
    pool_places: Tensor,
    columns: Tensor,
    offsets: Tensor,
    num_ids: int,
    most: int,
    rule: str,
) -> Ranked:
    """Sort, mark the kept images and the matches, count.

    Args:
        distance: [R, N], float32 or float64, any strides: queries x pool.
        query_ids, query_places: [R] int32; an identity of -1 is nobody in the pool.
        pool_ids, pool_places: [N] int32; identities are 0 .. num_ids - 1.
        columns: [C] int32, the pool columns of all galleries behind each other.
        offsets: [T + 1] int64, where each gallery's begin.
        num_ids: identities in the pool.
        most: a bound on the matches of a query in a gallery. What exceeds it gets no positions.
        rule: "none", "location" or "same_id_and_camera".
    Returns:
        Matches, position of the first match, of its identity, of the last match: [T, R] int32,
        zeros without a match; average precision [T, R] float64, NaN without a match; and for each
        row its first column with a NaN, -1 for none, [R] int32. A row with a NaN has no match.
    """
    nan = distance.isnan()
    nan_column = torch.full_like(query_ids, -1)
    if nan.numel():
        nan_column = torch.where(nan.any(1), nan.byte().argmax(1), -1).int()
    limits = offsets.tolist()
    parts = [
        _rank_gallery(
            distance, query_ids, query_places, pool_ids, pool_places,
            columns[begin:end].long(), nan_column, most, rule,
        )
        for begin, end in itertools.pairwise(limits)
    ]  # fmt: skip
    if not parts:
        empty = distance.new_empty((0, distance.shape[0]))
        integers = [empty.int() for _ in range(4)]
        return integers[0], integers[1], integers[2], integers[3], empty.double(), nan_column
    first, second, third, fourth, fifth = (torch.stack(p) for p in zip(*parts, strict=True))
    return first, second, third, fourth, fifth, nan_column


def _rank_gallery(
    distance: Tensor,
    query_ids: Tensor,
    query_places: Tensor,
    pool_ids: Tensor,
    pool_places: Tensor,
    columns: Tensor,
    nan_column: Tensor,
    most: int,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One gallery [G]; positions count kept images from 1."""
    ids, images = pool_ids[columns], len(columns)
    same_id = query_ids[:, None] == ids
    same_place = query_places[:, None] == pool_places[columns]
    dropped = {
        "none": torch.zeros_like(same_id),
        "location": same_place,
        "same_id_and_camera": same_place & same_id,
    }[rule]
    order = distance[:, columns].argsort(dim=1, stable=True)
    kept = ~dropped.gather(1, order) & (nan_column < 0)[:, None]
    match = same_id.gather(1, order) & kept
    position = torch.where(kept, kept.cumsum(1), images + 1)
    matches = match.sum(1)
    placed = (matches > 0) & (matches <= most)
    beyond = torch.where(match, position, images + 1)
    of_match = beyond.sort(dim=1).values  # of the m-th match, then images + 1
    first = beyond.amin(1) if images else torch.zeros_like(matches)
    last = torch.where(match, position, 0).amax(1) if images else first

    # An identity stands where its best image stands.
    at = torch.empty_like(position).scatter_(1, order, position)
    best = at.new_full((len(at), int(ids.amax()) + 1 if images else 0), images + 1)
    best = best.scatter_reduce(1, ids.long().expand_as(at), at, "amin")
    identity = 1 + (best < first[:, None]).sum(1)

    precision = torch.zeros(len(at), dtype=torch.float64, device=at.device)
    longest = int(torch.where(placed, matches, 0).amax()) if len(at) else 0
    for m in range(longest):  # in this order: the bits of every room
        # A number over a tensor would be a product with its reciprocal.
        terms = torch.full_like(precision, m + 1) / of_match[:, m]
        precision += torch.where(m < matches, terms, 0.0)
    precision = torch.where(placed, precision / matches, torch.nan)
    zero = torch.zeros_like(matches)
    integers = [torch.where(placed, value, zero).int() for value in (first, identity, last)]
    return matches.int(), integers[0], integers[1], integers[2], precision


def _rank_rows_fake(
    distance: Tensor,
    query_ids: Tensor,
    query_places: Tensor,
    pool_ids: Tensor,
    pool_places: Tensor,
    columns: Tensor,
    offsets: Tensor,
    *_: object,
) -> Ranked:
    rows = distance.shape[0]
    shape = (offsets.shape[0] - 1, rows)
    a, b, c, d = (distance.new_empty(shape, dtype=torch.int32) for _ in range(4))
    precision = distance.new_empty(shape, dtype=torch.float64)
    return a, b, c, d, precision, distance.new_empty((rows,), dtype=torch.int32)


# Search.


def _merge_reference(
    best: Tensor,
    best_index: Tensor,
    scores: Tensor,
    indices: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    first_index: int,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The k best of a list and a block of scores, by falling score, of equals by index.

    Args:
        best, best_index: [Q, n] and int64, best first, n <= k; what came before.
        scores: [Q, B], float32 or float64. A NaN is worse than every number.
        indices: [Q, B] int64 of the scores; first_index + column where it is None.
        scale, shift: [B] or None; a score counts as score * scale - shift.
    Returns:
        Scores and indices, [Q, min(k, n + B)], best first.
    """
    if scale is not None:
        scores = scores * scale
    if shift is not None:
        scores = scores - shift
    if indices is None:
        last = first_index + scores.shape[1]
        indices = torch.arange(first_index, last, device=scores.device).expand(scores.shape)
    scores, indices = torch.cat([best, scores], 1), torch.cat([best_index, indices], 1)
    order = indices.argsort(dim=1, stable=True)
    scores, indices = scores.gather(1, order) + 0, indices.gather(1, order)  # no -0.0
    # NaN comes first in a falling sort: rank the negatives, where it comes last.
    order = (-scores).argsort(dim=1, stable=True)[:, :k]
    return scores.gather(1, order), indices.gather(1, order)


def _merge_fake(
    best: Tensor, best_index: Tensor, scores: Tensor, *args: object
) -> tuple[Tensor, Tensor]:
    k = args[-1]
    assert isinstance(k, int)
    shape = (scores.shape[0], min(k, best.shape[1] + scores.shape[1]))
    return scores.new_empty(shape), best_index.new_empty(shape)


def _merge_refuses(backend: str, *args: object) -> str | None:
    k = args[-1]
    if backend == "cuda" and isinstance(k, int) and k > LONGEST_LIST:
        return f"k = {k}, it keeps up to {LONGEST_LIST}"
    return None


def _sums(left: Tensor, right: Tensor) -> Tensor:
    """Sums of left x right over the last axis in float64: 32 lanes, then halves upon halves."""
    lanes = torch.zeros((len(left), LANES), dtype=torch.float64, device=left.device)
    for begin in range(0, left.shape[1], LANES):
        part = slice(begin, min(begin + LANES, left.shape[1]))
        product = left[:, part].double() * right[:, part].double()
        lanes[:, : product.shape[1]] += product
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _root(squares: Tensor) -> Tensor:
    """Square roots to the last bit; on the CPU torch calls a library that may be one off."""
    return torch.from_numpy(np.sqrt(squares.numpy())) if squares.is_cpu else squares.sqrt()


def _pair_scores_reference(
    query: Tensor,
    gallery: Tensor,
    query_norms: Tensor,
    gallery_norms: Tensor,
    columns: Tensor,
    metric: str,
) -> Tensor:
    """Scores of chosen pairs, summed in float64 in one fixed order and rounded once.

    Args:
        query, gallery: [Q, D], [G, D], float32 or float64.
        query_norms, gallery_norms: what `row_norms` gives for them.
        columns: [Q, K] int64 rows of the gallery.
        metric: "cosine" (0 for a zero row), "inner", or "euclidean": the distance negated.
    Returns:
        [Q, K], dtype of `query`.
    """
    rows = torch.arange(len(query), device=query.device)[:, None].expand(columns.shape).flatten()
    flat, found = columns.flatten(), []
    step = max(1, PAIRS * LANES // max(query.shape[1], 1))
    for begin in range(0, len(flat), step):
        at, to = rows[begin : begin + step], flat[begin : begin + step]
        left, right = query[at].double(), gallery[to].double()
        if metric == "euclidean":
            found.append(-_root(_sums(left - right, left - right)))
            continue
        score = _sums(left, right)
        if metric == "cosine":
            ours, others = query_norms[at], gallery_norms[to]
            score = torch.where((ours > 0) & (others > 0), score / ours / others, 0.0).clamp(-1, 1)
        found.append(score)
    scores = torch.cat(found) if found else query_norms.new_zeros(0)
    return scores.to(query.dtype).reshape(columns.shape) + 0  # no -0.0


def _row_norms_reference(rows: Tensor) -> Tensor:
    """Euclidean norms [N] float64; not finite for a row with a NaN, an infinity or too much."""
    step = max(1, PAIRS * LANES // max(rows.shape[1], 1))
    parts = (rows[begin : begin + step] for begin in range(0, max(len(rows), 1), step))
    norms = [_sums(part, part) for part in parts]
    return _root(torch.cat(norms))


rank_rows = register(
    "rank_rows",
    "(Tensor distance, Tensor query_ids, Tensor query_places, Tensor pool_ids, "
    "Tensor pool_places, Tensor columns, Tensor offsets, int num_ids, int most, str rule) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_rank_rows_reference,
    fake=_rank_rows_fake,
    backends=("cuda",),
)
merge_top_k = register(
    "merge_top_k",
    "(Tensor best, Tensor best_index, Tensor scores, Tensor? indices, Tensor? scale, "
    "Tensor? shift, int first_index, int k) -> (Tensor, Tensor)",
    reference=_merge_reference,
    fake=_merge_fake,
    backends=("cuda",),
    refuses=_merge_refuses,
)
pair_scores = register(
    "pair_scores",
    "(Tensor query, Tensor gallery, Tensor query_norms, Tensor gallery_norms, Tensor columns, "
    "str metric) -> Tensor",
    reference=_pair_scores_reference,
    fake=lambda query, gallery, query_norms, gallery_norms, columns, metric: query.new_empty(
        columns.shape
    ),
    backends=("cuda",),
)
row_norms = register(
    "row_norms",
    "(Tensor rows) -> Tensor",
    reference=_row_norms_reference,
    fake=lambda rows: rows.new_empty(rows.shape[:1], dtype=torch.float64),
    backends=("cuda",),
)
