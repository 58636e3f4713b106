"""The definitions of the evaluation spec as plain loops that a reader can check by eye."""

from __future__ import annotations

from typing import Any

import numpy as np


def place(cam: int) -> int:
    return 2 if cam == 3 else cam


def drops(rule: str, same_id: bool, query_cam: int, gallery_cam: int) -> bool:
    if rule == "location":
        return place(query_cam) == place(gallery_cam)
    return rule == "same_id_and_camera" and same_id and query_cam == gallery_cam


def rank_query(
    row: Any, query_id: int, gallery_ids: Any, query_cam: int, gallery_cams: Any, rule: str
) -> dict[str, float] | None:
    """Positions, AP and INP of one query by sorting its gallery; None when it is invalid."""
    kept = [
        j
        for j in range(len(row))
        if not drops(rule, query_id == gallery_ids[j], query_cam, gallery_cams[j])
    ]
    kept.sort(key=lambda j: (row[j], j))
    identities, positions, first_identity = [], [], 0
    for position, j in enumerate(kept, 1):
        if gallery_ids[j] not in identities:
            identities.append(gallery_ids[j])
        if gallery_ids[j] == query_id:
            positions.append(position)
            first_identity = first_identity or len(identities)
    if not positions:
        return None
    precision = [m / position for m, position in enumerate(positions, 1)]
    return {
        "AP": sum(precision) / len(positions),
        "INP": len(positions) / positions[-1],
        "first_image": positions[0],
        "first_identity": first_identity,
        "last": positions[-1],
        "num_pos": len(positions),
    }


def rank_all(
    distance: Any, query_ids: Any, gallery_ids: Any, query_cams: Any, gallery_cams: Any, rule: str
) -> list[dict[str, float] | None]:
    return [
        rank_query(distance[i], query_ids[i], gallery_ids, query_cams[i], gallery_cams, rule)
        for i in range(len(query_ids))
    ]


def cmc(first: list[float], max_rank: int) -> np.ndarray:
    """Share of positions within k, k = 1..max_rank."""
    return np.array([sum(f <= k for f in first) / len(first) for k in range(1, max_rank + 1)])
