from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreid_vi import ops
from tests.conftest import golden
from tests.contract import OpContract
from tests.ops.test_pool import assert_close, seeded, tensor


def drawn_labels(rows: int, identities: int) -> torch.Tensor:
    return torch.randint(identities, (rows,), generator=torch.Generator().manual_seed(rows))


class TestBatchHardTripletLoss(OpContract):
    op = "batch_hard_triplet_loss"
    cases = (
        (12, 0, 5, 3, "euclidean"),
        (12, 9, 5, 3, "sqeuclidean"),
        (12, 9, 5, 3, "cosine"),
        (0, 0, 5, 3, "euclidean"),
        (4, 0, 5, 1, "euclidean"),
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
    def test_golden(self, name: str) -> None:
        v = golden("lba/triplet")
        x = tensor(v[f"{name}/x"]).requires_grad_()
        loss, correct = ops.batch_hard_triplet_loss(
            x, tensor(v["labels"]), margin=float(v["margin"])
        )
        loss.backward()
        assert_close(loss, v[f"{name}/hard_loss"], 1e-5)
        assert_close(x.grad, v[f"{name}/hard_grad"], 1e-4)
        assert correct.item() == v[f"{name}/hard_correct"]
        assert correct.dtype == torch.int64

    @pytest.mark.parametrize("name", ["k8", "k10", "k4", "k4_shuffled"])
    def test_golden_mpanet_option(self, name: str) -> None:
        v = golden("mpanet/center_cluster")
        loss = ops.batch_hard_triplet_loss(
            tensor(v[f"{name}/x"]), tensor(v[f"{name}/labels"]), margin=float(v["margin"])
        ).loss
        assert_close(loss, v[f"{name}/triplet_loss"], 1e-5)


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


def test_one_identity_gives_zero_with_a_graph() -> None:
    x = seeded(4, 3).requires_grad_()
    loss, correct = ops.batch_hard_triplet_loss(x, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert correct.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


class TestCenterClusterLoss(OpContract):
    op = "center_cluster_loss"
    cases = ((12, 5, 3, 2.0), (12, 5, 4, 0.01), (0, 5, 3, 0.7), (4, 3, 1, 0.7), (7, 6, 7, 5.0))

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        rows, size, identities, margin = case
        return seeded(rows, size), drawn_labels(rows, identities), margin

    def call(self, *args: Any) -> Any:
        return tuple(ops.center_cluster_loss(args[0], args[1], margin=args[2]))

    @pytest.mark.parametrize("name", ["k8", "k10", "k4", "k4_shuffled"])
    def test_golden(self, name: str) -> None:
        v = golden("mpanet/center_cluster")
        x = tensor(v[f"{name}/x"]).requires_grad_()
        result = ops.center_cluster_loss(x, tensor(v[f"{name}/labels"]), margin=float(v["margin"]))
        result.loss.backward()
        assert_close(result.loss, v[f"{name}/pair_loss"], 1e-5)
        assert_close(result.pull, v[f"{name}/dist_pc"], 1e-5)
        assert_close(result.push, v[f"{name}/pair_dist_an"], 1e-5)
        assert_close(x.grad, v[f"{name}/pair_grad"], 1e-4)


def test_center_cluster_does_not_depend_on_the_order_of_rows() -> None:
    x, labels = seeded(10, 4), drawn_labels(10, 3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    first = ops.center_cluster_loss(x, labels, margin=3.0)
    second = ops.center_cluster_loss(x[order], labels[order], margin=3.0)
    torch.testing.assert_close(tuple(first), tuple(second))


def test_a_row_on_its_centre_has_a_finite_gradient() -> None:
    v = golden("mpanet/center_cluster")
    x = tensor(v["duplicate/x"]).requires_grad_()
    loss = ops.center_cluster_loss(x, tensor(v["duplicate/labels"])).loss
    loss.backward()
    assert_close(loss, v["duplicate/loss"], 1e-5)
    assert v["duplicate/grad_isnan"].any()  # the published gradient
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        (
            "batch_hard_triplet_loss",
            {"labels": torch.zeros(3)},
            TypeError,
            r"labels: expected int64 of shape \[4\]",
        ),
        (
            "center_cluster_loss",
            {"labels": torch.zeros(3).long()},
            ValueError,
            r"labels: expected int64 of shape",
        ),
        (
            "batch_hard_triplet_loss",
            {"embeddings": torch.ones(4)},
            ValueError,
            r"embeddings: expected shape \[N, D\]",
        ),
        ("batch_hard_triplet_loss", {"metric": "dot"}, ValueError, "metric: expected one of"),
        (
            "batch_hard_triplet_loss",
            {"references": torch.ones(2, 3)},
            ValueError,
            "expected both or none",
        ),
        (
            "batch_hard_triplet_loss",
            {"margin": float("nan")},
            ValueError,
            "margin: expected a number",
        ),
        ("center_cluster_loss", {"margin": 0.0}, ValueError, "margin: expected > 0"),
    ],
)
def test_bad_input(op: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"embeddings": torch.ones(4, 3), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        getattr(ops, op)(**{**good, **change})
