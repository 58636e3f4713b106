"""Pooling: GeM, pattern pooling, the separation of its maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastreid_vi import ops
from fastreid_vi.certify.cases import OpCase, forward, gradient
from fastreid_vi.certify.vectors import Golden


def cases(golden: Golden) -> Iterator[OpCase]:
    """Every golden case of the family."""
    yield from _gem(golden)
    yield from _patterns(golden)


def _gem(golden: Golden) -> Iterator[OpCase]:
    v = golden.load("lba/gem")
    p, eps = float(v["p"]), float(v["eps"])
    yield OpCase(
        op="gem_pool",
        name="lba/gem",
        leaves={"x": v["x"]},
        call=lambda x: {"y": ops.gem_pool(x, p, eps)},
        results={"y": forward(v["y"])},
        cotangents={"y": v["cot"]},
        gradients={"x": gradient(v["grad_x"])},
    )
    yield OpCase(
        op="gem_pool",
        name="lba/gem signed",
        leaves={"x": v["x_signed"]},
        call=lambda x: {"y": ops.gem_pool(x, p, eps)},
        results={"y": forward(v["y_signed"])},
    )
    w = golden.case("mcja/head", "gem")
    yield OpCase(
        op="gem_pool",
        name="mcja/head gem",
        leaves={"x": w["x"]},
        call=lambda x: {"y": ops.gem_pool(x)},
        results={"y": forward(w["y64"])},
        cotangents={"y": w["gout"]},
        gradients={"x": gradient(w["gx64"])},
    )


def _patterns(golden: Golden) -> Iterator[OpCase]:
    v = golden.load("mpanet/pattern_attention")
    leaves = {name: v[name] for name in "xwb"}

    def pool(x: Tensor, w: Tensor, b: Tensor) -> Mapping[str, Tensor]:
        pooled, maps = ops.pattern_pool(x, w, b)
        return {"maps": maps, "features": torch.cat([pooled.flatten(1), x.mean((2, 3))], 1)}

    def separation(x: Tensor, w: Tensor, b: Tensor) -> Mapping[str, Tensor]:
        return {"loss": ops.map_separation_loss(ops.pattern_pool(x, w, b).maps)}

    yield OpCase(
        op="pattern_pool",
        name="mpanet/pattern_attention",
        leaves=leaves,
        call=pool,
        results={"maps": forward(v["masks"]), "features": forward(v["feats"])},
        cotangents={"features": v["cot"]},
        gradients={name: gradient(v[f"feats_grad_{name}"]) for name in "xwb"},
    )
    yield OpCase(
        op="map_separation_loss",
        name="mpanet/pattern_attention",
        leaves=leaves,
        call=separation,
        results={"loss": forward(v["sep"])},
        cotangents={"loss": 1.0},
        gradients={name: gradient(v[f"sep_grad_{name}"]) for name in "xwb"},
    )
