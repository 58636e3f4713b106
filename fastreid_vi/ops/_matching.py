"""The maths that correspondences share: rows, masks, matching probabilities and their gradients.

Rows are [B, S, C] in the accumulation dtype, one per position of a map.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi.ops._shared import accumulator, layout_of

Weighting = Literal["sample", "batch"]
FLOOR = 1e-12  # of norms, and of the range of a mask


def mask_rows(name: str, mask: Tensor, features: Tensor) -> Tensor:
    """A checked mask as [B, S], detached, in the accumulation dtype."""
    _checks.floating(name, mask, "B, 1, H, W")
    shape = (features.shape[0], 1, *features.shape[2:])
    if tuple(mask.shape) != shape or mask.device != features.device:
        raise ValueError(
            f"{name}: expected shape {list(shape)} on {features.device}, "
            f"got {_checks.described(mask)} on {mask.device}"
        )
    return mask.detach().to(accumulator(features.dtype)).flatten(1)


def rows_of(features: Tensor) -> Tensor:
    """[B, S, C]. Dense rows, so that equal positions get norms that are equal to the last bit."""
    rows = features.to(accumulator(features.dtype)).flatten(2).transpose(1, 2)
    return rows.contiguous()


def map_of(rows: Tensor, features: Tensor) -> Tensor:
    """Rows back as a map, in the dtype and memory format of `features`."""
    result = rows.transpose(1, 2).reshape(rows.shape[0], *features.shape[1:]).to(features.dtype)
    return result.contiguous(memory_format=layout_of(features))


def picked(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index]; an entry out of range, refused on the CPU, reads a neighbour elsewhere."""
    return rows[index.clamp(0, max(rows.shape[0] - 1, 0))]


def min_max(values: Tensor) -> Tensor:
    """[B, S], each row stretched to [0, 1]."""
    values = values - values.amin(1, keepdim=True)
    return values / (values.amax(1, keepdim=True) + FLOOR)


def mask_of(rows: Tensor) -> Tensor:
    """[B, S] from rows [B, S, C]."""
    return min_max(torch.linalg.vector_norm(rows, dim=2))


def comask_of(p: Tensor, source_mask: Tensor, target_mask: Tensor) -> Tensor:
    """[B, S] from P [B, S, S] and the masks of both sides, [B, S]."""
    return min_max(source_mask * (p @ target_mask[..., None])[..., 0])


def match(q: Tensor, k: Tensor, dtype: torch.dtype, temperature: float) -> tuple[Tensor, Tensor]:
    """P [B, S, S], rounded to `dtype`, and the log-sum-exp of its logits, [B, S]."""
    unit_q = q / torch.linalg.vector_norm(q, dim=2, keepdim=True).clamp_min(FLOOR)
    unit_k = k / torch.linalg.vector_norm(k, dim=2, keepdim=True).clamp_min(FLOOR)
    logits = temperature * (unit_q @ unit_k.transpose(1, 2))
    lse = logits.logsumexp(2)
    return (logits - lse[..., None]).exp().to(dtype), lse


def match_gradient(
    dp: Tensor, q: Tensor, k: Tensor, p: Tensor, lse: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """From dP [B, S, S] to the gradients of the rows q and k, through softmax and cosine."""
    cosine = torch.where(p > 0, (p.log() + lse[..., None]) / temperature, 0.0)
    # The rounded rows of P sum to one only nearly; what all dP of a row share must still cancel.
    shared = (p * dp).sum(2, keepdim=True) / p.sum(2, keepdim=True)
    ds = temperature * p * (dp - shared)
    inverse_q, inverse_k = _inverse_norm(q), _inverse_norm(k)
    dg = ds * inverse_q * inverse_k.transpose(1, 2)  # of the inner products
    radial_q = (ds * cosine).sum(2)[..., None] * inverse_q.square()
    radial_k = (ds * cosine).sum(1)[..., None] * inverse_k.square()
    return dg @ k - radial_q * q, dg.transpose(1, 2) @ q - radial_k * k


def _inverse_norm(rows: Tensor) -> Tensor:
    """[B, S, 1]: 1 / norm, and zero where a position has no direction to differentiate (L11)."""
    norm = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    return torch.where(norm < FLOOR, 0.0, 1.0 / norm)


def scattered(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """[count, S, C]: sums of the rows that share a target."""
    total = rows.new_zeros(count, *rows.shape[1:])
    return total.index_add_(0, index.clamp(0, max(count - 1, 0)), rows)


def position_losses(
    near: Tensor, far: Tensor, weight: Tensor, margin: float, weighting: str
) -> tuple[Tensor, Tensor]:
    """Dense triplet loss of distances [B, S], and [2, B, S]: its slopes over the distances.

    slopes[0] = dL/dnear / near and slopes[1] = dL/dfar / far, zero where a distance is: times the
    difference vector they are the gradient.
    """
    hinge = margin + near - far
    count = max(near.numel(), 1)
    if weighting == "batch" and len(near) > 0:
        weight = weight.mean(0, keepdim=True).expand_as(near)
    loss = (weight * hinge.clamp_min(0.0)).sum() / count
    slope = torch.where(hinge > 0.0, weight, 0.0) / count
    slopes = torch.stack((slope / near, -slope / far))
    return loss, torch.where(torch.stack((near, far)) > 0.0, slopes, 0.0)
