"""Norms and sums of positions, and rows stretched to [0, 1]: what masks are made of."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import OPTIONS, Rows, accumulator, accumulator_kind, block

FLOOR = 1e-12  # of norms, and of the range of a mask


@triton.jit
def _position_norms_kernel(
    x_ptr, norm_ptr, sum_ptr, channels, positions, stride_b, stride_c, stride_s, blocks,
    HAS_SUM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """norm[b, s] over channels, and the sum; one program owns BLOCK_S positions.

    All positions are summed in one order: equal positions get equal norms.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    row = x_ptr + b * stride_b + s[:, None].to(tl.int64) * stride_s
    square = tl.zeros([BLOCK_S, BLOCK_C], dtype=ACC)
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=ACC)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (s[:, None] < positions) & (c[None, :] < channels)
        x = tl.load(row + c[None, :].to(tl.int64) * stride_c, mask=inside, other=0.0).to(ACC)
        square += x * x
        if HAS_SUM:
            total += x
    norm = tl.sqrt(tl.sum(square, axis=1))
    tl.store(norm_ptr + b * positions + s, norm, mask=s < positions)
    if HAS_SUM:
        tl.store(sum_ptr + b * positions + s, tl.sum(total, axis=1), mask=s < positions)


@triton.jit
def _min_max_kernel(values_ptr, out_ptr, positions, FLOOR: tl.constexpr, BLOCK: tl.constexpr):
    """values [B, S] stretched to [0, 1]; one program owns one sample."""
    row = tl.program_id(0).to(tl.int64) * positions
    lane = tl.arange(0, BLOCK)
    low = tl.full([BLOCK], float("inf"), dtype=values_ptr.dtype.element_ty)
    high = tl.full([BLOCK], float("-inf"), dtype=values_ptr.dtype.element_ty)
    for first in range(0, positions, BLOCK):
        inside = first + lane < positions
        v = tl.load(values_ptr + row + first + lane, mask=inside, other=0.0)
        low = tl.where(inside & (v < low), v, low)
        high = tl.where(inside & (v > high), v, high)
    least = tl.min(low, axis=0)
    span = tl.max(high, axis=0) - least + FLOOR
    for first in range(0, positions, BLOCK):
        inside = first + lane < positions
        v = tl.load(values_ptr + row + first + lane, mask=inside, other=0.0)
        v = (v - least) / span
        tl.store(out_ptr + row + first + lane, v.to(out_ptr.dtype.element_ty), mask=inside)


def _launch_norms(map: Rows, norm: Tensor, total: Tensor | None) -> None:
    tile = {"BLOCK_S": 16, "BLOCK_C": block(map.channels, 128)}
    blocks = triton.cdiv(map.positions, tile["BLOCK_S"])
    _position_norms_kernel[(map.batches * blocks,)](
        map.tensor, norm, norm if total is None else total, *map[2:], blocks,
        HAS_SUM=total is not None, ACC=accumulator_kind(norm.dtype), **tile, **OPTIONS,
    )  # fmt: skip


def norms(map: Rows) -> Tensor:
    """Norm of every position, [B, S]."""
    kind = accumulator(map.tensor.dtype)
    norm = torch.empty(map.batches, map.positions, dtype=kind, device=map.tensor.device)
    _launch_norms(map, norm, None)
    return norm


def norms_and_sums(map: Rows) -> tuple[Tensor, Tensor]:
    """Norm and sum over channels of every position, [B, S] each."""
    kind = accumulator(map.tensor.dtype)
    norm = torch.empty(map.batches, map.positions, dtype=kind, device=map.tensor.device)
    total = torch.empty_like(norm)
    _launch_norms(map, norm, total)
    return norm, total


def stretched(values: Tensor, out: Tensor) -> Tensor:
    """Each row of `values` [B, S] stretched to [0, 1], into `out`."""
    size = values.shape[1]
    _min_max_kernel[(len(values),)](values, out, size, FLOOR, BLOCK=block(size, 1024), **OPTIONS)
    return out
