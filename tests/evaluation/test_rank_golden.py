"""rank_metrics against the released evaluation codes, in every room."""

from __future__ import annotations

import numpy as np
import pytest

from fastreid_vi.evaluation import RankMetrics, rank_metrics
from tests.conftest import golden

EXACT = {"rtol": 0, "atol": 1e-12}
SINGLE = {"rtol": 0, "atol": 1e-6}  # CMC that the released code accumulates in float32


def squared(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of integer features, exact in float32."""
    q, g = query.astype(np.float32), gallery.astype(np.float32)
    return (q * q).sum(1)[:, None] + (g * g).sum(1) - 2 * (q @ g.T)


def cosine(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    q, g = query.astype(np.float64), gallery.astype(np.float64)
    return -(q / np.linalg.norm(q, axis=1)[:, None]) @ (g / np.linalg.norm(g, axis=1)[:, None]).T


def same_queries(found: RankMetrics, expected: dict[str, np.ndarray], prefix: str) -> None:
    """Every per-query array of a golden file: integers exactly."""
    detail = found.per_query
    assert detail is not None
    assert np.array_equal(found.valid, expected[f"{prefix}valid"])
    # Golden positions count from 0 and hold -1 for an invalid query; ours count from 1 and hold 0.
    assert np.array_equal(detail.first_image - 1, expected[f"{prefix}first_std"])
    identity = np.where(found.valid, detail.first_identity - 1, -1)
    assert np.array_equal(identity, expected[f"{prefix}first_ite"])
    assert np.array_equal(detail.last - 1, expected[f"{prefix}last"])
    assert np.array_equal(detail.num_pos, expected[f"{prefix}num_pos"])
    np.testing.assert_allclose(detail.AP, expected[f"{prefix}AP"], **EXACT)
    np.testing.assert_allclose(detail.INP, expected[f"{prefix}INP"], **EXACT)
    assert found.mAP == pytest.approx(float(expected[f"{prefix}mAP"]), abs=1e-12)
    assert found.mINP == pytest.approx(float(expected[f"{prefix}mINP"]), abs=1e-12)


def cmc_equal(found: np.ndarray, expected: np.ndarray, tolerance: dict[str, float]) -> None:
    """CMC over the ranks both have; ours goes on with its last value."""
    np.testing.assert_allclose(found[: len(expected)], expected, **tolerance)
    assert np.all(found[len(expected) :] == found[len(expected) - 1])


@pytest.mark.parametrize("case", "ABCEFGHI")
def test_edges(room: str, case: str) -> None:
    data = golden("eval/eval_edges")
    given = [data[f"{case}_{name}"] for name in ("dist", "q_ids", "g_ids", "q_cams", "g_cams")]
    found = rank_metrics(*given, per_query=True)
    same_queries(found, data, f"{case}_")
    assert found.valid.sum() == data[f"{case}_num_valid"]
    np.testing.assert_allclose(found.cmc, data[f"{case}_ite_cmc20"], **EXACT)
    by_image = rank_metrics(*given, cmc_by="image")
    np.testing.assert_allclose(by_image.cmc, data[f"{case}_std_cmc20"], **EXACT)
    cmc_equal(rank_metrics(*given, max_rank=60).cmc, data[f"{case}_ite_cmc"], EXACT)
    cmc_equal(rank_metrics(*given, max_rank=60, cmc_by="image").cmc, data[f"{case}_std_cmc"], EXACT)
    for code, tolerance in (("agw", SINGLE), ("mcja", EXACT), ("mpanet", EXACT)):
        if f"{case}_{code}_cmc" in data:
            long = rank_metrics(*given, max_rank=len(data[f"{case}_{code}_cmc"]))
            np.testing.assert_allclose(long.cmc, data[f"{case}_{code}_cmc"], **tolerance)


def test_edge_without_a_valid_query(room: str) -> None:
    data = golden("eval/eval_edges")
    given = [data[f"D_{name}"] for name in ("dist", "q_ids", "g_ids", "q_cams", "g_cams")]
    with pytest.raises(ValueError, match=r"no valid query: 0 of 3 queries .* 4 gallery images"):
        rank_metrics(*given)


@pytest.mark.parametrize("name", ["small", "mid", "multi"])
def test_sysu(room: str, name: str) -> None:
    data = golden(f"eval/eval_sysu_{name}")
    distance = squared(data["q_feat"], data["g_feat"])
    if "dist" in data:
        assert np.array_equal(distance, data["dist"])
    labels = [data[key] for key in ("q_ids", "g_ids", "q_cams", "g_cams")]
    identities = len(data["mcja_cmc"])
    found = rank_metrics(distance, *labels, max_rank=identities, per_query=True)
    same_queries(found, data, "ref_")
    for code in ("ref_ite", "mcja", "mpanet"):
        np.testing.assert_allclose(found.cmc, data[f"{code}_cmc"], **EXACT)
    np.testing.assert_allclose(found.cmc[:20], data["agw_cmc20"], **SINGLE)
    for code in ("agw", "mcja", "mpanet"):
        assert found.mAP == pytest.approx(float(data[f"{code}_mAP"]), abs=1e-12)
    for code in ("agw", "mcja"):
        assert found.mINP == pytest.approx(float(data[f"{code}_mINP"]), abs=1e-12)
    by_image = rank_metrics(distance, *labels, cmc_by="image", max_rank=50)
    np.testing.assert_allclose(by_image.cmc, data["std_cmc50"], **SINGLE)
    np.testing.assert_allclose(by_image.cmc, data["ref_std_cmc"], **EXACT)

    market = rank_metrics(distance, *labels, protocol="market", per_query=True)
    assert market.per_query is not None
    np.testing.assert_allclose(market.cmc, data["fastreid_cmc50"], **SINGLE)
    np.testing.assert_allclose(market.per_query.AP, data["fastreid_AP"], **EXACT)
    np.testing.assert_allclose(market.per_query.INP, data["fastreid_INP"], **EXACT)
    np.testing.assert_allclose(market.per_query.AP, data["fastreid_cy_AP"], rtol=0, atol=1e-5)


def test_market(room: str) -> None:
    data = golden("eval/eval_market")
    distance = squared(data["q_feat"], data["g_feat"])
    labels = [data[key] for key in ("q_ids", "g_ids", "q_cams", "g_cams")]
    found = rank_metrics(distance, *labels, protocol="market", per_query=True)
    same_queries(found, data, "ref_")
    np.testing.assert_allclose(found.cmc, data["ref_std_cmc"], **EXACT)
    np.testing.assert_allclose(found.cmc, data["fastreid_cmc50"], **SINGLE)
    np.testing.assert_allclose(found.cmc, data["fastreid_cy_cmc50"], rtol=0, atol=1e-5)
    assert found.per_query is not None
    np.testing.assert_allclose(found.per_query.AP[found.valid], data["fastreid_AP"], **EXACT)
    np.testing.assert_allclose(found.per_query.INP[found.valid], data["fastreid_INP"], **EXACT)
    llcm = rank_metrics(distance, *labels, protocol="llcm")
    np.testing.assert_allclose(llcm.cmc, data["llcm_cmc20"], **SINGLE)
    means = [float(data["llcm_mAP"]), float(data["llcm_mINP"])]
    assert [llcm.mAP, llcm.mINP] == pytest.approx(means, abs=1e-12)
    identities = len(data["ref_ite_cmc"])
    longer = rank_metrics(distance, *labels, protocol="llcm", max_rank=identities)
    np.testing.assert_allclose(longer.cmc, data["ref_ite_cmc"], **EXACT)


@pytest.mark.parametrize("direction", ["v2t", "t2v"])
def test_regdb(room: str, direction: str) -> None:
    data = golden("eval/eval_regdb")
    query, gallery = direction[0], direction[2]
    features = data[f"{query}_feat"], data[f"{gallery}_feat"]
    ids = data[f"{query}_ids"], data[f"{gallery}_ids"]
    found = rank_metrics(squared(*features), *ids, protocol="regdb", max_rank=50, per_query=True)
    np.testing.assert_allclose(found.cmc, data[f"{direction}_std_cmc50"], **SINGLE)
    np.testing.assert_allclose(found.cmc[:20], data[f"{direction}_agw_cmc20"], **SINGLE)
    assert found.per_query is not None
    np.testing.assert_allclose(found.per_query.AP, data[f"{direction}_ref_AP"], **EXACT)
    np.testing.assert_allclose(found.per_query.INP, data[f"{direction}_ref_INP"], **EXACT)
    identity = rank_metrics(
        squared(*features), *ids, protocol="regdb", cmc_by="identity", max_rank=24
    )
    for code in ("mpanet", "mcja"):
        np.testing.assert_allclose(identity.cmc, data[f"{direction}_{code}_cmc"], **EXACT)
    for code in ("agw", "mpanet", "mcja"):
        assert found.mAP == pytest.approx(float(data[f"{direction}_{code}_mAP"]), abs=1e-12)
    for code in ("agw", "mcja"):
        assert found.mINP == pytest.approx(float(data[f"{direction}_{code}_mINP"]), abs=1e-12)

    ranks = [0, 4, 9, 19]
    mpanet = 100 * np.array([identity.mAP, *identity.cmc[ranks]])
    np.testing.assert_allclose(mpanet, data[f"{direction}_mpanet_eval"], rtol=0, atol=1e-10)
    unit = rank_metrics(cosine(*features), *ids, protocol="regdb", cmc_by="identity")
    mcja = 100 * np.array([*unit.cmc[ranks], unit.mAP, unit.mINP])
    np.testing.assert_allclose(mcja, data[f"{direction}_mcja_eval"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("direction", ["i2v", "v2i", "v2i_released"])
def test_llcm(room: str, direction: str) -> None:
    data = golden("eval/eval_llcm")
    side = {"i": ("t", slice(None)), "v": ("v", slice(None))}
    for trial in range(10):
        sampled = {"t": ("t", data["gal_nir"][trial]), "v": ("v", data["gal_vis"][trial])}
        query, gallery = {
            "i2v": (side["i"], sampled["v"]),
            "v2i": (side["v"], sampled["t"]),
            "v2i_released": (sampled["t"], side["v"]),
        }[direction]
        (q, q_rows), (g, g_rows) = query, gallery
        found = rank_metrics(
            squared(data[f"{q}_feat"][q_rows], data[f"{g}_feat"][g_rows]),
            data[f"{q}_ids"][q_rows],
            data[f"{g}_ids"][g_rows],
            data[f"{q}_cams"][q_rows],
            data[f"{g}_cams"][g_rows],
            protocol="llcm",
        )
        means = data[f"{direction}_mAP_mINP"][trial]
        assert (found.mAP, found.mINP) == pytest.approx(tuple(means), abs=1e-12)
        np.testing.assert_allclose(found.cmc, data[f"{direction}_cmc20"][trial], **SINGLE)
