"""Dense correspondences between feature maps: masks, matching probabilities, warps.

A map is read as rows [B, S, C], one per position. Every sample b meets one target, the map
`index[b]`, through the cosines of their positions:

P(p, q) = softmax over q of temperature cos(source_p, target_q)

P is rounded once to the dtype of the maps, and that P is used everywhere. Its cosines come back
from it and from the saved log-sum-exp of its logits: cos = (log P + lse) / temperature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._dispatch import register
from fastreid_vi.ops._matching import (
    comask_of,
    map_of,
    mask_of,
    mask_rows,
    match,
    match_gradient,
    picked,
    rows_of,
    scattered,
)
from fastreid_vi.ops._shared import accumulator, cast_for_autocast, layout_of


class Correspondence(NamedTuple):
    """Result of `correspondence_warp`."""

    warped: Tensor  # [B, C, H, W]
    comask: Tensor | None  # [B, 1, H, W]


def feature_mask(features: Tensor) -> Tensor:
    """Where a map is strong: norms over channels, min-max normalised over positions.

    n(p) = |x_p|,  mask(p) = (n(p) - min n) / (max n - min n + 1e-12)

    The result is detached. A map whose norms are all equal has mask zero; where they are nearly
    equal, their rounding noise is stretched to [0, 1], as in the published code.

    Args:
        features: [B, C, H, W], floating; NCHW or channels_last.
    Returns:
        [B, 1, H, W], dtype of `features`.
    Raises:
        TypeError: `features` is not a floating tensor.
        ValueError: `features` is not rank 4 or has no channel or position.

    >>> import torch
    >>> feature_mask(torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3)).flatten().tolist()
    [0.0, 0.5, 1.0]

    Spec: lba 3 (mask). Golden: lba/cmalign_mask_recon, lba/cmalign_edge. Backends: cpu, triton.
    """
    _checks.feature_map("features", features)
    mask: Tensor = _feature_mask(features)
    return mask


def correspondence_probability(
    source: Tensor, target: Tensor, *, index: Tensor | None = None, temperature: float = 50.0
) -> Tensor:
    """Matching probabilities of all pairs of positions; for looking, `correspondence_warp` trains.

    P(p, q) = softmax over q of temperature cos(source_p, target_q)

    Args:
        source: [B, C, H, W], floating; NCHW or channels_last.
        target: [T, C, H, W]; dtype of `source` (both are cast under autocast).
        index: [B], int64: the target of each sample; None pairs sample i with target i.
        temperature: > 0.
    Returns:
        [B, S, S], row p of the source and column q of the target; dtype of `source`.
    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: a shape, a device, `temperature` or an entry of `index` does not fit.

    >>> import torch
    >>> x = torch.eye(4).reshape(1, 4, 2, 2)
    >>> correspondence_probability(x, x)[0].diagonal().tolist()
    [1.0, 1.0, 1.0, 1.0]

    Spec: lba 3 (matching probability). Golden: lba/cmalign_similarity_warp. Backends: cpu, triton.
    """
    source, target, index = _pairing(source, target, index)
    _checks.above("temperature", temperature, 0)
    probability: Tensor = _probability(source, target, index, temperature)[0]
    return probability


def correspondence_warp(
    source: Tensor,
    target: Tensor,
    *,
    index: Tensor | None = None,
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    temperature: float = 50.0,
) -> Correspondence:
    """Target features brought to the positions of the source by soft correspondences.

    P(p, q) = softmax over q of temperature cos(source_p, target_q)
    warped_p = sum over q of P(p, q) target_q
    comask(p) = min-max over p of source_mask(p) sum over q of P(p, q) target_mask(q)

    The comask is detached, and so are the masks. No gradient passes through the normalisation of a
    position whose norm is below 1e-12 (spec, L11).

    Args:
        source: [B, C, H, W], floating; NCHW or channels_last.
        target: [T, C, H, W]; dtype of `source` (both are cast under autocast).
        index: [B], int64: the target of each sample; None pairs sample i with target i.
        source_mask, target_mask: [B, 1, H, W] and [T, 1, H, W], floating; both or none.
        temperature: > 0.
    Returns:
        `Correspondence(warped [B, C, H, W], comask [B, 1, H, W])`, dtype of `source`; comask is
        None without masks.
    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: a shape, a device, `temperature` or an entry of `index` does not fit.

    >>> import torch
    >>> x = torch.eye(4).reshape(1, 4, 2, 2)
    >>> torch.allclose(correspondence_warp(x, x.flip(3)).warped, x)
    True

    Spec: lba 3 (warp, co-attention mask). Golden: lba/cmalign_similarity_warp,
    lba/cmalign_mask_recon. Backends: cpu, triton.
    """
    source, target, index = _pairing(source, target, index)
    if (source_mask is None) != (target_mask is None):
        raise ValueError("source_mask, target_mask: expected both or none")
    if source_mask is not None:
        source_mask = mask_rows("source_mask", source_mask, source)
    if target_mask is not None:
        target_mask = mask_rows("target_mask", target_mask, target)
    _checks.above("temperature", temperature, 0)
    outputs = _warp(source, target, index, source_mask, target_mask, temperature)
    return Correspondence(outputs[0], None if source_mask is None else outputs[1])


def _pairing(source: Tensor, target: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Checked maps, and an index where none was given."""
    _checks.feature_map("source", source)
    _checks.feature_map("target", target)
    source, target = cast_for_autocast(source, target)
    batch = source.shape[0]
    count = batch if index is None else target.shape[0]
    _checks.shaped_like("target", target, (count, *source.shape[1:]), source)
    if index is None:
        return source, target, torch.arange(batch, device=source.device)
    _checks.labels_of("index", index, batch, source.device)
    if batch > 0 and count == 0:
        raise ValueError(f"target: expected at least one map, got {_checks.described(target)}")
    return source, target, index


# Reference: the definition.


def _mask_reference(features: Tensor) -> Tensor:
    batch, _, height, width = features.shape
    return mask_of(rows_of(features)).to(features.dtype).reshape(batch, 1, height, width)


def _probability_reference(
    source: Tensor, target: Tensor, index: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    return match(rows_of(source), picked(rows_of(target), index), source.dtype, temperature)


def _probability_backward_reference(
    grad: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    probability: Tensor,
    lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    q, k = rows_of(source), picked(rows_of(target), index)
    dp, p = grad.to(q.dtype), probability.to(q.dtype)
    dq, dk = match_gradient(dp, q, k, p, lse, temperature)
    return map_of(dq, source), map_of(scattered(dk, index, target.shape[0]), target)


def _warp_reference(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    source_mask: Tensor | None,
    target_mask: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Warped, comask (empty without masks), P, lse."""
    q, k = rows_of(source), picked(rows_of(target), index)
    probability, lse = match(q, k, source.dtype, temperature)
    p = probability.to(q.dtype)
    comask = source.new_empty(0)
    if source_mask is not None and target_mask is not None:
        comask = comask_of(p, source_mask, picked(target_mask, index)).to(source.dtype)
        comask = comask.reshape(source.shape[0], 1, *source.shape[2:])
    return map_of(p @ k, source), comask, probability, lse


def _warp_backward_reference(
    grad: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    probability: Tensor,
    lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    q, k, dw = rows_of(source), picked(rows_of(target), index), rows_of(grad)
    p = probability.to(q.dtype)
    dq, dk = match_gradient(dw @ k.transpose(1, 2), q, k, p, lse, temperature)
    dk = dk + p.transpose(1, 2) @ dw
    return map_of(dq, source), map_of(scattered(dk, index, target.shape[0]), target)


def _verify_index(result: Any, *args: Any) -> None:
    """`index` of probability and warp: argument 2, of maps in argument 1."""
    _checks.within("index", args[2], args[1].shape[0])


# Fakes: shapes, dtypes, strides.


def _map_like(features: Tensor) -> Tensor:
    return torch.empty_like(features, memory_format=layout_of(features))


def _mask_fake(features: Tensor) -> Tensor:
    return features.new_empty(features.shape[0], 1, *features.shape[2:])


def _probability_fake(
    source: Tensor, target: Tensor, index: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    batch, size = source.shape[0], source.shape[2] * source.shape[3]
    lse = source.new_empty(batch, size, dtype=accumulator(source.dtype))
    return source.new_empty(batch, size, size), lse


def _warp_fake(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    source_mask: Tensor | None,
    target_mask: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    comask = source.new_empty(0) if source_mask is None else _mask_fake(source)
    return _map_like(source), comask, *_probability_fake(source, target, index, temperature)


def _backward_fake(
    grad: Tensor, source: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _map_like(source), _map_like(target)


# Gradients.


def _mask_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _mask_gradient(ctx: Any, grad: Tensor) -> None:
    return None


def _probability_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    source, target, index, ctx.temperature = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(source, target, index, *output)


def _probability_gradient(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 4
    return *_probability_backward(grad, *ctx.saved_tensors, ctx.temperature), None, None


def _warp_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    source, target, index, _, _, ctx.temperature = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(source, target, index, *output[2:])


def _warp_gradient(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    return *_warp_backward(grad, *ctx.saved_tensors, ctx.temperature), None, None, None, None


# Registration.

_feature_mask = register(
    "feature_mask",
    "(Tensor features) -> Tensor",
    reference=_mask_reference,
    fake=_mask_fake,
    setup_context=_mask_save,
    backward=_mask_gradient,
    rows=(0,),
    backends=("cpu", "triton"),
)
_probability = register(
    "correspondence_probability",
    "(Tensor source, Tensor target, Tensor index, float temperature) -> (Tensor, Tensor)",
    reference=_probability_reference,
    fake=_probability_fake,
    verify=_verify_index,
    setup_context=_probability_save,
    backward=_probability_gradient,
    backends=("cpu", "triton"),
)
_probability_backward = register(
    "correspondence_probability_backward",
    "(Tensor grad, Tensor source, Tensor target, Tensor index, Tensor probability, Tensor lse,"
    " float temperature) -> (Tensor, Tensor)",
    reference=_probability_backward_reference,
    fake=_backward_fake,
    backends=("cpu", "triton"),
)
_warp = register(
    "correspondence_warp",
    "(Tensor source, Tensor target, Tensor index, Tensor? source_mask, Tensor? target_mask,"
    " float temperature) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_warp_reference,
    fake=_warp_fake,
    verify=_verify_index,
    setup_context=_warp_save,
    backward=_warp_gradient,
    backends=("cpu", "triton"),
)
_warp_backward = register(
    "correspondence_warp_backward",
    "(Tensor grad, Tensor source, Tensor target, Tensor index, Tensor probability, Tensor lse,"
    " float temperature) -> (Tensor, Tensor)",
    reference=_warp_backward_reference,
    fake=_backward_fake,
    backends=("cpu", "triton"),
)
