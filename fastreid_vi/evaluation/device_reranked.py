"""Re-ranking inside the protocols where the queries' features are on a device; see `reranked`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastreid_vi.evaluation import device_products, device_rerank
from fastreid_vi.evaluation.arrays import Int
from fastreid_vi.evaluation.galleries import Embeddings
from fastreid_vi.evaluation.positions import CameraRule, Ranks, make_labels, rank_rows
from fastreid_vi.evaluation.rerank_reference import Method


def rank_reranked(
    method: Method,
    queries: Sequence[tuple[str, Embeddings]],
    pools: Sequence[tuple[str, Embeddings]],
    used: Int,
    rows: Int,
    galleries: Sequence[Int],
    rule: CameraRule,
    *,
    normalize: bool,
) -> Ranks:
    """Positions of the matches of some queries in every gallery, [T, Q].

    Args:
        method: what to rank by.
        queries, pools: sets of features of all queries and of the whole pool, by their names in
            messages; the first of the queries decides on the device. One side has one set.
        used: rows of the pool that some gallery holds, ascending.
        rows: queries that are ranked; all are neighbours.
        galleries: rows of the pool, T times.
        rule: which images a query does not see.
        normalize: divide features by their L2 norm first.
    """
    query, pool = queries[0][1], pools[0][1]
    ranks = Ranks.empty(len(galleries), len(query.ids))
    everyone = np.arange(len(query.ids))
    first = device_products._features(*queries[0], None)
    named = []
    for sets, chosen in ((queries, everyone), (pools, used)):
        for name, images in sets:
            features = device_products._features(name, images, first.device)
            ready = device_products._ready(name, features, chosen, features.dtype, normalize)
            named.append((f"{name}.features", ready))
    tensors = device_rerank.feature_sets(named)
    left, right = tensors[: len(queries)], tensors[len(queries) :]
    there = torch.from_numpy(rows).to(first.device)
    for trial, seen in enumerate(galleries):
        columns = torch.from_numpy(np.searchsorted(used, seen)).to(first.device)
        distance: Tensor = device_rerank.rerank(left, [part[columns] for part in right], method)
        labels = make_labels(
            query.ids[rows], query.cams[rows], pool.ids[seen], pool.cams[seen], rule
        )
        found = rank_rows(distance[there], labels, [np.arange(len(seen))], rows, None)
        ranks.put(trial, rows, found)
    return ranks
