from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastreid_vi
from fastreid_vi import ops
from tests.contract import LAYOUTS, OpContract, device_of
from tests.ops.matching_cases import (
    WEIGHTINGS,
    aligned_cases,
    at_zeros,
    error,
    person,
    plain_mask,
    seeded,
    tensor,
)


class TestDenseTriplet(OpContract):
    op, layouts = "dense_triplet_loss", LAYOUTS
    cases = (
        ((2, 8, 6, 3), "sample", 0.3),
        ((3, 33, 1, 1), "batch", 0.3),
        ((0, 8, 3, 2), "sample", 0.3),
        ((0, 8, 3, 2), "batch", 0.3),
        ((1, 72, 7, 1), "batch", -0.2),
        ((4, 8, 9, 5), "batch", 0.0),
        ((2, 33, 18, 9), "sample", 0.3),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape, weighting, margin = case
        anchor = person(*shape)
        nearby = seeded(*shape)
        return anchor, anchor + 0.4 * nearby, anchor - 0.3 * nearby.flip(1), weighting, margin

    def call(self, *args: Any) -> Any:
        maps, weighting, margin = args[:3], args[3], args[4]
        weight = plain_mask(maps[0])
        return ops.dense_triplet_loss(*maps, weight, margin=margin, weighting=weighting)

    @pytest.mark.parametrize("kind", [torch.float64, torch.float32])
    @pytest.mark.parametrize(("weighting", "name"), WEIGHTINGS)
    def test_golden(self, room: str, kind: torch.dtype, weighting: Any, name: str) -> None:
        """Of stored reconstructions; in `test_alignment` through the alignment to the maps."""
        device = device_of(room)
        for label, case in aligned_cases():
            if label != "a":  # the others do not store the negative reconstruction
                continue
            maps = [tensor(case[k], device, kind) for k in ("feat", "recon_pos", "recon_neg")]
            weight = tensor(case["comask"], device)
            with fastreid_vi.backend(room):
                loss = ops.dense_triplet_loss(*maps, weight, weighting=weighting)
            assert error(loss, case[f"loss_{name}"]) < (1e-9 if kind == torch.float64 else 1e-5)

    @pytest.mark.parametrize("kind", [torch.float64, torch.float32])
    @pytest.mark.parametrize(("weighting", "name"), WEIGHTINGS)
    def test_golden_gradient(self, room: str, kind: torch.dtype, weighting: Any, name: str) -> None:
        device, bound = device_of(room), 1e-9 if kind == torch.float64 else 1e-4
        for _, case in aligned_cases():
            x = tensor(case["feat"], device, kind).requires_grad_()
            pairs = [tensor(case[k], device) for k in ("pos_idx", "neg_idx")]
            with fastreid_vi.backend(room):
                mask = ops.feature_mask(x)
                positive, negative = (ops.align_features(x, i, mask=mask) for i in pairs)
                loss = ops.dense_triplet_loss(
                    x, positive.aligned, negative.aligned, positive.comask, weighting=weighting
                )
                (gradient,) = torch.autograd.grad(loss, x)
            want = tensor(case[f"grad_feat_loss_{name}"], device)
            got, rest = at_zeros(x, gradient)
            assert error(got, at_zeros(x, want)[0]) < bound
            assert rest < 1e-3 * gradient.abs().max()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_properties(b: int, c: int, h: int, w: int) -> None:
    anchor, positive, negative = seeded(b, c, h, w), seeded(b, c, w, h), seeded(b, h, c, w)
    positive, negative = positive.reshape(anchor.shape), negative.reshape(anchor.shape)
    weight = plain_mask(anchor)
    loss = ops.dense_triplet_loss(anchor, positive, negative, weight)
    order = torch.arange(b - 1, -1, -1)
    for weighting in ("sample", "batch"):
        plain = ops.dense_triplet_loss(anchor, positive, negative, weight, weighting=weighting)
        rows = [x[order] for x in (anchor, positive, negative, weight)]
        torch.testing.assert_close(ops.dense_triplet_loss(*rows, weighting=weighting), plain)
    same = ops.dense_triplet_loss(anchor, positive, positive, weight, margin=0.25)
    torch.testing.assert_close(same, 0.25 * weight.mean())
    difference = (anchor - positive + 1e-6).norm(dim=1) - (anchor - negative + 1e-6).norm(dim=1)
    torch.testing.assert_close(loss, (weight[:, 0] * (difference + 0.3).relu()).mean())
    if b == 1:
        both = ops.dense_triplet_loss(anchor, positive, negative, weight, weighting="batch")
        torch.testing.assert_close(both, loss)


def test_batch_weighting_crosses_the_samples() -> None:
    maps, weight = [seeded(3, 4, 2, 2), person(3, 4, 2, 2), seeded(3, 2, 4, 2)], torch.rand(3, 2, 2)
    maps[2] = maps[2].reshape(maps[0].shape)
    near, far = ((maps[0] - m + 1e-6).norm(dim=1) for m in maps[1:])
    hinge = (0.3 + near - far).relu()
    broadcast = (weight[:, None].double() * hinge[None]).mean()  # the published [B, B, H, W]
    got = ops.dense_triplet_loss(*maps, weight[:, None], weighting="batch")
    torch.testing.assert_close(got, broadcast)


def test_the_weight_is_detached_and_the_loss_is_wide() -> None:
    maps = [seeded(2, 4, 3, 2).bfloat16().requires_grad_() for _ in range(3)]
    weight = torch.ones(2, 1, 3, 2, requires_grad=True)
    loss = ops.dense_triplet_loss(*maps, weight)
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad is None


GOOD = {name: torch.ones(2, 3, 4, 5) for name in ("anchor", "positive", "negative")}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"anchor": torch.ones(2, 3)}, ValueError, r"anchor: expected shape \[B, C, H, W\]"),
        ({"positive": torch.ones(1, 3, 4, 5)}, ValueError, r"positive: expected shape \[2, 3, 4"),
        ({"negative": torch.ones(2, 3, 4, 5).half()}, TypeError, "negative: expected dtype"),
        ({"weight": torch.ones(2, 4, 5)}, ValueError, r"weight: expected shape \[B, 1, H, W\]"),
        ({"weight": torch.ones(2, 1, 5, 4)}, ValueError, r"weight: expected shape \[2, 1, 4, 5\]"),
        ({"weight": torch.ones(2, 1, 4, 5).int()}, TypeError, "weight: expected a floating"),
        ({"weighting": "paper"}, ValueError, "weighting: expected one of 'sample', 'batch'"),
        ({"margin": float("nan")}, ValueError, "margin: expected a number, got nan"),
    ],
)
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ops.dense_triplet_loss(**{**GOOD, "weight": torch.ones(2, 1, 4, 5), **change})
