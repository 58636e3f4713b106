from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastreid_vi
from fastreid_vi import ops
from fastreid_vi._checks import NonFiniteError
from tests.conftest import golden
from tests.contract import OpContract, device_of
from tests.ops.test_pool import assert_close, seeded, tensor
from tests.ops.test_triplet import drawn_labels


class TestCenterClusterLoss(OpContract):
    op = "center_cluster_loss"
    cases = (
        (12, 5, 3, 2.0),
        (12, 5, 4, 0.01),
        (37, 41, 9, 20.0),
        (0, 5, 3, 0.7),
        (4, 3, 1, 0.7),
        (7, 6, 7, 5.0),
        (1, 1, 1, 0.7),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        rows, size, identities, margin = case
        return seeded(rows, size), drawn_labels(rows, identities), margin

    def call(self, *args: Any) -> Any:
        return tuple(ops.center_cluster_loss(args[0], args[1], margin=args[2]))

    @pytest.mark.parametrize("name", ["k8", "k10", "k4", "k4_shuffled"])
    def test_golden(self, name: str, room: str) -> None:
        v = golden("mpanet/center_cluster")
        x = tensor(v[f"{name}/x"]).to(device_of(room)).requires_grad_()
        labels = tensor(v[f"{name}/labels"]).to(device_of(room))
        with fastreid_vi.backend(room):
            result = ops.center_cluster_loss(x, labels, margin=float(v["margin"]))
            result.loss.backward()
        assert_close(result.loss, v[f"{name}/pair_loss"], 1e-5)
        assert_close(result.pull, v[f"{name}/dist_pc"], 1e-5)
        assert_close(result.push, v[f"{name}/pair_dist_an"], 1e-5)
        assert_close(x.grad, v[f"{name}/pair_grad"], 1e-4)

    def test_a_row_on_its_centre_has_a_finite_gradient(self, room: str) -> None:
        v = golden("mpanet/center_cluster")
        x = tensor(v["duplicate/x"]).to(device_of(room)).requires_grad_()
        with fastreid_vi.backend(room):
            loss = ops.center_cluster_loss(
                x, tensor(v["duplicate/labels"]).to(device_of(room))
            ).loss
            loss.backward()
        assert_close(loss, v["duplicate/loss"], 1e-5)
        assert v["duplicate/grad_isnan"].any()  # the published gradient
        assert x.grad is not None
        assert x.grad.isfinite().all()

    def test_near_centres_far_from_the_origin(self, room: str) -> None:
        """Quirk M3: with the expanded square the gap between centres carries an error of 1 %."""
        base = seeded(1, 2000) * 2
        x = (base + 0.01 * seeded(16, 2000)).float()
        labels = torch.arange(4).repeat_interleave(4)
        exact = ops.center_cluster_loss(x.double(), labels)
        with fastreid_vi.backend(room):
            got = ops.center_cluster_loss(x.to(device_of(room)), labels.to(device_of(room)))
        assert exact.push.item() > 0.1
        assert got.push.item() == pytest.approx(exact.push.item(), rel=1e-5)
        assert got.pull.item() == pytest.approx(exact.pull.item(), rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(1, 5), st.floats(0.1, 6.0))
def test_equals_autograd_of_its_formula(rows: int, identities: int, margin: float) -> None:
    x, labels = seeded(rows, 4).requires_grad_(), drawn_labels(rows, identities)
    centres = {y: x[labels == y].mean(0) for y in labels.tolist()}
    radii = [(x[i] - centres[y]).square().sum() for i, y in enumerate(labels.tolist())]
    pull = sum((r.sqrt() for r in radii if r > 1e-20), x.sum() * 0) / rows
    names = sorted(centres)
    gaps = [(centres[p] - centres[q]).norm() for i, p in enumerate(names) for q in names[:i]]
    push = (margin - torch.stack(gaps)).clamp_min(0).mean() if gaps else x.sum() * 0
    got = ops.center_cluster_loss(x, labels, margin=margin)
    torch.testing.assert_close((got.pull, got.push), (pull, push))
    weighted = 0.3 * got.pull + 2.0 * got.push
    torch.testing.assert_close(
        torch.autograd.grad(weighted, x), torch.autograd.grad(0.3 * pull + 2.0 * push, x)
    )


def test_does_not_depend_on_the_order_of_rows() -> None:
    x, labels = seeded(10, 4), drawn_labels(10, 3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    first = ops.center_cluster_loss(x, labels, margin=3.0)
    second = ops.center_cluster_loss(x[order], labels[order], margin=3.0)
    torch.testing.assert_close(tuple(first), tuple(second))


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_pull_or_push(rows: int) -> None:
    x = seeded(rows, 3).requires_grad_()
    result = ops.center_cluster_loss(x, torch.zeros(rows, dtype=torch.int64))
    result.loss.backward()
    assert [v.item() for v in result] == [0.0, 0.0, 0.0]
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_nan_is_refused() -> None:
    x = seeded(6, 3)
    x[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"embeddings: expected finite .* nan in row 3"):
        ops.center_cluster_loss(x, torch.arange(6) // 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels: expected int64 of shape \[4\]"),
        ({"labels": torch.zeros(4)}, TypeError, r"labels: expected int64 of shape \[4\]"),
        ({"labels": torch.zeros(4).long().to("meta")}, ValueError, "labels: expected device cpu"),
        ({"embeddings": torch.ones(4, 0)}, ValueError, "embeddings: .* with D >= 1"),
        ({"margin": 0.0}, ValueError, "margin: expected > 0"),
        ({"margin": float("nan")}, ValueError, "margin: expected > 0"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"embeddings": torch.ones(4, 3), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        ops.center_cluster_loss(**{**good, **change})
