from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastreid_vi
from fastreid_vi import ops
from fastreid_vi._checks import NonFiniteError
from tests.conftest import golden
from tests.contract import OpContract, device_of
from tests.ops.test_pool import assert_close, seeded, tensor

LOSSES = ("batch_hard_triplet_loss", "weighted_triplet_loss")


def drawn_labels(rows: int, identities: int) -> Tensor:
    return torch.randint(identities, (rows,), generator=torch.Generator().manual_seed(rows))


def loss_and_gradients(room: str, op: str, *floats: Tensor, **others: Any) -> tuple[Any, ...]:
    """Result of the op in this room, and the gradients of its floating arguments."""
    device = device_of(room)
    leaves = [x.detach().to(device).requires_grad_() for x in floats]
    names = ("embeddings", "references")[: len(leaves)]
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in others.items()}
    with fastreid_vi.backend(room):
        result = getattr(ops, op)(**dict(zip(names, leaves, strict=True)), **moved)
        result.loss.backward()
    return result, *(x.grad for x in leaves)


class TestBatchHardTripletLoss(OpContract):
    op = "batch_hard_triplet_loss"
    cases = (
        (12, 0, 5, 3, "euclidean"),
        (12, 9, 5, 3, "sqeuclidean"),
        (12, 9, 5, 3, "cosine"),
        (33, 0, 40, 9, "cosine"),
        (35, 3, 37, 4, "euclidean"),  # anchors without a positive
        (0, 0, 5, 3, "euclidean"),
        (4, 0, 5, 1, "euclidean"),
        (1, 0, 1, 1, "euclidean"),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        rows, references, size, identities, metric = case
        labels = drawn_labels(rows, identities)
        if not references:
            return seeded(rows, size), labels, metric
        other = seeded(references, size) + 0.2
        return seeded(rows, size), labels, metric, other, drawn_labels(references, identities)

    def call(self, *args: Any) -> Any:
        x, labels, metric = args[:3]
        references, reference_labels = args[3:] if len(args) > 3 else (None, None)
        return tuple(
            ops.batch_hard_triplet_loss(
                x, labels, metric=metric, references=references, reference_labels=reference_labels
            )
        )

    @pytest.mark.parametrize("name", ["a", "b"])
    def test_golden(self, name: str, room: str) -> None:
        v = golden("lba/triplet")
        result, grad = loss_and_gradients(
            room, self.op, tensor(v[f"{name}/x"]), labels=tensor(v["labels"]),
            margin=float(v["margin"]),
        )  # fmt: skip
        assert_close(result.loss, v[f"{name}/hard_loss"], 1e-5)
        assert_close(grad, v[f"{name}/hard_grad"], 1e-4)
        assert result.correct.item() == v[f"{name}/hard_correct"]
        assert result.correct.dtype == torch.int64

    @pytest.mark.parametrize("name", ["k8", "k10", "k4", "k4_shuffled"])
    def test_golden_mpanet_option(self, name: str, room: str) -> None:
        v = golden("mpanet/center_cluster")
        result, _ = loss_and_gradients(
            room, self.op, tensor(v[f"{name}/x"]), labels=tensor(v[f"{name}/labels"]),
            margin=float(v["margin"]),
        )  # fmt: skip
        assert_close(result.loss, v[f"{name}/triplet_loss"], 1e-5)

    @pytest.mark.parametrize("name", ["cross", "same", "p18k4", "no_positive", "no_negative"])
    def test_golden_aligngan(self, name: str, room: str) -> None:
        w = golden("aligngan/triplet")
        v = {k: w[f"{name}__{k}"] for k in ("l1", "l2", "margin", "loss")}
        labels = {"labels": tensor(v["l1"]), "margin": float(v["margin"]), "metric": "cosine"}
        floats = [tensor(w[f"{name}__emb1"])]
        if not w[f"{name}__same_tensor"]:
            floats.append(tensor(w[f"{name}__emb2"]))
            labels["reference_labels"] = tensor(v["l2"])
        result, *grads = loss_and_gradients(room, self.op, *floats, **labels)
        assert result.loss.item() == pytest.approx(float(v["loss"]), abs=1e-5)
        for grad, key in zip(grads, ("g1", "g2"), strict=False):
            want = w[f"{name}__{key}"]
            assert np.abs(grad.cpu().numpy() - want).max() <= 1e-5 * max(np.abs(want).max(), 1e-2)

    def test_duplicate_rows_take_the_first_index(self, room: str) -> None:
        """Images of an identity are drawn with replacement: exact ties are ordinary."""
        x = seeded(4, 6).repeat(3, 1).float()  # rows i, i + 4 and i + 8 are equal
        labels = torch.tensor([0, 0, 1, 1] * 3)
        _, grad = loss_and_gradients(room, self.op, x, labels=labels, margin=5.0)
        d = ops.pairwise_distance(x[:4])
        far, near = d[:2, :2].argmax(1), d[:2, 2:].argmin(1) + 2
        expected = torch.zeros(12, 6)
        for i in range(12):
            own, base = i % 4, 0 if i % 4 < 2 else 2
            for j, sign in (
                (int(d[own, base : base + 2].argmax()) + base, 1.0),
                (int(d[own, 2 - base : 4 - base].argmin()) + 2 - base, -1.0),
            ):
                if own != j:
                    edge = sign * (x[own] - x[j]) / d[own, j] / 12
                    expected[i] += edge
                    expected[j] -= edge
        assert far.numel() == near.numel() == 2
        torch.testing.assert_close(grad.cpu(), expected, rtol=1e-4, atol=1e-6)

    def test_equal_rows_have_finite_gradients(self, room: str) -> None:
        x, labels = torch.ones(6, 5), torch.tensor([0, 0, 1, 1, 2, 2])
        result, grad = loss_and_gradients(room, self.op, x, labels=labels)
        assert result.loss.item() == pytest.approx(0.3)
        assert result.correct.item() == 6
        assert torch.equal(grad.cpu(), torch.zeros_like(x))

    def test_near_equal_rows_keep_their_distance(self, room: str) -> None:
        """Two images of one person, far from the origin: differences, not squares."""
        base = seeded(4, 300).repeat_interleave(2, 0) * 8
        x = (base + 1e-3 * seeded(8, 300)).float()
        labels = torch.arange(4).repeat_interleave(2)
        got, grad = loss_and_gradients(room, self.op, x, labels=labels, margin=400.0)
        want, exact = loss_and_gradients(
            "reference", self.op, x.double(), labels=labels, margin=400.0
        )
        assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
        assert_close(grad, exact.numpy(), 2e-6)


class TestWeightedTripletLoss(OpContract):
    op = "weighted_triplet_loss"
    cases = (
        (12, 5, 3, False),
        (12, 5, 3, True),
        (33, 40, 8, True),
        (0, 5, 3, False),
        (4, 5, 1, False),
        (1, 3, 1, True),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        rows, size, identities, stable = case
        return seeded(rows, size), drawn_labels(rows, identities), stable

    def call(self, *args: Any) -> Any:
        return tuple(ops.weighted_triplet_loss(args[0], args[1], stable=args[2]))

    @pytest.mark.parametrize("kind", ["wrt", "wrt_norm"])
    @pytest.mark.parametrize("name", ["a", "b"])
    def test_golden(self, name: str, kind: str, room: str) -> None:
        v = golden("lba/triplet")
        x = tensor(v[f"{name}/x"]).double().requires_grad_()
        rows = x / (x.norm(dim=1, keepdim=True) + 1e-12) if kind == "wrt_norm" else x * 1.0
        result, grad = loss_and_gradients(
            room, self.op, rows.detach().float(), labels=tensor(v["labels"])
        )
        rows.backward(grad.double().cpu())
        assert_close(result.loss, v[f"{name}/{kind}_loss"], 1e-5)
        assert_close(x.grad, v[f"{name}/{kind}_grad"], 1e-4)
        assert result.correct.item() == v[f"{name}/{kind}_correct"]

    def test_published_form_forgets_far_negatives(self, room: str) -> None:
        """Quirk L15: beyond a distance of about 14 only the stable form sees a negative."""
        x = torch.cat([seeded(4, 8), seeded(4, 8) + 20.0]).float()
        labels = torch.arange(2).repeat_interleave(4)
        (published, _), (stable, _) = (
            loss_and_gradients(room, self.op, x, labels=labels, stable=s) for s in (False, True)
        )
        assert published.loss.item() > 1.0
        assert stable.loss.item() < 1e-6
        assert (published.correct.item(), stable.correct.item()) == (0, 8)

    def test_equal_rows_have_finite_gradients(self, room: str) -> None:
        x, labels = torch.ones(6, 5), torch.tensor([0, 0, 1, 1, 2, 2])
        result, grad = loss_and_gradients(room, self.op, x, labels=labels)
        assert result.loss.item() == pytest.approx(np.log(2.0), abs=1e-6)
        assert torch.equal(grad.cpu(), torch.zeros_like(x))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(2, 12), st.integers(1, 4), st.sampled_from(["euclidean", "sqeuclidean", "cosine"])
)
def test_batch_hard_equals_a_loop_over_anchors(rows: int, identities: int, metric: Any) -> None:
    x, labels = seeded(rows, 3), drawn_labels(rows, identities)
    distance = ops.pairwise_distance(x, metric=metric)
    hinges, correct = [], 0
    for i in range(rows):
        positive = [distance[i, j].item() for j in range(rows) if labels[i] == labels[j]]
        negative = [distance[i, j].item() for j in range(rows) if labels[i] != labels[j]]
        if negative:
            hinges.append(max(0.0, 0.3 + max(positive) - min(negative)))
            correct += min(negative) >= max(positive)
    result = ops.batch_hard_triplet_loss(x, labels, metric=metric)
    assert result.loss.item() == pytest.approx(np.mean(hinges) if hinges else 0.0, abs=2e-6)
    assert result.correct.item() == correct


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 10), st.integers(2, 4), st.booleans())
def test_weighted_equals_autograd_of_its_formula(rows: int, identities: int, stable: bool) -> None:
    x, labels = seeded(rows, 4).requires_grad_(), drawn_labels(rows, identities)
    d = torch.cdist(x, x).clamp_min(1e-6)
    same = (labels[:, None] == labels[None, :]).double()
    terms = []
    for i in range(rows):
        p, n = d[i][same[i] > 0], d[i][same[i] == 0]
        if len(n):
            w_p = (p - p.max()).exp()
            w_n = (n.min() - n if stable else -n).exp()
            gap = (p * w_p).sum() / (w_p.sum() + 1e-6) - (n * w_n).sum() / (w_n.sum() + 1e-6)
            terms.append(torch.log1p(gap.exp()))
    loss = ops.weighted_triplet_loss(x, labels, stable=stable).loss
    want = torch.stack(terms).mean() if terms else x.sum() * 0
    torch.testing.assert_close(loss, want)
    (got,), (expected,) = torch.autograd.grad(loss, x), torch.autograd.grad(want, x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_no_pair_gives_zero_with_a_graph(op: str, rows: int) -> None:
    x = seeded(rows, 3).requires_grad_()
    loss, correct = getattr(ops, op)(x, torch.zeros(rows, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert correct.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_no_references_gives_zero() -> None:
    x, r = seeded(3, 4).requires_grad_(), seeded(0, 4).requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    loss = ops.batch_hard_triplet_loss(x, torch.arange(3), references=r, reference_labels=none).loss
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(op: str, value: float) -> None:
    x = seeded(6, 3)
    x[4, 1] = value
    with pytest.raises(
        NonFiniteError, match=rf"embeddings: expected finite .* got {value} in row 4"
    ):
        getattr(ops, op)(x, torch.arange(6) // 2)


def test_a_nan_in_the_references_is_named() -> None:
    r = seeded(6, 3)
    r[2, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"references: .* nan in row 2"):
        ops.batch_hard_triplet_loss(
            seeded(4, 3), torch.arange(4) // 2, references=r, reference_labels=torch.arange(6) // 2
        )


GOOD = {"embeddings": torch.ones(4, 3), "labels": torch.zeros(4, dtype=torch.int64)}


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(3)}, TypeError, r"labels: expected int64 of shape \[4\]"),
        ({"labels": torch.zeros(4).int()}, TypeError, r"labels: expected int64 .* got int32"),
        ({"labels": [0, 0, 1, 1]}, TypeError, r"labels: expected int64 .* got list"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels: expected int64 of shape \[4\]"),
        ({"labels": torch.zeros(4).long().to("meta")}, ValueError, "labels: expected device cpu"),
        ({"embeddings": torch.ones(4)}, ValueError, r"embeddings: expected shape \[N, D\]"),
        ({"embeddings": torch.ones(4, 0)}, ValueError, "embeddings: .* with D >= 1"),
        ({"embeddings": torch.ones(4, 3).long()}, TypeError, "embeddings: expected a floating"),
    ],
)
def test_bad_input(op: str, change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(ops, op)(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metric": "dot"}, ValueError, "metric: expected one of"),
        ({"references": torch.ones(2, 3)}, ValueError, "expected both or none"),
        ({"margin": float("nan")}, ValueError, "margin: expected a number"),
        (
            {"references": torch.ones(2, 4), "reference_labels": torch.zeros(2).long()},
            ValueError,
            r"references: expected shape \[2, 3\]",
        ),
        (
            {"references": torch.ones(2, 3).half(), "reference_labels": torch.zeros(2).long()},
            TypeError,
            "references: expected dtype torch.float32",
        ),
        (
            {"references": torch.ones(2, 3), "reference_labels": torch.zeros(3).long()},
            ValueError,
            r"reference_labels: expected int64 of shape \[2\]",
        ),
    ],
)
def test_bad_batch_hard_options(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.batch_hard_triplet_loss(**{**GOOD, **change})
