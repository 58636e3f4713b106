"""What a random ranking scores under the SYSU-MM01 protocol: exact expectations, no draws."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastreid_vi.evaluation.galleries import GALLERY_CAMERAS
from fastreid_vi.evaluation.ranking import RankMetrics

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


# The integrands are smooth; more nodes change nothing above 1e-12 at the size of SYSU-MM01.
NODES = 256


def chance_sysu(
    query_ids: Any,
    query_cams: Any,
    gallery_ids: Any,
    gallery_cams: Any,
    *,
    mode: Literal["all", "indoor"] = "all",
    shots: int = 1,
    max_rank: int = 20,
) -> RankMetrics:
    """Expected metrics of a uniformly random order of every query's gallery.

    A gallery holds min(shots, m) of the m images of each camera and person whatever the trial, so
    the expectation is the same for all trials. With n of N kept images right, R1 is n / N.

    Args:
        query_ids, query_cams: [Q] int, the queries.
        gallery_ids, gallery_cams: [G] int, the whole gallery pool.
        mode: "all" or "indoor".
        shots: images of each person and camera in a gallery.
        max_rank: length of the CMC, by identity.
    Returns:
        The expectations over valid queries; `valid` [Q].
    Raises:
        ValueError: an unknown mode, or no query has a match.
    Spec: evaluation 1 and 2.1.
    """
    if mode not in GALLERY_CAMERAS:
        raise ValueError(f"mode: expected 'all' or 'indoor', got {mode!r}")
    q_ids, q_cams = np.asarray(query_ids, np.int64), np.asarray(query_cams, np.int64)
    g_ids, g_cams = np.asarray(gallery_ids, np.int64), np.asarray(gallery_cams, np.int64)
    persons = np.unique(g_ids)
    cmc = np.zeros((len(q_ids), max_rank))
    precision, inverse = np.zeros(len(q_ids)), np.zeros(len(q_ids))
    valid = np.zeros(len(q_ids), dtype=bool)
    for place in np.unique(_location(q_cams)):
        kept = [cam for cam in GALLERY_CAMERAS[mode] if _location(cam) != place]
        folders = np.stack([_counts(g_ids[g_cams == cam], persons) for cam in kept])  # [cams, M]
        images = np.minimum(folders, shots).sum(axis=0)  # [M]
        here = np.flatnonzero((_location(q_cams) == place) & np.isin(q_ids, persons))
        right = images[np.searchsorted(persons, q_ids[here])]
        for n in np.unique(right[right > 0]):
            rows = here[right == n]
            valid[rows] = True
            cmc[rows] = _identity_cmc(images[images > 0], int(n), max_rank)
            cmc[rows, 0] = n / images.sum()  # exact, where the quadrature rounds
            precision[rows], inverse[rows] = _precision(int(n), int(images.sum()))
    if not valid.any():
        raise ValueError(
            f"no valid query: none of {len(q_ids)} queries has a match among {len(g_ids)} images"
        )
    # A mean in one order, so that the result does not depend on how queries are grouped above.
    return RankMetrics(
        cmc[valid].mean(axis=0), float(precision[valid].mean()), float(inverse[valid].mean()), valid
    )


def _location(cams: Any) -> Any:
    return np.where(np.asarray(cams) == 3, 2, cams)


def _counts(ids: Int64, persons: Int64) -> Int64:
    found = np.searchsorted(persons, ids)
    return np.bincount(found, minlength=len(persons)).astype(np.int64)


def _identity_cmc(images: Int64, n: int, max_rank: int) -> Float64:
    """P(fewer than k identities have an image before the first of n right ones), k = 1..max_rank.

    Every image arrives at an exponential time; with u = exp(-t), the right person's first image has
    density n u^(n-1), and a person with m images has one before it with probability 1 - u^m.
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    u, weights = (nodes + 1.0) / 2.0, weights / 2.0
    others = np.sort(images).tolist()
    others.remove(n)
    beaten = np.zeros((max_rank, NODES))  # beaten[c]: c persons came first
    beaten[0] = 1.0
    for m in others:
        before = 1.0 - u**m
        shifted = np.vstack([np.zeros(NODES), beaten[:-1]])
        beaten = beaten * (1.0 - before) + shifted * before
    return np.asarray(np.minimum(np.cumsum(beaten @ (weights * n * u ** (n - 1))), 1.0))


def _precision(n: int, total: int) -> tuple[float, float]:
    """Expected average precision and inverse negative penalty with n right of `total` images."""
    ranks = np.arange(1, total + 1, dtype=np.float64)
    harmonic = float((1.0 / ranks).sum())
    spread = (n - 1) / (total - 1) if total > 1 else 0.0
    precision = (harmonic + spread * (total - harmonic)) / total
    # P(r), the last right image at rank r, from the end: P(total) = n / total and
    # P(r - 1) = P(r) (r - n) / (r - 1).
    last = np.arange(total, n, -1, dtype=np.float64)
    chance = n / total * np.cumprod(np.concatenate([[1.0], (last - n) / (last - 1.0)]))
    return precision, float((chance * n / np.arange(total, n - 1, -1)).sum())
