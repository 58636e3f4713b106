"""LbA's block, backward. With turn = dL/dd / d at a position, times its mask m, a pairing gives

dF_b += turn (m (f - w) + eps)        dW = m dR - turn (m (f - w) + eps)

(dR of the positive pairing only). dP = dW f_t^T comes from inner products; f and w enter dF through
Q = dG - turn m P, once as Q f_t and once as Q^T f_b, and through (P^T (turn m) P) f_t. Where f and
w nearly agree these terms cancel: there `pull` is zero, `direct` takes the turn, and the kernels
named so form the differences, tile by tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreid_vi.kernels._dense_alignment import _smoothed


@triton.jit
def _distance_gradient_kernel(
    p_ptr, lse_ptr, gram_ptr, norm_ptr, sum_ptr, mask_ptr, slope_ptr, grad_ptr, index_ptr,
    d_ptr, pull_ptr, direct_ptr, batches, positions,
    temperature: tl.constexpr, eps: tl.constexpr, CANCELLED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d = [positive: m d] - turn (m (G - P M) + eps sums) = dP; one program owns BLOCK_I rows.

    G comes back from P and its log-sum-exp. On entry d of the positive pairing is dR f_t^T.
    """
    blocks = tl.cdiv(positions, BLOCK_I)
    pairing = (tl.program_id(0) // blocks).to(tl.int64)  # the positive ones, then the negative
    b = pairing % batches
    i = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    t = tl.minimum(tl.maximum(tl.load(index_ptr + pairing), 0), batches - 1)
    row, known = pairing * positions + i, i < positions
    m = tl.load(mask_ptr + b * positions + i, mask=known, other=0.0)
    turn = tl.load(grad_ptr) * tl.load(slope_ptr + row, mask=known, other=0.0) * m
    lse = tl.load(lse_ptr + row, mask=known, other=0.0)
    length = tl.load(norm_ptr + b * positions + i, mask=known, other=0.0)
    whole = tl.load(gram_ptr + (b * positions + i) * positions + i, mask=known, other=0.0)
    apart = whole.to(tl.float64)
    for first in range(0, positions, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        own = _smoothed(
            p_ptr, gram_ptr + t * positions * positions, row, i, j, positions,
            BLOCK_I, BLOCK_J, BLOCK_K, ACC, PRECISION,
        )  # fmt: skip
        inside = known[:, None] & (j[None, :] < positions)
        at = row[:, None] * positions + j[None, :]
        p = tl.load(p_ptr + at, mask=inside, other=0.0).to(ACC)
        norm = tl.load(norm_ptr + t * positions + j, mask=j < positions, other=0.0)
        total = tl.load(sum_ptr + t * positions + j, mask=j < positions, other=0.0)
        cosine = (tl.log(tl.where(p > 0, p, 1.0)) + lse[:, None]) / temperature
        cross = cosine * length[:, None] * norm[None, :]
        apart += tl.sum(p.to(tl.float64) * (own - 2.0 * cross).to(tl.float64), axis=1)
        d = -turn[:, None] * (m[:, None] * (cross - own) + eps * total[None, :])
        given = inside & (row < batches * positions)[:, None]
        d += m[:, None] * tl.load(d_ptr + at, mask=given, other=0.0)
        tl.store(d_ptr + at, d, mask=inside)
    cancels = apart < CANCELLED * whole.to(tl.float64)
    tl.store(pull_ptr + row, tl.where(cancels, 0.0, turn), mask=known)
    tl.store(direct_ptr + row, tl.where(cancels, turn, 0.0), mask=known)


@triton.jit
def _away(
    p_ptr, x_ptr, mask_ptr, pairing, b, t, i, c, channels, positions, x_b, x_c, x_s,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_I, BLOCK_C]: m (f - w) of a pairing at positions i and channels c."""
    row = pairing * positions + i
    warped = tl.zeros([BLOCK_I, BLOCK_C], dtype=ACC)
    for first in range(0, positions, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        known = (i[:, None] < positions) & (k[None, :] < positions)
        p = tl.load(p_ptr + row[:, None] * positions + k[None, :], mask=known, other=0.0).to(ACC)
        known = (k[:, None] < positions) & (c[None, :] < channels)
        at = t * x_b + k[:, None].to(tl.int64) * x_s + c[None, :].to(tl.int64) * x_c
        key = tl.load(x_ptr + at, mask=known, other=0.0).to(ACC)
        warped = tl.dot(p, key, acc=warped, input_precision=PRECISION, out_dtype=ACC)
    inside = (i[:, None] < positions) & (c[None, :] < channels)
    at = b * x_b + i[:, None].to(tl.int64) * x_s + c[None, :].to(tl.int64) * x_c
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)
    m = tl.load(mask_ptr + b * positions + i, mask=i < positions, other=0.0)
    return m[:, None] * (x - warped)


@triton.jit
def _direct_inner_kernel(
    p_ptr, x_ptr, dr_ptr, mask_ptr, direct_ptr, index_ptr, d_ptr,
    batches, channels, positions, x_b, x_c, x_s, dr_b, dr_c, dr_s, blocks,
    eps: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d = dW f_t^T in the rows where `direct` is not zero; one program owns a tile."""
    down = tl.cdiv(positions, BLOCK_I)
    pairing = (tl.program_id(0) // (blocks * down)).to(tl.int64)
    b = pairing % batches
    i = tl.program_id(0) // blocks % down * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(0) % blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    row = pairing * positions + i
    turn = tl.load(direct_ptr + row, mask=i < positions, other=0.0)
    if tl.sum((turn != 0).to(tl.int32), axis=0) == 0:
        return
    t = tl.minimum(tl.maximum(tl.load(index_ptr + pairing), 0), batches - 1)
    m = tl.load(mask_ptr + b * positions + i, mask=i < positions, other=0.0)
    total = tl.zeros([BLOCK_I, BLOCK_J], dtype=ACC)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        dw = _away(
            p_ptr, x_ptr, mask_ptr, pairing, b, t, i, c, channels, positions, x_b, x_c, x_s,
            BLOCK_I, BLOCK_J, BLOCK_C, ACC, PRECISION,
        )  # fmt: skip
        dw = -turn[:, None] * (dw + eps)
        given = ((i < positions) & (row < batches * positions))[:, None] & (c[None, :] < channels)
        at = b * dr_b + i[:, None].to(tl.int64) * dr_s + c[None, :].to(tl.int64) * dr_c
        dw += m[:, None] * tl.load(dr_ptr + at, mask=given, other=0.0).to(ACC)
        known = (j[None, :] < positions) & (c[:, None] < channels)
        at = t * x_b + j[None, :].to(tl.int64) * x_s + c[:, None].to(tl.int64) * x_c
        key = tl.load(x_ptr + at, mask=known, other=0.0).to(ACC)
        total = tl.dot(dw, key, acc=total, input_precision=PRECISION, out_dtype=ACC)
    out = d_ptr + row[:, None] * positions + j[None, :]
    tl.store(out, total, mask=(turn != 0)[:, None] & (j[None, :] < positions))


@triton.jit
def _warped_gram_kernel(
    p_ptr, pull_ptr, mask_ptr, order_ptr, start_ptr, out_ptr, along_ptr, batches, positions, blocks,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t] = sum of P^T (pull m) P, along[t] = sum of P^T pull, over the pairings with target t.

    One program owns a tile of out.
    """
    tile = tl.program_id(0)
    t = (tile // (blocks * tl.cdiv(positions, BLOCK_I))).to(tl.int64)
    i = tile // blocks % tl.cdiv(positions, BLOCK_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tile % blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    total = tl.zeros([BLOCK_I, BLOCK_J], dtype=ACC)
    along = tl.zeros([BLOCK_I], dtype=ACC)
    for side in tl.static_range(2):
        bounds = start_ptr + side * (batches + 1) + t
        for n in range(tl.load(bounds), tl.load(bounds + 1)):
            b = tl.load(order_ptr + side * batches + n)
            for first in range(0, positions, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                row = (side * batches + b) * positions + k
                turn = tl.load(pull_ptr + row, mask=k < positions, other=0.0)
                m = tl.load(mask_ptr + b * positions + k, mask=k < positions, other=0.0)
                known = (i[:, None] < positions) & (k[None, :] < positions)
                at = row[None, :] * positions + i[:, None]
                left = tl.load(p_ptr + at, mask=known, other=0.0).to(ACC) * turn[None, :]
                along += tl.sum(left, axis=1)
                known = (k[:, None] < positions) & (j[None, :] < positions)
                at = row[:, None] * positions + j[None, :]
                right = tl.load(p_ptr + at, mask=known, other=0.0).to(ACC)
                left *= m[None, :]
                total = tl.dot(left, right, acc=total, input_precision=PRECISION, out_dtype=ACC)
    out = out_ptr + (t * positions + i[:, None]) * positions + j[None, :]
    tl.store(out, total, mask=(i[:, None] < positions) & (j[None, :] < positions))
    end = tl.where(tile % blocks == 0, positions, 0)
    tl.store(along_ptr + t * positions + i, along, mask=i < end)


@triton.jit
def _rows_tile(ptr, b, k, c, channels, positions, stride_b, stride_c, stride_s):
    """[K, C] of sample b of a map."""
    inside = (k[:, None] < positions) & (c[None, :] < channels)
    at = b * stride_b + k[:, None].to(tl.int64) * stride_s
    return tl.load(ptr + at + c[None, :].to(tl.int64) * stride_c, mask=inside, other=0.0)


@triton.jit
def _dense_gather_kernel(
    d_ptr, p_ptr, x_ptr, dr_ptr, mask_ptr, pull_ptr, index_ptr, order_ptr, start_ptr,
    q_radial_ptr, k_radial_ptr, warped_ptr, along_ptr, out_ptr,
    batches, channels, positions, x_b, x_c, x_s, dr_b, dr_c, dr_s, out_b, out_c, out_s, blocks,
    eps: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of sample t, every element written once; one program owns a tile of it.

    As a query of both pairings Q f_t, as a key Q^T f_b + P^T (m dR) over the samples b whose
    target it is, in rising order; (P^T (pull m) P) f_t; then what is a multiple of f, dR or one.
    """
    tile = tl.program_id(0)
    t = (tile // (blocks * tl.cdiv(positions, BLOCK_I))).to(tl.int64)
    i = tile // blocks % tl.cdiv(positions, BLOCK_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tile % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    known = i < positions
    m = tl.load(mask_ptr + t * positions + i, mask=known, other=0.0)
    radial = tl.zeros([BLOCK_I], dtype=ACC)
    offset = -tl.load(along_ptr + t * positions + i, mask=known, other=0.0)
    total = tl.zeros([BLOCK_I, BLOCK_C], dtype=ACC)
    for side in tl.static_range(2):
        row = (side * batches + t) * positions + i
        turn = tl.load(pull_ptr + row, mask=known, other=0.0)
        radial += turn * m - tl.load(q_radial_ptr + row, mask=known, other=0.0)
        offset += turn
        pick = tl.minimum(tl.maximum(tl.load(index_ptr + side * batches + t), 0), batches - 1)
        for first in range(0, positions, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            inside = known[:, None] & (k[None, :] < positions)
            at = row[:, None] * positions + k[None, :]
            p = tl.load(p_ptr + at, mask=inside, other=0.0).to(ACC)
            q = tl.load(d_ptr + at, mask=inside, other=0.0) - (turn * m)[:, None] * p
            f = _rows_tile(x_ptr, pick, k, c, channels, positions, x_b, x_c, x_s).to(ACC)
            total = tl.dot(q, f, acc=total, input_precision=PRECISION, out_dtype=ACC)
    for first in range(0, positions, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = known[:, None] & (k[None, :] < positions)
        at = (t * positions + i[:, None]) * positions + k[None, :]
        w = tl.load(warped_ptr + at, mask=inside, other=0.0)
        f = _rows_tile(x_ptr, t, k, c, channels, positions, x_b, x_c, x_s).to(ACC)
        total = tl.dot(w, f, acc=total, input_precision=PRECISION, out_dtype=ACC)
    for side in tl.static_range(2):
        bounds = start_ptr + side * (batches + 1) + t
        for n in range(tl.load(bounds), tl.load(bounds + 1)):
            b = tl.load(order_ptr + side * batches + n)
            start = (side * batches + b) * positions
            radial -= tl.load(k_radial_ptr + start + i, mask=known, other=0.0)
            for first in range(0, positions, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                inside = known[:, None] & (k[None, :] < positions)
                at = (start + k[None, :]) * positions + i[:, None]
                p = tl.load(p_ptr + at, mask=inside, other=0.0).to(ACC)
                share = tl.load(mask_ptr + b * positions + k, mask=k < positions, other=0.0)
                pull = tl.load(pull_ptr + start + k, mask=k < positions, other=0.0)
                p *= share[None, :]
                q = tl.load(d_ptr + at, mask=inside, other=0.0) - pull[None, :] * p
                f = _rows_tile(x_ptr, b, k, c, channels, positions, x_b, x_c, x_s).to(ACC)
                total = tl.dot(q, f, acc=total, input_precision=PRECISION, out_dtype=ACC)
                if side == 0:
                    dr = _rows_tile(dr_ptr, b, k, c, channels, positions, dr_b, dr_c, dr_s)
                    total = tl.dot(
                        p, dr.to(ACC), acc=total, input_precision=PRECISION, out_dtype=ACC
                    )
    f = _rows_tile(x_ptr, t, i, c, channels, positions, x_b, x_c, x_s).to(ACC)
    dr = _rows_tile(dr_ptr, t, i, c, channels, positions, dr_b, dr_c, dr_s).to(ACC)
    total += radial[:, None] * f + (1.0 - m)[:, None] * dr + (eps * offset)[:, None]
    out = out_ptr + t * out_b + i[:, None].to(tl.int64) * out_s + c[None, :].to(tl.int64) * out_c
    inside = known[:, None] & (c[None, :] < channels)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _direct_gather_kernel(
    p_ptr, x_ptr, mask_ptr, direct_ptr, wanted_ptr, index_ptr, order_ptr, start_ptr, out_ptr,
    batches, channels, positions, x_b, x_c, x_s, out_b, out_c, out_s, blocks,
    eps: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out += u - P^T u with u = direct (m (f - w) + eps); a program owns a tile and leaves it alone
    unless its sample, or one whose target it is, has such rows."""
    tile = tl.program_id(0)
    t = (tile // (blocks * tl.cdiv(positions, BLOCK_I))).to(tl.int64)
    i = tile // blocks % tl.cdiv(positions, BLOCK_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tile % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    found = tl.full([], 0, dtype=tl.int32)
    total = tl.zeros([BLOCK_I, BLOCK_C], dtype=ACC)
    for side in tl.static_range(2):
        if tl.load(wanted_ptr + side * batches + t) != 0:
            found += 1
            pick = tl.minimum(tl.maximum(tl.load(index_ptr + side * batches + t), 0), batches - 1)
            away = _away(
                p_ptr, x_ptr, mask_ptr, side * batches + t, t, pick, i, c, channels, positions,
                x_b, x_c, x_s, BLOCK_I, BLOCK_K, BLOCK_C, ACC, PRECISION,
            )  # fmt: skip
            row = (side * batches + t) * positions + i
            turn = tl.load(direct_ptr + row, mask=i < positions, other=0.0)
            total += turn[:, None] * (away + eps)
        bounds = start_ptr + side * (batches + 1) + t
        for n in range(tl.load(bounds), tl.load(bounds + 1)):
            b = tl.load(order_ptr + side * batches + n)
            if tl.load(wanted_ptr + side * batches + b) != 0:
                found += 1
                for first in range(0, positions, BLOCK_K):
                    k = first + tl.arange(0, BLOCK_K)
                    away = _away(
                        p_ptr, x_ptr, mask_ptr, side * batches + b, b, t, k, c, channels,
                        positions, x_b, x_c, x_s, BLOCK_K, BLOCK_K, BLOCK_C, ACC, PRECISION,
                    )  # fmt: skip
                    row = (side * batches + b) * positions + k
                    turn = tl.load(direct_ptr + row, mask=k < positions, other=0.0)
                    known = (i[:, None] < positions) & (k[None, :] < positions)
                    at = row[None, :] * positions + i[:, None]
                    p = tl.load(p_ptr + at, mask=known, other=0.0).to(ACC)
                    dw = -turn[:, None] * (away + eps)
                    total = tl.dot(p, dw, acc=total, input_precision=PRECISION, out_dtype=ACC)
    if found > 0:
        inside = (i[:, None] < positions) & (c[None, :] < channels)
        out = out_ptr + t * out_b + i[:, None].to(tl.int64) * out_s
        out += c[None, :].to(tl.int64) * out_c
        total += tl.load(out, mask=inside, other=0.0).to(ACC)
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)
