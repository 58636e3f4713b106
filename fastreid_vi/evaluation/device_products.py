"""Ranks from features on a device: what `products` does on the host, by one product there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fastreid_vi.evaluation import device_ops
from fastreid_vi.evaluation.arrays import Int, on_device, real_matrix
from fastreid_vi.evaluation.device import full_precision, tensor_of
from fastreid_vi.evaluation.galleries import Embeddings
from fastreid_vi.evaluation.positions import Labels, Ranks, rank_rows
from fastreid_vi.evaluation.products import Metric, can_match

# In memory at one time: distances, and numbers that are scaled in float64.
DISTANCES: Final = 2**26
SCALED: Final = 2**24


def rank_product(
    query: Embeddings,
    gallery: Embeddings,
    used: Int,
    labels: Labels,
    galleries: Sequence[Int],
    metric: Metric,
    *,
    normalize: bool,
) -> Ranks:
    """Positions of the matches of every query in every gallery, [T, Q].

    Args:
        query, gallery: all queries, with features on a device, and the whole pool.
        used: rows of the pool that some gallery holds, ascending.
        labels: of all queries and of the rows `used`.
        galleries: rows of the pool, T times.
        metric: "cosine" and "inner" are the negative dot product.
        normalize: divide every row by its L2 norm; a zero row stays zero.
    """
    left = _features("query", query, None)
    right = _features("gallery", gallery, left.device)
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"query.features, gallery.features: expected equal lengths, got {left.shape[1]} and "
            f"{right.shape[1]}"
        )
    rows = np.flatnonzero(can_match(labels))
    dtype = torch.promote_types(left.dtype, right.dtype)
    left = _ready("query", left, rows, dtype, normalize)
    right = _ready("gallery", right, used, dtype, normalize)
    ranks = Ranks.empty(len(galleries), len(labels.query_ids))
    columns = [np.searchsorted(used, gallery_rows) for gallery_rows in galleries]
    squared = metric.endswith("euclidean")
    offset = (right * right).sum(1) if squared else torch.zeros((), dtype=dtype).to(right)
    step = max(1, DISTANCES // max(len(used), 1))
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        with full_precision():
            # Ranking needs no |q|^2, the same for a query's whole row, and no root.
            distance = torch.mm(left[begin : begin + step], right.t())
        distance = distance.mul_(-2 if squared else -1).add_(offset)
        ranks.put(slice(None), part, rank_rows(distance, labels.rows(part), columns, part, None))
    return ranks


def _features(side: str, images: Embeddings, device: torch.device | None) -> Tensor:
    name, given = f"{side}.features", images.features
    if on_device(given):
        features = tensor_of(name, given, "[n, D]")
    else:
        features = torch.from_numpy(np.array(real_matrix(name, given, "[n, D]")))
    if len(features) != len(images.ids):
        raise ValueError(f"{name}: expected {len(images.ids)} rows, got {len(features)}")
    return features if device is None else features.to(device)


def _ready(side: str, features: Tensor, rows: Int, dtype: torch.dtype, normalize: bool) -> Tensor:
    """Some rows of finite features, unit vectors if asked for."""
    finite = features.isfinite().all(1)
    if not bool(finite.all()):
        row = int((~finite).byte().argmax())
        raise ValueError(f"{side}.features: row {row} is not finite")
    chosen = features[torch.from_numpy(rows).to(features.device)].to(dtype)
    if normalize:
        norms: Any = device_ops.row_norms(chosen)[:, None]
        norms = torch.where(norms > 0, norms, 1.0)
        step = max(1, SCALED // max(chosen.shape[1], 1))
        for begin in range(0, len(chosen), step):
            some = slice(begin, begin + step)
            chosen[some] = (chosen[some].double() / norms[some]).to(dtype)
    return chosen
