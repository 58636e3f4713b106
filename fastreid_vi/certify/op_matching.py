"""Correspondences and alignment: masks, probabilities, warps, LbA's dense triplet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastreid_vi import ops
from fastreid_vi.certify.cases import OpCase, Want, forward, gradient
from fastreid_vi.certify.vectors import Array, Golden

Weighting = Literal["sample", "batch"]
_WEIGHTINGS: tuple[tuple[Weighting, str], ...] = (("sample", "paper"), ("batch", "official"))
_MAPS = 2e-5  # float32 bound of maps
_ZERO = 1e-12  # scale of what must vanish


def cases(golden: Golden) -> Iterator[OpCase]:
    """Every golden case of the family."""
    yield from _masks(golden)
    yield from _pairs(golden)
    for name, v in _aligned(golden):
        yield _align(name, v)
        for weighting, stored in _WEIGHTINGS:
            yield _dense_alignment(name, v, weighting, stored)
            yield _dense_triplet(name, v, weighting, stored)
    yield _blend(golden)
    for weighting, stored in _WEIGHTINGS:
        yield _edge(golden, weighting, stored)
        yield _stored_triplet(golden, weighting, stored)


def _aligned(golden: Golden) -> Iterator[tuple[str, dict[str, Array]]]:
    """The cases with gradients: ReLU-ed, K = 4, signed."""
    first = [golden.load(f"lba/cmalign_loss_a_{part}") for part in ("fwd", "grad")]
    yield "lba/cmalign_loss_a", {**first[0], **first[1]}
    for name in ("lba/cmalign_loss_b", "lba/cmalign_loss_c_signed"):
        yield name, golden.load(name)


def _live(name: str, features: Array, want: Want) -> dict[str, Any]:
    """A gradient where the features have a norm (L11): elsewhere it is not defined."""
    live = np.broadcast_to(np.square(features).sum(1, keepdims=True) > 0, features.shape).copy()
    chosen = torch.from_numpy(live)
    return {
        "gradients": {name: want._replace(value=np.asarray(want.value)[live])},
        "parts": {name: ("x", lambda g: g[chosen.to(g.device)])},
    }


def _masks(golden: Golden) -> Iterator[OpCase]:
    v = golden.load("lba/cmalign_mask_recon")
    found = [("lba/cmalign_mask_recon " + s, v[f"feat_{s}"], v[f"mask_{s}"]) for s in "qk"]
    found += [(name, w["feat"], w["mask"]) for name, w in _aligned(golden)]
    edge = golden.load("lba/cmalign_edge")
    for name, features, mask in [*found, ("lba/cmalign_edge", edge["feat"], edge["mask"])]:
        yield OpCase(
            op="feature_mask",
            name=name,
            leaves={"x": features},
            call=lambda x: {"mask": ops.feature_mask(x)},
            results={"mask": forward(mask, _MAPS)},
        )


def _pairs(golden: Golden) -> Iterator[OpCase]:
    """Probability and warp; the stored gradients are taken on to the maps in float64."""
    v, masked = golden.load("lba/cmalign_similarity_warp"), golden.load("lba/cmalign_mask_recon")
    leaves = {"q": v["feat_q"], "k": v["feat_k"]}
    temperature = float(v["temperature"])
    dq, dk = _to_maps(v["feat_q"], v["feat_k"], v["prob_grad_sim"])
    yield OpCase(
        op="correspondence_probability",
        name="lba/cmalign_similarity_warp",
        leaves=leaves,
        call=lambda q, k: {"p": ops.correspondence_probability(q, k, temperature=temperature)},
        results={"p": forward(v["prob"], _MAPS)},
        cotangents={"p": v["prob_cot"]},
        gradients={"q": gradient(dq), "k": gradient(dk)},
    )
    dq, dk = _to_maps(v["feat_q"], v["feat_k"], v["warp_grad_prob"], temperature)

    def warp(q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor) -> Mapping[str, Tensor]:
        found = ops.correspondence_warp(
            q, k, source_mask=of_q, target_mask=of_k, temperature=temperature
        )
        assert found.comask is not None  # both masks are given
        return {"warped": found.warped, "comask": found.comask}

    yield OpCase(
        op="correspondence_warp",
        name="lba/cmalign_similarity_warp",
        leaves=leaves,
        given={"of_q": masked["mask_q"], "of_k": masked["mask_k"]},
        call=warp,
        results={
            "warped": forward(v["warp"], _MAPS),
            "comask": forward(masked["comask"], _MAPS),
        },
        cotangents={"warped": v["warp_cot"]},
        gradients={"q": gradient(dq), "k": gradient(dk + v["warp_grad_k"])},
    )


def _to_maps(
    q: Array, k: Array, upstream: Array, temperature: float | None = None
) -> tuple[Array, Array]:
    """A gradient of similarities (or, with a temperature, probabilities) as one of both maps."""
    with torch.enable_grad():
        maps = [torch.from_numpy(np.array(a)).double().requires_grad_() for a in (q, k)]
        u, v = (torch.nn.functional.normalize(x.flatten(2), dim=1) for x in maps)
        found = u.transpose(1, 2) @ v
        if temperature is not None:
            found = torch.softmax(temperature * found, 2)
        grads = torch.autograd.grad(found, maps, torch.from_numpy(np.array(upstream)))
    return grads[0].numpy(), grads[1].numpy()


def _align(name: str, v: Mapping[str, Array]) -> OpCase:
    def call(x: Tensor, index: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        aligned, comask = ops.align_features(x, index, mask=mask)
        return {"aligned": aligned, "comask": comask}

    return OpCase(
        op="align_features",
        name=name,
        leaves={"x": v["feat"]},
        given={"index": v["pos_idx"], "mask": v["mask"]},
        call=call,
        results={
            "aligned": forward(v["recon_pos"], _MAPS),
            "comask": forward(v["comask"], _MAPS),
        },
        cotangents={"aligned": v["recon_cot"]},
        **_live("x", v["feat"], gradient(v["grad_feat_recon_pos"])),
    )


def _blend(golden: Golden) -> OpCase:
    """Queries and keys in one batch, and the keys aligned with themselves."""
    v = golden.load("lba/cmalign_mask_recon")
    rows = len(v["feat_q"])

    def call(x: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        index = torch.arange(rows, 2 * rows, device=x.device).repeat(2)
        aligned, comask = ops.align_features(x, index, mask=mask)
        return {"aligned": aligned[:rows], "comask": comask[:rows]}

    return OpCase(
        op="align_features",
        name="lba/cmalign_mask_recon",
        leaves={"x": np.concatenate([v["feat_q"], v["feat_k"]])},
        given={"mask": np.concatenate([v["mask_q"], v["mask_k"]])},
        call=call,
        results={"aligned": forward(v["recon"], _MAPS), "comask": forward(v["comask"], _MAPS)},
    )


def _indices(v: Mapping[str, Array]) -> dict[str, Array]:
    return {"positive": v["pos_idx"], "negative": v["neg_idx"]}


def _dense_alignment(
    name: str, v: Mapping[str, Array], weighting: Weighting, stored: str
) -> OpCase:
    def call(x: Tensor, positive: Tensor, negative: Tensor) -> Mapping[str, Tensor]:
        found = ops.dense_alignment(x, positive, negative, weighting=weighting)
        return {"aligned": found.aligned, "loss": found.loss, "comask": found.comask}

    return OpCase(
        op="dense_alignment",
        name=f"{name} {stored}",
        leaves={"x": v["feat"]},
        given=_indices(v),
        call=call,
        results={
            "aligned": forward(v["recon_pos"], _MAPS),
            "comask": forward(v["comask"], _MAPS),
            "loss": forward(v[f"loss_{stored}"]),
        },
        cotangents={"aligned": v["recon_cot"], "loss": 1.0},
        **_live(
            "x",
            v["feat"],
            gradient(v[f"grad_feat_loss_{stored}"] + v["grad_feat_recon_pos"]),
        ),
    )


def _edge(golden: Golden, weighting: Weighting, stored: str) -> OpCase:
    """A zero position, a constant map, and a row whose positive partner is its own copy."""
    v = golden.load("lba/cmalign_edge")
    live = _live(
        "x", v["feat"], Want(v[f"grad_feat_without_zero_pixel_{stored}"], 1e-4, 1e-7)
    )  # stored in float32
    b, y, x0 = (int(i) for i in v["zero_pixel"])

    def call(x: Tensor, positive: Tensor, negative: Tensor) -> Mapping[str, Tensor]:
        found = ops.dense_alignment(x, positive, negative, weighting=weighting)
        return {"loss": found.loss, "comask": found.comask}

    return OpCase(
        op="dense_alignment",
        name=f"lba/cmalign_edge {stored}",
        leaves={"x": v["feat"]},
        given=_indices(v),
        call=call,
        results={"loss": forward(v[f"loss_{stored}"]), "comask": forward(v["comask"], _MAPS)},
        cotangents={"loss": 1.0},
        gradients={
            **live["gradients"],
            "zero position": Want(np.zeros(v["feat"].shape[1]), _ZERO, _ZERO, 1.0),
        },
        parts={**live["parts"], "zero position": ("x", lambda g: g[b, :, y, x0])},
    )


def _dense_triplet(name: str, v: Mapping[str, Array], weighting: Weighting, stored: str) -> OpCase:
    """Through both alignments back to the maps."""

    def call(x: Tensor, positive: Tensor, negative: Tensor) -> Mapping[str, Tensor]:
        mask = ops.feature_mask(x)
        near, far = (ops.align_features(x, i, mask=mask) for i in (positive, negative))
        return {
            "loss": ops.dense_triplet_loss(
                x, near.aligned, far.aligned, near.comask, weighting=weighting
            )
        }

    return OpCase(
        op="dense_triplet_loss",
        name=f"{name} {stored}",
        leaves={"x": v["feat"]},
        given=_indices(v),
        call=call,
        results={"loss": forward(v[f"loss_{stored}"])},
        cotangents={"loss": 1.0},
        **_live("x", v["feat"], gradient(v[f"grad_feat_loss_{stored}"])),
    )


def _stored_triplet(golden: Golden, weighting: Weighting, stored: str) -> OpCase:
    """Of reconstructions as they are in the file."""
    v = golden.load("lba/cmalign_loss_a_fwd")

    def call(x: Tensor, near: Tensor, far: Tensor, comask: Tensor) -> Mapping[str, Tensor]:
        return {"loss": ops.dense_triplet_loss(x, near, far, comask, weighting=weighting)}

    return OpCase(
        op="dense_triplet_loss",
        name=f"lba/cmalign_loss_a_fwd {stored}",
        leaves={"x": v["feat"]},
        given={"near": v["recon_pos"], "far": v["recon_neg"], "comask": v["comask"]},
        call=call,
        results={"loss": forward(v[f"loss_{stored}"])},
    )
