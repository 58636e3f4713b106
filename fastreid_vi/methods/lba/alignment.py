"""Alignment of a batch of maps with their partners, and its dense triplet loss, by the options.

The official form is one fused op. What it cannot express is composed of smaller ops here.

Spec: lba 3 (mask to dense triplet), quirks L1, L3, L5, L6, L11. Golden: lba/cmalign_*.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from fastreid_vi import ops
from fastreid_vi.methods.base import widened
from fastreid_vi.methods.lba.pairing import Pairs
from fastreid_vi.methods.lba.recipe import LbAOptions

FLOOR: Final = 1e-12  # of norms, and of the range of a mask


def aligned_with(features: Tensor, pairs: Pairs, options: LbAOptions) -> ops.DenseAlignment:
    """Each map blended with its positive partner, and the dense triplet loss against the negative.

    Args:
        features: [B, C, H, W], floating.
        pairs: on the device of `features`.
        options: temperature, `dt_margin`, `weighting`, `dist_eps`, `renorm_comask`,
            `dt_reduction`, `zero_guard`.
    Returns:
        `DenseAlignment(aligned [B, C, H, W], loss, comask [B, 1, H, W])`; the loss is float32
        (float64 for float64).
    """
    block = _fused if options.renorm_comask and options.zero_guard else _composed
    with torch.autocast(features.device.type, enabled=False):
        aligned, loss, comask = block(features, pairs, options)
    if options.dt_reduction == "sum":
        loss = loss * (features.shape[2] * features.shape[3])
    return ops.DenseAlignment(aligned, loss, comask)


def _fused(features: Tensor, pairs: Pairs, options: LbAOptions) -> ops.DenseAlignment:
    return ops.dense_alignment(
        features,
        *pairs,
        temperature=options.temperature,
        margin=options.dt_margin,
        weighting=options.weighting,
        eps=options.dist_eps,
    )


def _composed(features: Tensor, pairs: Pairs, options: LbAOptions) -> ops.DenseAlignment:
    """What the fused op cannot express: an unguarded cosine, a co-attention as it is."""
    mask = ops.feature_mask(features)
    recon_pos, recon_neg = (_reconstruction(features, index, mask, options) for index in pairs)
    with torch.no_grad():
        comask = _comask(features, pairs.positive, mask, options)
    near, far = (_distance(features, recon, options.dist_eps) for recon in (recon_pos, recon_neg))
    hinge = (options.dt_margin + near - far).clamp_min(0.0)  # [B, H, W]
    weight = widened(comask[:, 0])
    if options.weighting == "batch":
        weight = weight.mean(0, keepdim=True)
    return ops.DenseAlignment(recon_pos, (weight * hinge).mean(), comask)


def _reconstruction(features: Tensor, index: Tensor, mask: Tensor, options: LbAOptions) -> Tensor:
    """r_i = m_i w_i + (1 - m_i) x_i, [B, C, H, W]."""
    if options.zero_guard:
        aligned = ops.align_features(features, index, mask=mask, temperature=options.temperature)
        return aligned.aligned
    # The gradient of a zero position is divided by FLOOR, as the official code has it (L11).
    rows = widened(features).flatten(2).transpose(1, 2)  # [B, N, C]
    unit = F.normalize(rows, dim=2, eps=FLOOR)
    cosine = unit @ unit[index].transpose(1, 2)
    warped = (options.temperature * cosine).softmax(2) @ rows[index]
    weight = widened(mask).flatten(2).transpose(1, 2)  # [B, N, 1]
    blended = weight * warped + (1.0 - weight) * rows
    return blended.transpose(1, 2).reshape(features.shape).to(features.dtype)


def _distance(features: Tensor, recon: Tensor, eps: float) -> Tensor:
    """[B, H, W]; its gradient is zero where it is zero itself (L3)."""
    difference = widened(features) - widened(recon)
    distance: Tensor = torch.linalg.vector_norm(difference + eps, dim=1)
    return distance


def _comask(features: Tensor, index: Tensor, mask: Tensor, options: LbAOptions) -> Tensor:
    """[B, 1, H, W]: the mask times what the correspondences see of the partner's mask (L5)."""
    probability = ops.correspondence_probability(
        features, features, index=index, temperature=options.temperature
    )
    seen = probability @ mask[index].flatten(1)[..., None]  # [B, N, 1]
    product = mask * seen.reshape(mask.shape)
    if not options.renorm_comask:
        return product
    product = product - product.amin((2, 3), keepdim=True)
    return product / (product.amax((2, 3), keepdim=True) + FLOOR)
