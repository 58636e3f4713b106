"""Normalisation of feature maps against the published modules, tidy eager and compiled PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_pool import feature_map
from benchmarks.conftest import DEVICE, MODES, Workload, peers
from fastreid_vi import ops


def alleviation_eager(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The published formulation: pooling, two convolutions, instance norm, two products, a sum."""
    conv2d = torch.nn.functional.conv2d
    mean = torch.nn.functional.adaptive_avg_pool2d(x, 1)
    mask = torch.sigmoid(conv2d(torch.relu(conv2d(mean, w1)), w2))
    return x * mask + torch.nn.functional.instance_norm(x) * (1 - mask)


def alleviation_tidy(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=0)
    hidden = torch.relu(mean.flatten(1) @ w1.flatten(1).t())
    gate = torch.sigmoid(hidden @ w2.flatten(1).t())[..., None, None]
    return gate * x + (1 - gate) * (variance + 1e-5).rsqrt() * (x - mean)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["mpanet_384x128_layer3", "mpanet_384x128_layer4"])
@pytest.mark.parametrize("peer", peers("modality_alleviation", "eager", "tidy", "compiled"))
def bench_modality_alleviation(run: Any, peer: str, shape: str, mode: str) -> None:
    x = feature_map(shape)
    channels = x.shape[1]
    generator = torch.Generator().manual_seed(1)
    hidden = channels // 16
    w1 = torch.randn(hidden, channels, 1, 1, generator=generator) * (2 / hidden) ** 0.5
    w2 = torch.randn(channels, hidden, 1, 1, generator=generator) * (2 / channels) ** 0.5
    args = (x, w1.to(DEVICE).requires_grad_(), w2.to(DEVICE).requires_grad_())
    others = {"eager": alleviation_eager, "tidy": alleviation_tidy}
    work = Workload(
        "modality_alleviation",
        ops.modality_alleviation,
        others,
        args,
        3e-5,
        8 * x.numel(),
        20 * x.numel(),
    )
    run(work, peer, mode, shape)
