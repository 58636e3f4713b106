from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastreid_vi
from fastreid_vi import ops
from fastreid_vi._dispatch import OPS
from tests.conftest import golden
from tests.contract import LAYOUTS, OpContract, device_of
from tests.ops.matching_cases import (
    WEIGHTINGS,
    aligned_cases,
    at_zeros,
    error,
    frobenius,
    person,
    plain_mask,
    seeded,
    tensor,
)

DOUBLE = torch.float64


class TestAlign(OpContract):
    op, layouts, detached = "align_features", LAYOUTS, (1,)
    cases = (
        ((3, 8, 6, 3), (1, 2, 0)),
        ((2, 33, 1, 1), (1, 0)),
        ((4, 72, 7, 1), (2, 2, 1, 2)),
        ((0, 8, 3, 2), ()),
        ((2, 8, 9, 5), (0, 1)),
        ((2, 33, 18, 9), (1, 1)),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape, index = case
        return person(*shape) + 0.1 * seeded(*shape), torch.tensor(index).long()

    def call(self, *args: Any) -> Any:
        return tuple(ops.align_features(*args, mask=plain_mask(args[0])))

    @pytest.mark.parametrize("kind", [DOUBLE, torch.float32])
    def test_golden(self, room: str, kind: torch.dtype) -> None:
        device, bound = device_of(room), 1e-9 if kind == DOUBLE else 2e-5
        for _, case in aligned_cases():
            x = tensor(case["feat"], device, kind).requires_grad_()
            mask, index = tensor(case["mask"], device), tensor(case["pos_idx"], device)
            with fastreid_vi.backend(room):
                aligned, comask = ops.align_features(x, index, mask=mask)
                aligned.backward(tensor(case["recon_cot"], device, kind))
            assert error(aligned, case["recon_pos"]) < bound
            assert error(comask, case["comask"]) < bound
            assert x.grad is not None
            got, _ = at_zeros(x, x.grad)
            want, _ = at_zeros(x, tensor(case["grad_feat_recon_pos"], device))
            assert error(got, want) < (1e-9 if kind == DOUBLE else 1e-4)

    def test_golden_blend(self, room: str) -> None:
        """Queries and keys in one batch, and the keys aligned with themselves."""
        vectors, device = golden("lba/cmalign_mask_recon"), device_of(room)
        x = torch.cat([tensor(vectors[f"feat_{s}"], device) for s in "qk"])
        mask = torch.cat([tensor(vectors[f"mask_{s}"], device) for s in "qk"])
        index = torch.arange(4, 8, device=device).repeat(2)
        with fastreid_vi.backend(room):
            aligned, comask = ops.align_features(x, index, mask=mask)
        assert error(aligned[:4], vectors["recon"]) < 2e-5
        assert error(comask[:4], vectors["comask"]) < 2e-5


class TestDenseAlignment(OpContract):
    op, layouts, detached = "dense_alignment", LAYOUTS, (2,)
    cases = (
        ((4, 8, 6, 3), (2, 3, 0, 1), (3, 2, 3, 0), "sample"),
        ((2, 33, 1, 1), (1, 0), (0, 1), "batch"),
        ((4, 72, 7, 1), (2, 2, 1, 2), (1, 3, 0, 1), "batch"),
        ((0, 8, 3, 2), (), (), "sample"),
        ((0, 8, 3, 2), (), (), "batch"),
        ((3, 8, 9, 5), (1, 2, 0), (2, 0, 1), "batch"),
        ((2, 33, 18, 9), (0, 1), (1, 0), "sample"),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape, positive, negative, weighting = case
        index = [torch.tensor(i).long() for i in (positive, negative)]
        return person(*shape), *index, weighting

    def call(self, *args: Any) -> Any:
        return tuple(ops.dense_alignment(*args[:3], weighting=args[3]))

    def test_gradcheck(self, case: Any) -> None:
        """The mask is detached: finite differences see it, so plain autograd is asked instead."""
        args = self.prepared(case, DOUBLE, "contiguous", "cpu")
        mask = ops.feature_mask(args[0])
        aligned, loss = plain(args[0], mask, *args[1:])
        weight = seeded(*aligned.shape)
        ((aligned * weight).sum() + 3.0 * loss).backward()
        want, args[0].grad = args[0].grad, None
        for room in ("reference", *OPS[self.op].backends):
            if device_of(room) != "cpu":
                continue
            with fastreid_vi.backend(room):
                result = ops.dense_alignment(*args[:3], weighting=args[3])
                ((result.aligned * weight).sum() + 3.0 * result.loss).backward()
            got, expected = (at_zeros(args[0], g)[0] for g in (args[0].grad, want))
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
            args[0].grad = None

    @pytest.mark.parametrize("kind", [DOUBLE, torch.float32])
    @pytest.mark.parametrize(("weighting", "name"), WEIGHTINGS)
    def test_golden(self, room: str, kind: torch.dtype, weighting: Any, name: str) -> None:
        device, exact = device_of(room), kind == DOUBLE
        for _, case in aligned_cases():
            x = tensor(case["feat"], device, kind).requires_grad_()
            pairs = [tensor(case[k], device) for k in ("pos_idx", "neg_idx")]
            with fastreid_vi.backend(room):
                result = ops.dense_alignment(x, *pairs, weighting=weighting)
                (by_loss,) = torch.autograd.grad(result.loss, x, retain_graph=True)
                cotangent = tensor(case["recon_cot"], device, kind)
                (by_map,) = torch.autograd.grad(result.aligned, x, cotangent)
            assert error(result.aligned, case["recon_pos"]) < (1e-9 if exact else 2e-5)
            assert error(result.comask, case["comask"]) < (1e-9 if exact else 2e-5)
            assert error(result.loss, case[f"loss_{name}"]) < (1e-9 if exact else 1e-5)
            for got, key in (
                (by_loss, f"grad_feat_loss_{name}"),
                (by_map, "grad_feat_recon_pos"),
            ):
                want = at_zeros(x, tensor(case[key], device))[0]
                assert error(at_zeros(x, got)[0], want) < (1e-9 if exact else 1e-4)

    @pytest.mark.parametrize("kind", [DOUBLE, torch.float32])
    @pytest.mark.parametrize(("weighting", "name"), WEIGHTINGS)
    def test_golden_edge(self, room: str, kind: torch.dtype, weighting: Any, name: str) -> None:
        """A zero position, a constant map, and a row whose positive partner is its own copy."""
        vectors, device = golden("lba/cmalign_edge"), device_of(room)
        x = tensor(vectors["feat"], device, kind).requires_grad_()
        pairs = [tensor(vectors[k], device) for k in ("pos_idx", "neg_idx")]
        with fastreid_vi.backend(room):
            result = ops.dense_alignment(x, *pairs, weighting=weighting)
            (gradient,) = torch.autograd.grad(result.loss, x)
        assert error(result.loss, vectors[f"loss_{name}"]) < (1e-9 if kind == DOUBLE else 1e-5)
        assert error(result.comask, vectors["comask"]) < (1e-9 if kind == DOUBLE else 2e-5)
        got, rest = at_zeros(x, gradient)
        want = vectors[f"grad_feat_without_zero_pixel_{name}"]  # stored in float32
        assert error(got, want) < (1e-7 if kind == DOUBLE else 1e-4)
        assert rest < 1e-12


def plain(
    x: Tensor, mask: Tensor, positive: Tensor, negative: Tensor, weighting: str
) -> tuple[Tensor, Tensor]:
    """The block in a few lines of PyTorch, for its autograd."""
    rows = x.flatten(2).transpose(1, 2)
    unit, m = torch.nn.functional.normalize(rows, dim=2), mask.flatten(2).transpose(1, 2)
    maps, matched = [], []
    for index in (positive, negative):
        p = torch.softmax(50.0 * unit @ unit[index].transpose(1, 2), 2)
        maps.append(m * (p @ rows[index]) + (1 - m) * rows)
        matched.append((m * (p @ m[index])).detach())
    near, far = ((rows - r + 1e-6).norm(dim=2) for r in maps)
    comask = matched[0][..., 0]
    comask = comask - comask.amin(1, keepdim=True)
    comask = comask / (comask.amax(1, keepdim=True) + 1e-12)
    hinge = (0.3 + near - far).relu()
    if weighting == "batch":
        comask, hinge = comask.sum(0) / max(len(x), 1), hinge.sum(0) / max(len(x), 1)
        return maps[0].transpose(1, 2).reshape(x.shape), (comask * hinge).mean()
    loss = (comask * hinge).sum() / max(hinge.numel(), 1)
    return maps[0].transpose(1, 2).reshape(x.shape), loss


def pairing(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    negative = torch.randint(batch, (batch,), generator=generator)
    return torch.randperm(batch, generator=generator), negative


ROOMS = ("reference", *(r for r in OPS["dense_alignment"].backends if r != "cuda"))


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("weighting", ["sample", "batch"])
@pytest.mark.parametrize(
    ("kind", "forward", "backward"),
    [
        (torch.float32, 1e-5, 3e-5),
        (torch.float16, 1e-3, 5e-3),
        (torch.bfloat16, 4e-3, 1e-2),
    ],
)
def test_error_budget(
    room: str, weighting: Any, kind: torch.dtype, forward: float, backward: float
) -> None:
    """Frobenius errors against float64 on the same rounded inputs; eager PyTorch errs by 15 %."""
    x = person(6, 256, 9, 6).to(kind)
    pairs = pairing(6, 3)
    cotangent = seeded(*x.shape).to(kind)
    results = []
    for at, where in ((DOUBLE, "reference"), (kind, room)):
        leaf = x.to(at, copy=True).to(device_of(where)).requires_grad_()
        index = [i.to(leaf.device) for i in pairs]
        with fastreid_vi.backend(where):
            r = ops.dense_alignment(leaf, *index, weighting=weighting)
            (by_loss,) = torch.autograd.grad(r.loss, leaf, retain_graph=True)
            (by_map,) = torch.autograd.grad(r.aligned, leaf, cotangent.to(leaf))
        results.append([r.aligned, r.loss, r.comask, by_loss, by_map])
    for i, (want, got) in enumerate(zip(*results, strict=True)):
        assert frobenius(got, want) < (forward if i < 3 else backward), i


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_equals_its_four_parts(b: int, c: int, h: int, w: int) -> None:
    x, pairs = person(b, c, h, w).requires_grad_(), pairing(b, b + c)
    mask = ops.feature_mask(x)
    parts = [ops.align_features(x, index, mask=mask, temperature=20.0) for index in pairs]
    for weighting in ("sample", "batch"):
        whole = ops.dense_alignment(x, *pairs, temperature=20.0, margin=0.1, weighting=weighting)
        loss = ops.dense_triplet_loss(
            x, parts[0].aligned, parts[1].aligned, parts[0].comask, margin=0.1, weighting=weighting
        )
        torch.testing.assert_close(whole.aligned, parts[0].aligned)
        torch.testing.assert_close(whole.comask, parts[0].comask)
        torch.testing.assert_close(whole.loss, loss)
        (want,) = torch.autograd.grad(loss, x, retain_graph=True)
        (got,) = torch.autograd.grad(whole.loss, x)
        torch.testing.assert_close(got, want)


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 4), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_properties(b: int, c: int, h: int, w: int) -> None:
    x, (positive, negative) = person(b, c, h, w), pairing(b, b * c)
    result = ops.dense_alignment(x, positive, negative)
    still = ops.feature_mask(x).expand_as(x) == 0
    assert torch.equal(result.aligned[still], x[still])
    same = ops.dense_alignment(x, positive, positive, margin=0.25)
    torch.testing.assert_close(same.loss, 0.25 * same.comask.mean(), rtol=1e-6, atol=1e-9)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(c))
    back = torch.argsort(order)
    for weighting in ("sample", "batch"):
        one = ops.dense_alignment(x, positive, negative, weighting=weighting)
        moved = [back[i[order]] for i in (positive, negative)]
        other = ops.dense_alignment(x[order], *moved, weighting=weighting)
        torch.testing.assert_close(other.loss, one.loss)
        torch.testing.assert_close(other.aligned, one.aligned[order])


@pytest.mark.parametrize("room", ROOMS)
def test_without_eps_equal_positions_get_no_gradient(room: str) -> None:
    x = person(2, 8, 3, 2).to(device_of(room)).requires_grad_()
    own, other = torch.arange(2, device=x.device), torch.tensor([1, 0], device=x.device)
    with fastreid_vi.backend(room):
        for result in (
            ops.dense_alignment(x, own, other, eps=0.0),
            ops.dense_alignment(x[:, :, :1, :1], own, own, eps=0.0),
        ):
            (gradient,) = torch.autograd.grad(result.loss, x)
            assert gradient.isfinite().all()


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_reconstruction_that_is_nearly_the_map(room: str, kind: torch.dtype) -> None:
    """Some positions meet their copy: |f - w|^2 cancels in inner products, on either side."""
    x = person(3, 40, 5, 4)
    x[1, :, 1:4] = x[0, :, 1:4] * 1.0078125
    pairs = [torch.tensor(i) for i in ([2, 0, 1], [1, 2, 1])]
    results = []
    for at, where in ((DOUBLE, "reference"), (kind, room)):
        leaf = x.to(kind).to(device_of(where), at, copy=True).requires_grad_()
        with fastreid_vi.backend(where):
            for index in (pairs, pairs[::-1]):
                loss = ops.dense_alignment(leaf, *(i.to(leaf.device) for i in index)).loss
                results.append((loss, *torch.autograd.grad(loss, leaf)))
    for want, got in zip(results[:2], results[2:], strict=True):
        assert frobenius(got[0], want[0].double()) < (1e-5 if kind == torch.float32 else 4e-3)
        assert frobenius(got[1], want[1]) < (1e-4 if kind == torch.float32 else 2e-2)


def test_a_partner_out_of_range_is_never_read() -> None:
    x, good = person(2, 8, 3, 2), torch.tensor([1, 0])
    for bad in (torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0, 2**62])):
        with pytest.raises(ValueError, match=r"index: expected entries in \[0, 2\)"):
            ops.align_features(x, bad, mask=ops.feature_mask(x))
        with pytest.raises(ValueError, match=r"positive: expected entries in \[0, 2\)"):
            ops.dense_alignment(x, bad, good)
        with pytest.raises(ValueError, match=r"negative: expected entries in \[0, 2\)"):
            ops.dense_alignment(x, good, bad)


GOOD = {"features": torch.ones(2, 3, 4, 5)}
PAIR = torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"features": torch.ones(2, 3)}, ValueError, r"features: expected shape \[B, C, H, W\]"),
        ({"index": torch.tensor([1])}, ValueError, r"index: expected int64 of shape \[2\]"),
        ({"index": PAIR.int()}, TypeError, "index: expected int64"),
        ({"mask": torch.ones(2, 4, 5)}, ValueError, r"mask: expected shape \[B, 1, H, W\]"),
        ({"mask": torch.ones(1, 1, 4, 5)}, ValueError, r"mask: expected shape \[2, 1, 4, 5\]"),
        ({"temperature": -1.0}, ValueError, "temperature: expected > 0"),
    ],
)
def test_align_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ops.align_features(**{**GOOD, "index": PAIR, "mask": torch.ones(2, 1, 4, 5), **change})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"features": torch.ones(2, 3, 4, 5).int()}, TypeError, "features: expected a floating"),
        ({"positive": PAIR.float()}, TypeError, "positive: expected int64"),
        ({"negative": PAIR[:1]}, ValueError, r"negative: expected int64 of shape \[2\]"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected > 0"),
        ({"margin": float("nan")}, ValueError, "margin: expected a number, got nan"),
        ({"weighting": "official"}, ValueError, "weighting: expected one of 'sample', 'batch'"),
        ({"eps": -1e-6}, ValueError, "eps: expected >= 0"),
    ],
)
def test_dense_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ops.dense_alignment(**{**GOOD, "positive": PAIR, "negative": PAIR, **change})
