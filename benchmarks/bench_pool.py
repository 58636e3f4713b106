"""Pooling of feature maps against the published loops, tidy eager PyTorch and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import DEVICE, MODES, Workload, peers
from benchmarks.shapes import FEATURE_MAPS
from fastreid_vi import ops


def feature_map(shape: str, *, positive: bool = True) -> Tensor:
    """A channels-last map with training statistics: post-ReLU, about half zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(FEATURE_MAPS[shape], generator=generator)
    x = x.relu() if positive else x
    return x.to(DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()


def gem_eager(x: Tensor) -> Tensor:
    """The published sequence, on the flattened map."""
    rows = x.view(len(x), x.shape[1], -1) if x.is_contiguous() else x.flatten(2)
    return (torch.mean(rows**3.0, dim=-1) + 1e-12) ** (1 / 3.0)


def gem_tidy(x: Tensor) -> Tensor:
    return (x.pow(3.0).mean(dim=(2, 3)) + 1e-12).pow(1.0 / 3.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["lba_288x144_layer4", "mcja_384x192_stage4"])
@pytest.mark.parametrize("peer", peers("gem_pool", "eager", "tidy", "compiled"))
def bench_gem_pool(run: Any, peer: str, shape: str, mode: str) -> None:
    x = feature_map(shape)
    others = {"eager": gem_eager, "tidy": gem_tidy}
    work = Workload("gem_pool", ops.gem_pool, others, (x,), 1e-5, 4 * x.numel(), 12 * x.numel())
    run(work, peer, mode, shape)


def pattern_eager(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The published loop over maps: one masked copy of the feature map for each."""
    maps = torch.sigmoid(torch.nn.functional.conv2d(x, weight, bias))
    pooled = [(x * maps[:, i : i + 1]).mean(dim=(2, 3)) for i in range(weight.shape[0])]
    return torch.stack(pooled, dim=1), maps


def pattern_tidy(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    maps = torch.sigmoid(torch.nn.functional.conv2d(x, weight, bias))
    pooled = torch.einsum("bphw,bchw->bpc", maps, x) / (x.shape[2] * x.shape[3])
    return pooled, maps


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["mpanet_384x128_layer4"])
@pytest.mark.parametrize("peer", peers("pattern_pool", "eager", "tidy", "compiled"))
def bench_pattern_pool(run: Any, peer: str, shape: str, mode: str) -> None:
    x = feature_map(shape)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, x.shape[1], 1, 1, generator=generator) / x.shape[1] ** 0.5
    weight, bias = (
        weight.to(DEVICE).requires_grad_(),
        torch.zeros(6, device=DEVICE).requires_grad_(),
    )
    others = {"eager": pattern_eager, "tidy": pattern_tidy}
    args = (x, weight, bias)
    one = 2 * len(weight) * x.numel()  # scores, and pooling; the gradient takes each twice
    work = Workload(
        "pattern_pool", ops.pattern_pool, others, args, 3e-5, 4 * x.numel(), 12 * x.numel(),
        (2 * one, 6 * one),
    )  # fmt: skip
    run(work, peer, mode, shape)


def separation_eager(maps: Tensor) -> Tensor:
    """A loop over pairs of maps."""
    count = maps.shape[1]
    total = maps.new_zeros(())
    for i in range(count):
        for j in range(i + 1, count):
            total = total + (maps[:, i] * maps[:, j]).sum(dim=(1, 2)).mean()
    return 2.0 * total / (count * (count - 1))


def separation_tidy(maps: Tensor) -> Tensor:
    batch, count = maps.shape[:2]
    both = (maps.sum(1).square() - maps.square().sum(1)).sum()
    return both / (batch * count * (count - 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("peer", peers("map_separation_loss", "eager", "tidy", "compiled"))
def bench_map_separation_loss(run: Any, peer: str, mode: str) -> None:
    generator = torch.Generator().manual_seed(2)
    batch, _, height, width = FEATURE_MAPS["mpanet_384x128_layer4"]
    maps = torch.rand(batch, 6, height, width, generator=generator).to(DEVICE).requires_grad_()
    others = {"eager": separation_eager, "tidy": separation_tidy}
    work = Workload(
        "map_separation_loss",
        ops.map_separation_loss,
        others,
        (maps,),
        3e-5,
        4 * maps.numel(),
        12 * maps.numel(),
    )
    run(work, peer, mode, "mpanet_384x128_maps")
