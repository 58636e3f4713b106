"""MPANet's losses: pure functions from the network's outputs to named terms.

Spec: mpanet 3. Golden: mpanet/center_cluster, mpanet/mutual_mean_learning, mpanet/train_forward.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastreid_vi import ops
from fastreid_vi._distributed import joined
from fastreid_vi.config import VISIBLE
from fastreid_vi.methods.base import IGNORED, Losses, accuracy, widened
from fastreid_vi.methods.mpanet.recipe import MPANetOptions


class Outputs(NamedTuple):
    """What a training forward leaves for the losses."""

    maps: Tensor  # [B, P, H, W] pattern maps
    embeddings: Tensor  # [B, D] before the BN neck
    logits: Tensor  # [B, n] of the shared classifier, as all logits after the neck
    visible_logits: Tensor  # [B, n]
    infrared_logits: Tensor  # [B, n]
    visible_mean_logits: Tensor  # [B, n] of the moving average, no gradient
    infrared_mean_logits: Tensor  # [B, n]


class ModalityLosses(NamedTuple):
    """Result of `mutual_mean_learning`, unweighted."""

    visible: Tensor
    infrared: Tensor
    divergence: Tensor


def mpanet_losses(
    outputs: Outputs, labels: Tensor, modality: Tensor, options: MPANetOptions
) -> Losses:
    """All terms and L = 0.5 L_sep + L_cc + L_id + 1.0 (L_v + L_i) + 2.5 L_kl (official weights).

    Half-precision outputs are widened first and autocast is off inside. Under several processes the
    centres are those of the rows of all of them, and the gradient of the centre cluster loss suits
    averaging over processes.

    Args:
        outputs: of one training forward.
        labels: [B] int64; rows with -1 are left out of the identity losses.
        modality: [B] int64.
        options: weights and variants.
    Returns:
        Terms `separation`, `center_cluster`, `identity`, `visible_identity`, `infrared_identity`,
        `divergence` before their weights, `accuracy` of the shared classifier (detached), and the
        total.
    """
    with torch.autocast(outputs.logits.device.type, enabled=False):
        outputs = Outputs(*(widened(tensor) for tensor in outputs))
        separation = ops.map_separation_loss(outputs.maps)
        if options.sep_normalize:
            separation = separation / (outputs.maps.shape[2] * outputs.maps.shape[3])
        center = center_cluster(
            *joined(outputs.embeddings, labels, averaged=True),
            margin=options.margin,
            mode=options.cc_mode,
            safe=options.cc_safe,
            expand=options.cc_expand,
        ).loss
        identity = _mean_where(_nll(outputs.logits.log_softmax(1), labels), labels != IGNORED)
        mutual = mutual_mean_learning(outputs, labels, modality, options.kl_direction)
        total = (
            options.sep_weight * separation
            + options.cc_weight * center
            + identity
            + options.sid_weight * (mutual.visible + mutual.infrared)
            + options.kl_weight * mutual.divergence
        )
    terms = {
        "separation": separation,
        "center_cluster": center,
        "identity": identity,
        "visible_identity": mutual.visible,
        "infrared_identity": mutual.infrared,
        "divergence": mutual.divergence,
        "accuracy": accuracy(outputs.logits, labels),
    }
    return Losses(terms, total)


def mutual_mean_learning(
    outputs: Outputs,
    labels: Tensor,
    modality: Tensor,
    direction: Literal["student_teacher", "teacher_student"] = "student_teacher",
) -> ModalityLosses:
    """Identity losses of the modality classifiers, and their pull to the other modality's mean.

    On visible rows the student is the visible classifier and the teacher the infrared mean
    classifier; on infrared rows the other way round. The divergence is summed over rows and divided
    by B.

    All rows go through all classifiers and are selected by a mask: selecting rows first would wait
    for the device. A modality without rows adds zero (`MPANet.training_step` refuses it where it
    can see it).

    Args:
        outputs: logits [B, n] of the four classifiers; the teachers are detached here.
        labels: [B] int64, -1 is left out of the identity losses.
        modality: [B] int64.
        direction: "student_teacher" is KL(student, teacher), the gradient passing through both
            factors of p (log p - log t); "teacher_student" is KL(teacher, student).
    Returns:
        `ModalityLosses(visible, infrared, divergence)`, scalars.
    """
    visible = modality == VISIBLE
    column = visible[:, None]
    student = torch.where(column, outputs.visible_logits, outputs.infrared_logits).log_softmax(1)
    mean_logits = torch.where(column, outputs.infrared_mean_logits, outputs.visible_mean_logits)
    teacher = mean_logits.detach().log_softmax(1)
    source, target = (student, teacher) if direction == "student_teacher" else (teacher, student)
    divergence = (source.exp() * (source - target)).sum() / max(labels.shape[0], 1)
    nll, counted = _nll(student, labels), labels != IGNORED
    return ModalityLosses(
        _mean_where(nll, counted & visible), _mean_where(nll, counted & ~visible), divergence
    )


def _nll(log_probability: Tensor, labels: Tensor) -> Tensor:
    """[B]; 0 where the label is ignored."""
    return F.nll_loss(log_probability, labels, ignore_index=IGNORED, reduction="none")


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the rows of a mask, 0 with a graph where there are none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def center_cluster(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.7,
    mode: Literal["pairs", "rows"] = "pairs",
    safe: bool = True,
    expand: bool = False,
) -> ops.CenterCluster:
    """Centre cluster loss in the paper's form or with the official code's quirks M1, M2, M3.

    The paper's form is `ops.center_cluster_loss`. The others are here in plain PyTorch; they wait
    for the device (the number of identities is a shape), as the official code does.

    Args:
        embeddings: [B, D], floating.
        labels: [B] int64.
        margin: least distance of two centres.
        mode: "pairs" averages the hinge over identity pairs; "rows" takes rows 0, K, 2K, ... as
            anchors, K = B / number of identities, and averages over all rows of other identities.
        safe: zero gradient at zero distance; False gives the official NaN.
        expand: centre distances as a^2 + b^2 - 2ab, each term rounded to the dtype of `embeddings`.
    Returns:
        `CenterCluster(loss, pull, push)`, loss = pull + push.
    Raises:
        ValueError: "rows" with a batch that is not P x K.
    """
    if mode == "pairs" and safe and not expand:
        return ops.center_cluster_loss(embeddings, labels, margin=margin)
    identities, group, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = embeddings.new_zeros(len(identities), embeddings.shape[1])
    centers = sums.index_add(0, group, embeddings) / counts[:, None]  # [P, D]
    square = (embeddings - centers.index_select(0, group)).square().sum(1)
    pull = (_safe_root(square) if safe else square.sqrt()).mean()
    hinge = (margin - _center_distances(centers, expand)).clamp(min=0)  # [P, P]
    if mode == "pairs":
        rows, columns = torch.triu_indices(len(hinge), len(hinge), 1, device=hinge.device)
        push = _mean_where(hinge[rows, columns], torch.ones_like(rows, dtype=torch.bool))
    else:
        push = _row_push(hinge, labels, group)
    return ops.CenterCluster(pull + push, pull, push)


def _row_push(hinge: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """Mean over anchors 0, K, 2K, ... of the mean hinge to all rows of other identities."""
    identities, batch = hinge.shape[0], labels.shape[0]
    if batch % identities:
        raise ValueError(
            f'labels: cc_mode="rows" expects K rows of each identity, got {batch} rows '
            f"of {identities} identities"
        )
    anchors = torch.arange(0, batch, batch // identities, device=labels.device)
    others = labels[anchors][:, None] != labels[None, :]  # [P, B]
    values = torch.where(others, hinge[group[anchors]][:, group], 0.0)
    return (values.sum(1) / others.sum(1).clamp(min=1)).mean()


def _center_distances(centers: Tensor, expand: bool) -> Tensor:
    """[P, P] Euclidean distances, squares clamped at 1e-12."""
    if expand:
        norms = centers.square().sum(1)
        # In double and rounded back: the cancellation is the official one, TF32 would add more.
        product = (centers.double() @ centers.double().t()).to(centers.dtype)
        square = norms[:, None] + norms[None, :] - 2 * product
    else:
        square = (centers[:, None] - centers[None, :]).square().sum(2)
    return square.clamp(min=1e-12).sqrt()


def _safe_root(square: Tensor) -> Tensor:
    """Square root with gradient 0 at 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
