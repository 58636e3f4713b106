"""Re-ranked distances against the released codes and their float64 twins, in both rooms."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fastreid_vi.certify.cases import Check, Procedure, Want, compare, exact
from fastreid_vi.certify.vectors import Array, Golden
from fastreid_vi.evaluation import k_reciprocal_rerank, multi_spectral_rerank

_BOUND = 2e-6  # of a float32 implementation
_SINGLES = ("rerank_single", "rerank_single_k10")
_SPECTRAL = ("mser_i2v_masked", "mser_i2v_full", "mser_v2i_full")
_MPANET = ("mpanet_masked", "mpanet_full")


def procedures() -> Iterator[Procedure]:
    """For every file and variant the exact distances, and the bits of the released float16 code."""
    for precision in ("float32", "float16"):
        # Zhong's code is in float32, and has no halves to reproduce.
        variants = (*_MPANET, "zhong") if precision == "float32" else _MPANET
        runs: list[tuple[str, str, Any]] = [
            ("k_reciprocal_rerank", f"{name} {variant}", partial(_single, name, variant, precision))
            for name in _SINGLES
            for variant in variants
        ]
        runs += [
            ("multi_spectral_rerank", name, partial(_spectral, name, precision))
            for name in _SPECTRAL
        ]
        what = "" if precision == "float32" else ", released bits"
        rooms = ("reference", "retrieval") if precision == "float32" else ("reference",)
        for owner, name, run in runs:
            yield Procedure(
                owner=owner,
                name=f"eval/{name}{what}",
                run=run,
                dtypes=("float32",),
                devices=("cpu",),
                rooms=rooms,
            )


def _options(v: dict[str, Array], masked: bool, precision: str) -> dict[str, Any]:
    return {
        "k1": int(v["k1"]),
        "k2": int(v["k2"]),
        "weight": float(v["lam"]),
        "neighbors": "queries" if masked else "all",
        "precision": precision,
    }


def _check(got: Array, precision: str, twin: Array, released: Array) -> Check:
    want = exact(released) if precision == "float16" else Want(twin, _BOUND, _BOUND, 1.0)
    return compare("distances", "forward", got, want, torch.float32)


def _single(
    name: str, variant: str, precision: str, golden: Golden, dtype: torch.dtype, device: str
) -> Iterator[Check]:
    v = golden.load(f"eval/{name}")
    options = _options(v, variant == "mpanet_masked", precision)
    got = k_reciprocal_rerank(v["q_feat"], v["g_feat"], **options)
    yield _check(got, precision, v[f"{variant}_f64"], v[variant])


def _spectral(
    name: str, precision: str, golden: Golden, dtype: torch.dtype, device: str
) -> Iterator[Check]:
    v = golden.load(f"eval/{name}")
    options = {**_options(v, bool(v["mask"]), precision), "direction": str(v["mode"])}
    got = multi_spectral_rerank([*v["q_feat"]], [*v["g_feat"]], **options)
    yield _check(got, precision, v["final_f64"], v["final"])
