"""The baseline's losses.

Spec: lba 3 (L_ID = CE + L_tri).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_vi import ops
from fastreid_vi._distributed import joined
from fastreid_vi.methods.base import Losses, accuracy, cross_entropy, widened
from fastreid_vi.methods.baseline.recipe import BaselineOptions


def baseline_losses(
    embeddings: Tensor, logits: Tensor, labels: Tensor, options: BaselineOptions
) -> Losses:
    """L = CE + triplet_weight L_tri; half precision is widened first and autocast is off inside.

    Under several processes pairs are mined over the rows of all of them, and the gradient of the
    triplet loss suits averaging over processes.

    Args:
        embeddings: [B, D], pooled features before the neck, not normalised.
        logits: [B, n].
        labels: [B] int64; rows with -1 are left out of the cross entropy.
        options: margin and weight of the triplet loss.
    Returns:
        Terms `identity`, `triplet` before its weight, `accuracy` (detached), and the total.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = widened(logits)
        identity = cross_entropy(logits, labels)
        rows, row_labels = joined(widened(embeddings), labels, averaged=True)
        triplet = ops.batch_hard_triplet_loss(rows, row_labels, margin=options.margin).loss
    terms = {"identity": identity, "triplet": triplet, "accuracy": accuracy(logits, labels)}
    return Losses(terms, identity + options.triplet_weight * triplet)
