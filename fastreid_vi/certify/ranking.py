"""Ranking metrics against the released evaluation codes, in both rooms."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from fastreid_vi.certify.cases import Check, Procedure, Want, compare, exact
from fastreid_vi.certify.vectors import Array, Golden
from fastreid_vi.evaluation import RankMetrics, rank_metrics

_EXACT, _SINGLE, _CYTHON = 1e-12, 1e-6, 1e-5  # ours; CMC in float32; the Cython build
_ROOMS = ("reference", "retrieval")


def procedures() -> Iterator[Procedure]:
    """One procedure for every file and case of it."""
    runs: list[tuple[str, Any]] = [
        (f"eval/eval_edges {case}", partial(_edge, case)) for case in "ABCEFGHI"
    ]
    runs += [(f"eval/eval_sysu_{name}", partial(_sysu, name)) for name in ("small", "mid", "multi")]
    runs += [("eval/eval_market", _market)]
    runs += [(f"eval/eval_regdb {way}", partial(_regdb, way)) for way in ("v2t", "t2v")]
    runs += [(f"eval/eval_llcm {way}", partial(_llcm, way)) for way in _LLCM]
    runs += [(f"mcja/sampler_metrics {name}", partial(_mcja, name)) for name in ("m1", "m2")]
    runs += [
        (f"aligngan/sampler_evaluation {name}", partial(_aligngan, name))
        for name in ("single", "multi")
    ]
    for name, run in runs:
        yield Procedure(
            owner="rank_metrics",
            name=name,
            run=run,
            dtypes=("float64",),
            devices=("cpu",),
            rooms=_ROOMS,
        )


def _near(name: str, got: Any, want: Any, bound: float = _EXACT) -> Check:
    return compare(name, "forward", got, Want(want, bound, bound, 1.0), torch.float64)


def _same(name: str, got: Any, want: Any) -> Check:
    return compare(name, "forward", got, exact(want), torch.float64)


def _squared(query: Array, gallery: Array) -> Array:
    """Squared Euclidean distances of integer features, exact in float32."""
    q, g = query.astype(np.float32), gallery.astype(np.float32)
    found: Array = (q * q).sum(1)[:, None] + (g * g).sum(1) - 2 * (q @ g.T)
    return found


def _cosine(query: Array, gallery: Array) -> Array:
    q, g = query.astype(np.float64), gallery.astype(np.float64)
    q, g = q / np.linalg.norm(q, axis=1)[:, None], g / np.linalg.norm(g, axis=1)[:, None]
    found: Array = -q @ g.T
    return found


def _queries(found: RankMetrics, v: dict[str, Array], prefix: str) -> Iterator[Check]:
    """Every per-query array; golden positions count from 0 and hold -1 for an invalid query."""
    detail = found.per_query
    assert detail is not None  # it was asked for
    identity = np.where(found.valid, detail.first_identity - 1, -1)
    yield _same("valid", found.valid, v[f"{prefix}valid"])
    yield _same("first match", detail.first_image - 1, v[f"{prefix}first_std"])
    yield _same("identities before it", identity, v[f"{prefix}first_ite"])
    yield _same("last match", detail.last - 1, v[f"{prefix}last"])
    yield _same("matches", detail.num_pos, v[f"{prefix}num_pos"])
    yield _near("AP", detail.AP, v[f"{prefix}AP"])
    yield _near("INP", detail.INP, v[f"{prefix}INP"])
    yield _near("mAP", found.mAP, v[f"{prefix}mAP"])
    yield _near("mINP", found.mINP, v[f"{prefix}mINP"])


def _edge(case: str, golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("eval/eval_edges")
    given = [v[f"{case}_{name}"] for name in ("dist", "q_ids", "g_ids", "q_cams", "g_cams")]
    found = rank_metrics(*given, per_query=True)
    yield from _queries(found, v, f"{case}_")
    yield _near("identity CMC", found.cmc, v[f"{case}_ite_cmc20"])
    by_image = rank_metrics(*given, cmc_by="image")
    yield _near("image CMC", by_image.cmc, v[f"{case}_std_cmc20"])
    for code, bound in (("agw", _SINGLE), ("mcja", _EXACT), ("mpanet", _EXACT)):
        stored = v.get(f"{case}_{code}_cmc")
        if stored is not None:
            cmc = rank_metrics(*given, max_rank=len(stored)).cmc
            yield _near(f"CMC of {code}", cmc, stored, bound)


def _sysu(name: str, golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load(f"eval/eval_sysu_{name}")
    distance = _squared(v["q_feat"], v["g_feat"])
    labels = [v[key] for key in ("q_ids", "g_ids", "q_cams", "g_cams")]
    found = rank_metrics(distance, *labels, max_rank=len(v["mcja_cmc"]), per_query=True)
    yield from _queries(found, v, "ref_")
    for code in ("ref_ite", "mcja", "mpanet"):
        yield _near(f"CMC of {code}", found.cmc, v[f"{code}_cmc"])
    yield _near("CMC of agw", found.cmc[:20], v["agw_cmc20"], _SINGLE)
    for code in ("agw", "mcja", "mpanet"):
        yield _near(f"mAP of {code}", found.mAP, v[f"{code}_mAP"])
    for code in ("agw", "mcja"):
        yield _near(f"mINP of {code}", found.mINP, v[f"{code}_mINP"])
    by_image = rank_metrics(distance, *labels, cmc_by="image", max_rank=50)
    yield _near("image CMC", by_image.cmc, v["ref_std_cmc"])
    market = rank_metrics(distance, *labels, protocol="market", per_query=True)
    assert market.per_query is not None  # it was asked for
    yield _near("CMC of fast-reid", market.cmc, v["fastreid_cmc50"], _SINGLE)
    yield _near("AP of fast-reid", market.per_query.AP, v["fastreid_AP"])
    yield _near("INP of fast-reid", market.per_query.INP, v["fastreid_INP"])
    yield _near("AP of its Cython build", market.per_query.AP, v["fastreid_cy_AP"], _CYTHON)


def _market(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("eval/eval_market")
    distance = _squared(v["q_feat"], v["g_feat"])
    labels = [v[key] for key in ("q_ids", "g_ids", "q_cams", "g_cams")]
    found = rank_metrics(distance, *labels, protocol="market", per_query=True)
    yield from _queries(found, v, "ref_")
    yield _near("image CMC", found.cmc, v["ref_std_cmc"])
    yield _near("CMC of fast-reid", found.cmc, v["fastreid_cmc50"], _SINGLE)
    llcm = rank_metrics(distance, *labels, protocol="llcm")
    yield _near("CMC of LLCM's code", llcm.cmc, v["llcm_cmc20"], _SINGLE)
    yield _near("its mAP", llcm.mAP, v["llcm_mAP"])
    yield _near("its mINP", llcm.mINP, v["llcm_mINP"])


def _regdb(way: str, golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("eval/eval_regdb")
    features = v[f"{way[0]}_feat"], v[f"{way[2]}_feat"]
    ids = v[f"{way[0]}_ids"], v[f"{way[2]}_ids"]
    found = rank_metrics(_squared(*features), *ids, protocol="regdb", max_rank=50, per_query=True)
    assert found.per_query is not None  # it was asked for
    yield _near("image CMC", found.cmc, v[f"{way}_std_cmc50"], _SINGLE)
    yield _near("AP", found.per_query.AP, v[f"{way}_ref_AP"])
    yield _near("INP", found.per_query.INP, v[f"{way}_ref_INP"])
    identity = rank_metrics(
        _squared(*features), *ids, protocol="regdb", cmc_by="identity", max_rank=24
    )
    for code in ("mpanet", "mcja"):
        yield _near(f"CMC of {code}", identity.cmc, v[f"{way}_{code}_cmc"])
    ranks = [0, 4, 9, 19]
    percent = [100 * x for x in (identity.mAP, *identity.cmc[ranks])]
    yield _near("mAP, R1, R5, R10, R20 of mpanet", percent, v[f"{way}_mpanet_eval"], 1e-10)
    unit = rank_metrics(_cosine(*features), *ids, protocol="regdb", cmc_by="identity")
    percent = [100 * x for x in (*unit.cmc[ranks], unit.mAP, unit.mINP)]
    yield _near("R1, R5, R10, R20, mAP, mINP of mcja", percent, v[f"{way}_mcja_eval"], 1e-10)


_LLCM = {  # direction -> (side, sampled by trial) of queries and gallery
    "i2v": (("t", None), ("v", "gal_vis")),
    "v2i": (("v", None), ("t", "gal_nir")),
    "v2i_released": (("t", "gal_nir"), ("v", None)),
}


def _llcm(way: str, golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("eval/eval_llcm")
    means, curves = [], []
    for trial in range(10):
        sides = [
            [v[f"{side}_{part}"][slice(None) if drawn is None else v[drawn][trial]]
             for part in ("feat", "ids", "cams")]
            for side, drawn in _LLCM[way]
        ]  # fmt: skip
        (q, q_ids, q_cams), (g, g_ids, g_cams) = sides
        found = rank_metrics(_squared(q, g), q_ids, g_ids, q_cams, g_cams, protocol="llcm")
        means.append([found.mAP, found.mINP])
        curves.append(found.cmc)
    yield _near("mAP and mINP of ten trials", means, v[f"{way}_mAP_mINP"])
    yield _near("CMC of ten trials", curves, v[f"{way}_cmc20"], _SINGLE)


def _mcja(name: str, golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    """Gallery images of the query's own place are left out, whatever their identity."""
    v = golden.case("mcja/sampler_metrics", name)
    labels = [v[key] for key in ("q_ids", "g_ids", "q_cams", "g_cams")]
    found = rank_metrics(v["dist"], *labels, camera_rule="location", max_rank=len(v["cmc"]))
    yield _near("CMC", found.cmc, v["cmc"])
    yield _near("mAP", found.mAP, v["mAP"])
    yield _near("mINP", found.mINP, v["mINP"])


def _aligngan(name: str, golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.case("aligngan/sampler_evaluation", name)
    distance = _cosine(v["probe"], v["gallery"])
    found = rank_metrics(
        distance, v["probe_ids"], v["gallery_ids"], camera_rule="none", max_rank=len(v["cmc"])
    )
    yield _near("CMC", found.cmc, v["cmc"])
    yield _near("mAP", found.mAP, v["mAP"])
