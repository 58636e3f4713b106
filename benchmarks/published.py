"""The published formulations with the signatures of our ops, to put them into training steps.

Written from the papers and the descriptions of their code: loops over samples, broadcasts and
constants built on the host are theirs. Arguments that no recipe changes are not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.bench_alignment import min_max
from benchmarks.bench_cluster import center_cluster_eager
from benchmarks.bench_correspondence import mask_eager, matched
from benchmarks.bench_norm import alleviation_eager
from benchmarks.bench_pool import gem_eager, pattern_eager, separation_eager
from benchmarks.bench_softrank import retrieval_eager
from benchmarks.bench_triplet import batch_hard_eager
from fastreid_vi import ops


def gem_pool(features: Tensor, p: float = 3.0, eps: float = 1e-12) -> Tensor:
    return gem_eager(features)


def pattern_pool(features: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> ops.PatternPool:
    return ops.PatternPool(*pattern_eager(features, weight, bias))


def modality_alleviation(features: Tensor, reduce: Tensor, expand: Tensor, **_: Any) -> Tensor:
    return alleviation_eager(features, reduce, expand)


def distribution_adapter(
    features: Tensor,
    sc_weight: Tensor,
    sc_bias: Tensor,
    ca_weight: Tensor,
    *norms: Tensor,
    ca_running_mean: Tensor,
    ca_running_var: Tensor,
    norm_running_mean: Tensor,
    norm_running_var: Tensor,
    **_: Any,
) -> Tensor:
    ca_bn_w, ca_bn_b, norm_w, norm_b = norms
    mask = functional.softmax(functional.conv2d(features, sc_weight, sc_bias).flatten(2), dim=2)
    context = torch.matmul(features.flatten(2).unsqueeze(1), mask.unsqueeze(3)).squeeze(3)
    z = functional.conv1d(context.transpose(1, 2), ca_weight, groups=features.shape[1])
    batch_norm = functional.batch_norm
    z = batch_norm(z, ca_running_mean, ca_running_var, ca_bn_w, ca_bn_b, training=True)
    gated = features * torch.sigmoid(z)[..., None]
    running = norm_running_mean, norm_running_var
    return batch_norm(gated, *running, norm_w, norm_b, training=True) + features


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    negative_slope: float = 0.2,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    **_: Any,
) -> Tensor:
    y = functional.instance_norm(x, running_mean, running_var, weight, bias)
    if activation == "relu":
        y = torch.relu_(y)
    elif activation == "leaky_relu":
        y = functional.leaky_relu_(y, negative_slope)
    return y if residual is None else residual + y


def resize_normalize(
    images: Tensor,
    size: tuple[int, int],
    *,
    mean: float | Sequence[float],
    std: float | Sequence[float],
) -> Tensor:
    """Constants at full size, made on the host in each call; a plain resize has none."""
    resized = functional.interpolate(images, size, mode="bilinear", align_corners=False)
    if not isinstance(mean, Sequence) or not isinstance(std, Sequence):
        return resized
    shift, scale = (
        torch.tensor(v, dtype=images.dtype).view(1, 3, 1, 1).repeat(len(images), 1, *size)
        for v in (mean, std)
    )
    return (resized - shift.to(images.device)) / scale.to(images.device)


def batch_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.3,
    metric: str = "euclidean",
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
) -> ops.TripletLoss:
    """LbA's loop over anchors, AlignGAN's masked cosines."""
    none = torch.zeros((), dtype=torch.int64, device=embeddings.device)
    if metric == "euclidean" and references is None:
        return ops.TripletLoss(batch_hard_eager(embeddings, labels), none)
    others = embeddings if references is None else references
    other_labels = labels if reference_labels is None else reference_labels
    similarity = functional.normalize(embeddings) @ functional.normalize(others).t()
    same = labels[:, None].eq(other_labels[None, :]).float()
    near = (similarity + 9999999.0 * (1 - same)).sort(dim=1)[0][:, 0]
    far = (similarity - 9999999.0 * same).sort(dim=1, descending=True)[0][:, 0]
    return ops.TripletLoss((margin + far - near).clamp_min(0).mean(), none)


def center_cluster_loss(
    embeddings: Tensor, labels: Tensor, *, margin: float = 0.7
) -> ops.CenterCluster:
    loss = center_cluster_eager(embeddings, labels)
    return ops.CenterCluster(loss, loss.detach(), torch.zeros_like(loss))


def cross_modality_retrieval_loss(
    embeddings: Tensor, labels: Tensor, modalities: Tensor, *, strength: float = 0.5
) -> Tensor:
    return retrieval_eager(embeddings, labels, modalities)


def dense_alignment(
    features: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 0.3,
    weighting: str = "sample",
    eps: float = 1e-6,
    **_: Any,
) -> ops.DenseAlignment:
    mask = mask_eager(features)
    maps = []
    for index in (positive, negative):
        partner = features[index]
        p = matched(features, partner)
        warped = torch.bmm(p, partner.flatten(2).transpose(1, 2)).transpose(1, 2)
        maps.append(mask * warped.reshape(features.shape) + (1.0 - mask) * features)
        if index is positive:
            seen = torch.bmm(p.detach(), mask[index].flatten(2).transpose(1, 2))
            comask = min_max(mask * seen.transpose(1, 2).reshape(mask.shape))
    near, far = ((features - y + eps).square().sum(1).sqrt() for y in maps)
    hinge = (margin + near - far).clamp_min(0.0)
    weight = comask if weighting == "batch" else comask[:, 0]
    return ops.DenseAlignment(maps[0], (weight * hinge).mean(), comask)


OPS: dict[str, Callable[..., Any]] = {
    "gem_pool": gem_pool,
    "pattern_pool": pattern_pool,
    "map_separation_loss": separation_eager,
    "modality_alleviation": modality_alleviation,
    "distribution_adapter": distribution_adapter,
    "instance_norm_act": instance_norm_act,
    "resize_normalize": resize_normalize,
    "batch_hard_triplet_loss": batch_hard_triplet_loss,
    "center_cluster_loss": center_cluster_loss,
    "cross_modality_retrieval_loss": cross_modality_retrieval_loss,
    "dense_alignment": dense_alignment,
}


@contextmanager
def published() -> Iterator[None]:
    """The methods compute with the published formulations meanwhile."""
    before = {name: getattr(ops, name) for name in OPS}
    for name, function in OPS.items():
        setattr(ops, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(ops, name, function)
