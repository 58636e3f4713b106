"""AlignGAN's encoder input against the published sequence, tidy eager and compiled PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import DEVICE, MODES, Workload, peers
from benchmarks.shapes import ENCODER_INPUTS
from fastreid_vi import ops

INPUT = ENCODER_INPUTS["aligngan_encoder_input"]
SIZE = (INPUT.out_height, INPUT.out_width)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(images: Tensor) -> Tensor:
    """From [-1, 1]: the step to [0, 1] sits in mean and std."""
    mean, std = [2 * m - 1 for m in MEAN], [2 * s for s in STD]
    return ops.resize_normalize(images, SIZE, mean=mean, std=std)


def eager(images: Tensor) -> Tensor:
    """The published sequence, which builds its constants at full size on the host in each call."""
    resized = torch.nn.functional.interpolate(images, SIZE, mode="bilinear", align_corners=False)
    mean, std = (
        torch.tensor(v, dtype=images.dtype).view(1, 3, 1, 1).repeat(len(images), 1, *SIZE)
        for v in (MEAN, STD)
    )
    return ((resized + 1.0) / 2.0 - mean.to(images.device)) / std.to(images.device)


def tidy(images: Tensor) -> Tensor:
    resized = torch.nn.functional.interpolate(images, SIZE, mode="bilinear", align_corners=False)
    scale = torch.tensor([0.5 / s for s in STD], dtype=images.dtype, device=images.device)
    shift = torch.tensor(
        [(0.5 - m) / s for m, s in zip(MEAN, STD, strict=True)],
        dtype=images.dtype, device=images.device,
    )  # fmt: skip
    return torch.addcmul(shift[:, None, None], resized, scale[:, None, None])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("peer", peers("resize_normalize", "eager", "tidy", "compiled"))
def bench_resize_normalize(run: Any, peer: str, layout: str, mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(INPUT.batch, 3, INPUT.height, INPUT.width, generator=generator) * 2 - 1
    images = images.to(DEVICE).contiguous(memory_format=getattr(torch, layout)).requires_grad_()
    out = images.shape[0] * 3 * SIZE[0] * SIZE[1]
    # PyTorch's coordinates are float32.
    work = Workload(
        "resize_normalize", ours, {"eager": eager, "tidy": tidy}, (images,), 1e-4,
        4 * (images.numel() + out), 8 * (images.numel() + out),
    )  # fmt: skip
    run(work, peer, mode, f"aligngan_encoder_input_{layout.removesuffix('_format')}")
