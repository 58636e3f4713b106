"""RegDB and its chance level: golden vectors, both directions, wrong sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreid_vi.evaluation import (
    Embeddings,
    chance_regdb,
    evaluate_regdb,
    rank_metrics,
    regdb_table,
)
from tests.conftest import golden

RAW = {"normalize": False, "metric": "sqeuclidean"}


def side(name: str, folder: str | None = None) -> Embeddings:
    vectors = golden("eval/eval_regdb")
    ids = vectors[f"{name}_ids"]
    paths = None
    if folder is not None:
        paths = [f"{folder}/{pid}/male_front_{name}_{i:05d}_{pid}.bmp" for i, pid in enumerate(ids)]
    return Embeddings(vectors[f"{name}_feat"].astype(np.float32), ids, None, paths)


DIRECTIONS = [("v2t", "v", "t"), ("t2v", "t", "v")]


@pytest.mark.parametrize(("prefix", "query", "gallery"), DIRECTIONS)
def test_golden_image_cmc(room: str, prefix: str, query: str, gallery: str) -> None:
    vectors = golden("eval/eval_regdb")
    mean, std, trials = evaluate_regdb(side(query), side(gallery), per_query=True, **RAW)
    np.testing.assert_allclose(mean.cmc, vectors[f"{prefix}_agw_cmc20"], atol=1e-6)
    np.testing.assert_allclose(mean.cmc, vectors[f"{prefix}_std_cmc50"][:20], rtol=0, atol=1e-12)
    for name in ("mAP", "mINP"):
        assert getattr(mean, name) == pytest.approx(vectors[f"{prefix}_agw_{name}"], abs=1e-12)
        assert getattr(std, name) == 0
    assert len(trials) == 1
    assert trials[0].per_query is not None
    np.testing.assert_allclose(trials[0].per_query.AP, vectors[f"{prefix}_ref_AP"], atol=1e-12)
    np.testing.assert_allclose(trials[0].per_query.INP, vectors[f"{prefix}_ref_INP"], atol=1e-12)
    assert mean.valid.all()


@pytest.mark.parametrize(("prefix", "query", "gallery"), DIRECTIONS)
def test_golden_figures_of_mpanet_and_mcja(prefix: str, query: str, gallery: str) -> None:
    vectors = golden("eval/eval_regdb")
    mean = evaluate_regdb(side(query), side(gallery), cmc_by="identity", **RAW).mean
    found = [mean.mAP, *mean.cmc[[0, 4, 9, 19]]]
    np.testing.assert_allclose(found, vectors[f"{prefix}_mpanet_eval"] / 100, atol=1e-12)
    mean = evaluate_regdb(side(query), side(gallery), cmc_by="identity").mean
    found = [*mean.cmc[[0, 4, 9, 19]], mean.mAP, mean.mINP]
    np.testing.assert_allclose(found, vectors[f"{prefix}_mcja_eval"] / 100, atol=1e-12)


def test_table_holds_both_directions() -> None:
    infrared, visible = side("t", "Thermal"), side("v", "Visible")
    table = regdb_table(infrared, visible)
    assert list(table) == ["vis_to_ir", "ir_to_vis"]
    for name, (query, gallery) in {
        "vis_to_ir": (visible, infrared),
        "ir_to_vis": (infrared, visible),
    }.items():
        expected = evaluate_regdb(query, gallery).mean
        assert table[name].mean.mAP == expected.mAP
        assert np.array_equal(table[name].mean.cmc, expected.cmc)


def test_the_table_takes_every_option() -> None:
    infrared, visible = side("t", "Thermal"), side("v", "Visible")
    options = {"cmc_by": "identity", "max_rank": 7, "per_query": True, **RAW}
    table = regdb_table(infrared, visible, threads=1, **options)
    alone = evaluate_regdb(visible, infrared, **options)
    assert np.array_equal(table["vis_to_ir"].mean.cmc, alone.mean.cmc)
    assert len(alone.mean.cmc) == 7
    assert table["vis_to_ir"].mean.mAP != regdb_table(infrared, visible)["vis_to_ir"].mean.mAP
    detail, expected = table["vis_to_ir"].trials[0].per_query, alone.trials[0].per_query
    assert np.array_equal(detail.first_identity, expected.first_identity)
    with pytest.raises(ValueError, match=r"query\.cams: .* got None"):
        regdb_table(infrared, visible, camera_rule="location")


def test_cameras_are_not_looked_at_unless_asked() -> None:
    query, gallery = side("v"), side("t")
    plain = evaluate_regdb(query, gallery).mean
    same = [s._replace(cams=np.full(len(s.ids), 4)) for s in (query, gallery)]
    assert evaluate_regdb(*same).mean.mAP == plain.mAP
    with pytest.raises(ValueError, match="no valid query"):
        evaluate_regdb(*same, camera_rule="same_id_and_camera")
    with pytest.raises(ValueError, match=r"query\.cams: expected 120 camera numbers, got None"):
        evaluate_regdb(query, gallery, camera_rule="location")


@pytest.mark.parametrize(
    ("query", "gallery", "options", "message"),
    [
        (("v", "Visible"), ("t", "Thermal"), {"direction": "ir_to_vis"},
         "query: expected infrared images, as direction 'ir_to_vis' asks, got Visible/"),
        (("v", "Visible"), ("v", "Visible"), {}, "gallery: expected infrared images, got Visible/"),
        (("t", None), ("t", "Thermal"), {"direction": "vis_to_ir", "metric": "l1"},
         "metric: expected one of"),
        (("t", None), ("v", "Visible"), {"direction": "vis_to_ir"},
         "gallery: expected infrared images, as direction 'vis_to_ir' asks"),
        (("t", None), ("v", None), {"direction": "thermal"},
         "direction: expected one of 'ir_to_vis', 'vis_to_ir', got 'thermal'"),
    ],
)  # fmt: skip
def test_wrong_direction(query, gallery, options, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_regdb(side(*query), side(*gallery), **options)
    assert "\n" not in str(caught.value)


def test_a_list_of_two_modalities_is_refused() -> None:
    query = side("v", "Visible")
    paths = [*query.paths[:-1], "Thermal/3/x.bmp"]
    with pytest.raises(ValueError, match=r"query: expected visible images, got Thermal/3/x\.bmp"):
        evaluate_regdb(query._replace(paths=paths), side("t", "Thermal"))
    with pytest.raises(ValueError, match=r"query\.paths: expected 120 paths, got 119"):
        evaluate_regdb(query._replace(paths=paths[1:]), side("t", "Thermal"))


def test_chance_is_the_mean_of_random_rankings() -> None:
    random = np.random.default_rng(0)
    gallery = np.repeat(np.arange(9), random.integers(1, 8, 9))
    query = np.repeat(np.arange(10), 2000)  # person 9 is not in the gallery
    expected = chance_regdb(query, gallery)
    distance = random.random((len(query), len(gallery)), dtype=np.float32)
    found = rank_metrics(distance, query, gallery, protocol="regdb")
    assert np.array_equal(found.valid, expected.valid)
    assert found.cmc == pytest.approx(expected.cmc, abs=0.01)
    assert found.mAP == pytest.approx(expected.mAP, abs=0.005)
    assert found.mINP == pytest.approx(expected.mINP, abs=0.005)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 40))
def test_chance_obeys_laws(gallery: list[int], max_rank: int) -> None:
    chance = chance_regdb(gallery, gallery, max_rank=max_rank)
    share = np.mean([gallery.count(pid) / len(gallery) for pid in gallery])
    assert chance.cmc[0] == pytest.approx(share, abs=1e-12)
    assert (np.diff(chance.cmc) >= -1e-12).all()
    assert chance.cmc.shape == (max_rank,)
    assert chance.cmc[len(gallery) - 1 :] == pytest.approx(1.0)
    assert 0 < chance.mINP <= chance.mAP + 1e-12 <= 1 + 2e-12


def test_chance_at_real_size() -> None:
    ids = np.repeat(np.arange(206), 10)
    chance = chance_regdb(ids, ids)
    assert chance.cmc[0] == pytest.approx(1 / 206)
    assert chance.mAP == pytest.approx(0.0084, abs=1e-3)
    with pytest.raises(ValueError, match="no valid query: none of 2 queries"):
        chance_regdb([3, 4], [0, 1])
