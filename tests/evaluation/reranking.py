"""The golden re-ranking cases by name, as calls of the public functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastreid_vi.evaluation import k_reciprocal_rerank, multi_spectral_rerank
from tests.conftest import golden

MCJA = ("regdb_i2v", "regdb_v2i", "single", "sysu_a", "sysu_b", "sysu_k2is1", "v2i_eval")
EDGES = (
    "few_queries_masked",
    "k2_one_full",
    "lam0_full",
    "lam1_full",
    "noexpand_full",
    "k1_larger_than_set",
)


class Case(NamedTuple):
    """What to call, and what came out of it."""

    queries: list[Any]
    galleries: list[Any]
    options: dict[str, Any]
    exact: Any  # the procedure in float64
    released: Any  # by the released code, float16 inside
    vectors: dict[str, Any]  # everything in the file
    prefix: str = ""  # of the steps' names
    spectral: bool = False

    def rerank(self, **more: Any) -> Any:
        if self.spectral:
            return multi_spectral_rerank(self.queries, self.galleries, **self.options, **more)
        return k_reciprocal_rerank(self.queries[0], self.galleries[0], **self.options, **more)


def options(k1: Any, k2: Any, weight: Any, masked: Any, expand: Any) -> dict[str, Any]:
    return {
        "k1": int(k1),
        "k2": int(k2),
        "weight": float(weight),
        "neighbors": "queries" if masked else "all",
        "expand": bool(expand),
    }


def _single(name: str, variant: str) -> Case:
    d = golden(f"eval/{name}")
    masked = variant == "mpanet_masked"
    if name == "rerank_unit_norm":
        side, parameters = d["g_feat"][0], (20, 6, 0.3)
    else:
        side, parameters = d["g_feat"], (d["k1"], d["k2"], d["lam"])
    chosen = options(*parameters, masked, True)
    return Case([d["q_feat"]], [side], chosen, d[f"{variant}_f64"], d[variant], d, f"{variant}_")


def _edge(variant: str) -> Case:
    d = golden("eval/rerank_edges")
    assert d[f"{variant}_official_same"]
    chosen = options(*d[f"{variant}_params"])
    return Case([d["q_feat"]], [d["g_feat"]], chosen, None, d[variant], d)


def _spectral(name: str) -> Case:
    d = golden(f"eval/{name}")
    direction = str(d["mode"])
    chosen = {**options(d["k1"], d["k2"], d["lam"], d["mask"], False), "direction": direction}
    return Case(
        [*d["q_feat"]], [*d["g_feat"]], chosen, d["final_f64"], d["final"], d, spectral=True
    )


def _spectral_unit() -> Case:
    d = golden("eval/rerank_unit_norm")
    chosen = {**options(40, 20, 0.3, True, False), "direction": "i2v"}
    released = d["mser_i2v_masked_k40_k20"]
    return Case([d["q_feat"]], [*d["g_feat"]], chosen, d["mser_f64"], released, d, spectral=True)


def _mcja(name: str) -> Case:
    d = {key[len(name) + 2 :]: value for key, value in golden("mcja/mser").items()
         if key.startswith(f"{name}__")}  # fmt: skip
    k1, k2, masked, mode, sets = d["params"].tolist()
    chosen = {**options(k1, k2, d["lambda"], masked, False), "direction": ("i2v", "v2i")[mode]}
    sides = [[d[f"{s}{n}"] for n in range(sets) if f"{s}{n}" in d] for s in "qg"]
    return Case(*sides, chosen, d["dist_f64"], d["dist"], d, spectral=True)


CASES = {
    **{
        f"{name}/{variant}": (_single, (name, variant))
        for name in ("rerank_single", "rerank_single_k10", "rerank_unit_norm")
        for variant in ("mpanet_masked", "mpanet_full")
    },
    **{f"edges/{variant}": (_edge, (variant,)) for variant in EDGES},
    **{
        name: (_spectral, (name,)) for name in ("mser_i2v_masked", "mser_i2v_full", "mser_v2i_full")
    },
    "mser_unit_norm": (_spectral_unit, ()),
    **{f"mcja/{name}": (_mcja, (name,)) for name in MCJA},
}


def case(name: str) -> Case:
    make, arguments = CASES[name]
    found: Case = make(*arguments)  # type: ignore[operator]
    return found


def float_sets(found: Case) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The sets of features that take part."""
    i2v = found.options.get("direction", "i2v") == "i2v"
    queries = found.queries[:1] if i2v else found.queries
    galleries = found.galleries if i2v else found.galleries[:1]
    return (
        [np.ascontiguousarray(part, np.float32) for part in queries],
        [np.ascontiguousarray(part, np.float32) for part in galleries],
    )


def stacked(found: Case) -> tuple[np.ndarray, int]:
    """All items in their order, and how many of them are queries."""
    queries, galleries = float_sets(found)
    return np.concatenate([*queries, *galleries]), sum(map(len, queries))
