"""LbA's alignment by its options, against a plain definition of every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastreid_vi.methods.lba import LbAOptions
from fastreid_vi.methods.lba.alignment import aligned_with
from fastreid_vi.methods.lba.pairing import Arrangement, Pairs, draw_pairs
from tests.conftest import golden

VARIANTS: list[dict[str, Any]] = [
    {},
    {"weighting": "batch"},
    {"dist_eps": 0.0},
    {"dist_eps": 0.01, "weighting": "batch"},
    {"dt_reduction": "sum", "weighting": "batch"},
    {"renorm_comask": False},
    {"renorm_comask": False, "weighting": "batch"},
    {"renorm_comask": False, "dist_eps": 0.0, "dt_reduction": "sum"},
    {"renorm_comask": False, "dist_eps": 0.01, "weighting": "batch", "dt_margin": 0.1},
    {"renorm_comask": False, "temperature": 5.0},
    {"temperature": 5.0, "dt_margin": 1.0},
    {"zero_guard": False},
    {"zero_guard": False, "weighting": "batch", "dist_eps": 0.0, "temperature": 5.0},
    {"zero_guard": False, "renorm_comask": False, "dt_reduction": "sum"},
]


def min_max(values: Tensor) -> Tensor:
    values = values - values.min()
    return values / (values.max() + 1e-12)


def defined(features: Tensor, pairs: Pairs, options: LbAOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Section 3 of the specification, sample by sample: aligned, loss, comask."""
    maps = [x.flatten(1).t() for x in features]  # [N, C] each
    masks = [min_max(x.detach().norm(dim=1)) for x in maps]
    aligned, comasks, hinges = [], [], []
    for b, (x, m) in enumerate(zip(maps, masks, strict=True)):
        distances = []
        for index in (pairs.positive, pairs.negative):
            k = maps[int(index[b])]
            cosine = (x / x.norm(dim=1, keepdim=True)) @ (k / k.norm(dim=1, keepdim=True)).t()
            p = (options.temperature * cosine).softmax(1)
            r = m[:, None] * (p @ k) + (1 - m[:, None]) * x
            square = (x - r + options.dist_eps).square().sum(1)
            distances.append(torch.where(square > 0, square.clamp_min(1e-60).sqrt(), 0.0))
            if index is pairs.positive:
                aligned.append(r.t().reshape(features.shape[1:]))
                comask = m * (p.detach() @ masks[int(index[b])])
                comasks.append(min_max(comask) if options.renorm_comask else comask)
        hinges.append((options.dt_margin + distances[0] - distances[1]).clamp_min(0))
    weight, hinge = torch.stack(comasks), torch.stack(hinges)  # [B, N]
    if options.weighting == "batch":
        loss = (weight.mean(0) * hinge.mean(0)).mean()
    else:
        loss = (weight * hinge).mean()
    if options.dt_reduction == "sum":
        loss = loss * hinge.shape[1]
    return torch.stack(aligned), loss, weight.reshape(len(maps), 1, *features.shape[2:])


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Pairs, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 10, 5, 3, generator=generator, dtype=torch.float64).relu() + 0.01
    cotangent = torch.randn(features.shape, generator=generator, dtype=torch.float64)
    pairs = draw_pairs(Arrangement(3, 2), generator=generator)
    return features.to(dtype), pairs, cotangent.to(dtype)


def name_of(options: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()) or "default"


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_values_and_gradients_are_the_definition(options: dict[str, Any]) -> None:
    features, pairs, cotangent = inputs()
    chosen = LbAOptions(**options)
    results = []
    for form in (aligned_with, defined):
        leaf = features.clone().requires_grad_()
        aligned, loss, comask = form(leaf, pairs, chosen)
        ((aligned * cotangent).sum() + 3 * loss).backward()
        assert not comask.requires_grad
        results.append((aligned.detach(), loss.detach(), comask, leaf.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize(("variant", "weighting"), [("official", "batch"), ("paper", "sample")])
def test_golden_edge(variant: str, weighting: Any, guard: bool) -> None:
    """L11: what reaches an all-zero key is divided by 1e-12 in the released code only."""
    arrays = golden("lba/cmalign_edge")
    leaf = torch.from_numpy(arrays["feat"]).double().requires_grad_()
    pairs = Pairs(*(torch.from_numpy(arrays[f"{kind}_idx"]) for kind in ("pos", "neg")))
    options = LbAOptions(weighting=weighting, zero_guard=guard)
    _, loss, comask = aligned_with(leaf, pairs, options)
    loss.backward()
    assert leaf.grad is not None
    assert float(loss.detach()) == pytest.approx(float(arrays[f"loss_{variant}"]), rel=1e-9)
    torch.testing.assert_close(comask, torch.from_numpy(arrays["comask"]), rtol=1e-9, atol=1e-12)
    row, y, x = arrays["zero_pixel"].tolist()
    largest = leaf.grad.abs().amax(1)
    zero = float(arrays[f"grad_absmax_per_pixel_{variant}"][row, y, x])
    if guard:
        assert float(largest[row, y, x]) < 1e-9 * zero
    else:
        assert float(largest[row, y, x]) == pytest.approx(zero, rel=1e-6)
    leaf.grad[row, :, y, x] = 0
    others = torch.from_numpy(arrays[f"grad_feat_without_zero_pixel_{variant}"]).double()
    assert float((leaf.grad - others).abs().max()) <= 1e-6 * float(others.abs().max())


def test_the_guard_keeps_a_bad_match_from_exploding() -> None:
    features, pairs, _ = inputs()
    features[3, :, 2, 1] = 0
    largest = []
    for guard in (True, False):
        leaf = features.clone().requires_grad_()
        options = LbAOptions(zero_guard=guard, temperature=1.0)
        aligned_with(leaf, pairs, options).loss.backward()
        assert leaf.grad is not None
        largest.append(float(leaf.grad.abs().max()))
    assert largest[0] < 1.0
    assert largest[1] > 1e6


@pytest.mark.parametrize("renorm", [True, False])
def test_identical_partners_leave_the_margin(renorm: bool) -> None:
    features, pairs, _ = inputs()
    same = Pairs(pairs.positive, pairs.positive)
    result = aligned_with(features, same, LbAOptions(renorm_comask=renorm))
    torch.testing.assert_close(result.loss, 0.3 * result.comask.mean())


@pytest.mark.parametrize("weighting", ["sample", "batch"])
@pytest.mark.parametrize("renorm", [True, False])
def test_row_order_does_not_matter(weighting: Any, renorm: bool) -> None:
    features, pairs, _ = inputs()
    options = LbAOptions(weighting=weighting, renorm_comask=renorm)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    back = torch.argsort(order)
    mixed = Pairs(back[pairs.positive[order]], back[pairs.negative[order]])
    one = aligned_with(features, pairs, options)
    two = aligned_with(features[order], mixed, options)
    torch.testing.assert_close(two.loss, one.loss)
    torch.testing.assert_close(two.aligned, one.aligned[order])


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("renorm", [True, False])
def test_half_precision_gives_a_float32_loss(renorm: bool, guard: bool) -> None:
    features, pairs, _ = inputs()
    options = LbAOptions(renorm_comask=renorm, zero_guard=guard)
    exact = aligned_with(features, pairs, options)
    half = aligned_with(features.bfloat16(), pairs, options)
    assert half.aligned.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32
    assert float(half.loss) == pytest.approx(float(exact.loss), rel=0.05)


def test_no_distance_gives_a_finite_gradient() -> None:
    """L3: at mask 0 the map equals its reconstruction, and the norm has no derivative there."""
    features, pairs, _ = inputs()
    for renorm in (True, False):
        leaf = features.clone().requires_grad_()
        options = LbAOptions(renorm_comask=renorm, dist_eps=0.0)
        aligned_with(leaf, pairs, options).loss.backward()
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
