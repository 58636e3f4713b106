"""LbA's losses: pure functions from the network's outputs to named terms.

Spec: lba 3 (total). Golden: lba/e2e_tiny, lba/triplet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastreid_vi import _distributed, ops
from fastreid_vi.methods.base import Losses, accuracy, cross_entropy, widened
from fastreid_vi.methods.lba.recipe import LbAOptions


@dataclass
class Outputs:
    """What a training forward leaves for the losses; the dictionaries are by layer, 3 or 4."""

    pooled: Tensor  # [B, D] features before the BN neck
    logits: Tensor  # [B, n] of the plain features
    aligned_logits: dict[int, Tensor] = field(default_factory=dict)
    """[B, n] of the maps that were aligned after that layer."""
    dense: dict[int, Tensor] = field(default_factory=dict)
    """Scalar, the dense triplet loss of that layer."""


def lba_losses(
    outputs: Outputs, labels: Tensor, options: LbAOptions, *, equal_sizes: bool = False
) -> Losses:
    """All terms and L = L_ID + 1.0 L_IC + 0.5 L_DT, L_ID = CE + 1.0 L_tri (official weights).

    Half-precision outputs are widened first and autocast is off inside. In a run of several
    processes triplets are mined over the rows of all of them.

    Args:
        outputs: of one training forward.
        labels: [B] int64; rows with -1 are left out of the cross entropies.
        options: weights and margin.
        equal_sizes: every process has as many rows; spares an exchange that waits for the device.
    Returns:
        Terms `identity`, `triplet`, and for every aligned layer `consistency3`, `dense3`
        (`consistency4`, `dense4`) before their weights, `accuracy` (detached), and the total.
    """
    terms: dict[str, Tensor] = {}
    with torch.autocast(outputs.logits.device.type, enabled=False):
        logits = widened(outputs.logits)
        terms["identity"] = cross_entropy(logits, labels)
        terms["triplet"] = _batch_hard(widened(outputs.pooled), labels, options.margin, equal_sizes)
        total = terms["identity"] + options.triplet_weight * terms["triplet"]
        for layer, aligned_logits in outputs.aligned_logits.items():
            term = terms[f"consistency{layer}"] = cross_entropy(widened(aligned_logits), labels)
            total = total + options.ic_weight * term
        for layer, term in outputs.dense.items():
            terms[f"dense{layer}"] = term
            total = total + options.dt_weight * term
        terms["accuracy"] = accuracy(logits, labels)
    return Losses(terms, total)


def _batch_hard(pooled: Tensor, labels: Tensor, margin: float, equal_sizes: bool) -> Tensor:
    """Over both modalities together, not normalised."""
    if _distributed.world_size() > 1:
        pooled, labels = _distributed.joined(pooled, labels, averaged=True, equal_sizes=equal_sizes)
    return ops.batch_hard_triplet_loss(pooled, labels, margin=margin).loss
