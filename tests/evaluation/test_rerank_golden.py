"""Re-ranking against the released code's results: matrices, lists, V, V' and J."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastreid_vi.evaluation import k_reciprocal_rerank, rank_metrics
from fastreid_vi.evaluation.rerank_reference import Method, Steps, dense_rerank
from fastreid_vi.evaluation.rerank_sparse import SparseReranking
from tests.conftest import golden
from tests.evaluation.reranking import CASES, case, float_sets, stacked

# Integer features: every step of the released code is exact but for its own rounding.
INTEGER = [name for name in CASES if "unit" not in name and "mcja" not in name]
WITH_STEPS = {
    "rerank_single/mpanet_masked": "mpanet_masked_",
    "rerank_single/mpanet_full": "mpanet_full_",
    "rerank_single_k10/mpanet_masked": "mpanet_masked_",
    "rerank_single_k10/mpanet_full": "mpanet_full_",
    "mser_i2v_masked": "",
    "mser_i2v_full": "",
    "mser_v2i_full": "",
}


def close(found: Any, expected: Any, atol: float) -> None:
    np.testing.assert_allclose(
        found.astype(np.float64), expected.astype(np.float64), rtol=0, atol=atol
    )


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("edges")])
def test_float32_equals_the_exact_procedure(rerank_room: str, name: str) -> None:
    found = case(name)
    result = found.rerank()
    assert result.dtype == np.float32
    close(result, found.exact, 2e-6)
    close(result, found.released, 5e-3)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("edges")])
def test_edges(rerank_room: str, name: str) -> None:
    found = case(name)
    result = found.rerank()
    close(result, found.released, 5e-3)
    close(result, steps(name, "float64").result, 2e-6)


@pytest.mark.parametrize("name", ["rerank_single", "rerank_single_k10"])
def test_zhong(rerank_room: str, name: str) -> None:
    d = golden(f"eval/{name}")
    k1, k2, weight = int(d["k1"]), int(d["k2"]), float(d["lam"])
    result = k_reciprocal_rerank(d["q_feat"], d["g_feat"], k1=k1, k2=k2, weight=weight)
    close(result, d["zhong_f64"], 2e-6)
    close(result, d["zhong"], 2e-6)


@pytest.mark.parametrize("name", INTEGER)
def test_float16_has_the_released_bits(name: str) -> None:
    found = case(name)
    np.testing.assert_array_equal(found.rerank(precision="float16"), found.released)


@pytest.mark.parametrize("name", [n for n in CASES if n not in INTEGER])
def test_float16_on_real_numbers(name: str) -> None:
    """Norms summed in another order move a distance's last bit, and now and then a half."""
    found = case(name)
    result = found.rerank(precision="float16")
    close(result, found.released, 5e-4)
    assert (np.abs(result - found.released) < 1e-6).mean() > 0.95


@pytest.mark.parametrize("name", ["rerank_single", "rerank_single_k10"])
@pytest.mark.parametrize("variant", ["mpanet_masked", "mpanet_full"])
def test_metrics_after_released_rounding(name: str, variant: str) -> None:
    found = case(f"{name}/{variant}")
    d = found.vectors
    metrics = rank_metrics(
        found.rerank(precision="float16"), d["q_ids"], d["g_ids"], protocol="regdb"
    )
    assert metrics.mAP == pytest.approx(float(d[f"{variant}_mAP"]), abs=1e-12)
    assert metrics.cmc[0] == pytest.approx(float(d[f"{variant}_r1"]), abs=1e-12)


def method(name: str) -> Method:
    o = case(name).options
    return Method(o["k1"], o["k2"], o["weight"], o["neighbors"] == "queries", o["expand"])


def steps(name: str, precision: Any) -> Steps:
    items, queries = stacked(case(name))
    return dense_rerank(items, queries, method(name), precision)


@pytest.mark.parametrize("name", WITH_STEPS)
def test_steps_of_the_reference(name: str) -> None:
    found = case(name)
    d, prefix = found.vectors, WITH_STEPS[name]
    got = steps(name, "float16")
    np.testing.assert_array_equal(got.lists[:, : found.options["k1"] + 1], d[f"{prefix}topk"])
    for part, matrix in (("V", got.encoding), ("Vqe", got.expanded)):
        offsets, columns = d[f"{prefix}{part}_indptr"], d[f"{prefix}{part}_indices"]
        rows = np.repeat(np.arange(len(matrix)), np.diff(offsets))
        assert np.count_nonzero(matrix) == len(columns)
        np.testing.assert_array_equal(matrix[rows, columns], d[f"{prefix}{part}_data"])
    if f"{prefix}J" in d:
        np.testing.assert_array_equal(got.jaccard, d[f"{prefix}J"])
    if "prefuse" in d:
        np.testing.assert_array_equal(got.result, d["prefuse"])


@pytest.mark.parametrize("name", WITH_STEPS)
def test_steps_of_the_sparse_room(name: str) -> None:
    found = case(name)
    d, prefix, chosen = found.vectors, WITH_STEPS[name], method(name)
    queries, galleries = float_sets(found)
    sparse = SparseReranking(queries, galleries, chosen, [np.arange(len(galleries[0]))], 2)
    listed = sparse.lists[:, : chosen.k1 + 1]
    np.testing.assert_array_equal(listed, d[f"{prefix}topk"][: len(listed)])
    others = d[f"{prefix}topk"][len(listed) :, : sparse.other_lists.shape[1]]
    np.testing.assert_array_equal(sparse.other_lists, others)

    items = sum(map(len, queries)) + sum(map(len, galleries))
    offsets, columns, _ = sparse.native.neighbors()
    values = sparse.native.encoding(sparse.maxima[0])
    expected = d[f"{prefix}V_indptr"]
    # Gallery images that are nobody's neighbours have no row; theirs are empty.
    np.testing.assert_array_equal(offsets, expected[: len(offsets)])
    assert expected[-1] == offsets[-1]
    np.testing.assert_array_equal(columns, d[f"{prefix}V_indices"])
    close(values, d[f"{prefix}V_data"], 1e-3)
    offsets, columns, values = sparse.native.averages(sparse.maxima[0], np.arange(items))
    np.testing.assert_array_equal(offsets, d[f"{prefix}Vqe_indptr"])
    np.testing.assert_array_equal(columns, d[f"{prefix}Vqe_indices"])
    close(values, d[f"{prefix}Vqe_data"], 1e-3)


@pytest.mark.parametrize("variant", ["mpanet_masked", "mpanet_full"])
def test_jaccard_part(rerank_room: str, variant: str) -> None:
    found = case(f"rerank_single/{variant}")
    jaccard = found._replace(options={**found.options, "weight": 0}).rerank()
    close(jaccard, found.vectors[f"{variant}_J"], 5e-3)
    close(jaccard, steps(f"rerank_single/{variant}", "float64").jaccard, 2e-6)
