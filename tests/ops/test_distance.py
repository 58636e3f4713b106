from __future__ import annotations

from typing import Any

import pytest
import torch

from fastreid_vi import ops
from tests.contract import OpContract
from tests.ops.test_pool import seeded


class TestPairwiseDistance(OpContract):
    op = "pairwise_distance"
    cases = (
        (5, 7, 4, "euclidean"),
        (5, 7, 4, "sqeuclidean"),
        (5, 7, 4, "cosine"),
        (0, 3, 4, "euclidean"),
        (3, 0, 4, "cosine"),
        (1, 1, 1, "euclidean"),
        (6, None, 5, "euclidean"),
        (35, None, 67, "cosine"),
        (9, None, 130, "sqeuclidean"),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        n, m, d, metric = case
        return seeded(n, d), None if m is None else seeded(m, d) + 0.3, metric

    def call(self, *args: Any) -> Any:
        return ops.pairwise_distance(args[0], args[1], metric=args[2])


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_equals_a_loop(metric: Any) -> None:
    x, y = seeded(4, 6), seeded(3, 6)
    got = ops.pairwise_distance(x, y, metric=metric)
    for i in range(4):
        for j in range(3):
            square = ((x[i] - y[j]) ** 2).sum()
            cosine = 1 - x[i] @ y[j] / (x[i].norm() * y[j].norm())
            want = {"euclidean": square.sqrt(), "sqeuclidean": square, "cosine": cosine}[metric]
            torch.testing.assert_close(got[i, j], want)


def test_itself_is_the_default_and_the_diagonal_is_clamped() -> None:
    x = seeded(5, 8).requires_grad_()
    distance = ops.pairwise_distance(x)
    assert torch.equal(distance, ops.pairwise_distance(x, x))
    near = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    same = ops.pairwise_distance(near)
    torch.testing.assert_close(same, torch.full((2, 2), 1e-6, dtype=torch.float64))
    same.sum().backward()
    assert torch.equal(near.grad, torch.zeros_like(near))


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("own", [True, False])
def test_near_equal_rows_at_full_size(metric: Any, own: bool) -> None:
    """D = 14336 with norms near 240 and distances near 0.1: within 1e-5 of float64, entry by entry.

    The expanded square is off by several per cent here.
    """
    x = (2 * seeded(8, 14336).repeat_interleave(2, 0) + 1e-3 * seeded(16, 14336)).float()
    y = None if own else (x.double() + 1e-3 * seeded(16, 14337)[:, 1:]).float()
    exact = ops.pairwise_distance(x.double(), None if own else y.double(), metric=metric)
    got = ops.pairwise_distance(x, y, metric=metric).double()
    apart = exact > 1e-7
    assert apart.sum() >= 16 * 15
    assert ((got - exact).abs() / exact)[apart].max() < 1e-5
    if metric == "euclidean":
        expanded = (x.square().sum(1)[:, None] + x.square().sum(1) - 2 * x @ x.t()).clamp_min(0)
        assert not own or ((expanded.sqrt() - exact).abs() / exact)[apart].max() > 1e-3


def test_gradients_at_full_size() -> None:
    x = (2 * seeded(8, 14336).repeat_interleave(2, 0) + 1e-3 * seeded(16, 14336)).float()
    x, wide = x.requires_grad_(), x.detach().double().requires_grad_()
    grad = seeded(16, 16)
    ops.pairwise_distance(x).backward(grad.float())
    ops.pairwise_distance(wide).backward(grad.float().double())
    assert (x.grad.double() - wide.grad).norm() <= 3e-5 * wide.grad.norm()


def test_rows_shorter_than_the_floor_are_orthogonal_to_all() -> None:
    x = torch.stack([torch.zeros(5), torch.ones(5), torch.full((5,), 1e-20)])
    got = ops.pairwise_distance(x, metric="cosine")
    torch.testing.assert_close(got, torch.tensor([[1.0, 1, 1], [1, 0, 1], [1, 1, 1]]))


def test_nan_stays_in_its_row_and_column() -> None:
    x = seeded(4, 3)
    x[2, 1] = float("nan")
    got = ops.pairwise_distance(x)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2] = expected[:, 2] = True
    assert torch.equal(got.isnan(), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3)}, ValueError, r"x: expected shape \[N, D\]"),
        ({"y": torch.ones(2, 5)}, ValueError, r"y: expected shape \[2, 4\]"),
        ({"y": torch.ones(2, 4).double()}, TypeError, "y: expected dtype torch.float32"),
        ({"x": torch.ones(3, 0)}, ValueError, r"x: .* with D >= 1"),
        ({"y": torch.ones(4)}, ValueError, r"y: expected shape \[M, D\]"),
        ({"y": torch.ones(2, 4).to("meta")}, ValueError, "y: expected device cpu"),
        ({"metric": "manhattan"}, ValueError, "metric: expected one of 'euclidean'"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.pairwise_distance(**{"x": torch.ones(3, 4), **change})
