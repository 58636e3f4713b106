"""Instance norm and what follows it against PyTorch's, in both memory formats, and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_pool import feature_map
from benchmarks.conftest import DEVICE, MODES, Workload, peers
from fastreid_vi import ops


def relu_eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The published sequence: the norm, then ReLU in place."""
    return torch.relu_(torch.nn.functional.instance_norm(x, weight=weight, bias=bias))


def relu_tidy(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=0)
    scale = weight[:, None, None] * (variance + 1e-5).rsqrt()
    return torch.relu(scale * (x - mean) + bias[:, None, None])


def residual_ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return ops.instance_norm_act(x, weight, bias, residual=residual, activation="none")


def residual_eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return residual + torch.nn.functional.instance_norm(x, weight=weight, bias=bias)


def residual_tidy(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=0)
    scale = weight[:, None, None] * (variance + 1e-5).rsqrt()
    return scale * (x - mean) + bias[:, None, None] + residual


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("shape", ["aligngan_128_first", "aligngan_128_residual"])
@pytest.mark.parametrize("follows", ["relu", "residual"])
@pytest.mark.parametrize("peer", peers("instance_norm_act", "eager", "tidy", "compiled"))
def bench_instance_norm_act(
    run: Any, peer: str, follows: str, shape: str, layout: str, mode: str
) -> None:
    x = feature_map(shape, positive=False).detach()
    x = x.contiguous(memory_format=getattr(torch, layout)).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    vectors = (torch.rand(x.shape[1], generator=generator) + 0.5 for _ in range(2))
    weight, bias = (v.to(DEVICE).requires_grad_() for v in vectors)
    if follows == "relu":
        others = {"eager": relu_eager, "tidy": relu_tidy}
        # A unit whose input rounds to the other side of zero changes the gradient by one entry.
        work = Workload(
            "instance_norm_act", ops.instance_norm_act, others, (x, weight, bias), 2e-3,
            8 * x.numel(), 20 * x.numel(),
        )  # fmt: skip
    else:
        others = {"eager": residual_eager, "tidy": residual_tidy}
        residual = x.detach().flip(0).contiguous(memory_format=getattr(torch, layout))
        args = (x, weight, bias, residual.requires_grad_())
        work = Workload(
            "instance_norm_act", residual_ours, others, args, 3e-5, 12 * x.numel(), 24 * x.numel()
        )
    run(work, peer, mode, f"{shape}_{follows}_{layout.removesuffix('_format')}")
