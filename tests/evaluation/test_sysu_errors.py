"""Bad input to the SYSU-MM01 protocol: one clear line that names what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastreid_vi.evaluation import Embeddings, evaluate_sysu, sysu_galleries
from tests.evaluation.conftest import Data


def changed(images: Embeddings, **parts: Any) -> Embeddings:
    return images._replace(**parts)


def with_row(array: Any, row: int, value: Any) -> Any:
    copy = np.array(array, dtype=object if isinstance(value, str) else None)
    copy[row] = value
    return copy


BAD = {
    "mode": (lambda q, g, p: (q, g, p, {"mode": "outdoor"}), r"mode: .*'all', 'indoor'.*'outdoor'"),
    "shots": (lambda q, g, p: (q, g, p, {"shots": 0}), r"shots: expected >= 1, got 0"),
    "trials": (lambda q, g, p: (q, g, p, {"trials": 11}), r"trials: .* 10 rows, got 11"),
    "rerank": (lambda q, g, p: (q, g, p, {"rerank": "mser"}), r"rerank: expected None.*'mser'"),
    "metric": (lambda q, g, p: (q, g, p, {"metric": "hamming"}), r"metric: .*'hamming'"),
    "cmc_by": (lambda q, g, p: (q, g, p, {"cmc_by": "person"}), r"cmc_by: .*'person'"),
    "rule": (lambda q, g, p: (q, g, p, {"camera_rule": "x"}), r"camera_rule: .*'x'"),
    "max_rank": (lambda q, g, p: (q, g, p, {"max_rank": 0}), r"max_rank: expected >= 1, got 0"),
    "threads": (lambda q, g, p: (q, g, p, {"threads": 0}), r"threads: expected >= 1, got 0"),
    "random, 10 shots": (lambda q, g, p: (q, g, "random", {"shots": 10}), r"shots: .*single-shot"),
    "permutations": (lambda q, g, p: (q, g, "agw", {}), r'permutations: .*"random", got \'agw\''),
    "swapped": (lambda q, g, p: (g, q, p, {}), r"gallery.cams: none of 360 images"),
    "visible query": (
        lambda q, g, p: (changed(q, cams=with_row(q.cams, 5, 2)), g, p, {}),
        r"query.cams: expected infrared cameras \[3, 6\], got \[2, 3, 6\]",
    ),
    "no cameras": (lambda q, g, p: (changed(q, cams=None), g, p, {}), r"query.cams: .*None"),
    "no paths": (lambda q, g, p: (q, changed(g, paths=None), p, {}), r"gallery.paths: .*None"),
    "few paths": (
        lambda q, g, p: (q, changed(g, paths=g.paths[1:]), p, {}),
        r"gallery.paths: expected 1140 paths, got 1139",
    ),
    "file name": (
        lambda q, g, p: (q, changed(g, paths=with_row(g.paths, 3, "cam1/0002/a.jpg")), p, {}),
        r"gallery.paths: .*'cam1/0002/a.jpg'",
    ),
    "one image twice": (
        lambda q, g, p: (q, changed(g, paths=with_row(g.paths, 1, "cam1/0004/0001.jpg")), p, {}),
        r"gallery.paths: .* are one image of camera 1, pid 4",
    ),
    "ids": (
        lambda q, g, p: (q, changed(g, cams=g.cams[1:]), p, {}),
        r"gallery.cams: expected integers of shape \[1140\], got int64 \[1139\]",
    ),
    "rows": (
        lambda q, g, p: (q, changed(g, features=g.features[1:]), p, {}),
        r"gallery.features: expected 1140 rows, got 1139",
    ),
    "lengths": (
        lambda q, g, p: (q, changed(g, features=g.features[:, 1:]), p, {}),
        r"expected equal lengths, got 16 and 15",
    ),
    "rank": (
        lambda q, g, p: (q, changed(g, features=g.features[0]), p, {}),
        r"gallery.features: expected shape \[n, D\], got float32 \[16\]",
    ),
    "NaN": (
        lambda q, g, p: (changed(q, features=with_row(q.features, 7, np.nan)), g, p, {}),
        r"query.features: row 7 is not finite",
    ),
    "infinity": (
        lambda q, g, p: (q, changed(g, features=g.features + np.float32(np.inf)), p, {}),
        r"gallery.features: row \d+ is not finite",
    ),
    "empty query": (
        lambda q, g, p: (Embeddings(q.features[:0], [], [], []), g, p, {}),
        r"query: expected one image at least, got none",
    ),
    "empty gallery": (
        lambda q, g, p: (q, Embeddings(g.features[:0], [], [], []), p, {}),
        r"gallery: expected one image at least, got none",
    ),
    "no folder": (
        lambda q, g, p: (q, g, {k: v for k, v in p.items() if k != (4, 8)}, {}),
        r"permutations of camera 4, pid 8: missing",
    ),
    "empty folder": (
        lambda q, g, p: (q, g, {**p, (4, 8): np.zeros((10, 0), int)}, {}),
        r"permutations of camera 4, pid 8: empty",
    ),
    "image twice": (
        lambda q, g, p: (q, g, {**p, (4, 8): np.full((10, 2), 1)}, {"shots": 10}),
        r"permutations of camera 4, pid 8: a trial takes one image twice",
    ),
    "unknown image": (
        lambda q, g, p: (q, g, {**p, (4, 8): np.full((10, 2), 99)}, {}),
        r"permutations of camera 4, pid 8: trial 0 takes image 99",
    ),
    "no match": (
        lambda q, g, p: (changed(q, ids=q.ids * 0 - 1), g, p, {"mode": "indoor"}),
        r"no valid query: 0 of 360 queries .* 54 gallery images of indoor/1, trial 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(data: Data, case: str) -> None:
    change, message = BAD[case]
    query, gallery, permutations, options = change(*data)
    with pytest.raises(ValueError, match=message):
        evaluate_sysu(query, gallery, permutations, **options)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_rows_that_no_trial_looks_at_are_checked_too(data: Data, value: float) -> None:
    """A model that gives NaN is broken, whichever images a trial draws."""
    query, gallery, permutations = data
    (rows,) = sysu_galleries(gallery, permutations, mode="indoor", trials=1)
    outside = np.setdiff1d(np.arange(len(gallery.ids)), rows)
    absent = np.flatnonzero(~np.isin(query.ids, gallery.ids[rows]))
    assert len(absent)  # persons that cameras 1 and 2 never saw
    for side, row, message in (
        (1, outside[17], rf"gallery.features: row {outside[17]} is not finite"),
        (0, absent[0], rf"query.features: row {absent[0]} is not finite"),
    ):
        sides = list(data[:2])
        sides[side] = changed(sides[side], features=with_row(sides[side].features, row, value))
        with pytest.raises(ValueError, match=message):
            evaluate_sysu(*sides, permutations, mode="indoor", trials=1)


def test_wrong_types(data: Data) -> None:
    query, gallery, permutations = data
    with pytest.raises(TypeError, match=r"query.ids: expected integers .* float64"):
        evaluate_sysu(query._replace(ids=query.ids * 1.0), gallery, permutations)
    with pytest.raises(TypeError, match=r"query.features: expected real numbers"):
        evaluate_sysu(query._replace(features=query.features * 1j), gallery, permutations)
    with pytest.raises(TypeError, match=r"shots: expected an integer, got float"):
        evaluate_sysu(*data, shots=1.0)  # type: ignore[arg-type]
