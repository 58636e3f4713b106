"""LbA's alignment block against the published formulation: time, memory, error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreid_vi
from benchmarks.bench_correspondence import (
    mask_eager,
    mask_tidy,
    matched,
    matched_tidy,
    min_max,
    person_map,
    product_flops,
    warp_attention,
    warp_eager,
    warp_tidy,
)
from benchmarks.bench_dense_triplet import distance, triplet_eager
from benchmarks.clock import TINY
from benchmarks.conftest import DEVICE, MODES, Workload, peers, relative_error, rooms_of
from benchmarks.memory import extra_memory
from fastreid_vi import ops


def partners(batch: int) -> tuple[Tensor, Tensor]:
    """A bijection, and partners of which several samples may share one."""
    generator = torch.Generator().manual_seed(5)
    positive = torch.randperm(batch, generator=generator)
    return positive.to(DEVICE), torch.randint(batch, (batch,), generator=generator).to(DEVICE)


def align_eager(x: Tensor, index: Tensor) -> Tensor:
    mask = mask_eager(x)
    return mask * warp_eager(x, x[index]) + (1.0 - mask) * x


def align_tidy(x: Tensor, index: Tensor) -> Tensor:
    return torch.lerp(x, warp_tidy(x, x[index]), mask_tidy(x.detach()))


def align_attention(x: Tensor, index: Tensor) -> Tensor:
    return torch.lerp(x, warp_attention(x, x[index]), mask_tidy(x.detach()))


def dense_eager(x: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """The published block: gathered partners, both reconstructions, the loss that broadcasts."""
    mask = mask_eager(x)
    maps = []
    for index in (positive, negative):
        partner = x[index]
        p = matched(x, partner)
        warped = torch.bmm(p, partner.flatten(2).transpose(1, 2))
        maps.append(mask * warped.transpose(1, 2).reshape(x.shape) + (1.0 - mask) * x)
        if index is positive:
            with torch.no_grad():
                seen = torch.bmm(p, mask[index].flatten(2).transpose(1, 2))
                comask = min_max(mask * seen.transpose(1, 2).reshape(mask.shape))
    return maps[0], triplet_eager(x, maps[0], maps[1], comask)


def dense_tidy(x: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Norms scale the products; the loss is the product of two means over the batch."""
    mask = mask_tidy(x.detach())
    maps = []
    for index in (positive, negative):
        partner = x[index]
        p = matched_tidy(x, partner)
        warped = torch.bmm(partner.flatten(2), p.transpose(1, 2)).reshape(x.shape)
        maps.append(torch.lerp(x, warped, mask))
        if index is positive:
            seen = torch.bmm(p.detach(), mask[index].flatten(2).transpose(1, 2))
            comask = min_max(mask * seen.transpose(1, 2).reshape(mask.shape))
    hinge = (0.3 + distance(x, maps[0]) - distance(x, maps[1])).clamp_min(0.0)
    return maps[0], (comask[:, 0].mean(0) * hinge.mean(0)).mean()


def dense(x: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    result = ops.dense_alignment(x, positive, negative, weighting="batch")
    return result.aligned, result.loss


def align(x: Tensor, index: Tensor) -> Tensor:
    return ops.align_features(x, index, mask=ops.feature_mask(x)).aligned


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["lba_alignment_layer3", "lba_alignment_layer4"])
@pytest.mark.parametrize("peer", peers("dense_alignment", "eager", "tidy", "compiled"))
def bench_dense_alignment(run: Any, peer: str, shape: str, mode: str) -> None:
    x = person_map(shape)
    others = {"eager": dense_eager, "tidy": dense_tidy}
    args = (x, *partners(len(x)))
    size, one = x.numel(), product_flops(x)
    flops = 4 * one, 12 * one  # cosines and warp of two pairings; their gradients are twice that
    work = Workload("dense_alignment", dense, others, args, 3e-5, 8 * size, 20 * size, flops)
    run(work, peer, mode, shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["lba_alignment_layer4"])
@pytest.mark.parametrize("peer", peers("align_features", "eager", "tidy", "compiled", "attention"))
def bench_align_features(run: Any, peer: str, shape: str, mode: str) -> None:
    x = person_map(shape)
    others = {"eager": align_eager, "tidy": align_tidy, "attention": align_attention}
    args = (x, partners(len(x))[0])
    size, one = x.numel(), product_flops(x)
    flops = 2 * one, 6 * one
    work = Workload("align_features", align, others, args, 3e-5, 8 * size, 20 * size, flops)
    run(work, peer, mode, shape)


def gradients(
    function: Callable[..., Any], x: Tensor, pairs: tuple[Tensor, Tensor], cotangent: Tensor
) -> Tensor:
    aligned, loss = function(x, *pairs)
    grads = (cotangent, torch.ones_like(loss))
    gradient: Tensor = torch.autograd.grad((aligned, loss), x, grads)[0]
    return gradient


@pytest.mark.parametrize("room", rooms_of("dense_alignment"))
def bench_dense_alignment_memory(benchmark: Any, room: str) -> None:
    """Forward and backward at 64 x 2048 x 18 x 9, beyond the two maps that are the results."""
    shape = "lba_alignment_layer4"
    x = person_map(shape, batch=None if TINY else 64)
    pairs = partners(len(x))
    cotangent = torch.ones_like(x)  # of the aligned map: it exists in either formulation
    results = 2 * x.numel() * x.element_size()  # aligned, and the gradient
    published = extra_memory(lambda: gradients(dense_eager, x, pairs, cotangent)) - results
    with fastreid_vi.backend(room):
        ours = extra_memory(lambda: gradients(dense, x, pairs, cotangent)) - results
        benchmark.group = "dense_alignment memory 64x2048x18x9"
        benchmark.pedantic(gradients, (dense, x, pairs, cotangent), rounds=1)
    benchmark.extra_info.update(
        op="dense_alignment", peer=room, mode="memory", shape="64x2048x18x9",
        extra_memory=ours, extra_memory_published=published, share=ours / published,
    )  # fmt: skip
    if room != "reference" and not TINY:
        assert ours <= 0.1 * published, (ours, published)


@pytest.mark.parametrize("peer", [*rooms_of("dense_alignment"), "eager"])
def bench_dense_alignment_bfloat16(benchmark: Any, peer: str) -> None:
    """Time, and beside it the error of the gradient against float64 on the same rounded input."""
    shape = "lba_alignment_layer4"
    x = person_map(shape).detach().bfloat16().requires_grad_()
    pairs = partners(len(x))
    function, cotangent = dense_eager if peer == "eager" else dense, torch.ones_like(x)
    with fastreid_vi.backend("reference"):
        wide = x.detach().double().requires_grad_()
        exact = gradients(dense, wide, pairs, cotangent.double())
    with fastreid_vi.backend("reference" if peer == "eager" else peer):
        error = relative_error(gradients(function, x, pairs, cotangent), exact)
        benchmark.group = f"dense_alignment bfloat16 training {shape}"
        benchmark.pedantic(gradients, (function, x, pairs, cotangent), rounds=7, warmup_rounds=2)
    benchmark.extra_info.update(
        op="dense_alignment", peer=peer, mode="bfloat16", shape=shape, gradient_error=error
    )
    assert peer == "eager" or error <= 1e-2, error
