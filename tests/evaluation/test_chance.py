"""Chance levels against random rankings and against cases solved by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fastreid_vi.evaluation import RankMetrics, rank_metrics
from fastreid_vi.evaluation.chance import chance_sysu
from fastreid_vi.evaluation.galleries import GALLERY_CAMERAS


def pool(seed: int, persons: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Identity, camera and image number of a gallery pool with absent persons and short folders."""
    random = np.random.default_rng(seed)
    rows = [
        (person, cam, number)
        for cam in (1, 2, 4, 5)
        for person in range(persons)
        if random.random() < 0.7
        for number in range(1, random.integers(2, 14))
    ]
    ids, cams, numbers = np.array(rows).T
    return ids, cams, numbers


@pytest.mark.parametrize("mode", ["all", "indoor"])
@pytest.mark.parametrize("shots", [1, 10])
def test_equals_the_mean_of_random_rankings(mode: str, shots: int) -> None:
    ids, cams, numbers = pool(0)
    query_ids = np.repeat(np.arange(13), 2000)  # person 12 is in no gallery
    query_cams = np.tile([3, 6], 13 * 1000)
    expected = chance_sysu(query_ids, query_cams, ids, cams, mode=mode, shots=shots)  # type: ignore[arg-type]
    taken = (numbers <= shots) & np.isin(cams, GALLERY_CAMERAS[mode])
    distance = np.random.default_rng(1).random((len(query_ids), taken.sum()), dtype=np.float32)
    found = rank_metrics(distance, query_ids, ids[taken], query_cams, cams[taken])
    assert np.array_equal(expected.valid, found.valid)
    assert not expected.valid[query_ids == 12].any()
    assert found.cmc == pytest.approx(expected.cmc, abs=0.02)
    assert found.mAP == pytest.approx(expected.mAP, abs=0.005)
    assert found.mINP == pytest.approx(expected.mINP, abs=0.005)


def test_one_image_of_each_of_five_persons() -> None:
    expected = chance_sysu([0], [6], np.arange(5), np.full(5, 1))
    assert expected.cmc == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 16], abs=1e-12)
    # One right image: AP = INP = 1 / rank, rank uniform on 1..5.
    assert expected.mAP == pytest.approx(137 / 300, abs=1e-12)
    assert expected.mINP == pytest.approx(137 / 300, abs=1e-12)


def test_two_right_images_of_three() -> None:
    # Rankings of R R W: RRW, RWR, WRR, equally likely.
    expected = chance_sysu([0], [6], [0, 0, 1], [1, 2, 1])
    assert expected.cmc[:2] == pytest.approx([2 / 3, 1.0], abs=1e-12)
    assert expected.mAP == pytest.approx((1 + (1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 3, abs=1e-12)
    assert expected.mINP == pytest.approx((1 + 2 / 3 + 2 / 3) / 3, abs=1e-12)


def test_a_lone_person_is_always_found() -> None:
    expected = chance_sysu([7], [6], [7, 7], [4, 5], shots=10)
    assert isinstance(expected, RankMetrics)
    assert expected.cmc == pytest.approx(np.ones(20))
    assert (expected.mAP, expected.mINP) == pytest.approx((1.0, 1.0))


def test_camera_three_does_not_see_camera_two() -> None:
    both = chance_sysu([0, 0], [3, 6], [0, 0, 1], [1, 2, 1])
    assert both.cmc[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="no valid query: none of 1 queries"):
        chance_sysu([0], [3], [0, 1], [2, 1])


def test_first_rank_at_real_size_is_right_over_kept() -> None:
    ids, cams = np.repeat(np.arange(96), 4), np.tile([1, 2, 4, 5], 96)
    expected = chance_sysu(np.arange(96), np.full(96, 6), ids, cams)
    assert expected.cmc == pytest.approx(np.arange(1, 21) / 96, abs=1e-10)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode: expected 'all' or 'indoor', got 'outdoor'"):
        chance_sysu([0], [3], [0], [1], mode="outdoor")  # type: ignore[arg-type]
