"""Bilinear resize and normalisation. Coordinates are exact fractions of int32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import OPTIONS, accumulator_kind

GROUP = 4  # channels of one program: coordinates are worked out once for all of them
BLOCK = 512  # pixels of one program


@triton.jit
def _source(i, length, source, ACC: tl.constexpr):
    """Neighbours of result i of `length` among `source` pixels, and the weight of the upper one."""
    numerator = tl.maximum((2 * i + 1) * source - length, 0)
    low = numerator // (2 * length)
    fraction = (numerator - low * 2 * length).to(ACC) / (2 * length)
    return low, tl.minimum(low + 1, source - 1), fraction


@triton.jit
def _resize_kernel(
    x_ptr, out_ptr,
    channels, first, height, width, source_height, source_width,
    stride_b, stride_c, stride_h, stride_w, out_b, out_c, out_s,
    MEAN: tl.constexpr, SCALE: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK pixels of COUNT channels, from channel `first` + its group on."""
    blocks = tl.cdiv(height * width, BLOCK)
    groups = tl.cdiv(channels, COUNT)
    b = (tl.program_id(0) // (blocks * groups)).to(tl.int64)
    group = tl.program_id(0) // blocks % groups * COUNT
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    top, bottom, down = _source(pixel // width, height, source_height, ACC)
    left, right, across = _source(pixel % width, width, source_width, ACC)
    top, bottom = top.to(tl.int64) * stride_h, bottom.to(tl.int64) * stride_h
    left, right = left.to(tl.int64) * stride_w, right.to(tl.int64) * stride_w
    for k in tl.static_range(COUNT):
        inside = pixel < tl.where(group + k < channels, height * width, 0)
        c = (first + group + k).to(tl.int64)
        x = x_ptr + b * stride_b + c * stride_c
        upper = (1.0 - across) * tl.load(x + top + left, mask=inside, other=0.0).to(ACC)
        upper += across * tl.load(x + top + right, mask=inside, other=0.0).to(ACC)
        lower = (1.0 - across) * tl.load(x + bottom + left, mask=inside, other=0.0).to(ACC)
        lower += across * tl.load(x + bottom + right, mask=inside, other=0.0).to(ACC)
        y = ((1.0 - down) * upper + down * lower - MEAN[k]) * SCALE[k]
        out = out_ptr + b * out_b + c * out_c + pixel.to(tl.int64) * out_s
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _first_result(s, length, source):
    """No result before this one looks at source pixel s."""
    return tl.maximum((2 * s - 1) * length - source, 0) // (2 * source)


@triton.jit
def _weight(i, s, length, source, ACC: tl.constexpr):
    """Weight of source pixel s in result i, 0 beyond the last one."""
    low, high, fraction = _source(i, length, source, ACC)
    weight = tl.where(low == s, 1.0 - fraction, 0.0) + tl.where(high == s, fraction, 0.0)
    return tl.where(i < length, weight, 0.0)


@triton.jit
def _resize_gradient_kernel(
    g_ptr, dx_ptr,
    channels, first, height, width, source_height, source_width, taps_h, taps_w,
    stride_b, stride_c, stride_h, stride_w, out_b, out_c, out_s,
    SCALE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx gathers the results that a pixel went into, in order; programs own pixels of dx."""
    blocks = tl.cdiv(source_height * source_width, BLOCK)
    groups = tl.cdiv(channels, COUNT)
    b = (tl.program_id(0) // (blocks * groups)).to(tl.int64)
    group = tl.program_id(0) // blocks % groups
    c = group * COUNT + tl.arange(0, COUNT)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    y, x = pixel // source_width, pixel % source_width
    first_y = _first_result(y, height, source_height)
    first_x = _first_result(x, width, source_width)
    channel = (first + c)[:, None].to(tl.int64)
    known = (pixel < source_height * source_width)[None, :] & (c < channels)[:, None]
    g_ptr += b * stride_b + channel * stride_c
    total = tl.zeros([COUNT, BLOCK], dtype=ACC)
    for tap_y in range(0, taps_h):
        i = first_y + tap_y
        down = _weight(i, y, height, source_height, ACC)
        for tap_x in range(0, taps_w):
            j = first_x + tap_x
            weight = down * _weight(j, x, width, source_width, ACC)
            at = i.to(tl.int64) * stride_h + j.to(tl.int64) * stride_w
            inside = known & (weight != 0.0)[None, :]
            g = tl.load(g_ptr + at[None, :], mask=inside, other=0.0)
            total += weight[None, :] * g.to(ACC)
    scale = tl.zeros([COUNT], dtype=ACC)
    for k in tl.static_range(COUNT):
        scale = tl.where(tl.arange(0, COUNT) == k, SCALE[k], scale)
    out = dx_ptr + b * out_b + channel * out_c + pixel[None, :].to(tl.int64) * out_s
    tl.store(out, (total * scale[:, None]).to(dx_ptr.dtype.element_ty), mask=known)


def _empty(like: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    shape = (*like.shape[:2], height, width)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _pixel_strides(out: Tensor, channels_last: bool) -> tuple[int, int, int]:
    """Strides of sample, channel and pixel."""
    _, channels, height, width = out.shape
    inner = (1, channels) if channels_last else (height * width, 1)
    return (channels * height * width, *inner)


def _launches(
    *constants: Sequence[float],
) -> Iterator[tuple[int, int, tuple[tuple[float, ...], ...]]]:
    """(first channel, channels, constants of GROUP channels) of each launch.

    One where all channels share their constants, or are few; otherwise one per GROUP.
    """
    channels = len(constants[0])
    if all(len(set(values)) == 1 for values in constants):
        yield 0, channels, tuple((values[0],) * GROUP for values in constants)
        return
    for first in range(0, channels, GROUP):
        part = (tuple(values[first : first + GROUP]) for values in constants)
        padded = tuple(values + values[-1:] * (GROUP - len(values)) for values in part)
        yield first, min(GROUP, channels - first), padded


def resize_normalize(
    images: Tensor, height: int, width: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """[B, C, height, width] in the memory format of `images`."""
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    out = _empty(images, height, width, last)
    if images.shape[0] == 0:
        return out
    for first, channels, (means, scales) in _launches(mean, [1 / s for s in std]):
        groups = triton.cdiv(channels, GROUP) * triton.cdiv(height * width, BLOCK)
        _resize_kernel[(images.shape[0] * groups,)](
            images, out, channels, first, height, width, *images.shape[2:], *images.stride(),
            *_pixel_strides(out, last), MEAN=means, SCALE=scales, COUNT=GROUP, BLOCK=BLOCK,
            ACC=accumulator_kind(images.dtype), **OPTIONS,
        )  # fmt: skip
    return out


def resize_normalize_backward(
    grad: Tensor, height: int, width: int, std: Sequence[float], channels_last: bool
) -> Tensor:
    """Gradient [B, C, height, width] of the images."""
    dx = _empty(grad, height, width, channels_last)
    if grad.shape[0] == 0:
        return dx
    # A pixel is seen from less than one pixel away on both sides.
    taps = [
        triton.cdiv(2 * length, source) + 1
        for length, source in zip(grad.shape[2:], (height, width), strict=True)
    ]
    for first, channels, (scales,) in _launches([1 / s for s in std]):
        groups = triton.cdiv(channels, GROUP) * triton.cdiv(height * width, BLOCK // GROUP)
        _resize_gradient_kernel[(grad.shape[0] * groups,)](
            grad, dx, channels, first, *grad.shape[2:], height, width, *taps, *grad.stride(),
            *_pixel_strides(dx, channels_last), SCALE=scales, COUNT=GROUP, BLOCK=BLOCK // GROUP,
            ACC=accumulator_kind(grad.dtype), **OPTIONS,
        )  # fmt: skip
    return dx
