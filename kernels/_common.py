"""What the Triton rooms share: block sizes, feature maps as strided rows, launch options."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton 3.10 turns fused multiply-add off by default; results must not depend on the version.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


class Rows(NamedTuple):
    """A map [B, C, H, W] whose positions collapse to S = H W, with its strides in elements."""

    tensor: Tensor
    batches: int
    channels: int
    positions: int
    batch: int
    channel: int
    position: int


def rows(features: Tensor) -> Rows:
    """View a feature map as rows; copies only where H and W do not collapse or no axis is dense."""
    batches, channels, height, width = features.shape
    collapses = width == 1 or height == 1 or features.stride(2) == width * features.stride(3)
    position = features.stride(2) if width == 1 else features.stride(3)
    dense = position == 1 or features.stride(1) == 1 or channels == 1 or height * width == 1
    if not (collapses and dense):
        features, position = features.contiguous(), 1
    return Rows(
        features,
        batches,
        channels,
        height * width,
        features.stride(0),
        features.stride(1),
        position,
    )


def map_like(features: Tensor) -> Tensor:
    """Empty map in the memory format of `features`: channels_last stays channels_last."""
    last = (
        features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous()
    )
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(features, memory_format=layout)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block(size: int, largest: int, smallest: int = 16) -> int:
    """The block-size rule: the power of two that covers `size`, within [smallest, largest]."""
    return max(smallest, min(largest, triton.next_power_of_2(max(size, 1))))


def reduction_tile(map: Rows) -> dict[str, int]:
    """Tile of a kernel that walks over all positions of a few channels.

    16-byte loads along the dense axis, whole rows of positions where that is H W.
    """
    if map.channel == 1:
        return {"BLOCK_S": 16, "BLOCK_C": block(map.channels, 128)}
    return {"BLOCK_S": block(map.positions, 256), "BLOCK_C": 8}


def accumulator_kind(dtype: torch.dtype) -> tl.dtype:
    """`accumulator` as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32
