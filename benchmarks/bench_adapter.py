"""MCJA's modality distribution adapter against its published module, tidy eager and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_pool import feature_map
from benchmarks.conftest import DEVICE, MODES, Workload, peers
from fastreid_vi import ops

f = torch.nn.functional


def _gated(x: Tensor, context: Tensor, ca_w: Tensor, *norms: Tensor) -> Tensor:
    """context [B, C, M]: the gate, the batch norm of the gated map, the sum."""
    ca_bn_w, ca_bn_b, norm_w, norm_b = norms
    z = f.conv1d(context, ca_w, groups=x.shape[1])
    gate = torch.sigmoid(f.batch_norm(z, None, None, ca_bn_w, ca_bn_b, training=True))
    return f.batch_norm(x * gate[..., None], None, None, norm_w, norm_b, training=True) + x


def eager(x: Tensor, sc_w: Tensor, sc_b: Tensor, ca_w: Tensor, *norms: Tensor) -> Tensor:
    """The published sequence: a broadcast product that expands x M times."""
    mask = f.softmax(f.conv2d(x, sc_w, sc_b).flatten(2), dim=2)  # [B, M, S]
    context = torch.matmul(x.flatten(2).unsqueeze(1), mask.unsqueeze(3)).squeeze(3)
    return _gated(x, context.transpose(1, 2), ca_w, *norms)


def tidy(x: Tensor, sc_w: Tensor, sc_b: Tensor, ca_w: Tensor, *norms: Tensor) -> Tensor:
    mask = f.softmax(f.conv2d(x, sc_w, sc_b).flatten(2), dim=2)
    return _gated(x, x.flatten(2) @ mask.transpose(1, 2), ca_w, *norms)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "maps"),
    [("mcja_384x192_stage2", 2), ("mcja_384x192_stage3", 2), ("mcja_384x192_stage3", 12)],
)
@pytest.mark.parametrize(
    "peer", peers("distribution_adapter", "eager", "tidy", "compiled", "compiled_eager")
)
def bench_distribution_adapter(run: Any, peer: str, shape: str, maps: int, mode: str) -> None:
    x = feature_map(shape)
    channels = x.shape[1]
    generator = torch.Generator().manual_seed(1)
    shapes = [(maps, channels, 1, 1), (maps,), (channels, 1, maps), *[(channels,)] * 4]
    scales = [channels**-0.5, 0.1, maps**-0.5, 1.0, 1.0, 1.0, 1.0]
    weights = [
        (torch.randn(s, generator=generator) * k).to(DEVICE).requires_grad_()
        for s, k in zip(shapes, scales, strict=True)
    ]
    others = {"eager": eager, "tidy": tidy}
    if peer == "compiled_eager":  # the published sequence through torch.compile
        torch._dynamo.reset()
        others[peer] = torch.compile(eager)
    # The gradient of sc_bias is exactly zero; published code has rounding noise there.
    weights[1] = weights[1].detach()
    work = Workload(
        "distribution_adapter", ops.distribution_adapter, others, (x, *weights), 1e-3,
        8 * x.numel(), 20 * x.numel(),
    )  # fmt: skip
    run(work, peer, mode, f"{shape}_m{maps}")
