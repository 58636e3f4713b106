"""Pooling of feature maps: generalised mean. Pattern maps are in `pattern_pool`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import (
    OPTIONS,
    accumulator,
    accumulator_kind,
    map_like,
    reduction_tile,
    rows,
)
from fastreid_vi.kernels.map_separation import map_separation_loss, map_separation_loss_backward
from fastreid_vi.kernels.pattern_pool import pattern_pool, pattern_pool_backward

__all__ = [
    "gem_pool",
    "gem_pool_backward",
    "map_separation_loss",
    "map_separation_loss_backward",
    "pattern_pool",
    "pattern_pool_backward",
]


@triton.jit
def _power(x, p: tl.constexpr, KIND: tl.constexpr):
    """x^p. The exponents in use (KIND 0, 1, 2, 3) need no logarithm and hold for negative x."""
    if KIND == 0:
        return x * 0 + 1
    elif KIND == 1:
        return x
    elif KIND == 2:
        return x * x
    elif KIND == 3:
        return x * x * x
    else:
        positive = tl.exp2(p * tl.log2(tl.where(x > 0, x, 1.0)))
        at_zero: tl.constexpr = 0.0 if p > 0 else float("inf")
        return tl.where(x > 0, positive, tl.where(x == 0, at_zero, float("nan")))


@triton.jit
def _gem_pool_forward_kernel(
    x_ptr, pooled_ptr, moment_ptr,
    channels, positions, stride_b, stride_c, stride_s,
    p: tl.constexpr, eps: tl.constexpr,  # a float argument would arrive as float32
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """moment = mean over positions of x^p + eps, pooled = moment^(1/p).

    One program owns one sample and BLOCK_C channels and walks over the positions.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    base = x_ptr + b * stride_b + c[None, :].to(tl.int64) * stride_c
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=ACC)
    for first in range(0, positions, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        inside = (s[:, None] < positions) & (c[None, :] < channels)
        x = tl.load(base + s[:, None].to(tl.int64) * stride_s, mask=inside, other=1.0).to(ACC)
        total += tl.where(inside, _power(x, p, KIND), 0.0)
    moment = tl.sum(total, axis=0) / positions + eps
    # One root per channel: float64 costs nothing here, a fast float32 logarithm accuracy.
    wide = moment.to(tl.float64)
    pooled = tl.where(wide > 0, tl.exp2(tl.log2(tl.where(wide > 0, wide, 1.0)) / p), float("nan"))
    pooled = tl.where(wide == 0, 0.0, pooled)
    out = b * channels + c
    tl.store(moment_ptr + out, moment, mask=c < channels)
    tl.store(pooled_ptr + out, pooled.to(ACC).to(pooled_ptr.dtype.element_ty), mask=c < channels)


@triton.jit
def _gem_pool_backward_kernel(
    grad_ptr, x_ptr, moment_ptr, dx_ptr,
    channels, positions, stride_b, stride_c, stride_s, out_b, out_c, out_s,
    p: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """dx = grad moment^(1/p - 1) / S x^(p-1); programs as in the forward pass, KIND of p - 1."""
    blocks = tl.cdiv(channels, BLOCK_C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    per_channel = b * channels + c
    grad = tl.load(grad_ptr + per_channel, mask=c < channels, other=0.0).to(ACC)
    wide = tl.load(moment_ptr + per_channel, mask=c < channels, other=1.0).to(tl.float64)
    exponent: tl.constexpr = 1.0 / p - 1.0
    at_zero: tl.constexpr = float("inf") if exponent < 0 else (1.0 if exponent == 0 else 0.0)
    slope = tl.exp2(exponent * tl.log2(tl.where(wide > 0, wide, 1.0)))
    slope = tl.where(wide > 0, slope, tl.where(wide == 0, at_zero, float("nan")))
    scale = (grad * slope.to(ACC) / positions)[None, :]
    source = x_ptr + b * stride_b + c[None, :].to(tl.int64) * stride_c
    target = dx_ptr + b * out_b + c[None, :].to(tl.int64) * out_c
    for first in range(0, positions, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        inside = (s[:, None] < positions) & (c[None, :] < channels)
        row = s[:, None].to(tl.int64)
        x = tl.load(source + row * stride_s, mask=inside, other=1.0).to(ACC)
        dx = scale * _power(x, p - 1.0, KIND)
        tl.store(target + row * out_s, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _kind(p: float) -> int:
    return int(p) if p in (0.0, 1.0, 2.0, 3.0) else -1


def gem_pool(features: Tensor, p: float, eps: float) -> tuple[Tensor, Tensor]:
    """Pooled features [B, C] and the moment [B, C] that the gradient needs."""
    map = rows(features)
    pooled = features.new_empty(features.shape[:2])
    moment = features.new_empty(features.shape[:2], dtype=accumulator(features.dtype))
    if map.batches:
        tile = reduction_tile(map)
        grid = (triton.cdiv(map.channels, tile["BLOCK_C"]) * map.batches,)
        _gem_pool_forward_kernel[grid](
            map.tensor, pooled, moment, *map[2:], p, eps,
            **tile, ACC=accumulator_kind(features.dtype), KIND=_kind(p), **OPTIONS,
        )  # fmt: skip
    return pooled, moment


def gem_pool_backward(grad: Tensor, features: Tensor, moment: Tensor, p: float) -> Tensor:
    """Gradient map, in the memory format of `features`."""
    map, dx = rows(features), map_like(features)
    if map.batches:
        tile, out = reduction_tile(map), rows(dx)
        grid = (triton.cdiv(map.channels, tile["BLOCK_C"]) * map.batches,)
        _gem_pool_backward_kernel[grid](
            grad, map.tensor, moment, dx, *map[2:], out.batch, out.channel, out.position, p,
            **tile, ACC=accumulator_kind(features.dtype), KIND=_kind(p - 1.0), **OPTIONS,
        )  # fmt: skip
    return dx
