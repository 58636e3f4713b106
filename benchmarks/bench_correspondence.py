"""Correspondences against the published formulation and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.conftest import DEVICE, MODES, Workload, peers
from benchmarks.shapes import FEATURE_MAPS
from fastreid_vi import ops


def person_map(shape: str, seed: int = 0, batch: int | None = None) -> Tensor:
    """A channels-last map with training statistics: post-ReLU, some positions stronger."""
    generator = torch.Generator().manual_seed(seed)
    size = list(FEATURE_MAPS[shape])
    size[0] = batch or size[0]
    strength = 0.25 + 2.0 * torch.rand(size[0], 1, *size[2:], generator=generator)
    x = torch.randn(size, generator=generator).relu() * strength
    return x.to(DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()


def product_flops(x: Tensor) -> int:
    """Of all inner products between the positions of two maps like `x`, sample by sample."""
    batch, channels, *size = x.shape
    positions: int = size[0] * size[1]
    return 2 * batch * channels * positions**2


def min_max(values: Tensor) -> Tensor:
    """[B, 1, H, W] stretched to [0, 1] sample by sample."""
    low = values.amin(dim=(2, 3), keepdim=True)
    high = (values - low).amax(dim=(2, 3), keepdim=True)
    return (values - low) / (high + 1e-12)


def mask_eager(x: Tensor) -> Tensor:
    return min_max(x.detach().norm(dim=1, keepdim=True))


def matched(source: Tensor, target: Tensor) -> Tensor:
    """Probabilities [B, S, S] the published way: normalised copies of both maps."""
    q, k = (normalize(x.flatten(2), dim=1) for x in (source, target))
    logits = 50.0 * torch.bmm(q.transpose(1, 2), k)
    return torch.softmax(logits - logits.amax(2, keepdim=True), dim=2)


def warp_eager(source: Tensor, target: Tensor) -> Tensor:
    warped = torch.bmm(matched(source, target), target.flatten(2).transpose(1, 2))
    return warped.transpose(1, 2).reshape(source.shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["lba_alignment_layer4"])
@pytest.mark.parametrize("peer", peers("correspondence_warp", "eager", "compiled"))
def bench_correspondence_warp(run: Any, peer: str, shape: str, mode: str) -> None:
    args = (person_map(shape), person_map(shape, 1))

    def ours(source: Tensor, target: Tensor) -> Tensor:
        return ops.correspondence_warp(source, target).warped

    others = {"eager": warp_eager, "tidy": warp_eager}
    size, flops = args[0].numel(), product_flops(args[0])
    work = Workload(
        "correspondence_warp", ours, others, args, 3e-5, 12 * size, 32 * size,
        (2 * flops, 6 * flops),
    )  # fmt: skip
    run(work, peer, mode, shape)


@pytest.mark.parametrize("shape", ["lba_alignment_layer4"])
@pytest.mark.parametrize("peer", peers("feature_mask", "eager"))
def bench_feature_mask(benchmark: Any, peer: str, shape: str) -> None:
    import fastreid_vi

    x = person_map(shape).detach()
    function = mask_eager if peer == "eager" else ops.feature_mask
    with fastreid_vi.backend("reference" if peer == "eager" else peer):
        torch.testing.assert_close(function(x), mask_eager(x.double()).float())
        benchmark.group = f"feature_mask forward {shape}"
        benchmark.pedantic(function, (x,), rounds=7, warmup_rounds=2)
    benchmark.extra_info.update(op="feature_mask", peer=peer, mode="forward", shape=shape)
