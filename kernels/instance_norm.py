"""Instance norm, activation and residual sum; backward recomputes the activation's slope from x."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import (
    OPTIONS,
    accumulator,
    accumulator_kind,
    map_grid,
    map_like,
    map_tile,
    pieces,
    reduction_tile,
    rows,
    statistics,
)


@triton.jit
def _affine(
    mean_ptr, variance_ptr, weight_ptr, bias_ptr, b, c, channels, eps: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """mean, 1 / deviation, weight and bias of channels c of sample b, each [1, BLOCK_C]."""
    there = c < channels
    at = b * channels + c
    mean = tl.load(mean_ptr + at, mask=there, other=0.0)
    variance = tl.load(variance_ptr + at, mask=there, other=0.0)
    rstd = 1.0 / tl.sqrt(variance + eps)
    weight = tl.full(rstd.shape, 1.0, dtype=ACC)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=there, other=0.0).to(ACC)
    bias = tl.zeros(rstd.shape, dtype=ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=there, other=0.0).to(ACC)
    return mean[None, :], rstd[None, :], weight[None, :], bias[None, :]


@triton.jit
def _through_activation(g, z, slope: tl.constexpr):
    """Gradient of z; slope 1 for no activation."""
    if slope == 1.0:
        return g
    if slope == 0.0:
        return tl.where(z > 0.0, g, 0.0)
    return tl.where(z > 0.0, g, g * slope)


@triton.jit
def _norm_act_kernel(
    x_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    channels, positions, stride_b, stride_c, stride_s, add_b, add_c, add_s, out_b, out_c, out_s,
    eps: tl.constexpr, slope: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = act(weight (x - mean) rstd + bias) + residual; one program owns a tile of a sample."""
    blocks_c, blocks_s = tl.cdiv(channels, BLOCK_C), tl.cdiv(positions, BLOCK_S)
    b = (tl.program_id(0) // (blocks_c * blocks_s)).to(tl.int64)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.program_id(0) // blocks_c % blocks_s * BLOCK_S + tl.arange(0, BLOCK_S)
    mean, rstd, weight, bias = _affine(
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, b, c, channels, eps, ACC
    )
    inside = (s[:, None] < positions) & (c[None, :] < channels)
    column, row = c[None, :].to(tl.int64), s[:, None].to(tl.int64)
    source = x_ptr + b * stride_b + column * stride_c + row * stride_s
    x = tl.load(source, mask=inside, other=0.0).to(ACC)
    z = weight * rstd * (x - mean) + bias
    if slope == 0.0:
        z = tl.where(z < 0.0, 0.0, z)  # NaN passes
    elif slope != 1.0:
        z = tl.where(z < 0.0, z * slope, z)
    if residual_ptr is not None:
        added = residual_ptr + b * add_b + column * add_c + row * add_s
        z += tl.load(added, mask=inside, other=0.0).to(ACC)
    target = out_ptr + b * out_b + column * out_c + row * out_s
    tl.store(target, z.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_act_sums_kernel(
    g_ptr, x_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, sum_g_ptr, sum_gh_ptr,
    channels, positions, g_b, g_c, g_s, stride_b, stride_c, stride_s, batches, each, count,
    eps: tl.constexpr, slope: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over a piece of the positions of dz and of dz (x - mean) rstd.

    A program owns BLOCK_C channels of a sample and one of `count` pieces of `each` positions.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    piece = tl.program_id(0) % count
    b = (tl.program_id(0) // count // blocks).to(tl.int64)
    c = tl.program_id(0) // count % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    stop = tl.minimum((piece + 1) * each, positions)
    mean, rstd, weight, bias = _affine(
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, b, c, channels, eps, ACC
    )
    scale, column = weight * rstd, c[None, :].to(tl.int64)
    total_g = tl.zeros([BLOCK_S, BLOCK_C], dtype=ACC)
    total_gh = tl.zeros([BLOCK_S, BLOCK_C], dtype=ACC)
    for first in range(piece * each, stop, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        row = s[:, None].to(tl.int64)
        inside = (s[:, None] < stop) & (c[None, :] < channels)
        source = x_ptr + b * stride_b + column * stride_c + row * stride_s
        x = tl.load(source, mask=inside, other=0.0).to(ACC)
        upstream = g_ptr + b * g_b + column * g_c + row * g_s
        g = tl.load(upstream, mask=inside, other=0.0).to(ACC)
        dz = _through_activation(g, scale * (x - mean) + bias, slope)
        total_g += dz
        total_gh += dz * (x - mean)  # g is 0 outside
    out = (piece * batches + b) * channels + c
    tl.store(sum_g_ptr + out, tl.sum(total_g, axis=0), mask=c < channels)
    sum_gh = tl.sum(total_gh, axis=0)[None, :] * rstd
    tl.store(sum_gh_ptr + out[None, :], sum_gh, mask=c[None, :] < channels)


@triton.jit
def _norm_act_gradient_kernel(
    g_ptr, x_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, sum_g_ptr, sum_gh_ptr, dx_ptr,
    channels, positions, g_b, g_c, g_s, stride_b, stride_c, stride_s, out_b, out_c, out_s,
    eps: tl.constexpr, slope: tl.constexpr, FIXED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = weight rstd (dz - mean of dz - h mean of dz h); one program owns a tile of a sample."""
    blocks_c, blocks_s = tl.cdiv(channels, BLOCK_C), tl.cdiv(positions, BLOCK_S)
    b = (tl.program_id(0) // (blocks_c * blocks_s)).to(tl.int64)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.program_id(0) // blocks_c % blocks_s * BLOCK_S + tl.arange(0, BLOCK_S)
    mean, rstd, weight, bias = _affine(
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, b, c, channels, eps, ACC
    )
    inside = (s[:, None] < positions) & (c[None, :] < channels)
    column, row = c[None, :].to(tl.int64), s[:, None].to(tl.int64)
    source = x_ptr + b * stride_b + column * stride_c + row * stride_s
    x = tl.load(source, mask=inside, other=0.0).to(ACC)
    g = tl.load(g_ptr + b * g_b + column * g_c + row * g_s, mask=inside, other=0.0).to(ACC)
    h = rstd * (x - mean)
    dx = _through_activation(g, weight * h + bias, slope)
    if not FIXED:  # the statistics move with x
        at = b * channels + c
        sum_g = tl.load(sum_g_ptr + at, mask=c < channels, other=0.0)[None, :]
        sum_gh = tl.load(sum_gh_ptr + at, mask=c < channels, other=0.0)[None, :]
        dx -= (sum_g + h * sum_gh) / positions
    target = dx_ptr + b * out_b + column * out_c + row * out_s
    tl.store(target, (weight * rstd * dx).to(dx_ptr.dtype.element_ty), mask=inside)


def _constants(activation: str, negative_slope: float, eps: float) -> dict[str, float]:
    slopes = {"relu": 0.0, "leaky_relu": negative_slope, "none": 1.0}
    return {"eps": eps, "slope": slopes[activation]}


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    activation: str,
    negative_slope: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output map, and the mean and variance of each sample and channel."""
    map, out, kind = rows(x), map_like(x), accumulator(x.dtype)
    if running_mean is not None and running_var is not None:
        mean, variance = (r.to(kind).repeat(map.batches, 1) for r in (running_mean, running_var))
    else:
        mean, variance = statistics(map)
    if map.batches:
        tile, to, added = map_tile(map), rows(out), rows(x if residual is None else residual)
        _norm_act_kernel[map_grid(map, tile)](
            map.tensor, mean, variance, _dense(weight), _dense(bias),
            None if residual is None else added.tensor, out,
            *map[2:], *added[4:], *to[4:], **_constants(activation, negative_slope, eps),
            **tile, ACC=accumulator_kind(x.dtype), **OPTIONS,
        )  # fmt: skip
    return out, mean, variance


def instance_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    activation: str,
    negative_slope: float,
    eps: float,
    fixed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the map, in its memory format, of weight and of bias; empty without these."""
    map, given, dx = rows(x), rows(grad), map_like(x)
    options: dict[str, Any] = {
        **_constants(activation, negative_slope, eps),
        "ACC": accumulator_kind(x.dtype),
        **OPTIONS,
    }
    affine = (mean, variance, _dense(weight), _dense(bias))
    tile = reduction_tile(map)
    count, each = pieces(map, tile)
    sum_g, sum_gh = (mean.new_zeros(count, *mean.shape) for _ in range(2))
    if map.batches:
        grid = (count * triton.cdiv(map.channels, tile["BLOCK_C"]) * map.batches,)
        _norm_act_sums_kernel[grid](
            given.tensor, map.tensor, *affine, sum_g, sum_gh, map.channels, map.positions,
            *given[4:], *map[4:], map.batches, each, count, **tile, **options,
        )  # fmt: skip
    sum_g, sum_gh = (t[0] if count == 1 else t.sum(dim=0) for t in (sum_g, sum_gh))
    if map.batches:
        tile, to = map_tile(map), rows(dx)
        _norm_act_gradient_kernel[map_grid(map, tile)](
            given.tensor, map.tensor, *affine, sum_g, sum_gh, dx, map.channels, map.positions,
            *given[4:], *map[4:], *to[4:], FIXED=fixed, **tile, **options,
        )  # fmt: skip
    return (
        dx,
        x.new_empty(0) if weight is None else sum_gh.sum(dim=0).to(weight.dtype),
        x.new_empty(0) if bias is None else sum_g.sum(dim=0).to(bias.dtype),
    )
