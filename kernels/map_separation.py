"""The loss that keeps the pattern maps of a sample apart."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import OPTIONS, accumulator, block, map_like, rows


@triton.jit
def _map_separation_kernel(
    maps_ptr, parts_ptr, maps, positions, stride_b, stride_c, stride_s, pairs,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts[b] = 2 / pairs times the overlap of the maps of sample b, one program per sample.

    Each map meets the sum of those before it: one map gives exactly zero.
    """
    b = tl.program_id(0).to(tl.int64)
    overlap = tl.zeros([BLOCK], dtype=ACC)
    for first in range(0, positions, BLOCK):
        s = first + tl.arange(0, BLOCK)
        earlier = tl.zeros([BLOCK], dtype=ACC)
        for p in range(0, maps):
            at = b * stride_b + tl.cast(p, tl.int64) * stride_c + s.to(tl.int64) * stride_s
            a = tl.load(maps_ptr + at, mask=s < positions, other=0.0).to(ACC)
            overlap += a * earlier
            earlier += a
    tl.store(parts_ptr + b, 2.0 * tl.sum(overlap, axis=0) / pairs)


@triton.jit
def _map_separation_gradient_kernel(
    grad_ptr, maps_ptr, out_ptr, maps, positions, stride_b, stride_c, stride_s,
    out_b, out_c, out_s, pairs, blocks,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """2 grad / pairs times the sum of the other maps; one program owns BLOCK positions."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = s.to(tl.int64)
    scale = 2.0 * tl.load(grad_ptr) / pairs
    total = tl.zeros([BLOCK], dtype=ACC)
    for p in range(0, maps):
        at = b * stride_b + tl.cast(p, tl.int64) * stride_c + row * stride_s
        total += tl.load(maps_ptr + at, mask=s < positions, other=0.0).to(ACC)
    for p in range(0, maps):
        at = b * stride_b + tl.cast(p, tl.int64) * stride_c + row * stride_s
        a = tl.load(maps_ptr + at, mask=s < positions, other=0.0).to(ACC)
        to = out_ptr + b * out_b + tl.cast(p, tl.int64) * out_c + row * out_s
        tl.store(to, ((total - a) * scale).to(out_ptr.dtype.element_ty), mask=s < positions)


def _kind(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _pairs(maps: Tensor) -> int:
    """B P (P-1), and 1 where there is no pair."""
    return max(maps.shape[0] * maps.shape[1] * (maps.shape[1] - 1), 1)


def map_separation_loss(maps: Tensor) -> Tensor:
    """Mean overlap of the maps of a sample, float32 (float64 for float64)."""
    map, kind = rows(maps), accumulator(maps.dtype)
    if map.batches == 0:
        return maps.new_zeros((), dtype=kind)
    parts = maps.new_empty(map.batches, dtype=kind)
    _map_separation_kernel[(map.batches,)](
        map.tensor, parts, *map[2:], _pairs(maps),
        BLOCK=block(map.positions, 256), ACC=_kind(maps.dtype), **OPTIONS,
    )  # fmt: skip
    return parts.sum()


def map_separation_loss_backward(grad: Tensor, maps: Tensor) -> Tensor:
    """Gradient of the maps, in their memory format."""
    map, out = rows(maps), map_like(maps)
    if map.batches:
        size, to = block(map.positions, 256), rows(out)
        blocks = triton.cdiv(map.positions, size)
        _map_separation_gradient_kernel[(map.batches * blocks,)](
            grad, map.tensor, out, *map[2:], *to[4:], _pairs(maps), blocks,
            BLOCK=size, ACC=_kind(maps.dtype), **OPTIONS,
        )  # fmt: skip
    return out
