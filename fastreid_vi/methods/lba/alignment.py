"""Alignment of a batch of maps with their partners, and its dense triplet loss, by the options.

The official form is one fused op. What it cannot express is composed of smaller ops here.

Spec: lba 3 (mask to dense triplet), quirks L1, L3, L5, L6, L11. Golden: lba/cmalign_*.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_vi import ops
from fastreid_vi.methods.base import widened
from fastreid_vi.methods.lba.pairing import Pairs
from fastreid_vi.methods.lba.recipe import LbAOptions


def aligned_with(features: Tensor, pairs: Pairs, options: LbAOptions) -> ops.DenseAlignment:
    """Each map blended with its positive partner, and the dense triplet loss against the negative.

    Args:
        features: [B, C, H, W], floating.
        pairs: on the device of `features`.
        options: temperature, `dt_margin`, `weighting`, `dist_eps`, `renorm_comask`, `dt_reduction`.
    Returns:
        `DenseAlignment(aligned [B, C, H, W], loss, comask [B, 1, H, W])`; the loss is float32
        (float64 for float64).
    """
    block = _fused if options.renorm_comask else _composed
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
    """With the co-attention as it is, a_i = m_i sum_j P_ij m'_j: the fused op normalises it."""
    mask = ops.feature_mask(features)
    recon_pos, recon_neg = (
        ops.align_features(features, index, mask=mask, temperature=options.temperature).aligned
        for index in pairs
    )
    with torch.no_grad():
        comask = _product_comask(features, pairs.positive, mask, options.temperature)
    near, far = (_distance(features, recon, options.dist_eps) for recon in (recon_pos, recon_neg))
    hinge = (options.dt_margin + near - far).clamp_min(0.0)  # [B, H, W]
    weight = widened(comask[:, 0])
    if options.weighting == "batch":
        weight = weight.mean(0, keepdim=True)
    return ops.DenseAlignment(recon_pos, (weight * hinge).mean(), comask)


def _distance(features: Tensor, recon: Tensor, eps: float) -> Tensor:
    """[B, H, W]; its gradient is zero where it is zero itself (L3)."""
    difference = widened(features) - widened(recon)
    distance: Tensor = torch.linalg.vector_norm(difference + eps, dim=1)
    return distance


def _product_comask(features: Tensor, index: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """[B, 1, H, W]: the mask times what the correspondences see of the partner's mask."""
    probability = ops.correspondence_probability(
        features, features, index=index, temperature=temperature
    )
    seen = probability @ mask[index].flatten(1)[..., None]  # [B, S, 1]
    return mask * seen.reshape(mask.shape)
