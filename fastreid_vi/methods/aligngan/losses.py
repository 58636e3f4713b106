"""AlignGAN's losses: functions from the networks' outputs to named terms.

Spec: aligngan 3.3, 3.4. Golden: aligngan/triplet, aligngan/steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastreid_vi import ops
from fastreid_vi._distributed import joined, world_size
from fastreid_vi.methods.aligngan.embedder import Embedded
from fastreid_vi.methods.aligngan.recipe import AlignGANOptions
from fastreid_vi.methods.base import Losses, accuracy, widened
from fastreid_vi.methods.base import cross_entropy as identity


class Side(NamedTuple):
    """One side of a training batch: embedder's outputs and labels [n]."""

    out: Embedded
    labels: Tensor


def adversarial(scores: Tensor, target: float) -> Tensor:
    """Least-squares GAN: mean over all scores of (score - target)^2."""
    return (widened(scores) - target).square().mean()


def distance(images: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference over all pixels (L1 loss)."""
    return (widened(images) - widened(target)).abs().mean()


def batch_hard(
    anchors: Side,
    candidates: Side | None = None,
    *,
    margin: float = 1.0,
    soft_bh: tuple[int, int] = (0, 0),
) -> Tensor:
    """Cosine batch-hard triplet loss: mean over anchors of max(0, margin + hard_n - hard_p).

    hard_p is the smallest cosine similarity to a candidate of the anchor's identity, hard_n the
    largest to one of another. An anchor without a positive or without a negative adds zero.

    Over several processes, all anchors meet all candidates.

    Args:
        anchors: [n, D] embeddings and labels.
        candidates: [m, D] and labels; None for the anchors themselves.
        margin: hinge offset.
        soft_bh: take the k-th hardest positive and negative, counted from 0.
    Returns:
        Scalar.

    Spec: aligngan 3.3. Golden: aligngan/triplet.
    """
    x, labels = _all_rows(anchors)
    y, others = (x, labels) if candidates is None else _all_rows(candidates)
    if soft_bh == (0, 0):
        references = {} if candidates is None else {"references": y, "reference_labels": others}
        return ops.batch_hard_triplet_loss(
            x, labels, margin=margin, metric="cosine", **references
        ).loss
    similarity = F.normalize(x) @ F.normalize(y).t()
    same = labels[:, None] == others[None, :]
    # Excluded ones take the far end of the order: reaching one makes the hinge zero.
    hard_p = _kth(torch.where(same, similarity, torch.inf), soft_bh[0])
    hard_n = -_kth(-torch.where(same, -torch.inf, similarity), soft_bh[1])
    return (margin + hard_n - hard_p).clamp(min=0).mean()


def _all_rows(side: Side) -> tuple[Tensor, Tensor]:
    embedding = widened(side.out.embedding)
    if world_size() == 1:
        return embedding, side.labels
    rows, labels = joined(embedding, side.labels, equal_sizes=True, averaged=True)
    return rows, labels


def _kth(values: Tensor, k: int) -> Tensor:
    """The k-th smallest of every row, counted from 0; infinity where there are not so many."""
    if k >= values.shape[1]:
        return torch.full_like(values[:, 0], torch.inf)
    return values.sort(dim=1).values[:, k]


# The phases. Each function is called inside autocast and leaves it.


def feature_warmup_losses(real: Side, options: AlignGANOptions) -> Losses:
    """Stage A, infrared images alone: identity + triplet."""
    with _full_precision(real.labels):
        terms = {
            "identity": identity(real.out.logits, real.labels),
            "triplet": batch_hard(real, margin=options.margin, soft_bh=options.soft_bh),
        }
        shown = {"accuracy": accuracy(real.out.logits, real.labels)}
    return _weighted(terms, {"triplet": options.feature_triplet_weight}, shown)


def feature_losses(fake: Side, real: Side, scores: Tensor, options: AlignGANOptions) -> Losses:
    """Stage C, encoder and embedder: identities and triplets of both sides + 0.1 adversarial.

    Args:
        fake: translated visible images.
        real: infrared images.
        scores: of the joint discriminator for (real image, fake feature).
        options: weights and variants.
    """
    with _full_precision(scores):
        triplet = _triplet(options)
        terms = {
            "identity_fake": identity(fake.out.logits, fake.labels),
            "identity_real": identity(real.out.logits, real.labels),
            "triplet_fake": triplet(fake, real),
            "triplet_real": triplet(real, fake),
            "gan": adversarial(scores, 1.0),
        }
        shown = {
            "accuracy_fake": accuracy(fake.out.logits, fake.labels),
            "accuracy_real": accuracy(real.out.logits, real.labels),
        }
    triplets = dict.fromkeys(("triplet_fake", "triplet_real"), options.feature_triplet_weight)
    return _weighted(terms, {**triplets, "gan": options.feature_gan_weight}, shown)


class Translation(NamedTuple):
    """One direction of the generators' step, judged."""

    scores: Tensor  # of the discriminator of the modality translated to, for the fakes
    cycle: Tensor  # the source images, translated there and back
    mapping: Tensor  # images of the modality translated to, through the same generator
    source: Tensor  # what `cycle` should be
    target: Tensor  # what `mapping` should be


def generator_losses(
    visible: Translation,
    infrared: Translation,
    fake: Side,
    real: Side,
    options: AlignGANOptions,
) -> Losses:
    """Stages B and C, generators: gan + 10 cycle + 5 mapping + 0.1 triplet + 0.1 identity.

    Args:
        visible: infrared images made visible.
        infrared: visible images made infrared.
        fake: visible images made infrared, through encoder and embedder.
        real: infrared images, likewise, without gradient.
        options: weights and variants.
    """
    with _full_precision(visible.scores):
        triplet = _triplet(options)
        anchors, candidates = real, fake
        if options.pixel_triplet_labels == "official":
            anchors, candidates = Side(real.out, fake.labels), Side(fake.out, real.labels)
        ways = torch.stack([_judged(visible), _judged(infrared)]).mean(dim=0)
        terms = {
            "gan": ways[0],
            "cycle": ways[1],
            "mapping": ways[2],
            "triplet": triplet(fake, real) + triplet(anchors, candidates),
            "identity": identity(fake.out.logits, fake.labels),
        }
        shown = {"accuracy": accuracy(fake.out.logits, fake.labels)}
    weights = {
        "cycle": options.cycle_weight,
        "mapping": options.mapping_weight,
        "triplet": options.pixel_triplet_weight,
        "identity": options.pixel_identity_weight,
    }
    return _weighted(terms, weights, shown)


def discriminator_losses(real: Tensor, fakes: Mapping[str, Tensor]) -> Losses:
    """(real to 1 + mean of all kinds of fakes to 0) / 2.

    Args:
        real: scores of real images or pairs.
        fakes: kind -> scores.
    """
    with _full_precision(real):
        terms = {"real": adversarial(real, 1.0)}
        terms |= {kind: adversarial(scores, 0.0) for kind, scores in fakes.items()}
    return _weighted(terms, {"real": 0.5, **dict.fromkeys(fakes, 0.5 / len(fakes))}, {})


def _full_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def _triplet(options: AlignGANOptions) -> Callable[[Side, Side], Tensor]:
    def triplet(anchors: Side, candidates: Side) -> Tensor:
        return batch_hard(anchors, candidates, margin=options.margin, soft_bh=options.soft_bh)

    return triplet


def _judged(way: Translation) -> Tensor:
    """[3]: adversarial, cycle and mapping loss of one direction."""
    gan = adversarial(way.scores, 1.0)
    return torch.stack([gan, distance(way.cycle, way.source), distance(way.mapping, way.target)])


def _weighted(
    terms: dict[str, Tensor], weights: Mapping[str, float], shown: dict[str, Tensor]
) -> Losses:
    parts = [weights.get(name, 1.0) * value for name, value in terms.items()]
    total = torch.stack(parts).sum()
    return Losses({**terms, **shown}, total)
