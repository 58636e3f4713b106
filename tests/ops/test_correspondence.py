from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastreid_vi
from fastreid_vi import ops
from tests.conftest import golden
from tests.contract import LAYOUTS, OpContract, device_of
from tests.ops.matching_cases import aligned_cases, error, person, plain_mask, seeded, tensor

DOUBLE = torch.float64


class TestFeatureMask(OpContract):
    op, layouts, detached = "feature_mask", LAYOUTS, (0,)
    cases = ((2, 8, 6, 3), (1, 33, 1, 1), (0, 3, 4, 3), (3, 72, 7, 1), (2, 5, 9, 5))

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        return (person(*case),)

    def run(
        self, args: list[Any], room: str, dtype: torch.dtype, backward_room: str | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        with fastreid_vi.backend(room):
            mask = ops.feature_mask(args[0])
        assert not mask.requires_grad
        return [mask], [torch.zeros_like(args[0])]

    def test_compiles_without_graph_breaks(self) -> None:
        x = person(*self.cases[0]).requires_grad_()
        torch._dynamo.reset()
        mask = torch.compile(ops.feature_mask, fullgraph=True)(x)
        torch.testing.assert_close(mask, ops.feature_mask(x))

    def test_gradcheck(self, case: Any) -> None:
        assert not ops.feature_mask(person(*case).requires_grad_()).requires_grad

    def test_any_backward_follows_any_forward(self) -> None:
        assert "feature_mask_backward" not in fastreid_vi._dispatch.OPS

    def test_no_double_backward(self) -> None:
        x = person(*self.cases[0]).requires_grad_()
        assert not (x * ops.feature_mask(x)).sum().isnan()

    @pytest.mark.parametrize("kind", [DOUBLE, torch.float32])
    def test_golden(self, room: str, kind: torch.dtype) -> None:
        bound, device = (1e-9 if kind == DOUBLE else 2e-5), device_of(room)
        vectors = golden("lba/cmalign_mask_recon")
        pairs = [(vectors["feat_q"], vectors["mask_q"]), (vectors["feat_k"], vectors["mask_k"])]
        pairs += [(case["feat"], case["mask"]) for _, case in aligned_cases()]
        with fastreid_vi.backend(room):
            for features, mask in pairs:
                assert error(ops.feature_mask(tensor(features, device, kind)), mask) < bound
            edge = golden("lba/cmalign_edge")
            mask = ops.feature_mask(tensor(edge["feat"], device, kind))
        assert error(mask, edge["mask"]) < bound
        assert not mask[2].any()  # a constant map

    @pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
    @pytest.mark.parametrize("kind", [DOUBLE, torch.float32, torch.bfloat16])
    def test_a_constant_map_has_no_mask(
        self, room: str, kind: torch.dtype, layout: torch.memory_format
    ) -> None:
        column = seeded(2, 67, 1, 1).to(kind)
        x = column.expand(2, 67, 7, 5).contiguous(memory_format=layout).to(device_of(room))
        with fastreid_vi.backend(room):
            assert not ops.feature_mask(x).any()


class MatchingContract(OpContract):
    layouts = LAYOUTS
    cases: Any = (
        ((2, 8, 6, 3), 2, None, True),
        ((3, 33, 1, 1), 2, (1, 1, 0), True),
        ((2, 72, 7, 1), 5, (4, 0), False),
        ((0, 8, 3, 2), 3, (), True),
        ((4, 8, 9, 5), 2, (1, 1, 1, 0), True),
        ((1, 33, 18, 9), 1, (0,), True),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape, count, index, masks = case
        target = (person(count, *shape[1:]) + 0.1 * seeded(count, *shape[1:])).flip(1)
        return seeded(*shape), target, None if index is None else torch.tensor(index).long(), masks


class TestProbability(MatchingContract):
    op = "correspondence_probability"

    def call(self, *args: Any) -> Any:
        return ops.correspondence_probability(*args[:2], index=args[2])

    @pytest.mark.parametrize("kind", [DOUBLE, torch.float32])
    def test_golden(self, room: str, kind: torch.dtype) -> None:
        vectors, device = golden("lba/cmalign_similarity_warp"), device_of(room)
        q, k = (tensor(vectors[n], device, kind).requires_grad_() for n in ("feat_q", "feat_k"))
        with fastreid_vi.backend(room):
            p = ops.correspondence_probability(q, k)
            assert error(p, vectors["prob"]) < (1e-9 if kind == DOUBLE else 2e-5)
            p.backward(tensor(vectors["prob_cot"], device, kind))
        # The stored gradient of the similarity, taken on to the maps by plain PyTorch.
        wq, wk = (tensor(vectors[n], dtype=DOUBLE).requires_grad_() for n in ("feat_q", "feat_k"))
        u, v = (torch.nn.functional.normalize(x.flatten(2), dim=1) for x in (wq, wk))
        similarity = u.transpose(1, 2) @ v
        assert error(similarity, vectors["sim"]) < 1e-12
        similarity.backward(tensor(vectors["prob_grad_sim"]))
        for got, want in ((q.grad, wq.grad), (k.grad, wk.grad)):
            assert got is not None
            assert want is not None
            assert error(got, want) < (1e-9 if kind == DOUBLE else 1e-4)


class TestWarp(MatchingContract):
    op = "correspondence_warp"

    @property
    def detached(self) -> tuple[int, ...]:  # type: ignore[override]
        return (1,)

    def call(self, *args: Any) -> Any:
        source, target, index, masks = args
        if not masks:
            return ops.correspondence_warp(source, target, index=index).warped
        both = {"source_mask": plain_mask(source), "target_mask": plain_mask(target)}
        return tuple(ops.correspondence_warp(source, target, index=index, **both))

    def smooth(self, outputs: Any) -> list[Tensor]:
        return super().smooth(outputs) if len(outputs) == 2 else [outputs[0]]

    @pytest.mark.parametrize("kind", [DOUBLE, torch.float32])
    def test_golden(self, room: str, kind: torch.dtype) -> None:
        vectors, device = golden("lba/cmalign_similarity_warp"), device_of(room)
        q, k = (tensor(vectors[n], device, kind).requires_grad_() for n in ("feat_q", "feat_k"))
        masked = golden("lba/cmalign_mask_recon")
        masks = {
            "source_mask": tensor(masked["mask_q"], device),
            "target_mask": tensor(masked["mask_k"], device),
        }
        with fastreid_vi.backend(room):
            warped, comask = ops.correspondence_warp(q, k, **masks)
            warped.backward(tensor(vectors["warp_cot"], device, kind))
        assert error(warped, vectors["warp"]) < (1e-9 if kind == DOUBLE else 2e-5)
        assert error(comask, masked["comask"]) < (1e-9 if kind == DOUBLE else 2e-5)
        wq, wk = (tensor(vectors[n], dtype=DOUBLE).requires_grad_() for n in ("feat_q", "feat_k"))
        u, v = (torch.nn.functional.normalize(x.flatten(2), dim=1) for x in (wq, wk))
        p = torch.softmax(50.0 * u.transpose(1, 2) @ v, 2)
        p.backward(tensor(vectors["warp_grad_prob"]))
        assert wk.grad is not None
        for got, want in ((q.grad, wq.grad), (k.grad, wk.grad + tensor(vectors["warp_grad_k"]))):
            assert error(got, want) < (1e-9 if kind == DOUBLE else 1e-4)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.floats(1, 90))
def test_matching_properties(b: int, c: int, h: int, w: int, temperature: float) -> None:
    source, target = seeded(b, c, h, w), seeded(b, c, w, h).reshape(b, c, h, w)
    p = ops.correspondence_probability(source, target, temperature=temperature)
    torch.testing.assert_close(p.sum(2), torch.ones(b, h * w, dtype=DOUBLE))
    scaled = ops.correspondence_probability(3.5 * source, 0.25 * target, temperature=temperature)
    torch.testing.assert_close(scaled, p, rtol=1e-9, atol=1e-12)
    warped = ops.correspondence_warp(source, target, temperature=temperature).warped
    low, high = target.amin((2, 3), keepdim=True), target.amax((2, 3), keepdim=True)
    assert ((warped >= low - 1e-12) & (warped <= high + 1e-12)).all()


def test_a_target_may_serve_many() -> None:
    source, target, index = seeded(4, 8, 3, 2), person(3, 8, 3, 2), torch.tensor([2, 2, 0, 2])
    gathered = target[index].requires_grad_()
    shared = target.clone().requires_grad_()
    one = ops.correspondence_warp(source, shared, index=index).warped
    other = ops.correspondence_warp(source, gathered).warped
    torch.testing.assert_close(one, other)
    weight = seeded(*one.shape)
    (one * weight).sum().backward()
    (other * weight).sum().backward()
    assert gathered.grad is not None
    total = torch.zeros_like(target).index_add(0, index, gathered.grad)
    torch.testing.assert_close(shared.grad, total)
    assert shared.grad is not None
    assert not shared.grad[1].any()  # nobody's target


def test_a_zero_position_gets_no_gradient_through_its_direction() -> None:
    source, target = seeded(1, 8, 3, 2), person(1, 8, 3, 2)
    target[0, :, 1, 1] = 0.0
    target.requires_grad_()
    warped = ops.correspondence_warp(source, target, temperature=1.0).warped
    p = ops.correspondence_probability(source, target, temperature=1.0)
    warped.sum().backward()
    assert target.grad is not None
    values = p.detach().sum(1)[0].reshape(1, 3, 2).expand(8, 3, 2)  # dk = P^T dw alone
    torch.testing.assert_close(target.grad[0, :, 1, 1], values[:, 1, 1])


def test_warp_under_autocast() -> None:
    source, target = seeded(2, 8, 3, 2).float(), seeded(2, 8, 3, 2).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        warped = ops.correspondence_warp(source.bfloat16(), target).warped
    assert warped.dtype == torch.bfloat16
    warped.float().sum().backward()
    assert target.grad is not None
    assert target.grad.dtype == torch.float32


GOOD = {"source": torch.ones(2, 3, 4, 5), "target": torch.ones(3, 3, 4, 5)}
INDEX = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"source": torch.ones(2, 3, 4)}, ValueError, r"source: expected shape \[B, C, H, W\]"),
        ({"source": torch.ones(2, 3, 4, 5).int()}, TypeError, "source: expected a floating"),
        ({"target": torch.ones(3, 4, 4, 5)}, ValueError, r"target: expected shape \[3, 3, 4, 5\]"),
        ({"target": torch.ones(3, 3, 4, 5).double()}, TypeError, "target: expected dtype"),
        ({"target": torch.ones(0, 3, 4, 5)}, ValueError, "target: expected at least one map"),
        ({"index": None}, ValueError, r"target: expected shape \[2, 3, 4, 5\]"),
        ({"index": torch.tensor([0])}, ValueError, r"index: expected int64 of shape \[2\]"),
        ({"index": torch.tensor([0.0, 1.0])}, TypeError, "index: expected int64"),
        (
            {"index": torch.tensor([0, 3])},
            ValueError,
            r"index: expected entries in \[0, 3\), got 3",
        ),
        ({"index": torch.tensor([-1, 0])}, ValueError, r"got -1 at position 0"),
        ({"temperature": 0.0}, ValueError, "temperature: expected > 0"),
        ({"source_mask": torch.ones(2, 1, 4, 5)}, ValueError, "expected both or none"),
        (
            {"source_mask": torch.ones(2, 1, 4, 5), "target_mask": torch.ones(2, 1, 4, 5)},
            ValueError,
            r"target_mask: expected shape \[3, 1, 4, 5\]",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ops.correspondence_warp(**{**GOOD, "index": INDEX, **change})
    if not any("mask" in name for name in change):
        with pytest.raises(kind, match=message):
            ops.correspondence_probability(**{**GOOD, "index": INDEX, **change})


def test_mask_bad_input() -> None:
    with pytest.raises(ValueError, match="features: expected at least one channel and position"):
        ops.feature_mask(torch.ones(2, 3, 0, 5))
