"""Modality distribution adapter: softmax pooling as in pattern pooling, the gate and both batch
norms from `adapter_gate`, and one affine map per sample and channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import (
    OPTIONS,
    Rows,
    accumulator,
    accumulator_kind,
    block,
    map_grid,
    map_like,
    map_tile,
    reduction_tile,
    rows,
    statistics,
)
from fastreid_vi.kernels.adapter_gate import close_gate, open_gate
from fastreid_vi.kernels.norm import _gradient_sums_kernel
from fastreid_vi.kernels.pattern_pool import (
    MAPS,
    PROGRAMS,
    ROW,
    _pattern_logit_gradient_kernel,
    _pattern_maps_kernel,
    _pattern_softmax_gradient_kernel,
    _pattern_softmax_kernel,
    _pool,
    _products,
    _tile,
)


@triton.jit
def _adapter_apply_kernel(
    x_ptr, mean_ptr, a_ptr, d_ptr, out_ptr,
    channels, positions, stride_b, stride_c, stride_s, out_b, out_c, out_s,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = x + a (x - mean) + d; one program owns a tile of a sample."""
    blocks_c, blocks_s = tl.cdiv(channels, BLOCK_C), tl.cdiv(positions, BLOCK_S)
    b = (tl.program_id(0) // (blocks_c * blocks_s)).to(tl.int64)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.program_id(0) // blocks_c % blocks_s * BLOCK_S + tl.arange(0, BLOCK_S)
    at, there = b * channels + c, c < channels
    mean = tl.load(mean_ptr + at, mask=there, other=0.0)[None, :]
    a = tl.load(a_ptr + at, mask=there, other=0.0)[None, :]
    d = tl.load(d_ptr + at, mask=there, other=0.0)[None, :]
    inside = (s[:, None] < positions) & there[None, :]
    column, row = c[None, :].to(tl.int64), s[:, None].to(tl.int64)
    source = x_ptr + b * stride_b + column * stride_c + row * stride_s
    x = tl.load(source, mask=inside, other=0.0).to(ACC)
    y = x + (a * (x - mean) + d)
    target = out_ptr + b * out_b + column * out_c + row * out_s
    tl.store(target, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _adapter_map_gradient_kernel(
    g_ptr, x_ptr, mean_ptr, on_g_ptr, on_x_ptr, offset_ptr,
    grad_context_ptr, weight_ptr, attention_ptr, grad_logits_ptr, dx_ptr,
    channels, positions, g_b, g_c, g_s, stride_b, stride_c, stride_s, out_b, out_c, out_s,
    maps, blocks_s, blocks_c,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = on_g g - on_x (x - mean) - offset + sum over m of p dt + dlogits weight.

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
        a = tl.load(attention_ptr + at, mask=along, other=0.0)
        d = tl.load(grad_logits_ptr + at, mask=along, other=0.0)
        at = (b * maps + p[:, None]) * channels + c[None, :]
        t = tl.load(grad_context_ptr + at, mask=across, other=0.0)
        w = tl.load(weight_ptr + p[:, None] * channels + c[None, :], mask=across, other=0.0)
        total = tl.dot(a, t, acc=total, input_precision=PRECISION, out_dtype=ACC)
        total = tl.dot(d, w.to(ACC), acc=total, input_precision=PRECISION, out_dtype=ACC)
    at, there = b * channels + c, c < channels
    mean = tl.load(mean_ptr + at, mask=there, other=0.0)[None, :]
    on_g = tl.load(on_g_ptr + at, mask=there, other=0.0)[None, :]
    on_x = tl.load(on_x_ptr + at, mask=there, other=0.0)[None, :]
    offset = tl.load(offset_ptr + at, mask=there, other=0.0)[None, :]
    inside = (s[:, None] < positions) & there[None, :]
    column, row = c[None, :].to(tl.int64), s[:, None].to(tl.int64)
    source = x_ptr + b * stride_b + column * stride_c + row * stride_s
    total -= on_x * (tl.load(source, mask=inside, other=0.0).to(ACC) - mean) + offset
    upstream = g_ptr + b * g_b + column * g_c + row * g_s
    total += on_g * tl.load(upstream, mask=inside, other=0.0).to(ACC)
    target = dx_ptr + b * out_b + column * out_c + row * out_s
    tl.store(target, total.to(dx_ptr.dtype.element_ty), mask=inside)


def _attend(map: Rows, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, M, S] and context [B, M, C] in the accumulation type."""
    kind, count = accumulator(map.tensor.dtype), weight.shape[0]
    attention = map.tensor.new_empty(map.batches, count, map.positions, dtype=kind)
    context = map.tensor.new_empty(map.batches, count, map.channels, dtype=kind)
    if map.batches == 0:
        return attention, context
    dtype, tile = map.tensor.dtype, _tile(map)
    blocks = triton.cdiv(map.positions, tile["BLOCK_S"])
    logits = torch.empty_like(attention)
    _pattern_maps_kernel[(map.batches * blocks, triton.cdiv(count, MAPS))](
        map.tensor, weight.contiguous(), weight, logits, *map[2:], count, blocks,
        SIGMOID=False, HAS_BIAS=False, **tile, **_products(dtype, exact=weight.dtype == dtype),
        **OPTIONS,
    )  # fmt: skip
    _pattern_softmax_kernel[(map.batches * count,)](
        logits, attention, map.positions, BLOCK=block(map.positions, ROW), **OPTIONS
    )
    _pool(map, attention, context, 1, False, _products(dtype, exact=False))
    return attention, context


def distribution_adapter(
    features: Tensor,
    sc_weight: Tensor,
    sc_bias: Tensor,
    ca_weight: Tensor,
    ca_bn_weight: Tensor,
    ca_bn_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    ca_running_mean: Tensor | None,
    ca_running_var: Tensor | None,
    norm_running_mean: Tensor | None,
    norm_running_var: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Output map; attention and context; mean, variance and gate; statistics of both norms."""
    map, out, wide = rows(features), map_like(features), torch.float64
    mean, variance = statistics(map, kind=wide)
    attention, context = _attend(map, sc_weight)
    narrow = mean.to(context.dtype)
    context -= narrow[:, None]
    running = (ca_running_mean, ca_running_var, norm_running_mean, norm_running_var)
    measured = [
        features.new_empty(map.channels, dtype=wide) if r is None else r.to(wide, copy=True)
        for r in running
    ]
    gate = torch.empty_like(mean)
    if map.batches:
        z = ((context + mean[:, None]) * ca_weight.to(wide)[:, 0].t()).sum(dim=1)
        vectors = (ca_bn_weight, ca_bn_bias, norm_weight, norm_bias)
        fixed = ca_running_mean is not None
        gate, a, d = open_gate(z, mean, variance, vectors, measured, eps, fixed)
        tile, to = map_tile(map), rows(out)
        _adapter_apply_kernel[map_grid(map, tile)](
            map.tensor, narrow, a, d, out, *map[2:], *to[4:],
            **tile, ACC=accumulator_kind(features.dtype), **OPTIONS,
        )  # fmt: skip
    return out, attention, context, mean, variance.to(wide), gate, *measured


def _attend_backward(
    map: Rows, weight: Tensor, attention: Tensor, mean: Tensor, grad_context: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits [B, M, S] and of the weight [M, C], in the accumulation type."""
    count, dtype = weight.shape[0], map.tensor.dtype
    tile, mixed = _tile(map), _products(dtype, exact=False)
    blocks = triton.cdiv(map.positions, tile["BLOCK_S"])
    grad_logits = torch.empty_like(attention)
    _pattern_logit_gradient_kernel[(map.batches * blocks, triton.cdiv(count, MAPS))](
        map.tensor, grad_context, torch.zeros_like(attention), attention, grad_logits, grad_logits,
        *map[2:], count, blocks, SIGMOID=False, **tile, **mixed, **OPTIONS,
    )  # fmt: skip
    _pattern_softmax_gradient_kernel[(map.batches * count,)](
        attention, grad_logits, map.positions, BLOCK=block(map.positions, ROW), **OPTIONS
    )
    blocks_c = triton.cdiv(map.channels, tile["BLOCK_C"])
    each = triton.cdiv(map.batches * blocks_c * triton.cdiv(count, MAPS), PROGRAMS)
    parts = attention.new_empty(triton.cdiv(map.batches, each), count, map.channels)
    _pool(map, grad_logits, parts, each, False, mixed)
    # They sum to zero but for rounding, which a large mean of x would weigh.
    rest = grad_logits.sum(dim=2).t() @ mean
    return grad_logits, parts.sum(dim=0) - rest


def distribution_adapter_backward(
    grad: Tensor,
    features: Tensor,
    sc_weight: Tensor,
    ca_weight: Tensor,
    ca_bn_weight: Tensor,
    norm_weight: Tensor,
    attention: Tensor,
    context: Tensor,
    mean: Tensor,
    variance: Tensor,
    gate: Tensor,
    ca_mean: Tensor,
    ca_var: Tensor,
    norm_mean: Tensor,
    norm_var: Tensor,
    eps: float,
    fixed: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the map, in its memory format, and of the parameters but for `sc_bias`."""
    map, given, dx = rows(features), rows(grad), map_like(features)
    kind, acc = attention.dtype, accumulator_kind(features.dtype)
    if map.batches == 0:
        like = (sc_weight, ca_weight, ca_bn_weight, ca_bn_weight, norm_weight, norm_weight)
        return dx, *(p.new_zeros(p.shape) for p in like)
    narrow = mean.to(kind)
    sum_g, sum_gc = torch.empty_like(narrow), torch.empty_like(narrow)
    tile = reduction_tile(map)
    _gradient_sums_kernel[(triton.cdiv(map.channels, tile["BLOCK_C"]) * map.batches,)](
        given.tensor, map.tensor, narrow, sum_g, sum_gc, map.channels, map.positions,
        *given[4:], *map[4:], **tile, ACC=acc, **OPTIONS,
    )  # fmt: skip
    w, whole = ca_weight.to(mean.dtype)[:, 0].t(), context + mean[:, None]  # [M, C], [B, M, C]
    z = (whole * w).sum(dim=1)
    *maps, dz, parameters = close_gate(
        z, mean, variance, gate, (sum_g, sum_gc), norm_weight,
        (ca_mean, ca_var, norm_mean, norm_var), map.positions, eps, fixed,
    )  # fmt: skip
    ca_rstd = (ca_var + eps).rsqrt()
    if not fixed:
        normal = (z - ca_mean) * ca_rstd
        dz = dz - (parameters[1] + normal * parameters[0]) / map.batches
    dz = (ca_bn_weight.to(mean.dtype) * ca_rstd * dz)[:, None]  # [B, 1, C]
    grad_context = (dz * w).to(kind).contiguous()
    grad_logits, grad_sc = _attend_backward(map, sc_weight, attention, narrow, grad_context)
    tile, to = {**_tile(map), "BLOCK_C": 64 if kind == torch.float32 else 32}, rows(dx)
    blocks_s = triton.cdiv(map.positions, tile["BLOCK_S"])
    blocks_c = triton.cdiv(map.channels, tile["BLOCK_C"])
    products = _products(features.dtype, exact=False)
    _adapter_map_gradient_kernel[(map.batches * blocks_s * blocks_c,)](
        given.tensor, map.tensor, narrow, *maps,
        grad_context, sc_weight.contiguous(), attention, grad_logits, dx,
        map.channels, map.positions, *given[4:], *map[4:], *to[4:],
        sc_weight.shape[0], blocks_s, blocks_c, **tile, ACC=acc,
        PRECISION=products["PRECISION"], **OPTIONS, num_stages=1,
    )  # fmt: skip
    return (
        dx,
        grad_sc.to(sc_weight.dtype).reshape(sc_weight.shape),
        (dz * whole).sum(dim=0).t()[:, None].to(ca_weight.dtype).contiguous(),
        *(p.to(ca_bn_weight.dtype) for p in parameters[:2]),
        *(p.to(norm_weight.dtype) for p in parameters[2:]),
    )
