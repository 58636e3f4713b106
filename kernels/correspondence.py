"""Correspondences: masks, matching probabilities, warps, alignment within a batch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastreid_vi.kernels._common import (
    INTERPRETED,
    OPTIONS,
    accumulator,
    accumulator_kind,
    block,
    map_like,
    rows,
)
from fastreid_vi.kernels._matching import (
    LANES,
    ROWS,
    Matched,
    _gather_kernel,
    _key_radial_kernel,
    _match_gradient_kernel,
    _match_kernel,
    _warp_kernel,
    dense,
    inner,
    meet,
    products,
)
from fastreid_vi.kernels._norms import FLOOR, norms, stretched

WARPS = 8  # with fewer, tiles of float32 products do not fit the registers


def feature_mask(features: Tensor) -> Tensor:
    """Norms over channels, min-max normalised over positions, [B, 1, H, W]."""
    out = features.new_empty(features.shape[0], 1, *features.shape[2:])
    if len(features):
        stretched(norms(rows(features)), out)
    return out


def matched(
    pair: Matched,
    g: Tensor,
    temperature: float,
    masks: tuple[Tensor, Tensor] | None,
    out: tuple[Tensor, Tensor],
) -> Tensor:
    """P [B, S, S] and its log-sum-exp [B, S] into `out`; what the masks see [B, S], if any."""
    (p, lse), size = out, pair.q.positions
    seen = torch.empty_like(lse) if masks else lse.new_empty(0)
    q_mask, k_mask = (m.contiguous() for m in masks) if masks else (lse, lse)
    count = pair.q.batches * size
    _match_kernel[(triton.cdiv(count, ROWS),)](
        g, pair.q_norm, pair.k_norm, pair.index, q_mask, k_mask,
        p, lse, seen, count, size, pair.k.batches,
        temperature=temperature, FLOOR=FLOOR, HAS_MASK=masks is not None,
        ROWS=ROWS, BLOCK=block(size, LANES), ACC=accumulator_kind(lse.dtype),
        INTERPRETED=INTERPRETED, **OPTIONS,
    )  # fmt: skip
    return seen


def _probabilities(
    pair: Matched, temperature: float, masks: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """P [B, S, S], its log-sum-exp [B, S], and what the masks see [B, S] (empty without masks)."""
    size = pair.q.positions
    p, lse = pair.q.tensor.new_empty(pair.q.batches, size, size), torch.empty_like(pair.q_norm)
    seen = matched(pair, inner(pair.q, pair.k, pair.index), temperature, masks, (p, lse))
    return p, lse, seen


def _warped(pair: Matched, p: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """P times the rows of the targets; where there is a mask, blended with the source."""
    q, to = pair.q, rows(out)
    side = block(q.positions, 64 if p.element_size() < 8 else 32)
    wide = block(q.channels, 64 if p.element_size() < 8 else 32)
    blocks = triton.cdiv(q.channels, wide)
    _warp_kernel[(q.batches * triton.cdiv(q.positions, side) * blocks,)](
        p, pair.k.tensor, pair.index, q.tensor, p if mask is None else mask, out,
        q.channels, q.positions, pair.k.batches, *pair.k[4:], *q[4:], *to[4:], blocks,
        BLEND=mask is not None, BLOCK_I=side, BLOCK_J=block(q.positions, 32), BLOCK_C=wide,
        **products(p.dtype), **OPTIONS, num_warps=WARPS,
    )  # fmt: skip


def correspondence_probability(
    source: Tensor, target: Tensor, index: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """P [B, S, S] and its log-sum-exp [B, S]."""
    if len(source) == 0:
        size = source.shape[2] * source.shape[3]
        lse = source.new_empty(0, size, dtype=accumulator(source.dtype))
        return source.new_empty(0, size, size), lse
    return _probabilities(meet(source, target, index), temperature, None)[:2]


def correspondence_warp(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    source_mask: Tensor | None,
    target_mask: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Warped, comask (empty without masks), P, log-sum-exp."""
    masked = source_mask is not None and target_mask is not None
    out = map_like(source)
    comask = source.new_empty((len(source), 1, *source.shape[2:]) if masked else 0)
    if len(source) == 0:
        return out, comask, *correspondence_probability(source, target, index, temperature)
    pair = meet(source, target, index)
    masks = (source_mask, target_mask) if masked else None
    p, lse, seen = _probabilities(pair, temperature, masks)
    if masked:
        stretched(seen, comask)
    _warped(pair, p, None, out)
    return out, comask, p, lse


def align_features(
    features: Tensor, index: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Aligned, comask, P, log-sum-exp."""
    out = map_like(features)
    comask = features.new_empty(len(features), 1, *features.shape[2:])
    if len(features) == 0:
        return out, comask, *correspondence_probability(features, features, index, temperature)
    pair, mask = meet(features, features, index), mask.contiguous()
    p, lse, seen = _probabilities(pair, temperature, (mask, mask))
    stretched(seen, comask)
    _warped(pair, p, mask, out)
    return out, comask, p, lse


class _Gradient:
    """The gradient through the pairings of one call, from dP or from the gradient of the warp."""

    def __init__(
        self,
        grad: Tensor,
        source: Tensor,
        target: Tensor,
        index: Tensor,
        probability: Tensor,
        lse: Tensor,
        temperature: float,
        mask: Tensor | None = None,
    ) -> None:
        self.pair = pair = meet(source, target, index)
        self.warped = grad.dim() == 4
        self.p, self.mask = probability.contiguous(), mask
        kind, size = accumulator(source.dtype), pair.q.positions
        self.dw = dense(grad) if self.warped else pair.q  # never read without a warp
        if self.warped:
            self.d = inner(self.dw, pair.k, pair.index)
        else:
            self.d = grad.to(kind, memory_format=torch.contiguous_format, copy=True)
        lse, self.q_radial = lse.contiguous(), torch.empty_like(lse, dtype=kind)
        self.k_radial = torch.empty_like(self.q_radial)
        types = {"temperature": temperature, "FLOOR": FLOOR, "ACC": accumulator_kind(kind)}
        count = pair.q.batches * size
        _match_gradient_kernel[(triton.cdiv(count, ROWS),)](
            self.d, self.p, lse, pair.q_norm, pair.k_norm, pair.index,
            lse if mask is None else mask, self.q_radial, count, size, pair.k.batches,
            HAS_MASK=mask is not None, ROWS=ROWS, BLOCK=block(size, LANES), **types, **OPTIONS,
        )  # fmt: skip
        blocks = triton.cdiv(size, 32)
        _key_radial_kernel[(pair.q.batches * blocks,)](
            self.d, self.p, lse, pair.q_norm, pair.k_norm, pair.index, self.k_radial,
            size, pair.k.batches, blocks, BLOCK_I=16, BLOCK_J=32, **types, **OPTIONS,
        )  # fmt: skip
        order = torch.sort(pair.index.clamp(0, pair.k.batches - 1), stable=True)
        self.order = order.indices
        bounds = torch.arange(pair.k.batches + 1, device=grad.device)
        self.start = torch.searchsorted(order.values, bounds)

    def into(self, out: Tensor, *, query: bool, key: bool) -> Tensor:
        """The gradient of the source, of the target, or of a map that is both."""
        (q, k, *_), size = self.pair, self.pair.q.positions
        to, width = rows(out), self.p.element_size()
        side = block(size, 64 if width == 2 else 32)  # two products share the registers
        wide = block(q.channels, 64 if width == 2 else 32)
        blocks = triton.cdiv(q.channels, wide)
        _gather_kernel[(to.batches * triton.cdiv(size, side) * blocks,)](
            self.d, self.p, q.tensor, k.tensor, self.dw.tensor,
            self.p if self.mask is None else self.mask, self.pair.index, self.order, self.start,
            self.q_radial, self.k_radial, out, q.channels, size, k.batches,
            *q[4:], *k[4:], *self.dw[4:], *to[4:], blocks,
            QUERY=query, KEY=key, WARPED=self.warped, BLEND=self.mask is not None,
            BLOCK_I=side, BLOCK_J=block(size, 32 if width == 2 else 16), BLOCK_C=wide,
            **products(self.p.dtype, exact=False), **OPTIONS, num_warps=WARPS,
            maxnreg=255,  # left to itself, ptxas aims at 64 and spills
        )  # fmt: skip
        return out


def correspondence_warp_backward(
    grad: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    probability: Tensor,
    lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of both maps, in their memory formats."""
    dsource, dtarget = map_like(source), map_like(target)
    if len(source) == 0:
        return dsource, dtarget.zero_()
    chain = _Gradient(grad, source, target, index, probability, lse, temperature)
    return chain.into(dsource, query=True, key=False), chain.into(dtarget, query=False, key=True)


correspondence_probability_backward = correspondence_warp_backward


def align_features_backward(
    grad: Tensor,
    features: Tensor,
    index: Tensor,
    mask: Tensor,
    probability: Tensor,
    lse: Tensor,
    temperature: float,
) -> Tensor:
    """Gradient of the features, in their memory format."""
    out = map_like(features)
    if len(features) == 0:
        return out
    mask = mask.contiguous()
    chain = _Gradient(grad, features, features, index, probability, lse, temperature, mask)
    return chain.into(out, query=True, key=True)
