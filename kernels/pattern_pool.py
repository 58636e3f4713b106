"""Pooling under pattern maps. Products meet 16 maps at a time, the least that `tl.dot` takes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import (
    INTERPRETED,
    OPTIONS,
    Rows,
    accumulator,
    block,
    map_like,
    rows,
)


@triton.jit
def _over_channels(
    x_ptr, v_ptr, s, p, channels, positions, maps, stride_c, stride_s,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_S, BLOCK_P]: sum over channels of x[s, c] v[p, c]."""
    total = tl.zeros([BLOCK_S, BLOCK_P], dtype=ACC)
    row = x_ptr + s[:, None].to(tl.int64) * stride_s
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (s[:, None] < positions) & (c[None, :] < channels)
        x = tl.load(row + c[None, :].to(tl.int64) * stride_c, mask=inside, other=0.0)
        known = (p[None, :] < maps) & (c[:, None] < channels)
        v = tl.load(v_ptr + p[None, :] * channels + c[:, None], mask=known, other=0.0)
        total = tl.dot(x.to(DOT), v.to(DOT), acc=total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def _pattern_maps_kernel(
    x_ptr, weight_ptr, bias_ptr, maps_ptr,
    channels, positions, stride_b, stride_c, stride_s, maps, blocks,
    SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """maps = sigmoid(x . weight + bias), or the logits where a softmax follows.

    One program owns BLOCK_S positions of a sample and BLOCK_P maps and walks over the channels.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    z = _over_channels(
        x_ptr + b * stride_b, weight_ptr, s, p, channels, positions, maps, stride_c, stride_s,
        BLOCK_S, BLOCK_P, BLOCK_C, ACC, DOT, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        z += tl.load(bias_ptr + p, mask=p < maps, other=0.0).to(ACC)[None, :]
    if SIGMOID:
        z = 1.0 / (1.0 + tl.exp(-z))
    out = maps_ptr + (b * maps + p[None, :]) * positions + s[:, None]
    inside = (s[:, None] < positions) & (p[None, :] < maps)
    tl.store(out, z.to(maps_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pattern_softmax_kernel(logits_ptr, maps_ptr, positions, BLOCK: tl.constexpr):
    """Softmax over positions; one program owns one map of one sample."""
    row = tl.program_id(0).to(tl.int64) * positions
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), dtype=logits_ptr.dtype.element_ty)
    for first in range(0, positions, BLOCK):
        inside = first + lane < positions
        z = tl.load(logits_ptr + row + first + lane, mask=inside, other=float("-inf"))
        top = tl.maximum(top, z)
    highest = tl.max(top, axis=0)
    total = tl.zeros([BLOCK], dtype=logits_ptr.dtype.element_ty)
    for first in range(0, positions, BLOCK):
        inside = first + lane < positions
        z = tl.load(logits_ptr + row + first + lane, mask=inside, other=float("-inf"))
        total += tl.exp(z - highest)
    weight = tl.sum(total, axis=0)
    for first in range(0, positions, BLOCK):
        inside = first + lane < positions
        z = tl.load(logits_ptr + row + first + lane, mask=inside, other=float("-inf"))
        a = tl.exp(z - highest) / weight
        tl.store(maps_ptr + row + first + lane, a.to(maps_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pattern_pool_kernel(
    x_ptr, maps_ptr, out_ptr,
    samples, channels, positions, stride_b, stride_c, stride_s, maps, each, blocks,
    AVERAGE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[group, p, c] = sum over samples of the group and positions of maps[b, p, s] x[b, c, s].

    One program owns BLOCK_P maps and BLOCK_C channels of a group of `each` samples. The last group
    goes first: the kernel before this one read its samples last, they may be in the L2 cache.
    """
    group = tl.cdiv(samples, each) - 1 - tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    steps = tl.cdiv(positions, BLOCK_S)
    here = tl.minimum(samples - group * each, each)
    column = x_ptr + c[None, :].to(tl.int64) * stride_c
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    for step in range(0, here * steps):
        b = (group * each + step // steps).to(tl.int64)
        s = step % steps * BLOCK_S + tl.arange(0, BLOCK_S)
        known = (p[:, None] < maps) & (s[None, :] < positions)
        at = (b * maps + p[:, None]) * positions + s[None, :]
        a = tl.load(maps_ptr + at, mask=known, other=0.0)
        inside = (s[:, None] < positions) & (c[None, :] < channels)
        source = column + b * stride_b + s[:, None].to(tl.int64) * stride_s
        x = tl.load(source, mask=inside, other=0.0)
        total = tl.dot(a.to(DOT), x.to(DOT), acc=total, input_precision=PRECISION, out_dtype=ACC)
    if AVERAGE:
        total = total / positions
    out = out_ptr + (group.to(tl.int64) * maps + p[:, None]) * channels + c[None, :]
    known = (p[:, None] < maps) & (c[None, :] < channels)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def _pattern_logit_gradient_kernel(
    x_ptr, grad_pooled_ptr, grad_maps_ptr, maps_ptr, dz_ptr, db_ptr,
    channels, positions, stride_b, stride_c, stride_s, maps, blocks,
    SIGMOID: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da = grad_maps + grad_pooled . x; for sigmoid dz = da a (1 - a), and its sums for the bias.

    Programs as in the maps kernel. Where a softmax follows, da is what is stored.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = _over_channels(
        x_ptr + b * stride_b, grad_pooled_ptr + b * maps * channels, s, p,
        channels, positions, maps, stride_c, stride_s,
        BLOCK_S, BLOCK_P, BLOCK_C, ACC, DOT, PRECISION,
    )  # fmt: skip
    if SIGMOID:
        d = d / positions
    at = (b * maps + p[None, :]) * positions + s[:, None]
    inside = (s[:, None] < positions) & (p[None, :] < maps)
    d += tl.load(grad_maps_ptr + at, mask=inside, other=0.0).to(ACC)
    if SIGMOID:
        a = tl.load(maps_ptr + at, mask=inside, other=0.0).to(ACC)
        d = d * a * (1.0 - a)
        part = db_ptr + tl.program_id(0).to(tl.int64) * maps + p
        # Few numbers, and they cancel: float64 costs nothing here.
        tl.store(part, tl.sum(d.to(tl.float64), axis=0), mask=p < maps)
    tl.store(dz_ptr + at, d, mask=inside)


@triton.jit
def _pattern_softmax_gradient_kernel(maps_ptr, dz_ptr, positions, BLOCK: tl.constexpr):
    """dz = a (da - sum of a da), in place; one program owns one map of one sample."""
    row = tl.program_id(0).to(tl.int64) * positions
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=dz_ptr.dtype.element_ty)
    for first in range(0, positions, BLOCK):
        inside = first + lane < positions
        a = tl.load(maps_ptr + row + first + lane, mask=inside, other=0.0).to(total.dtype)
        total += a * tl.load(dz_ptr + row + first + lane, mask=inside, other=0.0)
    mean = tl.sum(total, axis=0)
    for first in range(0, positions, BLOCK):
        inside = first + lane < positions
        a = tl.load(maps_ptr + row + first + lane, mask=inside, other=0.0).to(total.dtype)
        d = tl.load(dz_ptr + row + first + lane, mask=inside, other=0.0)
        tl.store(dz_ptr + row + first + lane, a * (d - mean), mask=inside)


@triton.jit
def _pattern_map_gradient_kernel(
    grad_pooled_ptr, weight_ptr, maps_ptr, dz_ptr, dx_ptr,
    channels, positions, out_b, out_c, out_s, maps, blocks_s, blocks_c,
    AVERAGE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx[s, c] = sum over p of a[p, s] grad_pooled[p, c] + dz[p, s] weight[p, c]; x is not read.

    One program owns a BLOCK_S x BLOCK_C tile of a sample.
    """
    b = (tl.program_id(0) // (blocks_s * blocks_c)).to(tl.int64)
    s = tl.program_id(0) // blocks_c % blocks_s * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=ACC)
    for first in range(0, maps, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        along = (p[None, :] < maps) & (s[:, None] < positions)
        across = (p[:, None] < maps) & (c[None, :] < channels)
        at = (b * maps + p[None, :]) * positions + s[:, None]
        a = tl.load(maps_ptr + at, mask=along, other=0.0)
        at = (b * maps + p[:, None]) * channels + c[None, :]
        g = tl.load(grad_pooled_ptr + at, mask=across, other=0.0)
        total = tl.dot(a.to(DOT), g.to(DOT), acc=total, input_precision=PRECISION, out_dtype=ACC)
    if AVERAGE:
        total = total / positions
    for first in range(0, maps, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        along = (p[None, :] < maps) & (s[:, None] < positions)
        across = (p[:, None] < maps) & (c[None, :] < channels)
        at = (b * maps + p[None, :]) * positions + s[:, None]
        d = tl.load(dz_ptr + at, mask=along, other=0.0)
        w = tl.load(weight_ptr + p[:, None] * channels + c[None, :], mask=across, other=0.0)
        total = tl.dot(d, w.to(ACC), acc=total, input_precision=PRECISION, out_dtype=ACC)
    out = dx_ptr + b * out_b + s[:, None].to(tl.int64) * out_s + c[None, :].to(tl.int64) * out_c
    inside = (s[:, None] < positions) & (c[None, :] < channels)
    tl.store(out, total.to(dx_ptr.dtype.element_ty), mask=inside)


MAPS = 16  # BLOCK_P
PROGRAMS = 512  # that share the weight gradient: enough for 132 processors, little to sum
ROW = 1024  # positions that a softmax program holds at once


def _kind(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _products(dtype: torch.dtype, *, exact: bool = True) -> dict[str, Any]:
    """Types of the products; `exact` where both factors have the dtype of the features.

    Otherwise one is a float32 gradient of the logits, which float16 may not hold: half-precision
    features meet it as TF32, which holds them exactly.
    """
    kind = _kind(dtype)
    narrow, dot = dtype.itemsize == 2, kind
    if narrow and exact and not INTERPRETED:  # the interpreter would multiply the bits of bfloat16
        dot = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    fast = narrow or (dtype == torch.float32 and allowed)
    return {"ACC": kind, "DOT": dot, "PRECISION": "tf32" if fast else "ieee"}


def _tile(map: Rows) -> dict[str, int]:
    """64 positions, and 64 channels or, where these are contiguous, 256 bytes of them."""
    size = map.tensor.element_size()
    wide = 256 // size if map.channel == 1 else 64
    return {
        "BLOCK_S": block(map.positions, 64 if size < 8 else 32),
        "BLOCK_P": MAPS,
        "BLOCK_C": block(map.channels, wide if size < 8 else 32),
    }


def _pool(
    map: Rows, maps: Tensor, out: Tensor, each: int, average: bool, products: dict[str, Any]
) -> None:
    tile, count = _tile(map), maps.shape[1]
    blocks = triton.cdiv(map.channels, tile["BLOCK_C"])
    grid = (triton.cdiv(map.batches, each) * blocks, triton.cdiv(count, MAPS))
    _pattern_pool_kernel[grid](
        map.tensor, maps, out, map.batches, *map[2:], count, each, blocks,
        AVERAGE=average, **tile, **products, **OPTIONS,
    )  # fmt: skip


def pattern_pool(
    features: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Pooled features [B, P, C] and pattern maps [B, P, H, W]."""
    map, count, sigmoid = rows(features), weight.shape[0], activation == "sigmoid"
    pooled = features.new_empty(map.batches, count, map.channels)
    maps = features.new_empty(map.batches, count, *features.shape[2:])
    if map.batches == 0:
        return pooled, maps
    tile, products = _tile(map), _products(features.dtype)
    blocks = triton.cdiv(map.positions, tile["BLOCK_S"])
    first = maps if sigmoid else torch.empty_like(maps, dtype=accumulator(maps.dtype))
    _pattern_maps_kernel[(map.batches * blocks, triton.cdiv(count, MAPS))](
        map.tensor, weight.contiguous(), weight if bias is None else bias.contiguous(), first,
        *map[2:], count, blocks,
        SIGMOID=sigmoid, HAS_BIAS=bias is not None, **tile, **products, **OPTIONS,
    )  # fmt: skip
    if not sigmoid:
        _pattern_softmax_kernel[(map.batches * count,)](
            first, maps, map.positions, BLOCK=block(map.positions, ROW), **OPTIONS
        )
    _pool(map, maps, pooled, 1, sigmoid, products)
    return pooled, maps


def pattern_pool_backward(
    grad_pooled: Tensor,
    grad_maps: Tensor,
    features: Tensor,
    weight: Tensor,
    maps: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the features, in their memory format, of the weight and of the bias."""
    map, count, sigmoid = rows(features), weight.shape[0], activation == "sigmoid"
    dx, db = map_like(features), weight.new_zeros(count)
    if map.batches == 0:
        return dx, torch.zeros_like(weight, memory_format=torch.contiguous_format), db
    kind, tile, products = accumulator(features.dtype), _tile(map), _products(features.dtype)
    blocks = triton.cdiv(map.positions, tile["BLOCK_S"])
    blocks_c = triton.cdiv(map.channels, tile["BLOCK_C"])
    weight, maps, grad_pooled = weight.contiguous(), maps.contiguous(), grad_pooled.contiguous()
    dz = torch.empty_like(maps, dtype=kind)
    db_parts = dz.new_empty(map.batches * blocks, count, dtype=torch.float64)
    _pattern_logit_gradient_kernel[(map.batches * blocks, triton.cdiv(count, MAPS))](
        map.tensor, grad_pooled, grad_maps.contiguous(), maps, dz, db_parts,
        *map[2:], count, blocks, SIGMOID=sigmoid, **tile, **products, **OPTIONS,
    )  # fmt: skip
    if sigmoid:
        db = db_parts.sum(dim=0).to(db.dtype)
    else:  # a bias moves all positions alike, which softmax cancels: its gradient stays zero
        _pattern_softmax_gradient_kernel[(map.batches * count,)](
            maps, dz, map.positions, BLOCK=block(map.positions, ROW), **OPTIONS
        )
    mixed, out = _products(features.dtype, exact=False), rows(dx)
    each = triton.cdiv(map.batches * blocks_c * triton.cdiv(count, MAPS), PROGRAMS)
    dw_parts = dz.new_empty(triton.cdiv(map.batches, each), count * map.channels)
    _pool(map, dz, dw_parts, each, False, mixed)
    dw = dw_parts.sum(dim=0).to(weight.dtype).reshape(weight.shape)
    _pattern_map_gradient_kernel[(map.batches * blocks * blocks_c,)](
        grad_pooled, weight, maps, dz, dx, map.channels, map.positions, *out[4:],
        count, blocks, blocks_c, AVERAGE=sigmoid, **tile, **products, **OPTIONS, num_stages=1,
    )  # fmt: skip
    return dx, dw, db
