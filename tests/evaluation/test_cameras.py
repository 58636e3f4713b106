"""The matrix of camera pairs against one evaluation per pair; averages of trained models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastreid_vi.evaluation import (
    Embeddings,
    Evaluation,
    average_evaluations,
    camera_matrix,
    evaluate_regdb,
    evaluate_sysu,
    rank_metrics,
    sysu_galleries,
)
from tests.evaluation.conftest import Data, reordered

RULES = ("location", "same_id_and_camera", "none")


def some(seed: int, count: int, cams: list[int]) -> Embeddings:
    generator = np.random.default_rng(seed)
    features = generator.integers(-9, 10, (count, 6)).astype(np.float32)
    return Embeddings(features, generator.integers(0, 7, count), generator.choice(cams, count))


def squared(query: Embeddings, gallery: Embeddings) -> np.ndarray:
    return ((query.features[:, None] - gallery.features) ** 2).sum(axis=2)


RAW: dict[str, Any] = {"normalize": False, "metric": "sqeuclidean"}


@pytest.mark.parametrize("rule", RULES)
def test_every_pair_is_an_evaluation(room: str, rule: Any) -> None:
    query, gallery = some(0, 60, [2, 3, 6, 9]), some(1, 90, [1, 2, 3, 6])
    # In the second gallery most pairs have no valid query.
    sizes = (70, 6, 70)
    galleries = [np.random.default_rng(t).permutation(90)[:n] for t, n in enumerate(sizes)]
    found = camera_matrix(query, gallery, galleries=galleries, camera_rule=rule, **RAW)
    assert found.camera_rule == rule
    assert found.query_cams.tolist() == [2, 3, 6, 9]
    assert found.gallery_cams.tolist() == [1, 2, 3, 6]
    fewest = 3
    for (a, query_cam), (b, gallery_cam) in pairs(found):
        q = reordered_rows(query, query.cams == query_cam)
        results, ever = [], np.zeros(len(q.ids), bool)
        for rows in galleries:
            g = reordered_rows(gallery, rows[gallery.cams[rows] == gallery_cam])
            if not len(g.ids):
                continue
            try:
                alone = rank_metrics(squared(q, g), q.ids, g.ids, q.cams, g.cams, camera_rule=rule)
            except ValueError as error:
                assert "no valid query" in str(error)  # noqa: PT017
                continue
            results.append([alone.cmc[0], alone.mAP, alone.mINP])
            ever |= alone.valid
        fewest = min(fewest, len(results) or 3)
        figures = [found.R1[a, b], found.mAP[a, b], found.mINP[a, b]]
        expected = np.mean(results, axis=0) if results else [np.nan] * 3
        np.testing.assert_allclose(figures, expected, rtol=0, atol=1e-12)
        assert found.valid[a, b] == ever.sum()
        assert found.queries[a] == len(q.ids)
    assert fewest == 2
    counts = [[(gallery.cams[rows] == cam).sum() for rows in galleries] for cam in (1, 2, 3, 6)]
    np.testing.assert_allclose(found.images, np.mean(counts, axis=1))
    if rule == "location":  # cameras 2 and 3 are one place
        assert np.isnan(found.mAP[[0, 0, 1, 1, 2], [1, 2, 1, 2, 3]]).all()
        assert not found.valid[:2, 1:3].any()


def pairs(found: Any) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return [
        ((a, q), (b, g))
        for a, q in enumerate(found.query_cams)
        for b, g in enumerate(found.gallery_cams)
    ]


def reordered_rows(images: Embeddings, rows: Any) -> Embeddings:
    return Embeddings(images.features[rows], images.ids[rows], images.cams[rows])


def test_galleries_of_sysu(room: str, data: Data) -> None:
    query, gallery, permutations = data
    galleries = sysu_galleries(gallery, permutations, shots=10)
    found = camera_matrix(query, gallery, galleries=galleries)
    assert found.query_cams.tolist() == [3, 6]
    assert found.gallery_cams.tolist() == [1, 2, 4, 5]
    assert found.camera_rule == "location"
    assert np.isnan(found.R1[0, 1])  # camera 3 stands where camera 2 does
    assert (np.isnan(found.R1).sum(), (found.valid == 0).sum()) == (1, 1)
    assert found.queries.sum() == len(query.ids)
    # Camera 6 searching camera 1 alone is the protocol on the pool of camera 1.
    six = reordered(query, query.cams == 6)
    one = reordered(gallery, gallery.cams == 1)
    alone = evaluate_sysu(six, one, permutations, mode="indoor", shots=10).mean
    figures = [found.R1[1, 0], found.mAP[1, 0], found.mINP[1, 0]]
    assert figures == pytest.approx([alone.cmc[0], alone.mAP, alone.mINP], abs=1e-12)
    assert found.valid[1, 0] == alone.valid.sum()
    everything = camera_matrix(query, gallery)
    assert everything.images.sum() == len(gallery.ids)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"galleries": []}, ValueError, "galleries: expected one gallery at least, got none"),
        ({"galleries": [[]]}, ValueError, r"galleries\[0\]: expected rows 0 to 89 .* got none"),
        ({"galleries": [[1], [2, 90]]}, ValueError, r"galleries\[1\]: .* got 2 to 90"),
        ({"galleries": [[1.5]]}, TypeError, r"galleries\[0\]: expected integers"),
        ({"camera_rule": "same"}, ValueError, "camera_rule: expected one of"),
        ({"protocol": "cuhk"}, ValueError, "protocol: expected one of .*'market'.* got 'cuhk'"),
        ({"metric": "l1"}, ValueError, "metric: expected one of"),
        ({"threads": 0}, ValueError, "threads: expected >= 1, got 0"),
    ],
)
def test_bad_options(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        camera_matrix(some(0, 60, [3, 6]), some(1, 90, [1, 2]), **change)


def test_bad_images() -> None:
    query, gallery = some(0, 60, [3, 6]), some(1, 90, [1, 2])
    with pytest.raises(ValueError, match=r"query\.cams: expected 60 camera numbers, got None"):
        camera_matrix(query._replace(cams=None), gallery)
    with pytest.raises(ValueError, match=r"gallery\.cams: .* got None"):
        camera_matrix(query, gallery._replace(cams=None), protocol="regdb")
    with pytest.raises(ValueError, match=r"no valid query: 0 of 60 .* any pair .* 'location'"):
        camera_matrix(query, gallery._replace(ids=gallery.ids + 100))


def test_average_of_models() -> None:
    """RegDB's ten trials: ten models, each with its own split."""
    runs = []
    for trial in range(10):
        query, gallery = some(trial, 40 + trial, [1]), some(100 + trial, 50, [1])
        runs.append(evaluate_regdb(query, gallery, per_query=True))
    found = average_evaluations(runs)
    values = np.array([[*run.mean.cmc, run.mean.mAP, run.mean.mINP] for run in runs])
    for part, expected in ((found.mean, values.mean(axis=0)), (found.std, values.std(axis=0))):
        np.testing.assert_allclose([*part.cmc, part.mAP, part.mINP], expected, rtol=0, atol=1e-15)
    assert len(found.trials) == 10
    assert all(trial.per_query is not None for trial in found.trials)
    assert len(found.mean.valid) == sum(40 + trial for trial in range(10))
    assert found.mean.valid.sum() == sum(run.mean.valid.sum() for run in runs)


def test_average_of_seeds(data: Data) -> None:
    runs = [evaluate_sysu(*data, mode="indoor", trials=3), evaluate_sysu(*data, mode="indoor")]
    found = average_evaluations(runs)
    assert [trial.mAP for trial in found.trials] == [run.mean.mAP for run in runs]
    assert found.mean.mAP == pytest.approx((runs[0].mean.mAP + runs[1].mean.mAP) / 2)
    assert found.std.mINP == pytest.approx(abs(runs[0].mean.mINP - runs[1].mean.mINP) / 2)


def test_bad_averages(data: Data) -> None:
    short = evaluate_sysu(*data, trials=1, max_rank=5)
    with pytest.raises(ValueError, match="cmc of number 1 has 20 ranks, the first has 5"):
        average_evaluations([short, evaluate_sysu(*data, trials=1)])
    with pytest.raises(ValueError, match="evaluations: expected one at least, got none"):
        average_evaluations([])
    with pytest.raises(TypeError, match="evaluations: expected Evaluation, got RankMetrics"):
        average_evaluations([short.mean])  # type: ignore[list-item]
    assert isinstance(average_evaluations([short]), Evaluation)
