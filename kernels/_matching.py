"""What the rooms of correspondences share: products of rows, matching and its gradient.

Inner products [B, S, S] are stored in the accumulation dtype: at S = 162 they are a twelfth of a
map of 2048 channels, and every size of map takes the same kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import (
    INTERPRETED,
    OPTIONS,
    Rows,
    accumulator,
    accumulator_kind,
    block,
    rows,
)
from fastreid_vi.kernels._norms import norms

LANES = 256  # positions that a row kernel holds at once
ROWS = 32 if INTERPRETED else 2  # rows that share a program


@triton.jit
def _inner_kernel(
    q_ptr, k_ptr, index_ptr, out_ptr, channels, positions, targets,
    q_b, q_c, q_s, k_b, k_c, k_s, blocks,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[b, i, j] = sum over c of q[b, i, c] k[index[b], j, c]; one program owns a tile of it."""
    tile = tl.program_id(0)
    b = (tile // (blocks * tl.cdiv(positions, BLOCK_I))).to(tl.int64)
    i = tile // blocks % tl.cdiv(positions, BLOCK_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tile % blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    t = tl.minimum(tl.maximum(tl.load(index_ptr + b), 0), targets - 1)
    left = q_ptr + b * q_b + i[:, None].to(tl.int64) * q_s
    right = k_ptr + t * k_b + j[None, :].to(tl.int64) * k_s
    total = tl.zeros([BLOCK_I, BLOCK_J], dtype=ACC)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (i[:, None] < positions) & (c[None, :] < channels)
        q = tl.load(left + c[None, :].to(tl.int64) * q_c, mask=inside, other=0.0)
        inside = (j[None, :] < positions) & (c[:, None] < channels)
        k = tl.load(right + c[:, None].to(tl.int64) * k_c, mask=inside, other=0.0)
        total = tl.dot(q.to(DOT), k.to(DOT), acc=total, input_precision=PRECISION, out_dtype=ACC)
    out = out_ptr + (b * positions + i[:, None]) * positions + j[None, :]
    tl.store(out, total, mask=(i[:, None] < positions) & (j[None, :] < positions))


@triton.jit
def _logits(gram, keys, scale, lane, inside, FLOOR: tl.constexpr):
    """[ROWS, BLOCK], float64: the temperature multiplies the rounding of what it meets."""
    norm = tl.load(keys + lane, mask=inside, other=1.0).to(tl.float64)
    z = tl.load(gram + lane, mask=inside, other=0.0).to(tl.float64) * scale
    return tl.where(inside, z / tl.maximum(norm, FLOOR), float("-inf"))


@triton.jit
def _rounded(x, kind: tl.constexpr, INTERPRETED: tl.constexpr):
    """x >= 0 in another type, to nearest even; the interpreter would cut bfloat16 off."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        x = bits.to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def _match_kernel(
    gram_ptr, q_norm_ptr, k_norm_ptr, index_ptr, q_mask_ptr, k_mask_ptr,
    p_ptr, lse_ptr, seen_ptr, count, positions, targets,
    temperature: tl.constexpr, FLOOR: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """P from inner products, its log-sum-exp, and what the masks see; a program owns ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < count
    t = tl.load(index_ptr + row // positions, mask=known, other=0)
    t = tl.minimum(tl.maximum(t, 0), targets - 1)
    lanes = tl.arange(0, BLOCK)[None, :]
    gram, p = gram_ptr + row[:, None] * positions, p_ptr + row[:, None] * positions
    keys = k_norm_ptr + t[:, None] * positions
    norm = tl.load(q_norm_ptr + row, mask=known, other=1.0).to(tl.float64)
    scale = (temperature / tl.maximum(norm, FLOOR))[:, None]
    top = tl.full([ROWS, BLOCK], float("-inf"), dtype=tl.float64)
    for first in range(0, positions, BLOCK):
        inside = known[:, None] & (first + lanes < positions)
        top = tl.maximum(top, _logits(gram, keys, scale, first + lanes, inside, FLOOR))
    highest = tl.where(known, tl.max(top, axis=1), 0.0)
    total = tl.zeros([ROWS, BLOCK], dtype=ACC)
    for first in range(0, positions, BLOCK):
        inside = known[:, None] & (first + lanes < positions)
        z = _logits(gram, keys, scale, first + lanes, inside, FLOOR)
        total += tl.exp((z - highest[:, None]).to(ACC))
    weight = tl.where(known, tl.sum(total, axis=1), 1.0)
    tl.store(lse_ptr + row, highest.to(ACC) + tl.log(weight), mask=known)
    seen = tl.zeros([ROWS, BLOCK], dtype=ACC)
    for first in range(0, positions, BLOCK):
        inside = known[:, None] & (first + lanes < positions)
        z = _logits(gram, keys, scale, first + lanes, inside, FLOOR)
        share = tl.exp((z - highest[:, None]).to(ACC)) / weight[:, None]
        share = _rounded(share, p_ptr.dtype.element_ty, INTERPRETED)
        tl.store(p + first + lanes, share, mask=inside)
        if HAS_MASK:
            at = t[:, None] * positions + first + lanes
            seen += share.to(ACC) * tl.load(k_mask_ptr + at, mask=inside, other=0.0)
    if HAS_MASK:
        mask = tl.load(q_mask_ptr + row, mask=known, other=0.0)
        tl.store(seen_ptr + row, mask * tl.sum(seen, axis=1), mask=known)


@triton.jit
def _warp_kernel(
    p_ptr, k_ptr, index_ptr, x_ptr, mask_ptr, out_ptr, channels, positions, targets,
    k_b, k_c, k_s, x_b, x_c, x_s, out_b, out_c, out_s, blocks,
    BLEND: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[b, i, c] = w = sum over j of P[b, i, j] k[index[b], j, c], or x - m (x - w)."""
    tile = tl.program_id(0)
    b = (tile // (blocks * tl.cdiv(positions, BLOCK_I))).to(tl.int64)
    i = tile // blocks % tl.cdiv(positions, BLOCK_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tile % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.minimum(tl.maximum(tl.load(index_ptr + b), 0), targets - 1)
    left = p_ptr + (b * positions + i[:, None]) * positions
    right = k_ptr + t * k_b + c[None, :].to(tl.int64) * k_c
    total = tl.zeros([BLOCK_I, BLOCK_C], dtype=ACC)
    for first in range(0, positions, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        inside = (i[:, None] < positions) & (j[None, :] < positions)
        p = tl.load(left + j[None, :], mask=inside, other=0.0)
        inside = (j[:, None] < positions) & (c[None, :] < channels)
        k = tl.load(right + j[:, None].to(tl.int64) * k_s, mask=inside, other=0.0)
        total = tl.dot(p.to(DOT), k.to(DOT), acc=total, input_precision=PRECISION, out_dtype=ACC)
    inside = (i[:, None] < positions) & (c[None, :] < channels)
    if BLEND:
        m = tl.load(mask_ptr + b * positions + i, mask=i < positions, other=0.0)[:, None]
        at = b * x_b + i[:, None].to(tl.int64) * x_s + c[None, :].to(tl.int64) * x_c
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)
        total = x - m * (x - total)
    out = out_ptr + b * out_b + i[:, None].to(tl.int64) * out_s + c[None, :].to(tl.int64) * out_c
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _match_gradient_kernel(
    d_ptr, p_ptr, lse_ptr, q_norm_ptr, k_norm_ptr, index_ptr, mask_ptr, radial_ptr,
    count, positions, targets,
    temperature: tl.constexpr, FLOOR: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dP to the gradient of the inner products, in place; a program owns ROWS rows.

    radial[b, i]: what query i loses along itself, for cosines do not see its norm. Rows of the
    rounded P sum to one only nearly; what all dP of a row share must still cancel.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < count
    t = tl.load(index_ptr + row // positions, mask=known, other=0)
    t = tl.minimum(tl.maximum(t, 0), targets - 1)
    lanes = tl.arange(0, BLOCK)[None, :]
    d, p = d_ptr + row[:, None] * positions, p_ptr + row[:, None] * positions
    shared = tl.zeros([ROWS, BLOCK], dtype=ACC)
    total = tl.zeros([ROWS, BLOCK], dtype=ACC)
    for first in range(0, positions, BLOCK):
        inside = known[:, None] & (first + lanes < positions)
        share = tl.load(p + first + lanes, mask=inside, other=0.0).to(ACC)
        shared += share * tl.load(d + first + lanes, mask=inside, other=0.0)
        total += share
    mean = tl.sum(shared, axis=1) / tl.where(known, tl.sum(total, axis=1), 1.0)
    factor = tl.full([ROWS], temperature, dtype=ACC)
    if HAS_MASK:
        factor = factor * tl.load(mask_ptr + row, mask=known, other=0.0)
    norm = tl.load(q_norm_ptr + row, mask=known, other=0.0)
    inverse = tl.where(norm < FLOOR, 0.0, 1.0 / tl.where(norm < FLOOR, 1.0, norm))
    lse = tl.load(lse_ptr + row, mask=known, other=0.0)
    radial = tl.zeros([ROWS, BLOCK], dtype=ACC)
    for first in range(0, positions, BLOCK):
        inside = known[:, None] & (first + lanes < positions)
        share = tl.load(p + first + lanes, mask=inside, other=0.0).to(ACC)
        ds = tl.load(d + first + lanes, mask=inside, other=0.0) - mean[:, None]
        ds = factor[:, None] * share * ds
        cosine = (tl.log(tl.where(share > 0, share, 1.0)) + lse[:, None]) / temperature
        radial += ds * cosine
        key = tl.load(k_norm_ptr + t[:, None] * positions + first + lanes, mask=inside, other=0.0)
        other = tl.where(key < FLOOR, 0.0, 1.0 / tl.where(key < FLOOR, 1.0, key))
        tl.store(d + first + lanes, ds * inverse[:, None] * other, mask=inside)
    tl.store(radial_ptr + row, tl.sum(radial, axis=1) * inverse * inverse, mask=known)


@triton.jit
def _key_radial_kernel(
    d_ptr, p_ptr, lse_ptr, q_norm_ptr, k_norm_ptr, index_ptr, radial_ptr, positions, targets,
    blocks, temperature: tl.constexpr, FLOOR: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """radial[b, j] = sum over i of dG G / |k|^2: what key j loses along itself.

    One program owns BLOCK_J keys of a pairing. G comes back from P and its log-sum-exp.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    t = tl.minimum(tl.maximum(tl.load(index_ptr + b), 0), targets - 1)
    total = tl.zeros([BLOCK_I, BLOCK_J], dtype=ACC)
    for first in range(0, positions, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        at = (b * positions + i[:, None]) * positions + j[None, :]
        inside = (i[:, None] < positions) & (j[None, :] < positions)
        share = tl.load(p_ptr + at, mask=inside, other=0.0).to(ACC)
        lse = tl.load(lse_ptr + b * positions + i, mask=i < positions, other=0.0)
        norm = tl.load(q_norm_ptr + b * positions + i, mask=i < positions, other=0.0)
        cosine = (tl.log(tl.where(share > 0, share, 1.0)) + lse[:, None]) / temperature
        total += tl.load(d_ptr + at, mask=inside, other=0.0) * cosine * norm[:, None]
    key = tl.load(k_norm_ptr + t * positions + j, mask=j < positions, other=0.0)
    inverse = tl.where(key < FLOOR, 0.0, 1.0 / tl.where(key < FLOOR, 1.0, key))
    tl.store(radial_ptr + b * positions + j, tl.sum(total, axis=0) * inverse, mask=j < positions)


@triton.jit
def _gather_kernel(
    d_ptr, p_ptr, q_ptr, k_ptr, dw_ptr, mask_ptr, index_ptr, order_ptr, start_ptr,
    q_radial_ptr, k_radial_ptr, out_ptr, channels, positions, targets,
    q_b, q_c, q_s, k_b, k_c, k_s, dw_b, dw_c, dw_s, out_b, out_c, out_s, blocks,
    QUERY: tl.constexpr, KEY: tl.constexpr, WARPED: tl.constexpr, BLEND: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of sample t, every element written once; one program owns a tile of it.

    QUERY: dG k[index[t]] - radial q.  KEY: over the samples b whose target is t, in rising order,
    dG^T q + P^T (m dW), - radial k.  BLEND: + (1 - m) dW, and m counts in P^T too.
    """
    tile = tl.program_id(0)
    t = (tile // (blocks * tl.cdiv(positions, BLOCK_I))).to(tl.int64)
    i = tile // blocks % tl.cdiv(positions, BLOCK_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tile % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (i[:, None] < positions) & (c[None, :] < channels)
    total = tl.zeros([BLOCK_I, BLOCK_C], dtype=ACC)
    radial = tl.zeros([BLOCK_I], dtype=ACC)
    if QUERY:
        pick = tl.minimum(tl.maximum(tl.load(index_ptr + t), 0), targets - 1)
        for first in range(0, positions, BLOCK_J):
            j = first + tl.arange(0, BLOCK_J)
            known = (i[:, None] < positions) & (j[None, :] < positions)
            at = (t * positions + i[:, None]) * positions + j[None, :]
            d = tl.load(d_ptr + at, mask=known, other=0.0)
            known = (j[:, None] < positions) & (c[None, :] < channels)
            at = pick * k_b + j[:, None].to(tl.int64) * k_s + c[None, :].to(tl.int64) * k_c
            k = tl.load(k_ptr + at, mask=known, other=0.0).to(ACC)
            total = tl.dot(d, k, acc=total, input_precision=PRECISION, out_dtype=ACC)
        radial += tl.load(q_radial_ptr + t * positions + i, mask=i < positions, other=0.0)
    if KEY:
        for n in range(tl.load(start_ptr + t), tl.load(start_ptr + t + 1)):
            b = tl.load(order_ptr + n)
            radial += tl.load(k_radial_ptr + b * positions + i, mask=i < positions, other=0.0)
            for first in range(0, positions, BLOCK_J):
                j = first + tl.arange(0, BLOCK_J)
                known = (i[:, None] < positions) & (j[None, :] < positions)
                at = (b * positions + j[None, :]) * positions + i[:, None]
                d = tl.load(d_ptr + at, mask=known, other=0.0)
                rows = (j[:, None] < positions) & (c[None, :] < channels)
                q_at = b * q_b + j[:, None].to(tl.int64) * q_s + c[None, :].to(tl.int64) * q_c
                q = tl.load(q_ptr + q_at, mask=rows, other=0.0).to(ACC)
                total = tl.dot(d, q, acc=total, input_precision=PRECISION, out_dtype=ACC)
                if WARPED:
                    p = tl.load(p_ptr + at, mask=known, other=0.0).to(ACC)
                    if BLEND:
                        m = tl.load(mask_ptr + b * positions + j, mask=j < positions, other=0.0)
                        p = p * m[None, :]
                    w_at = b * dw_b + j[:, None].to(tl.int64) * dw_s
                    w_at += c[None, :].to(tl.int64) * dw_c
                    dw = tl.load(dw_ptr + w_at, mask=rows, other=0.0).to(ACC)
                    total = tl.dot(p, dw, acc=total, input_precision=PRECISION, out_dtype=ACC)
    own = q_ptr + t * q_b + i[:, None].to(tl.int64) * q_s + c[None, :].to(tl.int64) * q_c
    if not QUERY:
        own = k_ptr + t * k_b + i[:, None].to(tl.int64) * k_s + c[None, :].to(tl.int64) * k_c
    total -= radial[:, None] * tl.load(own, mask=inside, other=0.0).to(ACC)
    if BLEND:
        m = tl.load(mask_ptr + t * positions + i, mask=i < positions, other=0.0)[:, None]
        at = t * dw_b + i[:, None].to(tl.int64) * dw_s + c[None, :].to(tl.int64) * dw_c
        total += (1.0 - m) * tl.load(dw_ptr + at, mask=inside, other=0.0).to(ACC)
    out = out_ptr + t * out_b + i[:, None].to(tl.int64) * out_s + c[None, :].to(tl.int64) * out_c
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


class Matched(NamedTuple):
    """Maps as rows with unit stride along channels, their norms, and who meets whom."""

    q: Rows
    k: Rows
    q_norm: Tensor  # [B, S]
    k_norm: Tensor  # [T, S]
    index: Tensor  # [B]


def dense(features: Tensor) -> Rows:
    """Rows with unit stride along channels: products read 128 bits at once."""
    map = rows(features)
    if map.channel == 1 or map.channels == 1:
        return map
    return rows(features.contiguous(memory_format=torch.channels_last))


def products(dtype: torch.dtype, *, exact: bool = True) -> dict[str, Any]:
    """Types of the products; `exact` where both factors have the dtype of the features.

    Otherwise one is a float32 gradient, which float16 may not hold: half-precision features meet
    it as TF32, which holds them exactly.
    """
    kind = accumulator_kind(dtype)
    narrow, dot = dtype.itemsize == 2, kind
    if narrow and exact and not INTERPRETED:  # the interpreter would multiply the bits of bfloat16
        dot = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    fast = narrow or (dtype == torch.float32 and allowed)
    types = {"ACC": kind, "PRECISION": "tf32" if fast else "ieee"}
    return {**types, "DOT": dot} if exact else types


def inner(q: Rows, k: Rows, index: Tensor, out: Tensor | None = None) -> Tensor:
    """[B, S, S]: inner products of the rows of q with those of their targets."""
    size, width = q.positions, q.tensor.element_size()
    if out is None:
        kind = accumulator(q.tensor.dtype)
        out = torch.empty(q.batches, size, size, dtype=kind, device=q.tensor.device)
    side = block(size, 64 if width < 8 else 32)
    blocks = triton.cdiv(size, side)
    _inner_kernel[(q.batches * blocks * blocks,)](
        q.tensor, k.tensor, index, out, q.channels, size, k.batches, *q[4:], *k[4:], blocks,
        BLOCK_I=side, BLOCK_J=side, BLOCK_C=block(q.channels, 128 // width),
        **products(q.tensor.dtype), **OPTIONS,
    )  # fmt: skip
    return out


def meet(source: Tensor, target: Tensor, index: Tensor) -> Matched:
    """The arguments of a call, ready for the kernels; one map is converted once."""
    q = dense(source)
    k = q if target is source else dense(target)
    q_norm = norms(q)
    return Matched(q, k, q_norm, q_norm if k is q else norms(k), index.contiguous())
