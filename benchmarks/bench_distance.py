"""Pairwise distances against torch.cdist and the expanded square, published and tidy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import DEVICE, MODES, Workload, peers
from benchmarks.shapes import EMBEDDINGS
from fastreid_vi import ops


def embeddings(shape: str) -> tuple[Tensor, Tensor]:
    """Rows scattered around one centre per identity, and their labels."""
    identities, images, size = EMBEDDINGS[shape]
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(identities, 1, size, generator=generator)
    rows = centres + torch.randn(identities, images, size, generator=generator)
    labels = torch.arange(identities).repeat_interleave(images)
    return rows.flatten(0, 1).to(DEVICE).requires_grad_(), labels.to(DEVICE)


def gram_flops(x: Tensor) -> tuple[int, int]:
    """Of the product of all rows with each other, and of the one that the gradient needs."""
    one = 2 * len(x) * x.numel()
    return one, 2 * one


def distance_eager(x: Tensor) -> Tensor:
    """The sequence that published losses share: expanded squares, an in-place product."""
    square = x.pow(2).sum(dim=1, keepdim=True).expand(len(x), len(x))
    return (square + square.t()).addmm(x, x.t(), beta=1, alpha=-2).clamp(min=1e-12).sqrt()


def distance_library(x: Tensor) -> Tensor:
    """PyTorch's own function, by differences."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def distance_tidy(x: Tensor) -> Tensor:
    square = x.square().sum(1)
    return (square[:, None] + square[None, :] - 2 * x @ x.t()).clamp_min(1e-12).sqrt()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", list(EMBEDDINGS))
@pytest.mark.parametrize("peer", peers("pairwise_distance", "eager", "tidy", "compiled", "cdist"))
def bench_pairwise_distance(run: Any, peer: str, shape: str, mode: str) -> None:
    x, _ = embeddings(shape)
    # The expanded square leaves noise on the diagonal, where a gradient must vanish: a loose gate.
    work = Workload(
        "pairwise_distance",
        ops.pairwise_distance,
        {"eager": distance_eager, "tidy": distance_tidy, "cdist": distance_library},
        (x,),
        5e-2,
        4 * x.numel(),
        12 * x.numel(),
        gram_flops(x),
    )
    run(work, peer, mode, shape)
