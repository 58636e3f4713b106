"""Normalisation of feature maps."""

from __future__ import annotations

import torch
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
    reduction_tile,
    rows,
    statistics,
)


@triton.jit
def _blend_kernel(
    x_ptr, mean_ptr, rstd_ptr, gate_ptr, out_ptr,
    channels, positions, stride_b, stride_c, stride_s, out_b, out_c, out_s,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = m x + (1 - m) rstd (x - mean); one program owns a tile of a sample."""
    blocks_c, blocks_s = tl.cdiv(channels, BLOCK_C), tl.cdiv(positions, BLOCK_S)
    b = (tl.program_id(0) // (blocks_c * blocks_s)).to(tl.int64)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.program_id(0) // blocks_c % blocks_s * BLOCK_S + tl.arange(0, BLOCK_S)
    there = c < channels
    per_channel = b * channels + c
    mean = tl.load(mean_ptr + per_channel, mask=there, other=0.0)[None, :]
    gate = tl.load(gate_ptr + per_channel, mask=there, other=0.0)[None, :]
    pull = (1.0 - gate) * tl.load(rstd_ptr + per_channel, mask=there, other=0.0)[None, :]
    inside = (s[:, None] < positions) & there[None, :]
    column, row = c[None, :].to(tl.int64), s[:, None].to(tl.int64)
    source = x_ptr + b * stride_b + column * stride_c + row * stride_s
    x = tl.load(source, mask=inside, other=0.0).to(ACC)
    y = gate * x + pull * (x - mean)
    target = out_ptr + b * out_b + column * out_c + row * out_s
    tl.store(target, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_sums_kernel(
    g_ptr, x_ptr, mean_ptr, sum_g_ptr, sum_gc_ptr,
    channels, positions, g_b, g_c, g_s, stride_b, stride_c, stride_s,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over positions of g and of g (x - mean); a program owns BLOCK_C channels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    column = c[None, :].to(tl.int64)
    per_channel = b * channels + c
    mean = tl.load(mean_ptr + per_channel, mask=c < channels, other=0.0)[None, :]
    total_g = tl.zeros([BLOCK_S, BLOCK_C], dtype=ACC)
    total_gc = tl.zeros([BLOCK_S, BLOCK_C], dtype=ACC)
    for first in range(0, positions, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        row = s[:, None].to(tl.int64)
        inside = (s[:, None] < positions) & (c[None, :] < channels)
        source = x_ptr + b * stride_b + column * stride_c + row * stride_s
        x = tl.load(source, mask=inside, other=0.0).to(ACC)
        upstream = g_ptr + b * g_b + column * g_c + row * g_s
        g = tl.load(upstream, mask=inside, other=0.0).to(ACC)
        total_g += g
        total_gc += tl.where(inside, g * (x - mean), 0.0)
    tl.store(sum_g_ptr + per_channel, tl.sum(total_g, axis=0), mask=c < channels)
    tl.store(sum_gc_ptr + per_channel, tl.sum(total_gc, axis=0), mask=c < channels)


@triton.jit
def _gradient_kernel(
    g_ptr, x_ptr, mean_ptr, on_g_ptr, on_x_ptr, offset_ptr, dx_ptr,
    channels, positions, g_b, g_c, g_s, stride_b, stride_c, stride_s, out_b, out_c, out_s,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = on_g g + on_x (x - mean) + offset; one program owns a tile of a sample."""
    blocks_c, blocks_s = tl.cdiv(channels, BLOCK_C), tl.cdiv(positions, BLOCK_S)
    b = (tl.program_id(0) // (blocks_c * blocks_s)).to(tl.int64)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.program_id(0) // blocks_c % blocks_s * BLOCK_S + tl.arange(0, BLOCK_S)
    there = c < channels
    per_channel = b * channels + c
    mean = tl.load(mean_ptr + per_channel, mask=there, other=0.0)[None, :]
    on_g = tl.load(on_g_ptr + per_channel, mask=there, other=0.0)[None, :]
    on_x = tl.load(on_x_ptr + per_channel, mask=there, other=0.0)[None, :]
    offset = tl.load(offset_ptr + per_channel, mask=there, other=0.0)[None, :]
    inside = (s[:, None] < positions) & there[None, :]
    column, row = c[None, :].to(tl.int64), s[:, None].to(tl.int64)
    source = x_ptr + b * stride_b + column * stride_c + row * stride_s
    x = tl.load(source, mask=inside, other=0.0).to(ACC)
    g = tl.load(g_ptr + b * g_b + column * g_c + row * g_s, mask=inside, other=0.0).to(ACC)
    dx = on_g * g + on_x * (x - mean) + offset
    target = dx_ptr + b * out_b + column * out_c + row * out_s
    tl.store(target, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def modality_alleviation(
    features: Tensor, reduce_weight: Tensor, expand_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output map, and per sample and channel: mean, 1 / deviation, gate."""
    map, out = rows(features), map_like(features)
    kind = accumulator(features.dtype)
    mean, rstd = statistics(map, eps)
    # The gate is [B, C]-sized: two library products.
    hidden = torch.relu(mean @ reduce_weight.to(kind).flatten(1).t())
    gate = torch.sigmoid(hidden @ expand_weight.to(kind).flatten(1).t())
    if map.batches:
        tile, to = map_tile(map), rows(out)
        _blend_kernel[map_grid(map, tile)](
            map.tensor, mean, rstd, gate, out, *map[2:], *to[4:],
            **tile, ACC=accumulator_kind(features.dtype), **OPTIONS,
        )  # fmt: skip
    return out, mean, rstd, gate


def modality_alleviation_backward(
    grad: Tensor,
    features: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the map, in its memory format, and of both weights."""
    map, given, dx = rows(features), rows(grad), map_like(features)
    acc = accumulator_kind(features.dtype)
    sum_g, sum_gc = torch.empty_like(mean), torch.empty_like(mean)
    if map.batches:
        tile = reduction_tile(map)
        grid = (triton.cdiv(map.channels, tile["BLOCK_C"]) * map.batches,)
        _gradient_sums_kernel[grid](
            given.tensor, map.tensor, mean, sum_g, sum_gc, map.channels, map.positions,
            *given[4:], *map[4:], **tile, ACC=acc, **OPTIONS,
        )  # fmt: skip
    w1, w2 = reduce_weight.to(mean.dtype).flatten(1), expand_weight.to(mean.dtype).flatten(1)
    hidden = torch.relu(mean @ w1.t())
    dz = (mean * sum_g + (1.0 - rstd) * sum_gc) * gate * (1.0 - gate)
    dh = (dz @ w2) * (hidden > 0)
    pull = (1.0 - gate) * rstd
    on_g = gate + pull
    on_x = -pull * rstd.square() * sum_gc / map.positions
    offset = (dh @ w1 - pull * sum_g) / map.positions
    if map.batches:
        tile, to = map_tile(map), rows(dx)
        _gradient_kernel[map_grid(map, tile)](
            given.tensor, map.tensor, mean, on_g, on_x, offset, dx, map.channels, map.positions,
            *given[4:], *map[4:], *to[4:], **tile, ACC=acc, **OPTIONS,
        )  # fmt: skip
    return (
        dx,
        (dh.t() @ mean).to(reduce_weight.dtype).reshape(reduce_weight.shape),
        (dz.t() @ hidden).to(expand_weight.dtype).reshape(expand_weight.shape),
    )
