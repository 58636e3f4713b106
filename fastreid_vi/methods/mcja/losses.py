"""MCJA's losses: pure functions from embeddings and logits to named terms.

Spec: mcja 3.2, 3.3. Golden: mcja/head, mcja/cmr.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastreid_vi import ops
from fastreid_vi._distributed import joined
from fastreid_vi.config import VISIBLE
from fastreid_vi.methods.base import Losses, accuracy, cross_entropy, widened
from fastreid_vi.methods.mcja.recipe import MCJAOptions

NORM_FLOOR = 1e-8
"""Norms are bounded below by this in the cosine."""


def mcja_losses(
    embeddings: Tensor, logits: Tensor, labels: Tensor, modality: Tensor, options: MCJAOptions
) -> Losses:
    """L = CE + cmr_weight L_cmr; half precision is widened first and autocast is off inside.

    Under several processes the retrieval loss ranks the rows of all of them, and its gradient
    suits averaging over processes.

    Args:
        embeddings: [B, D], after the BN neck.
        logits: [B, n].
        labels: [B] int64; rows with -1 are left out of the cross entropy.
        modality: [B] int64.
        options: strength, path and weight of the retrieval loss.
    Returns:
        Terms `identity`, `retrieval` before its weight, `accuracy` (detached), and the total.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = widened(logits)
        identity = cross_entropy(logits, labels)
        rows = joined(widened(embeddings), labels, modality, averaged=True)
        retrieval = cross_modality_retrieval(
            *rows, strength=options.cmr_strength, path=options.cmr_path
        )
    terms = {"identity": identity, "retrieval": retrieval, "accuracy": accuracy(logits, labels)}
    return Losses(terms, identity + options.cmr_weight * retrieval)


def cross_modality_retrieval(
    embeddings: Tensor,
    labels: Tensor,
    modality: Tensor,
    *,
    strength: float = 0.5,
    path: Literal["auto", "pav"] = "auto",
) -> Tensor:
    """Cross-modality retrieval loss (CMR); see `ops.cross_modality_retrieval_loss`.

    Args:
        embeddings: [B, D], floating.
        labels: [B] int64.
        modality: [B] int64.
        strength: of the soft rank, > 0.
        path: "auto" is the op; "pav" ranks every row by sorting and pooling.
    Returns:
        Scalar; zero with a graph when a modality is absent or no query is valid (Q6).
    """
    if path == "auto":
        return ops.cross_modality_retrieval_loss(embeddings, labels, modality, strength=strength)
    ranked = rank_galleries(embeddings, modality, strength=strength)
    visible = modality == VISIBLE
    size = ranked.gallery.sum(1)  # [B]
    match = ranked.gallery & (labels[:, None] == labels[None, :])
    matches = match.sum(1)
    kept = (matches > 0) & (matches < size)
    target = torch.where(match, 1, size[:, None]).to(ranked.ranks.dtype)
    counted = ranked.gallery & kept[:, None]
    error = torch.where(counted, (ranked.ranks - target).abs(), 0.0).sum(1)  # [B]
    directions = torch.stack((visible, ~visible)) & kept  # [2, B]
    entries = (directions * size).sum(1)
    means = (directions * error).sum(1) / entries.clamp(min=1)
    return means.sum() / (entries > 0).sum().clamp(min=1)


class RankedGalleries(NamedTuple):
    """Every row as a query of the other modality; entries outside `gallery` mean nothing."""

    distance: Tensor  # [B, B], (1 - cos) / 2
    ranks: Tensor  # [B, B]
    gallery: Tensor  # [B, B] bool


def rank_galleries(
    embeddings: Tensor, modality: Tensor, *, strength: float = 0.5
) -> RankedGalleries:
    """Soft ranks of the other modality for each row, by sorting and pooling.

    The sizes of the modalities are values on the device, so that rows are not cut out: the own
    modality stays in the row, further away than any rank of the gallery could reach. Such entries
    form a block of their own behind the gallery and leave its ranks and gradients alone.

    Args:
        embeddings: [B, D], floating.
        modality: [B] int64.
        strength: of the soft rank, > 0.
    """
    norm = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True).clamp(min=NORM_FLOOR)
    unit = embeddings / norm
    distance = (1.0 - unit @ unit.t()) / 2.0
    visible = modality == VISIBLE
    gallery = visible[:, None] != visible[None, :]
    # Blocks merge across a gap of at most B ranks; a rank is `strength` of distance.
    beyond = 1.0 + 2.0 * strength * embeddings.shape[0]
    ranks = ops.soft_rank(torch.where(gallery, distance, beyond), strength=strength)
    return RankedGalleries(distance, ranks, gallery)
