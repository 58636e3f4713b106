"""What the Triton rooms share: block sizes, feature maps as rows, their statistics, options."""

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


def map_tile(map: Rows) -> dict[str, int]:
    """Tile of the kernels that own a piece of a map."""
    if map.channel == 1:
        columns = block(map.channels, 256)
        return {"BLOCK_S": 2048 // columns, "BLOCK_C": columns}
    return {"BLOCK_S": block(map.positions, 256), "BLOCK_C": 8}


def map_grid(map: Rows, tile: dict[str, int]) -> tuple[int]:
    """One axis: the second and third end at 65535, which a batch may exceed."""
    columns = triton.cdiv(map.channels, tile["BLOCK_C"])
    return (columns * triton.cdiv(map.positions, tile["BLOCK_S"]) * map.batches,)


def pieces(map: Rows, tile: dict[str, int]) -> tuple[int, int]:
    """How many pieces the positions are walked in, and the positions of one.

    One where samples and channels fill the device, otherwise as many as do, of 16 tiles or more.
    """
    programs = map.batches * triton.cdiv(map.channels, tile["BLOCK_C"])
    shortest = 16 * tile["BLOCK_S"]
    wanted = min(triton.cdiv(PROGRAMS, max(programs, 1)), triton.cdiv(map.positions, shortest))
    each = triton.cdiv(triton.cdiv(map.positions, wanted), tile["BLOCK_S"]) * tile["BLOCK_S"]
    return triton.cdiv(map.positions, each), each


PROGRAMS = 512  # enough for the 132 processors of an H200


@triton.jit
def _statistics_kernel(
    x_ptr, mean_ptr, spread_ptr,
    channels, positions, stride_b, stride_c, stride_s, batches, each, count,
    eps: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean and variance, or 1 / sqrt(variance + eps), over a piece of the positions.

    A program owns BLOCK_C channels of a sample and one of `count` pieces of `each` positions. Sums
    are shifted by its first position and the variance takes a second walk (it hits the cache), so
    that a large mean costs no precision.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    piece = tl.program_id(0) % count
    b = (tl.program_id(0) // count // blocks).to(tl.int64)
    c = tl.program_id(0) // count % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    start = piece * each
    stop = tl.minimum(start + each, positions)
    base = x_ptr + b * stride_b + c.to(tl.int64) * stride_c
    shift = tl.load(base + start.to(tl.int64) * stride_s, mask=c < channels, other=0.0).to(ACC)
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=ACC)
    for first in range(start, stop, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        inside = (s[:, None] < stop) & (c[None, :] < channels)
        x = tl.load(base[None, :] + s[:, None].to(tl.int64) * stride_s, mask=inside, other=0.0)
        total += tl.where(inside, x.to(ACC) - shift[None, :], 0.0)
    rest = tl.sum(total, axis=0) / (stop - start)
    mean = shift + rest
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=ACC)
    for first in range(start, stop, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        inside = (s[:, None] < stop) & (c[None, :] < channels)
        x = tl.load(base[None, :] + s[:, None].to(tl.int64) * stride_s, mask=inside, other=0.0)
        d = tl.where(inside, x.to(ACC) - mean[None, :], 0.0)
        total += d * d
    spread = tl.sum(total, axis=0) / (stop - start)
    if eps is not None:
        spread = 1.0 / tl.sqrt(spread + eps)
    out = (piece * batches + b) * channels + c
    kind = mean_ptr.dtype.element_ty
    tl.store(mean_ptr + out, shift.to(kind) + rest.to(kind), mask=c < channels)
    tl.store(spread_ptr + out, spread, mask=c < channels)


@triton.jit
def _combine_statistics_kernel(
    means_ptr, variances_ptr, mean_ptr, spread_ptr,
    items, positions, each, count,
    eps: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean and variance of all positions from those of the pieces; one item is a channel."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    shift = tl.load(means_ptr + i, mask=i < items, other=0.0)
    total = tl.zeros([BLOCK], dtype=ACC)
    for k in range(1, count):
        size = tl.minimum(each, positions - k * each)
        mean = tl.load(means_ptr + k * items + i, mask=i < items, other=0.0)
        total += size * (mean - shift).to(ACC)
    mean = shift + (total / positions).to(shift.dtype)
    total = tl.zeros([BLOCK], dtype=ACC)
    for k in range(0, count):
        size = tl.minimum(each, positions - k * each)
        d = (tl.load(means_ptr + k * items + i, mask=i < items, other=0.0) - mean).to(ACC)
        total += size * (tl.load(variances_ptr + k * items + i, mask=i < items, other=0.0) + d * d)
    spread = total / positions
    if eps is not None:
        spread = 1.0 / tl.sqrt(spread + eps)
    tl.store(mean_ptr + i, mean, mask=i < items)
    tl.store(spread_ptr + i, spread, mask=i < items)


def statistics(
    map: Rows, eps: float | None = None, kind: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """[B, C] each: mean over positions, and biased variance or, with `eps`, 1 / deviation.

    The mean has dtype `kind`, by default that of the accumulators: float64 keeps what is left of a
    large one.
    """
    tile, shape = reduction_tile(map), (map.batches, map.channels)
    acc = accumulator_kind(map.tensor.dtype)
    spread = map.tensor.new_empty(shape, dtype=accumulator(map.tensor.dtype))
    mean = torch.empty_like(spread, dtype=kind)
    if map.batches == 0:
        return mean, spread
    count, each = pieces(map, tile)
    first = (mean, spread)
    if count > 1:
        first = (mean.new_empty(count, *shape), spread.new_empty(count, *shape))
    grid = (count * triton.cdiv(map.channels, tile["BLOCK_C"]) * map.batches,)
    _statistics_kernel[grid](
        map.tensor, *first, *map[2:], map.batches, each, count,
        eps=eps if count == 1 else None, **tile, ACC=acc, **OPTIONS,
    )  # fmt: skip
    if count > 1:
        _combine_statistics_kernel[(triton.cdiv(mean.numel(), 256),)](
            *first, mean, spread, mean.numel(), map.positions, each, count,
            eps=eps, BLOCK=256, ACC=acc, **OPTIONS,
        )  # fmt: skip
    return mean, spread
