"""Re-ranking on tensors: the ops under `fastreid_vi.evaluation.device_rerank`.

Sparse rows are padded to one length: counts [R] int32; columns [R, E] int32, ascending, then -1;
values [R, E] float32, then 0. The reference rooms are the definition, on dense matrices.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastreid_vi._dispatch import register

PAIRS: Final = 2**14  # whose distance is summed up at once

Sparse = tuple[Tensor, Tensor, Tensor]


def neighbor_room(rows: int, length: int, k1: int, half: int, expand: bool) -> int:
    """Entries that a row of V may have."""
    reach = min(k1 + 1, length)
    added = min(half + 1, length) if expand else 0
    return min(reach * (1 + added), rows)


def _neighbors_reference(
    lists: Tensor,
    distances: Tensor,
    features: Tensor,
    maxima: Tensor,
    rounding: Tensor,
    k1: int,
    half: int,
    expand: bool,
) -> Sparse:
    """V: the neighbours R* of every item and their weights.

    Args:
        lists: [R, L] int32, ranking lists of items 0 .. R - 1, of distinct items.
        distances: [R, L] float32 of the entries; NaN where unknown.
        features: [R, D] float32, which give the distances that no list holds.
        maxima: [R] float32 m. At or below `rounding` [R] it counts as zero.
        k1, half: lengths of the lists and of those that expansion adds.
        expand: local expansion.
    Returns:
        Sparse rows of `neighbor_room` entries.
    Spec: reranking, 1, steps 4 to 6.
    """
    rows, length = lists.shape
    listed = lists.long()
    reciprocal = _reciprocal(listed, k1)
    whole = reciprocal
    if expand:
        shorter = _reciprocal(listed, half)
        # Counts of at most R members are exact in float32.
        common = reciprocal.float() @ shorter.float().t()
        chosen = reciprocal & (3 * common > 2 * shorter.sum(1))  # the initial set decides
        whole = reciprocal | (chosen.float() @ shorter.float() > 0)
    inside = torch.zeros_like(whole).scatter_(1, listed, True)
    known = torch.full_like(maxima[:, None], torch.nan).repeat(1, rows)
    known.scatter_(1, listed, distances)
    known = torch.where(inside, known, known.t())
    missing = (whole & known.isnan()).nonzero()
    for begin in range(0, len(missing), PAIRS):
        i, j = missing[begin : begin + PAIRS].unbind(1)
        known[i, j] = (features[i] - features[j]).square().sum(1)
    some = (maxima > rounding)[:, None]
    scaled = known.clamp(min=0) / torch.where(some, maxima[:, None], 1.0)
    near = torch.where(whole, torch.where(some, (-scaled).exp(), 1.0), 0.0)
    values = near.double() / near.double().sum(1, keepdim=True)
    room = neighbor_room(rows, length, k1, half, expand)
    return _packed(values.float(), whole, room)


def _reciprocal(lists: Tensor, k: int) -> Tensor:
    """[i, j]: each among the first k + 1 of the other's list."""
    near = torch.zeros((len(lists), len(lists)), dtype=torch.bool, device=lists.device)
    near.scatter_(1, lists[:, : k + 1], True)
    return near & near.t()


def _packed(dense: Tensor, some: Tensor, room: int) -> Sparse:
    """Sparse rows of some entries of a matrix; what is beyond `room` is left out."""
    slots = some.cumsum(1) - 1
    some = some & (slots < room)
    rows, columns = some.nonzero(as_tuple=True)
    places = dense.new_full((len(dense), room), -1, dtype=torch.int32)
    values = dense.new_zeros((len(dense), room))
    at = slots[rows, columns]
    places[rows, at] = columns.int()
    values[rows, at] = dense[rows, columns]
    return some.sum(1).int(), places, values


def _unpacked(columns: Tensor, values: Tensor, width: int) -> Tensor:
    dense = values.new_zeros((len(values), width + 1))
    places = torch.where(columns < 0, width, columns).long()
    return dense.scatter_(1, places, values)[:, :width]


def _neighbors_fake(
    lists: Tensor,
    distances: Tensor,
    features: Tensor,
    maxima: Tensor,
    rounding: Tensor,
    k1: int,
    half: int,
    expand: bool,
) -> Sparse:
    rows, length = lists.shape
    return _empty(lists, neighbor_room(rows, length, k1, half, expand))


def _empty(lists: Tensor, room: int) -> Sparse:
    shape = (lists.shape[0], room)
    counts = lists.new_empty(shape[:1], dtype=torch.int32)
    return (
        counts,
        lists.new_empty(shape, dtype=torch.int32),
        lists.new_empty(shape, dtype=torch.float32),
    )


def _average_reference(
    lists: Tensor, counts: Tensor, columns: Tensor, values: Tensor, room: int
) -> Sparse:
    """V': the mean of rows of V.

    Args:
        lists: [M, K] int32, rows of V; -1 for none. Without any the mean is an empty row.
        counts, columns, values: R sparse rows over R columns.
        room: entries that a row of the result has, at least as many as it needs.
    Returns:
        M sparse rows.
    Spec: reranking, 1, step 7.
    """
    dense = _unpacked(columns, values, len(counts))
    dense = torch.cat([dense, dense.new_zeros((1, len(counts)))])
    sums = dense.new_zeros((len(lists), len(counts)))
    for rows in lists.long().unbind(1):  # in the order of the list
        sums += dense[rows]  # -1 is the row of zeros
    several = (lists >= 0).sum(1, keepdim=True)
    return _packed(sums / several.clamp(min=1), sums > 0, room)


def _fuse_reference(
    query_counts: Tensor,
    query_columns: Tensor,
    query_values: Tensor,
    gallery_counts: Tensor,
    gallery_columns: Tensor,
    gallery_values: Tensor,
    base: Tensor,
    maxima: Tensor,
    rounding: Tensor,
    query_sets: int,
    gallery_sets: int,
    columns: int,
    weight: float,
) -> Tensor:
    """F, the mean over sets: Jaccard distances mixed with scaled distances.

    Args:
        query_counts, query_columns, query_values: V' of the queries, set after set.
        gallery_counts, gallery_columns, gallery_values: V' of the images, set after set, entries
            along the first axis: [E, sets x G].
        base: [query_sets x Q, G] float32 squared distances, added up over the gallery's sets.
        maxima, rounding: [query_sets x Q] float32, as for `rerank_neighbors`.
        query_sets, gallery_sets: one of them is 1.
        columns: of V'.
        weight: of the scaled distances.
    Returns:
        [Q, G] float32.
    Spec: reranking, 1, steps 8 and 9.
    """
    ours = _unpacked(query_columns, query_values, columns)
    theirs = _unpacked(gallery_columns.t(), gallery_values.t(), columns).t()
    overlap = base.new_zeros((len(ours), theirs.shape[1]))
    for c in range(columns):
        overlap += torch.minimum(ours[:, c, None], theirs[c])
    overlap = overlap.clamp(max=1)  # beyond 1 lies rounding only
    jaccard = (1 - overlap / (2 - overlap)).reshape(len(ours), gallery_sets, base.shape[1])
    sums = torch.zeros_like(base)
    for part in jaccard.unbind(1):
        sums = sums + part
    mean = torch.ones_like(maxima) / (query_sets * gallery_sets)
    scale = torch.where(maxima > rounding, weight * mean / maxima, 0.0)[:, None]
    result = (1 - weight) * mean[:, None] * sums + scale * base.clamp(min=0)
    return result.reshape(query_sets, len(base) // query_sets, base.shape[1]).sum(0)


def _fuse_fake(
    query_counts: Tensor,
    query_columns: Tensor,
    query_values: Tensor,
    gallery_counts: Tensor,
    gallery_columns: Tensor,
    gallery_values: Tensor,
    base: Tensor,
    maxima: Tensor,
    rounding: Tensor,
    query_sets: int,
    gallery_sets: int,
    columns: int,
    weight: float,
) -> Tensor:
    return base.new_empty((base.shape[0] // query_sets, base.shape[1]))


rerank_neighbors = register(
    "rerank_neighbors",
    "(Tensor lists, Tensor distances, Tensor features, Tensor maxima, Tensor rounding, int k1, "
    "int half, bool expand) -> (Tensor, Tensor, Tensor)",
    reference=_neighbors_reference,
    fake=_neighbors_fake,
    backends=("cuda",),
)
rerank_average = register(
    "rerank_average",
    "(Tensor lists, Tensor counts, Tensor columns, Tensor values, int room) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_average_reference,
    fake=lambda lists, counts, columns, values, room: _empty(lists, room),
    backends=("cuda",),
)
rerank_fuse = register(
    "rerank_fuse",
    "(Tensor query_counts, Tensor query_columns, Tensor query_values, Tensor gallery_counts, "
    "Tensor gallery_columns, Tensor gallery_values, Tensor base, Tensor maxima, Tensor rounding, "
    "int query_sets, int gallery_sets, int columns, float weight) -> Tensor",
    reference=_fuse_reference,
    fake=_fuse_fake,
    backends=("cuda",),
)
