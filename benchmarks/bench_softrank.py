"""Soft ranks against torchsort; the retrieval loss against its published form and tidy PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import DEVICE, MODES, Workload, peers
from benchmarks.shapes import RETRIEVAL, SOFT_RANKS
from fastreid_vi import ops

try:
    import torchsort
except ImportError:  # an optional peer
    LIBRARY: tuple[str, ...] = ()
else:
    LIBRARY = ("torchsort",)


def affine(values: Tensor, strength: float = 1.0) -> Tensor:
    """The closed form without a look at whether it holds."""
    centred = (values - values.mean(1, keepdim=True)) / strength
    return centred + (values.shape[1] + 1) / 2


def library(values: Tensor, strength: float = 1.0) -> Tensor:
    ranks: Tensor = torchsort.soft_rank(values, regularization_strength=strength)
    return ranks


def soft_rank_work(values: Tensor, others: dict[str, Any], tolerance: float) -> Workload:
    size = values.numel()  # values in, ranks and blocks out; gradient and blocks in, gradient out
    args = (values.to(DEVICE).requires_grad_(),)
    return Workload("soft_rank", ops.soft_rank, others, args, tolerance, 12 * size, 24 * size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", list(SOFT_RANKS))
@pytest.mark.parametrize("peer", peers("soft_rank", "tidy", "compiled", *LIBRARY))
def bench_soft_rank_closed_form(run: Any, peer: str, shape: str, mode: str) -> None:
    """Values closer together than strength n/2: one block per row."""
    values = torch.rand(SOFT_RANKS[shape], generator=torch.Generator().manual_seed(0))
    work = soft_rank_work(values, {"tidy": affine, "torchsort": library}, 1e-5)
    run(work, peer, mode, f"{shape}_closed_form")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", list(SOFT_RANKS))
@pytest.mark.parametrize("peer", peers("soft_rank", *LIBRARY))
def bench_soft_rank_general_path(run: Any, peer: str, shape: str, mode: str) -> None:
    """Values that spread over several n: hundreds of blocks per row."""
    if peer == "reference" and shape == "2048x2048":
        pytest.skip("four million entries in a loop of Python: seconds per call")
    size = SOFT_RANKS[shape]
    values = size[1] * torch.randn(size, generator=torch.Generator().manual_seed(0))
    # torchsort finds its blocks again from float32 means: gradients of a few rows differ.
    work = soft_rank_work(values, {"torchsort": library}, 1e-2)
    run(work, peer, mode, f"{shape}_general_path")


def retrieval_eager(x: Tensor, labels: Tensor, modalities: Tensor) -> Tensor:
    """The published form: cosines of expanded rows, matches per identity, queries cut out."""
    losses = []
    for modality in (0, 1):
        query, gallery = x[modalities == modality], x[modalities != modality]
        own, other = labels[modalities == modality], labels[modalities != modality]
        n = len(gallery)
        match = torch.zeros(len(query), n, dtype=torch.bool, device=x.device)
        for identity in own.unique():
            match[own == identity] = other == identity
        pairs = (query[:, None].expand(-1, n, -1), gallery[None].expand(len(query), -1, -1))
        distance = (1 - torch.nn.functional.cosine_similarity(*pairs, dim=2)) / 2
        kept = match.any(1) & ~match.all(1)
        distance, match = distance[kept], match[kept]
        ranks = library(distance, 0.5) if LIBRARY else affine(distance, 0.5)
        losses.append((ranks - torch.where(match, 1.0, float(n))).abs().mean())
    return torch.stack(losses).mean()


def retrieval_tidy(x: Tensor, labels: Tensor, modalities: Tensor) -> Tensor:
    """One product of unit rows, centred; modalities alternate, so slices instead of a search."""
    unit = torch.nn.functional.normalize(x, eps=1e-8)
    distance = (1 - unit[0::2] @ unit[1::2].t()) / 2
    match = labels[0::2][:, None] == labels[1::2][None, :]
    losses = []
    for d, same in ((distance, match), (distance.t(), match.t())):
        kept = same.any(1) & ~same.all(1)
        error = (affine(d, 0.5) - torch.where(same, 1.0, float(d.shape[1]))).abs()
        losses.append((error.mean(1) * kept).sum() / kept.sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", list(RETRIEVAL))
@pytest.mark.parametrize(
    "peer", peers("cross_modality_retrieval_loss", "eager", "tidy", "compiled")
)
def bench_cross_modality_retrieval_loss(run: Any, peer: str, shape: str, mode: str) -> None:
    identities, images, size = RETRIEVAL[shape]
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(identities, 1, size, generator=generator)
    x = (centres + torch.randn(identities, images, size, generator=generator)).flatten(0, 1)
    labels = torch.arange(identities, device=DEVICE).repeat_interleave(images)
    modalities = torch.arange(len(x), device=DEVICE) % 2
    work = Workload(
        "cross_modality_retrieval_loss",
        ops.cross_modality_retrieval_loss,
        {"eager": retrieval_eager, "tidy": retrieval_tidy},
        (x.to(DEVICE).requires_grad_(), labels, modalities),
        1e-5,
        4 * x.numel(),
        12 * x.numel(),
        (x.numel() * len(x), 3 * x.numel() * len(x)),  # half of the pairs are cross-modal
    )
    run(work, peer, mode, shape)
