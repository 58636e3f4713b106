"""What a random ranking scores under each protocol: exact expectations, no draws."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

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
    chance = _Chance.of(len(q_ids), max_rank)
    for place in np.unique(_location(q_cams)):
        kept = [cam for cam in GALLERY_CAMERAS[mode] if _location(cam) != place]
        folders = np.stack([_counts(g_ids[g_cams == cam], persons) for cam in kept])  # [cams, M]
        images = np.minimum(folders, shots).sum(axis=0)  # [M]
        here = np.flatnonzero((_location(q_cams) == place) & np.isin(q_ids, persons))
        right = images[np.searchsorted(persons, q_ids[here])]
        for n in np.unique(right[right > 0]).tolist():
            cmc = _identity_cmc(images[images > 0], n, max_rank)
            cmc[0] = n / images.sum()  # exact, where the quadrature rounds
            chance.put(here[right == n], cmc, *_precision(n, int(images.sum())))
    return chance.mean(len(g_ids))


def chance_regdb(query_ids: Any, gallery_ids: Any, *, max_rank: int = 20) -> RankMetrics:
    """Expected metrics of a uniformly random order of the whole gallery, CMC by image.

    Args:
        query_ids: [Q] int, the queries.
        gallery_ids: [G] int, the gallery.
        max_rank: length of the CMC.
    Returns:
        The expectations over valid queries; `valid` [Q].
    Raises:
        ValueError: no query has a match.
    Spec: evaluation 1 and 2.2.
    """
    q_ids, g_ids = np.asarray(query_ids, np.int64), np.asarray(gallery_ids, np.int64)
    persons = np.unique(g_ids)
    images, total = _counts(g_ids, persons), len(g_ids)
    right = np.where(np.isin(q_ids, persons), images[_places(q_ids, persons)], 0)
    chance = _Chance.of(len(q_ids), max_rank)
    for n in np.unique(right[right > 0]).tolist():
        # No right image among the first k: the product of the shares that are still wrong.
        drawn = np.minimum(np.arange(max_rank), total - n)
        wrong = np.cumprod((total - n - drawn) / (total - drawn))
        chance.put(np.flatnonzero(right == n), 1.0 - wrong, *_precision(n, total))
    return chance.mean(len(g_ids))


def chance_llcm(
    query_ids: Any,
    query_cams: Any,
    gallery_ids: Any,
    gallery_cams: Any,
    *,
    vis_to_ir: Literal["paper", "released"] = "paper",
    max_rank: int = 20,
) -> RankMetrics:
    """Expected metrics of a uniformly random order of every query's gallery.

    A gallery holds one image of each person and camera whichever is drawn, so the expectation is
    the same for all trials.

    Args:
        query_ids, query_cams: [Q] int, the queries.
        gallery_ids, gallery_cams: [G] int, all images the gallery is drawn from.
        vis_to_ir: as for `evaluate_llcm`; "released" is for visible queries.
        max_rank: length of the CMC, by identity.
    Returns:
        The expectations over valid queries; `valid` [Q], with "released" by (pid, camera) of the
        gallery, whose images are the ones that search.
    Raises:
        ValueError: no query has a match.
    Spec: evaluation 1 and 2.3.
    """
    searching = np.stack([np.asarray(part, np.int64) for part in (query_ids, query_cams)], axis=1)
    pool = np.stack([np.asarray(part, np.int64) for part in (gallery_ids, gallery_cams)], axis=1)
    if vis_to_ir == "released":
        searching, pool = np.unique(pool, axis=0), searching
        folders, held = np.unique(pool, axis=0, return_counts=True)
    else:
        folders = np.unique(pool, axis=0)
        held = np.ones(len(folders), np.int64)
    persons = np.unique(folders[:, 0])
    images = np.zeros(len(persons), np.int64)
    np.add.at(images, np.searchsorted(persons, folders[:, 0]), held)
    table = dict(zip(map(tuple, folders.tolist()), held.tolist(), strict=True))
    same = np.array([table.get((y, c), 0) for y, c in searching.tolist()], np.int64)
    ids = searching[:, 0]
    of_person = np.where(np.isin(ids, persons), images[_places(ids, persons)], 0)
    chance = _Chance.of(len(ids), max_rank)
    keys = np.stack([of_person, of_person - same], axis=1)
    for whole, n in np.unique(keys[keys[:, 1] > 0], axis=0).tolist():
        kept = images.tolist()
        kept[kept.index(whole)] = n
        cmc = _identity_cmc(np.array(kept), n, max_rank)
        cmc[0] = n / sum(kept)  # exact, where the quadrature rounds
        chance.put(np.flatnonzero((keys == (whole, n)).all(axis=1)), cmc, *_precision(n, sum(kept)))
    return chance.mean(len(pool))


class _Chance(NamedTuple):
    """Expectations of each query, filled group by group."""

    cmc: Float64
    precision: Float64
    inverse: Float64
    valid: NDArray[np.bool_]

    @classmethod
    def of(cls, queries: int, max_rank: int) -> _Chance:
        cmc, valid = np.zeros((queries, max_rank)), np.zeros(queries, dtype=bool)
        return cls(cmc, np.zeros(queries), np.zeros(queries), valid)

    def put(self, rows: NDArray[np.intp], cmc: Float64, precision: float, inverse: float) -> None:
        self.valid[rows] = True
        self.cmc[rows], self.precision[rows], self.inverse[rows] = cmc, precision, inverse

    def mean(self, images: int) -> RankMetrics:
        """Over valid queries, in one order, so that the grouping does not matter."""
        if not self.valid.any():
            raise ValueError(
                f"no valid query: none of {len(self.valid)} queries has a match among "
                f"{images} images"
            )
        return RankMetrics(
            self.cmc[self.valid].mean(axis=0),
            float(self.precision[self.valid].mean()),
            float(self.inverse[self.valid].mean()),
            self.valid,
        )


def _places(ids: Int64, persons: Int64) -> Int64:
    """Position of each identity among `persons`; any position for one that is not there."""
    return np.minimum(np.searchsorted(persons, ids), len(persons) - 1).astype(np.int64)


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
    u, weights = _quadrature()
    others = np.sort(images).tolist()
    others.remove(n)
    beaten = np.zeros((max_rank, NODES))  # beaten[c]: c persons came first
    beaten[0] = 1.0
    for m in others:
        before = 1.0 - u**m
        shifted = np.vstack([np.zeros(NODES), beaten[:-1]])
        beaten = beaten * (1.0 - before) + shifted * before
    return np.asarray(np.minimum(np.cumsum(beaten @ (weights * n * u ** (n - 1))), 1.0))


@functools.cache
def _quadrature() -> tuple[Float64, Float64]:
    """Gauss-Legendre nodes and weights on [0, 1]; they cost more than what they integrate."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return (nodes + 1.0) / 2.0, weights / 2.0


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
