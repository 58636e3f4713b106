"""CMC, mAP and mINP of one gallery, from distances."""

from __future__ import annotations

import importlib
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from fastreid_vi.evaluation.arrays import (
    Double,
    Int,
    Mask,
    at_least_one,
    check_real,
    choice,
    integers,
    real_matrix,
    to_numpy,
)
from fastreid_vi.evaluation.positions import (
    CameraRule,
    Labels,
    Ranks,
    make_labels,
    rank_rows,
    stays_on_device,
)

CmcBy = Literal["identity", "image"]
ProtocolName = Literal["sysu", "regdb", "llcm", "market"]

# Distances of another type that are converted in one go.
CONVERTED: Final = 2**22


class Protocol(NamedTuple):
    """What a protocol's name stands for."""

    camera_rule: CameraRule
    cmc_by: CmcBy
    max_rank: int


PROTOCOLS: Final[dict[str, Protocol]] = {
    "sysu": Protocol("location", "identity", 20),
    "regdb": Protocol("none", "image", 20),
    "llcm": Protocol("same_id_and_camera", "identity", 20),
    "market": Protocol("same_id_and_camera", "image", 50),
}


class PerQuery(NamedTuple):
    """Every query by itself, [Q] each. Positions count the kept gallery images from 1."""

    AP: Double  # average precision; NaN for an invalid query
    INP: Double  # matches / position of the last match; NaN for an invalid query
    first_image: Int  # position of the first match; 0 for an invalid query
    first_identity: Int  # its position among identities, each at its best image; 0 likewise
    last: Int  # position of the last match; 0 likewise
    num_pos: Int  # matches in the gallery


class _Four(NamedTuple):
    cmc: Double
    mAP: float
    mINP: float
    valid: Mask


class RankMetrics(_Four):
    """Fractions in [0, 1], means over valid queries; a tuple of the first four.

    Attributes:
        cmc: [max_rank] float64; cmc[k - 1]: share of valid queries matched within k positions.
        mAP: mean average precision.
        mINP: mean inverse negative penalty.
        valid: [Q] bool; the query keeps a match in its gallery.
        per_query: every query by itself, if asked for, else None.
    """

    per_query: PerQuery | None = None

    def __new__(
        cls, cmc: Double, mAP: float, mINP: float, valid: Mask, per_query: PerQuery | None = None
    ) -> RankMetrics:
        """Four fields of a tuple and, beside them, `per_query`."""
        self = super().__new__(cls, cmc, mAP, mINP, valid)
        self.per_query = per_query
        return self


def rank_metrics(
    distance: Any,
    query_ids: Any,
    gallery_ids: Any,
    query_cams: Any = None,
    gallery_cams: Any = None,
    *,
    protocol: ProtocolName = "sysu",
    cmc_by: CmcBy | None = None,
    camera_rule: CameraRule | None = None,
    max_rank: int | None = None,
    per_query: bool = False,
    threads: int | None = None,
) -> RankMetrics:
    """CMC, mAP and mINP of one gallery.

    A query ranks the gallery images its camera rule keeps by (distance, gallery index), smallest
    first; with its n matches at positions r_1 < ... < r_n, AP = mean of m / r_m and INP = n / r_n.

    Args:
        distance: [Q, G], real numbers without NaN; half precisions are compared in float32. What
            lies on a CUDA device (torch, CuPy, DLPack) is ranked there.
        query_ids, gallery_ids: [Q], [G] identities, any integers.
        query_cams, gallery_cams: [Q], [G] camera numbers; only the rule "none" does without them.
        protocol: "sysu", "regdb", "llcm" or "market": defaults of the next three arguments.
        cmc_by: "identity" counts each identity once, at its best image; "image" counts all images.
        camera_rule: "location" drops images from the query's place (cameras 2 and 3 share one),
            "same_id_and_camera" those of its identity and camera, "none" nothing.
        max_rank: length of `cmc`; 20, and 50 for "market".
        per_query: also return every query's AP, INP and positions.
        threads: of the C++ room; by default the cores of this process. It changes no result.
    Returns:
        `RankMetrics(cmc, mAP, mINP, valid)`, float64, with `per_query`.
    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: sizes that disagree, an empty `distance`, a NaN in it, missing cameras, an
            unknown name, or no query with a match.
    Spec: evaluation, 1 to 3. Golden: eval. Backends: retrieval, cuda.

    >>> rank_metrics([[0.1, 0.4, 0.2]], [7], [7, 7, 9], protocol="regdb").mAP
    0.8333333333333333
    """
    defaults = PROTOCOLS[choice("protocol", protocol, ProtocolName)]
    rule = defaults.camera_rule if camera_rule is None else camera_rule
    by = defaults.cmc_by if cmc_by is None else cmc_by
    length = defaults.max_rank if max_rank is None else max_rank
    check_options(rule, by, length, threads)
    if stays_on_device(distance):
        device = importlib.import_module("fastreid_vi.evaluation.device")
        matrix = device.tensor_of("distance", distance, "[Q, G]")
    else:
        matrix = to_numpy("distance", distance)
        check_real("distance", matrix, "[Q, G]")
    queries, images = matrix.shape
    if 0 in matrix.shape:
        raise ValueError(
            f"distance: expected at least one query and one image, got shape {list(matrix.shape)}"
        )
    labels = make_labels(
        integers("query_ids", query_ids, queries),
        _cameras("query_cams", query_cams, queries, rule),
        integers("gallery_ids", gallery_ids, images),
        _cameras("gallery_cams", gallery_cams, images, rule),
        rule,
    )
    ranks = _rank_matrix(matrix, labels, threads)
    return summarize(ranks, by, length, per_query, f"{images} gallery images, rule {rule!r}")


def _rank_matrix(matrix: Any, labels: Labels, threads: int | None) -> Ranks:
    """One gallery, [Q]; a matrix that has to be converted is never copied as a whole."""
    queries, images = matrix.shape
    here = isinstance(matrix, np.ndarray)
    whole = not here or matrix.dtype in (np.float32, np.float64)
    block = queries if whole else max(1, CONVERTED // images)
    ranks = Ranks.empty(1, queries)
    for begin in range(0, queries, block):
        part = matrix[begin : begin + block]
        if here:
            part = real_matrix("distance", part, "[Q, G]")
        rows = np.arange(begin, begin + len(part))
        found = rank_rows(part, labels.rows(rows), [np.arange(images)], rows, threads)
        ranks.put(slice(None), rows, found)
    return ranks.gallery(0)


def _cameras(name: str, value: Any, length: int, rule: CameraRule) -> Int:
    """Camera numbers; zeros where the rule looks at none and none came."""
    if value is not None:
        return integers(name, value, length)
    if rule != "none":
        raise ValueError(f"{name}: the camera rule {rule!r} needs cameras, got None")
    return np.zeros(length, np.int64)


def check_options(rule: str, cmc_by: str, max_rank: int, threads: int | None) -> None:
    """The options every protocol shares."""
    choice("camera_rule", rule, CameraRule)
    choice("cmc_by", cmc_by, CmcBy)
    at_least_one("max_rank", max_rank)
    if threads is not None:
        at_least_one("threads", threads)


def summarize(
    ranks: Ranks, cmc_by: CmcBy, max_rank: int, per_query: bool, searched: str
) -> RankMetrics:
    """Means over the valid queries of one gallery, in query order."""
    matches, first_image, first_identity, last, precision = ranks
    valid = matches > 0
    count = int(valid.sum())
    if not count:
        raise ValueError(f"no valid query: 0 of {len(valid)} queries have a match in {searched}")
    penalty = np.divide(matches, last, out=np.full(len(valid), np.nan), where=valid)
    first = (first_identity if cmc_by == "identity" else first_image)[valid]
    hits = np.bincount(np.minimum(first, max_rank + 1), minlength=max_rank + 2)
    detail = None
    if per_query:
        positions = (part.astype(np.int64) for part in (first_image, first_identity, last, matches))
        detail = PerQuery(precision.copy(), penalty, *positions)
    return RankMetrics(
        np.cumsum(hits[1 : max_rank + 1]) / count,
        float(precision[valid].mean()),
        float(penalty[valid].mean()),
        valid,
        detail,
    )
