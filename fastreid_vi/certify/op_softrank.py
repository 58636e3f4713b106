"""Soft ranks and MCJA's retrieval loss."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastreid_vi import ops
from fastreid_vi.certify.cases import OpCase, Want
from fastreid_vi.certify.vectors import Golden

_RETRIEVAL = (
    "p4k4", "p8k16", "p8k16rand", "removed", "onedir", "tiny_gallery", "strength008",
    "strength005", "strength002", "novalid",
)  # fmt: skip


def cases(golden: Golden) -> Iterator[OpCase]:
    """Every golden case of the family."""
    v = golden.load("mcja/soft_rank")
    for size in v["sizes"].tolist():
        for k in range(len(v["strengths"])):
            yield _soft_rank(golden, size, k)
    for name in _RETRIEVAL:
        yield _retrieval(golden, name)


def _soft_rank(golden: Golden, size: int, k: int) -> OpCase:
    file = golden.load("mcja/soft_rank")
    v, strength = golden.case("mcja/soft_rank", f"n{size}"), float(file["strengths"][k])
    want = v[f"s{k}__gx64"]
    return OpCase(
        op="soft_rank",
        name=f"mcja/soft_rank n {size}, strength {strength:g}",
        leaves={"x": v["x"]},
        call=lambda x: {"ranks": ops.soft_rank(x, strength=strength)},
        results={"ranks": Want(v[f"s{k}__y64"], 2e-6 * size, 1e-9, 1.0)},
        cotangents={"ranks": v["gout"]},
        gradients={"x": Want(want, 1e-4, 1e-9, float(np.abs(want).max()) or 1.0)},
    )


def _retrieval(golden: Golden, name: str) -> OpCase:
    v = golden.case("mcja/cmr", name)
    strength = float(v["strength"])
    largest = max(float(np.abs(v["gemb64"]).max()), 1e-6)
    return OpCase(
        op="cross_modality_retrieval_loss",
        name=f"mcja/cmr {name}",
        leaves={"x": v["emb"]},
        given={"ids": v["ids"], "mods": v["mods"]},
        call=lambda x, ids, mods: {
            "loss": ops.cross_modality_retrieval_loss(x, ids, mods, strength=strength)
        },
        results={"loss": Want(v["loss64"], 1e-5, 1e-10)},
        cotangents={"loss": 1.7},
        gradients={"x": Want(v["gemb64"], 1e-4, 1e-9, largest)},
    )
