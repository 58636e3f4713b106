"""Gate and batch norms of the modality distribution adapter: [B, C]-sized work, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import OPTIONS, block

COLUMNS = 32  # channels of one program


@triton.jit
def _load(ptr, b, c, batches, channels):
    """Tile of values [B, C], zeros outside."""
    at = b[:, None].to(tl.int64) * channels + c[None, :]
    inside = (b[:, None] < batches) & (c[None, :] < channels)
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _store(ptr, b, c, batches, channels, values):
    at = b[:, None].to(tl.int64) * channels + c[None, :]
    inside = (b[:, None] < batches) & (c[None, :] < channels)
    tl.store(ptr + at, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _opened(z, mean, rstd, weight, bias):
    """sigmoid(weight (z - mean) rstd + bias)"""
    return 1.0 / (1.0 + tl.exp(-(weight * ((z - mean) * rstd) + bias)))


@triton.jit
def _adapter_gate_kernel(
    z_ptr, x_mean_ptr, x_variance_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr,
    ca_mean_ptr, ca_var_ptr, norm_mean_ptr, norm_var_ptr, gate_ptr, a_ptr, d_ptr,
    batches, channels, eps: tl.constexpr,
    FIXED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g = sigmoid(BN(z)), and y = x + a (x - mean) + d with the batch norm of g x.

    One program owns BLOCK_C channels of all samples and walks over these. The variance of g x is
    g^2 v within a sample plus the spread of g mean between samples: no difference of large sums.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < channels
    weight = tl.load(weight_ptr + c, mask=there, other=0.0).to(tl.float64)[None, :]
    bias = tl.load(bias_ptr + c, mask=there, other=0.0).to(tl.float64)[None, :]
    lane = tl.arange(0, BLOCK_B)
    if FIXED:
        ca_mean = tl.load(ca_mean_ptr + c, mask=there, other=0.0)
        ca_var = tl.load(ca_var_ptr + c, mask=there, other=0.0)
        norm_mean = tl.load(norm_mean_ptr + c, mask=there, other=0.0)
        norm_var = tl.load(norm_var_ptr + c, mask=there, other=0.0)
    else:
        total = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float64)
        for first in range(0, batches, BLOCK_B):
            total += _load(z_ptr, first + lane, c, batches, channels)
        ca_mean = tl.sum(total, axis=0) / batches
        total = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float64)
        for first in range(0, batches, BLOCK_B):
            d = _load(z_ptr, first + lane, c, batches, channels) - ca_mean[None, :]
            total += tl.where((first + lane)[:, None] < batches, d * d, 0.0)
        ca_var = tl.sum(total, axis=0) / batches
        tl.store(ca_mean_ptr + c, ca_mean, mask=there)
        tl.store(ca_var_ptr + c, ca_var, mask=there)
    ca_rstd = (1.0 / tl.sqrt(ca_var + eps))[None, :]
    if not FIXED:
        total = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float64)
        for first in range(0, batches, BLOCK_B):
            b = first + lane
            z = _load(z_ptr, b, c, batches, channels)
            gate = _opened(z, ca_mean[None, :], ca_rstd, weight, bias)
            total += gate * _load(x_mean_ptr, b, c, batches, channels)
        norm_mean = tl.sum(total, axis=0) / batches
        total = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float64)
        for first in range(0, batches, BLOCK_B):
            b = first + lane
            z = _load(z_ptr, b, c, batches, channels)
            gate = _opened(z, ca_mean[None, :], ca_rstd, weight, bias)
            between = gate * _load(x_mean_ptr, b, c, batches, channels) - norm_mean[None, :]
            within = gate * gate * _load(x_variance_ptr, b, c, batches, channels)
            total += tl.where(b[:, None] < batches, within + between * between, 0.0)
        norm_var = tl.sum(total, axis=0) / batches
        tl.store(norm_mean_ptr + c, norm_mean, mask=there)
        tl.store(norm_var_ptr + c, norm_var, mask=there)
    norm_weight = tl.load(norm_weight_ptr + c, mask=there, other=0.0).to(tl.float64)
    norm_bias = tl.load(norm_bias_ptr + c, mask=there, other=0.0).to(tl.float64)[None, :]
    scale = (norm_weight / tl.sqrt(norm_var + eps))[None, :]
    for first in range(0, batches, BLOCK_B):
        b = first + lane
        z = _load(z_ptr, b, c, batches, channels)
        gate = _opened(z, ca_mean[None, :], ca_rstd, weight, bias)
        u = gate * _load(x_mean_ptr, b, c, batches, channels)
        _store(gate_ptr, b, c, batches, channels, gate)
        _store(a_ptr, b, c, batches, channels, scale * gate)
        _store(d_ptr, b, c, batches, channels, scale * (u - norm_mean[None, :]) + norm_bias)


@triton.jit
def _adapter_gate_gradient_kernel(
    z_ptr, x_mean_ptr, x_variance_ptr, gate_ptr, sum_g_ptr, sum_gc_ptr,
    norm_weight_ptr, ca_mean_ptr, ca_var_ptr, norm_mean_ptr, norm_var_ptr,
    on_g_ptr, on_x_ptr, offset_ptr, dz_ptr, parameters_ptr,
    batches, channels, positions, eps: tl.constexpr,
    FIXED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = on_g g - on_x (x - mean) - offset + what comes through dz, the gradient of z.

    Programs as in the gate kernel. `parameters` [4, C]: gradients of the gate's weight and bias and
    of the map's weight and bias.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < channels
    lane = tl.arange(0, BLOCK_B)
    ca_mean = tl.load(ca_mean_ptr + c, mask=there, other=0.0)[None, :]
    ca_rstd = (1.0 / tl.sqrt(tl.load(ca_var_ptr + c, mask=there, other=0.0) + eps))[None, :]
    norm_mean = tl.load(norm_mean_ptr + c, mask=there, other=0.0)[None, :]
    rstd = (1.0 / tl.sqrt(tl.load(norm_var_ptr + c, mask=there, other=0.0) + eps))[None, :]
    norm_weight = tl.load(norm_weight_ptr + c, mask=there, other=0.0).to(tl.float64)[None, :]
    scale = norm_weight * rstd
    on_bias = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float64)
    on_weight = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float64)
    for first in range(0, batches, BLOCK_B):
        b = first + lane
        g = _load(gate_ptr, b, c, batches, channels)
        sum_g = _load(sum_g_ptr, b, c, batches, channels)
        sum_gc = _load(sum_gc_ptr, b, c, batches, channels)
        u = g * _load(x_mean_ptr, b, c, batches, channels)
        on_bias += sum_g
        on_weight += rstd * (g * sum_gc + (u - norm_mean) * sum_g)
    norm_dbias = tl.sum(on_bias, axis=0)[None, :]
    norm_dweight = tl.sum(on_weight, axis=0)[None, :]
    shared_x = tl.zeros([1, BLOCK_C], dtype=tl.float64)
    shared_constant = tl.zeros([1, BLOCK_C], dtype=tl.float64)
    if not FIXED:
        shared_x = scale * norm_dweight / batches / positions
        shared_constant = scale * norm_dbias / batches / positions
    on_bias = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float64)
    on_weight = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float64)
    for first in range(0, batches, BLOCK_B):
        b = first + lane
        g = _load(gate_ptr, b, c, batches, channels)
        mean = _load(x_mean_ptr, b, c, batches, channels)
        on_x = shared_x * rstd * g
        offset = shared_constant + shared_x * (rstd * (g * mean - norm_mean))
        dg = mean * (scale * _load(sum_g_ptr, b, c, batches, channels) - positions * offset)
        dg += scale * _load(sum_gc_ptr, b, c, batches, channels)
        dg -= positions * on_x * _load(x_variance_ptr, b, c, batches, channels)
        dz = dg * g * (1.0 - g)  # g is zero outside
        normal = (_load(z_ptr, b, c, batches, channels) - ca_mean) * ca_rstd
        on_bias += dz
        on_weight += dz * normal
        _store(on_g_ptr, b, c, batches, channels, 1.0 + scale * g)
        _store(on_x_ptr, b, c, batches, channels, on_x * g)
        _store(offset_ptr, b, c, batches, channels, offset * g)
        _store(dz_ptr, b, c, batches, channels, dz)
    dbias, dweight = tl.sum(on_bias, axis=0), tl.sum(on_weight, axis=0)
    tl.store(parameters_ptr + c, dweight, mask=there)
    tl.store(parameters_ptr + channels + c, dbias, mask=there)
    tl.store(parameters_ptr + 2 * channels + c[None, :], norm_dweight, mask=there[None, :])
    tl.store(parameters_ptr + 3 * channels + c[None, :], norm_dbias, mask=there[None, :])


def open_gate(
    z: Tensor,
    mean: Tensor,
    variance: Tensor,
    vectors: Sequence[Tensor],
    statistics: Sequence[Tensor],
    eps: float,
    fixed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, and a and d of y = x + a (x - mean) + d in the dtype of `variance`; [B, C] each.

    `statistics` [C], float64, of the gate's and the map's norm: given if `fixed`, else filled.
    """
    batches, channels = z.shape
    gate, a, d = torch.empty_like(z), torch.empty_like(variance), torch.empty_like(variance)
    _adapter_gate_kernel[(triton.cdiv(channels, COLUMNS),)](
        z, mean, variance, *(v.contiguous() for v in vectors), *statistics, gate, a, d,
        batches, channels, eps=eps, FIXED=fixed,
        BLOCK_B=block(batches, 32), BLOCK_C=COLUMNS, **OPTIONS,
    )  # fmt: skip
    return gate, a, d


def close_gate(
    z: Tensor,
    mean: Tensor,
    variance: Tensor,
    gate: Tensor,
    sums: Sequence[Tensor],
    norm_weight: Tensor,
    statistics: Sequence[Tensor],
    positions: int,
    eps: float,
    fixed: bool,
) -> tuple[Tensor, ...]:
    """`on_g`, `on_x`, `offset` [B, C] in the dtype of `sums`; in float64, gradients of the gate's
    norm [B, C] and of the parameters [4, C].
    """
    batches, channels = z.shape
    maps = [torch.empty_like(sums[0]) for _ in range(3)]
    dz, parameters = torch.empty_like(z), z.new_empty(4, channels)
    _adapter_gate_gradient_kernel[(triton.cdiv(channels, COLUMNS),)](
        z, mean, variance, gate, *sums, norm_weight.contiguous(), *statistics,
        *maps, dz, parameters, batches, channels, positions, eps=eps, FIXED=fixed,
        BLOCK_B=block(batches, 32), BLOCK_C=COLUMNS, **OPTIONS,
    )  # fmt: skip
    return *maps, dz, parameters
