"""Alignment within a batch, and LbA's whole block.

The kernels of `align_features` are those of correspondences.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastreid_vi.kernels import _dense_gradient as gradient
from fastreid_vi.kernels._common import (
    OPTIONS,
    accumulator,
    accumulator_kind,
    block,
    map_like,
    rows,
)
from fastreid_vi.kernels._dense_alignment import (
    CANCELLED,
    WARPS,
    blended,
    far_squares,
    gram_products,
)
from fastreid_vi.kernels._matching import (
    LANES,
    ROWS,
    Matched,
    _key_radial_kernel,
    _match_gradient_kernel,
    dense,
    inner,
    products,
)
from fastreid_vi.kernels._norms import FLOOR, norms_and_sums, stretched
from fastreid_vi.kernels._positions import position_losses
from fastreid_vi.kernels.correspondence import align_features, align_features_backward, matched

__all__ = [
    "align_features",
    "align_features_backward",
    "dense_alignment",
    "dense_alignment_backward",
]


def dense_alignment(
    features: Tensor,
    positive: Tensor,
    negative: Tensor,
    temperature: float,
    margin: float,
    weighting: str,
    eps: float,
) -> tuple[Tensor, ...]:
    """Aligned, loss, comask; P and lse of both pairings, the Grams of the samples, mask, slopes."""
    batch, size = len(features), features.shape[2] * features.shape[3]
    aligned = map_like(features)
    comask = features.new_empty(batch, 1, *features.shape[2:])
    p = features.new_empty(2, batch, size, size)
    wide = torch.empty(2, batch, size, dtype=accumulator(features.dtype), device=features.device)
    lse, mask, weight = wide, torch.empty_like(wide[0]), torch.empty_like(wide[0])
    if batch == 0:
        loss, slopes = position_losses(wide, wide, weight, margin, weighting)
        return aligned, loss, comask, p, lse, wide.new_empty(0, size, size), mask, slopes
    x = dense(features)
    norm, total = norms_and_sums(x)
    stretched(norm, mask)
    gram = inner(x, x, torch.arange(batch, device=features.device))
    near, far = (Matched(x, x, norm, norm, i.contiguous()) for i in (positive, negative))
    seen = matched(near, inner(x, x, near.index), temperature, (mask, mask), (p[0], lse[0]))
    stretched(seen, weight)
    comask.copy_(weight.view_as(comask))
    parts = [blended(near, p[0], mask, eps, aligned, mask)]
    g = inner(x, x, far.index)
    matched(far, g, temperature, None, (p[1], lse[1]))
    known = far_squares(far, p[1], g, gram, total, mask, eps)
    parts.append(blended(far, p[1], mask, eps, None, known))
    loss, slopes = position_losses(*parts, weight, margin, weighting, known)
    return aligned, loss, comask, p, lse, gram, mask, slopes


class _BlockGradient:
    """The backward pass of one call."""

    def __init__(
        self,
        grads: tuple[Tensor, Tensor],
        features: Tensor,
        index: Tensor,
        saved: tuple[Tensor, ...],
        temperature: float,
        eps: float,
    ) -> None:
        self.p, self.lse, self.gram, self.mask, self.slopes = (s.contiguous() for s in saved)
        self.x, self.dr, self.grad = dense(features), dense(grads[0]), grads[1]
        self.norm, self.total = norms_and_sums(self.x)
        self.index, self.temperature, self.eps = index, temperature, eps
        self.pull, self.direct = torch.empty_like(self.slopes), torch.empty_like(self.slopes)
        self.radial = self.slopes.new_empty(2, *self.slopes.shape)  # of queries, of keys
        self.d = self.slopes.new_empty(*self.p.shape)
        self.size, self.batch = self.x.positions, self.x.batches
        order = torch.sort(index.clamp(0, self.batch - 1), dim=1, stable=True)
        bounds = torch.arange(self.batch + 1, device=index.device).expand(2, -1).contiguous()
        self.order = order.indices
        self.start = torch.searchsorted(order.values, bounds)

    def through_distances(self) -> None:
        """d: the gradient of P of both pairings; `pull`, `direct`: the turns of the distances."""
        size, dtype = self.size, self.p.dtype
        inner(self.dr, self.x, self.index[0], self.d[0])
        side = block(size, 64 if dtype != torch.float64 else 32)
        # Half-precision features meet Q as TF32, whose rounding of w shows earlier in f - w.
        cancelled = CANCELLED * (10 if dtype.itemsize == 2 else 1)
        gradient._distance_gradient_kernel[(2 * self.batch * triton.cdiv(size, side),)](
            self.p, self.lse, self.gram, self.norm, self.total, self.mask, self.slopes, self.grad,
            self.index, self.d, self.pull, self.direct, self.batch, size,
            temperature=self.temperature, eps=self.eps, CANCELLED=cancelled,
            BLOCK_I=side, BLOCK_J=block(size, 32), BLOCK_K=16,
            **gram_products(dtype), **OPTIONS, num_warps=WARPS,
        )  # fmt: skip
        side = block(size, 32)
        blocks = triton.cdiv(size, side)
        gradient._direct_inner_kernel[(2 * self.batch * blocks * blocks,)](
            self.p, self.x.tensor, self.dr.tensor, self.mask, self.direct, self.index, self.d,
            *self.x[1:4], *self.x[4:], *self.dr[4:], blocks,
            eps=self.eps, BLOCK_I=side, BLOCK_J=side,
            BLOCK_C=block(self.x.channels, 16 if dtype == torch.float64 else 32),
            **products(dtype, exact=False), **OPTIONS,
        )  # fmt: skip

    def through_matching(self) -> None:
        """d becomes the gradient of the inner products; what positions lose along themselves."""
        size, kind = self.size, accumulator_kind(self.d.dtype)
        types = {"temperature": self.temperature, "FLOOR": FLOOR, "ACC": kind}
        count, blocks = self.batch * size, triton.cdiv(size, 32)
        for side in range(2):
            d, p, lse, index = self.d[side], self.p[side], self.lse[side], self.index[side]
            _match_gradient_kernel[(triton.cdiv(count, ROWS),)](
                d, p, lse, self.norm, self.norm, index, lse, self.radial[0, side],
                count, size, self.batch,
                HAS_MASK=False, ROWS=ROWS, BLOCK=block(size, LANES), **types, **OPTIONS,
            )  # fmt: skip
            _key_radial_kernel[(self.batch * blocks,)](
                d, p, lse, self.norm, self.norm, index, self.radial[1, side],
                size, self.batch, blocks, BLOCK_I=16, BLOCK_J=32, **types, **OPTIONS,
            )  # fmt: skip

    def into(self, out: Tensor) -> Tensor:
        """The gradient of the features."""
        size, dtype, to = self.size, self.p.dtype, rows(out)
        warped, along = torch.empty_like(self.gram), torch.empty_like(self.mask)
        side = block(size, 64 if dtype != torch.float64 else 32)
        blocks = triton.cdiv(size, side)
        gradient._warped_gram_kernel[(self.batch * blocks * blocks,)](
            self.p, self.pull, self.mask, self.order, self.start, warped, along,
            self.batch, size, blocks, BLOCK_I=side, BLOCK_J=side, BLOCK_K=16,
            **gram_products(dtype), **OPTIONS, num_warps=WARPS, maxnreg=255,
        )  # fmt: skip
        side = block(size, 64 if dtype.itemsize == 2 else 32)
        wide = block(self.x.channels, 64 if dtype.itemsize == 2 else 32)
        blocks = triton.cdiv(self.x.channels, wide)
        grid = (self.batch * triton.cdiv(size, side) * blocks,)
        strides = (*self.x[1:4], *self.x[4:])
        types = {"eps": self.eps, **products(dtype, exact=False), **OPTIONS, "num_warps": WARPS}
        types["maxnreg"] = 255  # left to itself, ptxas aims at 64 or 128 and spills
        gradient._dense_gather_kernel[grid](
            self.d, self.p, self.x.tensor, self.dr.tensor, self.mask, self.pull, self.index,
            self.order, self.start, self.radial[0], self.radial[1], warped, along, out,
            *strides, *self.dr[4:], *to[4:], blocks,
            BLOCK_I=side, BLOCK_K=block(size, 32 if dtype.itemsize == 2 else 16), BLOCK_C=wide,
            **types,
        )  # fmt: skip
        side = block(size, 32)
        gradient._direct_gather_kernel[(self.batch * triton.cdiv(size, side) * blocks,)](
            self.p, self.x.tensor, self.mask, self.direct, (self.direct != 0).any(2),
            self.index, self.order, self.start, out, *strides, *to[4:], blocks,
            BLOCK_I=side, BLOCK_K=block(size, 32), BLOCK_C=wide, **types,
        )  # fmt: skip
        return out


def dense_alignment_backward(
    grad_aligned: Tensor,
    grad_loss: Tensor,
    features: Tensor,
    positive: Tensor,
    negative: Tensor,
    aligned: Tensor,
    probability: Tensor,
    lse: Tensor,
    gram: Tensor,
    mask: Tensor,
    slopes: Tensor,
    temperature: float,
    eps: float,
) -> Tensor:
    """Gradient of the features, in their memory format."""
    out = map_like(features)
    if len(features) == 0:
        return out
    index, saved = torch.stack((positive, negative)), (probability, lse, gram, mask, slopes)
    chain = _BlockGradient((grad_aligned, grad_loss), features, index, saved, temperature, eps)
    chain.through_distances()
    chain.through_matching()
    return chain.into(out)
