"""Which pairs of cameras are hard: R1, mAP and mINP of every query camera x gallery camera."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastreid_vi.evaluation.arrays import Double, Int, Mask, integers
from fastreid_vi.evaluation.galleries import Embeddings, ids_and_cams
from fastreid_vi.evaluation.positions import CameraRule, Ranks
from fastreid_vi.evaluation.products import Metric
from fastreid_vi.evaluation.protocols import make_options, rank_galleries
from fastreid_vi.evaluation.ranking import ProtocolName


class CameraMatrix(NamedTuple):
    """Figures of A query cameras x B gallery cameras, fractions in [0, 1]."""

    query_cams: Int
    """[A], ascending."""
    gallery_cams: Int
    """[B], ascending."""
    R1: Double
    """[A, B]; NaN where no query of the pair is valid."""
    mAP: Double
    """[A, B], likewise."""
    mINP: Double
    """[A, B], likewise."""
    valid: Int
    """[A, B] queries of camera a that keep a match in camera b, in one gallery at least."""
    queries: Int
    """[A] queries of each camera."""
    images: Double
    """[B] images of each camera in a gallery, mean over the galleries."""
    camera_rule: CameraRule
    """The rule that held inside every pair."""


def camera_matrix(
    query: Embeddings,
    gallery: Embeddings,
    *,
    galleries: Sequence[Any] | None = None,
    protocol: ProtocolName = "sysu",
    camera_rule: CameraRule | None = None,
    normalize: bool = True,
    metric: Metric = "cosine",
    threads: int | None = None,
) -> CameraMatrix:
    """R1, mAP and mINP when queries of one camera search the images of one camera.

    Pair (a, b) is an evaluation by itself: the queries of camera a rank the gallery images of
    camera b, without those the rule drops. As in the protocols, a figure is the mean over galleries
    of the mean over valid queries; a gallery without a valid query of the pair is left out of it.
    Images of other cameras are no distractors here, so the pairs do not average to the protocol's
    own figure. One matrix product serves all pairs of all galleries.

    Args:
        query, gallery: images with cameras.
        galleries: rows of `gallery` that each trial searches, as `sysu_galleries` gives them; None
            is one gallery of all images.
        protocol: "sysu", "regdb", "llcm" or "market": default of `camera_rule`.
        camera_rule: inside a pair "location" empties the pairs of one place (camera 3 searching
            camera 2, or a camera itself), "same_id_and_camera" takes a camera's own pair the
            matches, and "none" counts everything, a query's own image too.
        normalize, metric: as for `evaluate_sysu`.
        threads: as for `rank_metrics`.
    Returns:
        `CameraMatrix`; it says which rule held.
    Raises:
        TypeError, ValueError: the argument that does not fit, by name; no valid query in any pair.
    Spec: evaluation, 1 and 2.
    """
    options = make_options(protocol, normalize, metric, None, camera_rule, None, False, threads)
    _, cams = ids_and_cams("query", query)
    _, pool_cams = ids_and_cams("gallery", gallery)
    trials = _checked(galleries, len(pool_cams))
    query_cams, camera = np.unique(cams, return_inverse=True)
    gallery_cams = np.unique(pool_cams[np.concatenate(trials)])
    parts = [rows[pool_cams[rows] == cam] for rows in trials for cam in gallery_cams]
    ranks = rank_galleries(query, gallery, parts, options)
    if not ranks.matches.any():
        raise ValueError(
            f"no valid query: 0 of {len(cams)} queries have a match in any pair of cameras, "
            f"rule {options.camera_rule!r}"
        )
    shape = (len(trials), len(gallery_cams), len(cams))
    figures, valid = _pairs(ranks, shape, camera, len(query_cams))
    sizes = np.reshape([len(rows) for rows in parts], shape[:2])
    return CameraMatrix(
        query_cams,
        gallery_cams,
        *figures,
        valid,
        np.bincount(camera),
        sizes.mean(axis=0),
        options.camera_rule,
    )


def _checked(galleries: Sequence[Any] | None, images: int) -> list[Int]:
    """Rows of every gallery, inside the pool."""
    if galleries is None:
        return [np.arange(images)]
    if not len(galleries):
        raise ValueError("galleries: expected one gallery at least, got none")
    checked = []
    for t, given in enumerate(galleries):
        rows = integers(f"galleries[{t}]", given, len(given))
        if not len(rows) or rows.min() < 0 or rows.max() >= images:
            raise ValueError(
                f"galleries[{t}]: expected rows 0 to {images - 1} of the gallery, got "
                f"{f'{rows.min()} to {rows.max()}' if len(rows) else 'none'}"
            )
        checked.append(rows)
    return checked


def _pairs(
    ranks: Ranks, shape: tuple[int, int, int], camera: Int, cameras: int
) -> tuple[tuple[Double, Double, Double], Int]:
    """Figures [A, B] each and valid queries [A, B], from ranks of shape [T x B, Q]."""
    valid: Mask = np.asarray(ranks.matches > 0).reshape(shape)
    of_query = (
        ranks.first_image == 1,
        ranks.average_precision,
        ranks.matches / np.maximum(ranks.last_image, 1),
    )
    count = _totals(valid.astype(np.float64), camera, cameras)  # [T, B, A]
    present = (count > 0).sum(axis=0)
    figures = []
    for values in of_query:
        sums = _totals(np.where(valid, values.reshape(shape), 0.0), camera, cameras)
        means = np.divide(sums, count, out=np.zeros_like(sums), where=count > 0).sum(axis=0)
        figures.append(
            np.divide(means, present, out=np.full(means.shape, np.nan), where=present > 0).T
        )
    ever = _totals(np.asarray(valid.any(axis=0))[None].astype(np.float64), camera, cameras)[0]
    return (figures[0], figures[1], figures[2]), ever.T.astype(np.int64)


def _totals(values: Double, camera: Int, cameras: int) -> Double:
    """Sums over the queries of each camera, in query order: [T, B, Q] -> [T, B, A]."""
    rows = [np.bincount(camera, row, cameras) for row in values.reshape(-1, values.shape[2])]
    return np.reshape(rows, (*values.shape[:2], cameras))
