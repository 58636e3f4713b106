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
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        n, m, d, metric = case
        return seeded(n, d), seeded(m, d) + 0.3, metric

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


def test_a_common_part_does_not_cost_small_distances() -> None:
    x = seeded(6, 64) * 0.01 + 100.0
    exact = torch.cdist(x.float().double(), x.float().double())
    error = (ops.pairwise_distance(x.float()).double() - exact).abs()
    off_diagonal = ~torch.eye(6, dtype=torch.bool)
    assert (error[off_diagonal] / exact[off_diagonal]).max() < 1e-4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3)}, ValueError, r"x: expected shape \[N, D\]"),
        ({"y": torch.ones(2, 5)}, ValueError, r"y: expected shape \[2, 4\]"),
        ({"y": torch.ones(2, 4).double()}, TypeError, "y: expected dtype torch.float32"),
        ({"metric": "manhattan"}, ValueError, "metric: expected one of 'euclidean'"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.pairwise_distance(**{"x": torch.ones(3, 4), **change})
