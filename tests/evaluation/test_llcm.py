"""LLCM and its chance level: golden draws and metrics, released direction, wrong sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreid_vi.evaluation import (
    Embeddings,
    chance_llcm,
    evaluate_llcm,
    llcm_galleries,
    llcm_table,
    rank_metrics,
)
from tests.conftest import golden
from tests.evaluation.conftest import reordered

RAW = {"normalize": False, "metric": "sqeuclidean"}
CASES = [
    ("i2v", "t", "v", {}),
    ("v2i", "v", "t", {}),
    ("v2i_released", "v", "t", {"vis_to_ir": "released"}),
]


def side(name: str, *, paths: bool = False) -> Embeddings:
    vectors = golden("eval/eval_llcm")
    ids, cams = vectors[f"{name}_ids"], vectors[f"{name}_cams"]
    kind = {"v": "vis", "t": "nir"}[name]
    names = [
        f"test_{kind}/cam{c}/{y:04d}/{y:04d}_c{c:02d}_s100000_f{i:05d}_{kind}.jpg"
        for i, (y, c) in enumerate(zip(ids, cams, strict=True))
    ]
    features = vectors[f"{name}_feat"].astype(np.float32)
    return Embeddings(features, ids, cams, names if paths else None)


@pytest.mark.parametrize(("prefix", "query", "gallery", "options"), CASES)
@pytest.mark.parametrize("paths", [False, True])
def test_golden_trials(room, prefix, query, gallery, options, paths) -> None:
    vectors = golden("eval/eval_llcm")
    found = evaluate_llcm(side(query, paths=paths), side(gallery, paths=paths), **options, **RAW)
    assert len(found.trials) == 10
    for trial, (mAP, mINP), cmc in zip(
        found.trials, vectors[f"{prefix}_mAP_mINP"], vectors[f"{prefix}_cmc20"], strict=True
    ):
        assert (trial.mAP, trial.mINP) == pytest.approx((mAP, mINP), abs=1e-12)
        np.testing.assert_allclose(trial.cmc, cmc, atol=1e-6)
    mean = vectors[f"{prefix}_mAP_mINP"].mean(axis=0)
    assert (found.mean.mAP, found.mean.mINP) == pytest.approx(tuple(mean), abs=1e-12)
    np.testing.assert_allclose(
        found.std.cmc, np.std([t.cmc for t in found.trials], axis=0), atol=1e-12
    )


@pytest.mark.parametrize(("name", "key"), [("v", "gal_vis"), ("t", "gal_nir")])
def test_golden_draws(name: str, key: str) -> None:
    expected = golden("eval/eval_llcm")[key]
    for paths in (False, True):
        np.testing.assert_array_equal(llcm_galleries(side(name, paths=paths)), expected)


def test_the_order_of_rows_does_not_matter_with_paths() -> None:
    query, gallery = side("t", paths=True), side("v", paths=True)
    order = np.random.default_rng(0).permutation(len(gallery.ids))
    mixed = reordered(gallery, order)
    found, expected = (evaluate_llcm(query, g, **RAW) for g in (mixed, gallery))
    assert [t.mAP for t in found.trials] == [t.mAP for t in expected.trials]


def test_released_changes_visible_queries_only() -> None:
    infrared, visible = side("t", paths=True), side("v", paths=True)
    plain = evaluate_llcm(infrared, visible).mean.mAP
    assert evaluate_llcm(infrared, visible, vis_to_ir="released").mean.mAP == plain
    table = llcm_table(infrared, visible)
    assert list(table) == ["ir_to_vis", "vis_to_ir", "vis_to_ir/released"]
    assert table["ir_to_vis"].mean.mAP == plain
    assert table["vis_to_ir"].mean.mAP == evaluate_llcm(visible, infrared).mean.mAP
    released = evaluate_llcm(visible, infrared, vis_to_ir="released").mean
    assert table["vis_to_ir/released"].mean.mAP == released.mAP != table["vis_to_ir"].mean.mAP
    assert len(released.valid) == len({*zip(infrared.ids, infrared.cams, strict=True)})


def test_the_table_takes_every_option() -> None:
    infrared, visible = side("t", paths=True), side("v", paths=True)
    options = {"cmc_by": "image", "camera_rule": "none", "max_rank": 7, "per_query": True, **RAW}
    table = llcm_table(infrared, visible, trials=2, threads=1, **options)
    for name, (query, gallery, form) in {
        "ir_to_vis": (infrared, visible, "paper"),
        "vis_to_ir": (visible, infrared, "paper"),
        "vis_to_ir/released": (visible, infrared, "released"),
    }.items():
        alone = evaluate_llcm(query, gallery, trials=2, vis_to_ir=form, **options)
        for a, b in zip(table[name].trials, alone.trials, strict=True):
            assert np.array_equal(a.cmc, b.cmc)
            assert len(a.cmc) == 7
            assert np.array_equal(a.per_query.AP, b.per_query.AP, equal_nan=True)


@pytest.mark.parametrize(
    ("swap", "options", "message"),
    [
        (False, {"direction": "vis_to_ir"}, "query: expected visible images, as direction"),
        (True, {"direction": "ir_to_vis"}, "query: expected infrared images, as direction"),
        (False, {"direction": "up"}, "direction: expected one of 'ir_to_vis', 'vis_to_ir'"),
        (False, {"vis_to_ir": "both"}, "vis_to_ir: expected one of 'paper', 'released', got"),
        (False, {"trials": 0}, "trials: expected >= 1, got 0"),
    ],
)
def test_wrong_direction(swap: bool, options, message: str) -> None:
    sides = [side("t", paths=True), side("v", paths=True)]
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_llcm(*(sides[::-1] if swap else sides), **options)
    assert "\n" not in str(caught.value)


def test_two_lists_of_one_modality_and_missing_cameras() -> None:
    infrared, visible = side("t", paths=True), side("v", paths=True)
    with pytest.raises(ValueError, match="gallery: expected visible images, got test_nir/"):
        evaluate_llcm(infrared, infrared)
    with pytest.raises(ValueError, match=r"gallery\.cams: expected 285 camera numbers, got None"):
        evaluate_llcm(infrared, visible._replace(cams=None))
    with pytest.raises(ValueError, match=r"query\.cams: expected 250 camera numbers, got None"):
        evaluate_llcm(infrared._replace(cams=None), visible)


@pytest.mark.parametrize("vis_to_ir", ["paper", "released"])
def test_chance_is_the_mean_of_random_rankings(vis_to_ir) -> None:
    random = np.random.default_rng(3)
    folders = [(y, c) for y in range(12) for c in range(1, 6) if random.random() < 0.6]
    rows = np.array([f for f in folders for _ in range(random.integers(1, 5))])
    other = np.array([(y, c) for y in range(13) for c in (1, 3, 5, 7)])
    if vis_to_ir == "paper":
        queries, pool, searched = np.repeat(other, 300, axis=0), rows, np.unique(rows, axis=0)
    else:
        queries, pool, searched = rows, other, rows
    expected = chance_llcm(
        queries[:, 0], queries[:, 1], pool[:, 0], pool[:, 1], vis_to_ir=vis_to_ir
    )
    asked = queries if vis_to_ir == "paper" else np.repeat(np.unique(other, axis=0), 300, axis=0)
    distance = random.random((len(asked), len(searched)), dtype=np.float32)
    found = rank_metrics(
        distance, asked[:, 0], searched[:, 0], asked[:, 1], searched[:, 1], protocol="llcm"
    )
    valid = expected.valid if vis_to_ir == "paper" else np.repeat(expected.valid, 300)
    assert np.array_equal(found.valid, valid)
    assert not found.valid.all()
    assert found.cmc == pytest.approx(expected.cmc, abs=0.012)
    assert found.mAP == pytest.approx(expected.mAP, abs=0.006)
    assert found.mINP == pytest.approx(expected.mINP, abs=0.006)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=14),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=14),
)
def test_chance_and_metrics_agree_on_who_is_valid(query, gallery) -> None:
    """One trial, random features: the same queries count, and R1 is the share of right images."""
    (q, c), (g, d) = np.array(query).T, np.array(gallery).T
    folders = sorted(set(gallery))
    keeps = [[f for f in folders if f != (y, cam)] for y, cam in query]
    right = [sum(pid == y for pid, _ in kept) for (y, _), kept in zip(query, keeps, strict=True)]
    features = np.random.default_rng(0).standard_normal
    sides = Embeddings(features((len(q), 3)), q, c), Embeddings(features((len(g), 3)), g, d)
    if not any(right):
        for refused in (lambda: evaluate_llcm(*sides, trials=1), lambda: chance_llcm(q, c, g, d)):
            with pytest.raises(ValueError, match="no valid query"):
                refused()
        return
    chance = chance_llcm(q, c, g, d)
    assert np.array_equal(chance.valid, np.array(right) > 0)
    assert np.array_equal(evaluate_llcm(*sides, trials=1).mean.valid, chance.valid)
    shares = [n / len(kept) for n, kept in zip(right, keeps, strict=True) if n]
    assert chance.cmc[0] == pytest.approx(np.mean(shares), abs=1e-12)
