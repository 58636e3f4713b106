"""Correspondences against the published formulation and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

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


def matched_tidy(source: Tensor, target: Tensor) -> Tensor:
    """The same without copies of the maps: norms scale the products."""
    q, k = source.flatten(2), target.flatten(2)
    scale = 50.0 / (q.norm(dim=1)[:, :, None] * k.norm(dim=1)[:, None, :]).clamp_min(1e-24)
    return torch.softmax(scale * torch.bmm(q.transpose(1, 2), k), dim=2)


def warp_tidy(source: Tensor, target: Tensor) -> Tensor:
    rows = torch.bmm(target.flatten(2), matched_tidy(source, target).transpose(1, 2))
    return rows.reshape(source.shape)


def warp_attention(source: Tensor, target: Tensor) -> Tensor:
    """PyTorch's fused attention, on normalised copies of both maps."""
    rows = target.flatten(2).transpose(1, 2)[:, None]  # [B, 1, S, C]
    q, k = (normalize(x.flatten(2), dim=1).transpose(1, 2)[:, None] for x in (source, target))
    warped = scaled_dot_product_attention(q, k, rows, scale=50.0)
    return warped[:, 0].transpose(1, 2).reshape(source.shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["lba_alignment_layer4"])
@pytest.mark.parametrize("peer", peers("correspondence_probability", "eager", "tidy", "compiled"))
def bench_correspondence_probability(run: Any, peer: str, shape: str, mode: str) -> None:
    args = (person_map(shape), person_map(shape, 1))
    others = {"eager": matched, "tidy": matched_tidy}
    size, flops = args[0].numel(), product_flops(args[0])
    work = Workload(
        "correspondence_probability", ops.correspondence_probability, others, args, 3e-5,
        8 * size, 24 * size, (flops, 3 * flops),
    )  # fmt: skip
    run(work, peer, mode, shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["lba_alignment_layer4"])
@pytest.mark.parametrize(
    "peer", peers("correspondence_warp", "eager", "tidy", "compiled", "attention")
)
def bench_correspondence_warp(run: Any, peer: str, shape: str, mode: str) -> None:
    args = (person_map(shape), person_map(shape, 1))

    def ours(source: Tensor, target: Tensor) -> Tensor:
        return ops.correspondence_warp(source, target).warped

    others = {"eager": warp_eager, "tidy": warp_tidy, "attention": warp_attention}
    size, flops = args[0].numel(), product_flops(args[0])
    work = Workload(
        "correspondence_warp", ours, others, args, 3e-5, 12 * size, 32 * size,
        (2 * flops, 6 * flops),
    )  # fmt: skip
    run(work, peer, mode, shape)


def mask_tidy(x: Tensor) -> Tensor:
    norms = x.square().sum(1, keepdim=True).sqrt()
    low, high = torch.aminmax(norms.flatten(1), dim=1)
    low, high = low[:, None, None, None], high[:, None, None, None]
    return (norms - low) / (high - low + 1e-12)


@pytest.mark.parametrize("mode", ["forward"])  # the mask has no gradient
@pytest.mark.parametrize("shape", ["lba_alignment_layer4"])
@pytest.mark.parametrize("peer", peers("feature_mask", "eager", "tidy", "compiled"))
def bench_feature_mask(run: Any, peer: str, shape: str, mode: str) -> None:
    x = person_map(shape).detach()
    others = {"eager": mask_eager, "tidy": mask_tidy}
    work = Workload("feature_mask", ops.feature_mask, others, (x,), 3e-5, 4 * x.numel())
    run(work, peer, mode, shape)
