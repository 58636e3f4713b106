"""Distances and the losses that mine: batch-hard and weighted triplets, centre clusters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fastreid_vi import ops
from fastreid_vi.certify.cases import OpCase, Want, exact, forward, gradient, narrow
from fastreid_vi.certify.vectors import Golden

_CLUSTERS = ("k8", "k10", "k4", "k4_shuffled")
_ALIGNGAN = ("cross", "same", "p18k4", "no_positive", "no_negative")


def cases(golden: Golden) -> Iterator[OpCase]:
    """Every golden case of the family."""
    for name in ("a", "b"):
        yield _batch_hard(golden, name)
        yield _distances(golden, name)
        for kind in ("wrt", "wrt_norm"):
            yield _weighted(golden, name, kind)
    for name in _CLUSTERS:
        yield _batch_hard_of_clusters(golden, name)
        yield _cluster(golden, name)
    yield _duplicate(golden)
    for name in _ALIGNGAN:
        yield _cosine_triplet(golden, name)
        yield _cosines(golden, name)


def _batch_hard(golden: Golden, name: str) -> OpCase:
    v = golden.load("lba/triplet")
    margin = float(v["margin"])

    def call(x: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        found = ops.batch_hard_triplet_loss(x, labels, margin=margin)
        return {"loss": found.loss, "correct": found.correct}

    return OpCase(
        op="batch_hard_triplet_loss",
        name=f"lba/triplet {name}",
        leaves={"x": v[f"{name}/x"]},
        given={"labels": v["labels"]},
        call=call,
        results={
            "loss": forward(v[f"{name}/hard_loss"]),
            "correct": exact(v[f"{name}/hard_correct"]),
        },
        cotangents={"loss": 1.0},
        gradients={"x": gradient(v[f"{name}/hard_grad"])},
    )


def _distances(golden: Golden, name: str) -> OpCase:
    """Hardest distances of each row, out of the matrix."""
    v = golden.load("lba/triplet")
    same = v["labels"][:, None] == v["labels"]

    def call(x: Tensor, same: Tensor) -> Mapping[str, Tensor]:
        d = ops.pairwise_distance(x)
        return {
            "hardest positive": d.masked_fill(~same, -np.inf).amax(1),
            "hardest negative": d.masked_fill(same, np.inf).amin(1),
        }

    return OpCase(
        op="pairwise_distance",
        name=f"lba/triplet {name}",
        leaves={"x": v[f"{name}/x"]},
        given={"same": same},
        call=call,
        results={
            "hardest positive": forward(v[f"{name}/dist_ap"]),
            "hardest negative": forward(v[f"{name}/dist_an"]),
        },
    )


def _weighted(golden: Golden, name: str, kind: str) -> OpCase:
    v = golden.load("lba/triplet")
    unit = kind == "wrt_norm"

    def call(x: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        rows = x / (x.norm(dim=1, keepdim=True) + 1e-12) if unit else x
        found = ops.weighted_triplet_loss(rows, labels)
        return {"loss": found.loss, "correct": found.correct}

    return OpCase(
        op="weighted_triplet_loss",
        name=f"lba/triplet {name} {kind}",
        leaves={"x": v[f"{name}/x"]},
        given={"labels": v["labels"]},
        call=call,
        results={
            "loss": forward(v[f"{name}/{kind}_loss"]),
            "correct": exact(v[f"{name}/{kind}_correct"]),
        },
        cotangents={"loss": 1.0},
        gradients={"x": gradient(v[f"{name}/{kind}_grad"])},
    )


def _batch_hard_of_clusters(golden: Golden, name: str) -> OpCase:
    v, margin = golden.case("mpanet/center_cluster", name, "/"), _margin(golden)
    return OpCase(
        op="batch_hard_triplet_loss",
        name=f"mpanet/center_cluster {name}",
        leaves={"x": v["x"]},
        given={"labels": v["labels"]},
        call=lambda x, labels: {"loss": ops.batch_hard_triplet_loss(x, labels, margin=margin).loss},
        results={"loss": forward(v["triplet_loss"])},
    )


def _margin(golden: Golden) -> float:
    return float(golden.load("mpanet/center_cluster")["margin"])


def _cluster(golden: Golden, name: str) -> OpCase:
    v, margin = golden.case("mpanet/center_cluster", name, "/"), _margin(golden)

    def call(x: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        found = ops.center_cluster_loss(x, labels, margin=margin)
        return {"loss": found.loss, "pull": found.pull, "push": found.push}

    return OpCase(
        op="center_cluster_loss",
        name=f"mpanet/center_cluster {name}",
        leaves={"x": v["x"]},
        given={"labels": v["labels"]},
        call=call,
        results={
            "loss": forward(v["pair_loss"]),
            "pull": forward(v["dist_pc"]),
            "push": forward(v["pair_dist_an"]),
        },
        cotangents={"loss": 1.0},
        gradients={"x": gradient(v["pair_grad"])},
    )


def _duplicate(golden: Golden) -> OpCase:
    """Two equal rows of one identity; the released gradient is NaN there, ours is not."""
    v, margin = golden.case("mpanet/center_cluster", "duplicate", "/"), _margin(golden)
    return OpCase(
        op="center_cluster_loss",
        name="mpanet/center_cluster duplicate",
        leaves={"x": v["x"]},
        given={"labels": v["labels"]},
        call=lambda x, labels: {"loss": ops.center_cluster_loss(x, labels, margin=margin).loss},
        results={"loss": forward(v["loss"])},
        cotangents={"loss": 1.0},
        gradients={"NaN": exact(np.zeros(v["x"].shape))},
        parts={"NaN": ("x", lambda g: g.isnan().double())},
    )


def _cosine_triplet(golden: Golden, name: str) -> OpCase:
    v = golden.case("aligngan/triplet", name)
    margin, same = float(v["margin"]), bool(v["same_tensor"])

    def call(labels: Tensor, others: Tensor, **leaves: Tensor) -> Mapping[str, Tensor]:
        options: dict[str, Any] = (
            {} if same else {"references": leaves["emb2"], "reference_labels": others}
        )
        found = ops.batch_hard_triplet_loss(
            leaves["emb1"], labels, margin=margin, metric="cosine", **options
        )
        return {"loss": found.loss}

    used = ("emb1",) if same else ("emb1", "emb2")
    return OpCase(
        op="batch_hard_triplet_loss",
        name=f"aligngan/triplet {name}",
        leaves={key: v[key] for key in used},
        given={"labels": v["l1"], "others": v["l2"]},
        call=call,
        results={"loss": Want(v["loss"], 1e-5, 1e-5, 1.0)},
        cotangents={"loss": 1.0},
        gradients={
            key: Want(
                v[f"g{key[-1]}"], 1e-5, 1e-5, max(float(np.abs(v[f"g{key[-1]}"]).max()), 1e-2)
            )
            for key in used
        },
    )


def _cosines(golden: Golden, name: str) -> OpCase:
    v = golden.case("aligngan/triplet", name)
    return OpCase(
        op="pairwise_distance",
        name=f"aligngan/triplet {name}",
        leaves={"x": v["emb1"]},
        given={"y": v["emb2"]},
        call=lambda x, y: {"cosine": 1 - ops.pairwise_distance(x, y, metric="cosine")},
        results={"cosine": narrow(v["cosine12"], 1e-5)},
    )
