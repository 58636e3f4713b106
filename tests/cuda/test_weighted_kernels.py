"""The kernels of csrc/cuda/weighted.cu, executed on the CPU: the op's contract, and what is the
kernels' own business: tiles, splits of the depth, panels, vectors, alignment, the running softmax.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda import emulator
from tests.cuda.conftest import Emulated
from tests.cuda.room import EmulatedRoom
from tests.cuda.test_triplet_kernels import DTYPES, SHAPES, VIEWS, drawn_labels, seeded
from tests.ops import test_triplet

INFINITY = float("inf")


class TestWeightedTripletRoom(EmulatedRoom, test_triplet.TestWeightedTripletLoss):
    """Forward, gradient, golden vectors, both forms of the negatives' weights."""


class Exact:
    """Loss, statistics and gradient in float64, the gradient by autograd."""

    def __init__(self, x: Tensor, labels: Tensor, stable: bool) -> None:
        wide = x.double().requires_grad_()
        d = (wide[:, None] - wide[None]).square().sum(-1).clamp_min(1e-12).sqrt()
        same = labels[:, None] == labels[None, :]
        far, self.positive = d.masked_fill(~same, -1.0).max(1)
        near, self.negative = d.masked_fill(same, INFINITY).min(1)
        self.valid = ~same.all(1)
        near = torch.where(self.valid, -near, 0.0) if stable else torch.zeros_like(near)
        means, columns = [], []
        for shift, score, among in ((far, d, same), (near, -d, ~same)):
            weight = torch.where(among, (score - shift[:, None]).exp(), 0.0)
            inverse = 1 / (weight.sum(1) + 1e-6)
            means.append((weight * d).sum(1) * inverse)
            columns += [shift, torch.where(among.any(1), inverse, 0.0), means[-1]]
        gap = means[0] - means[1]
        loss = torch.where(self.valid, torch.nn.functional.softplus(gap), 0.0).mean()
        (self.grad,) = torch.autograd.grad(loss, wide)
        self.loss, self.stats = loss.detach(), torch.stack(columns, 1).detach()
        self.slope = torch.where(self.valid, gap.detach().sigmoid() / len(x), 0.0)
        self.correct = int((self.valid & (gap <= 0)).sum())


def check(
    emulated: Emulated, x: Tensor, labels: Tensor, stable: bool = False, panels: int = 1
) -> tuple[Tensor, ...]:
    """Runs all kernels once and compares; returns what they gave."""
    exact = Exact(x, labels, stable)
    launches = emulated.emulation.launches
    found = emulated.weighted_triplet_loss(x, labels, stable)
    assert emulated.emulation.launches == launches + 2 * panels
    loss, correct, positive, negative, slope, stats = found
    eps = torch.finfo(loss.dtype).eps
    assert loss.dtype == (x.dtype if x.dtype == torch.float64 else torch.float32)
    assert correct.item() == exact.correct
    assert torch.equal(positive, exact.positive)
    assert torch.equal(negative[exact.valid], exact.negative[exact.valid])
    for got, want in ((loss, exact.loss), (slope, exact.slope), (stats, exact.stats)):
        torch.testing.assert_close(got.double(), want, rtol=128 * eps, atol=128 * eps)
    dx = emulated.weighted_triplet_loss_backward(
        torch.ones_like(loss), x, labels, *found[2:], stable
    )
    assert emulated.emulation.launches == launches + 4 * panels
    assert dx.dtype == x.dtype
    unit, scale = torch.finfo(x.dtype).eps, exact.grad.abs().max().item()
    atol = scale * max(unit, 128 * eps) + 1e-30
    torch.testing.assert_close(dx.double(), exact.grad, rtol=unit, atol=atol)
    return (*found, dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(emulated: Emulated, shape, dtype):
    x = seeded(*shape, dtype) * 0.25
    check(emulated, x, drawn_labels(shape[0], 5), stable=shape[1] % 2 == 0)


@pytest.mark.parametrize("stable", [False, True])
def test_many_rows(emulated: Emulated, stable):
    check(emulated, seeded(130, 24), drawn_labels(130, 17), stable)


@pytest.mark.parametrize("stable", [False, True])
def test_panels(emulation: emulator.Emulator, stable):
    """Beyond 512 rows the matrix is never whole: 515 rows are searched in three panels."""
    emulation.order("shuffled")
    with emulation.unwatched():
        check(Emulated(emulation), seeded(515, 7), drawn_labels(515, 40), stable, panels=3)


def test_panels_are_watched(emulated: Emulated):
    check(emulated, seeded(513, 2), drawn_labels(513, 9), panels=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(emulated: Emulated, view, dtype):
    x = VIEWS[view](seeded(12, 40, dtype))
    assert check(emulated, x, torch.arange(len(x)) % 3)[-1].is_contiguous()


def test_ties_take_the_first_index(emulated: Emulated):
    labels = torch.arange(10).remainder(4).repeat(5)
    result = check(emulated, seeded(10, 33).repeat(5, 1), labels, stable=True)
    assert (result[2] < 10).all()
    assert (result[3] < 10).all()


def test_lonely_anchors(emulated: Emulated):
    """Without a negative: zero. Alone in its identity: its own farthest positive."""
    result = check(emulated, seeded(5, 6), torch.full((5,), 7))
    loss, correct, _, negative, slope, stats, dx = result
    assert all((t == 0).all() for t in (loss, correct, negative, slope, stats[:, 3:], dx))
    assert check(emulated, seeded(5, 6), torch.arange(5))[2].tolist() == list(range(5))


def test_far_rows(emulated: Emulated):
    """The published negatives vanish against 1e-6; the loss stays finite and exact."""
    x = torch.cat([seeded(20, 8), seeded(20, 8, salt=1) + 40.0, seeded(20, 8, salt=2) - 200.0])
    labels = torch.arange(60) // 20
    for stable in (False, True):
        loss, dx = (check(emulated, x, labels, stable)[i] for i in (0, -1))
        assert loss.isfinite()
        assert dx.isfinite().all()


def test_the_running_softmax_follows_the_best(emulated: Emulated):
    """Distances that grow or fall along the row: every column replaces the best, or none does."""
    for x in (torch.arange(120.0)[:, None], torch.arange(120.0).flip(0)[:, None] * 0.5):
        check(emulated, x, (torch.arange(120) % 2), stable=True)


def test_nan_reaches_the_loss(emulated: Emulated):
    x = seeded(40, 12)
    x[37, 3] = float("nan")
    for stable in (False, True):
        assert emulated.weighted_triplet_loss(x, torch.arange(40) % 3, stable)[0].isnan()


def test_equal_rows_have_finite_gradients(emulated: Emulated):
    x, labels = torch.ones(6, 20), torch.arange(6) // 2
    found = emulated.weighted_triplet_loss(x, labels, False)
    dx = emulated.weighted_triplet_loss_backward(torch.ones(()), x, labels, *found[2:], False)
    assert torch.equal(dx, torch.zeros_like(x))


def test_empty(emulated: Emulated):
    x, labels, launches = seeded(0, 4), torch.zeros(0).long(), emulated.emulation.launches
    loss, correct, *saved = emulated.weighted_triplet_loss(x, labels, True)
    assert (loss.shape, loss.item(), correct.item()) == ((), 0.0, 0)
    assert [s.shape for s in saved] == [(0,), (0,), (0,), (0, 6)]
    dx = emulated.weighted_triplet_loss_backward(loss, x, labels, *saved, True)
    assert dx.shape == (0, 4)
    assert emulated.emulation.launches == launches


def test_the_order_of_threads_does_not_matter(emulation: emulator.Emulator):
    """The same bits from every order: no float atomics, one writer for each element."""
    x, labels = seeded(70, 150), drawn_labels(70, 9)
    results: list[Any] = []
    for order in emulator.ORDERS:
        emulation.order(order, seed=len(results))
        results.append(check(Emulated(emulation), x, labels, stable=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals(emulated: Emulated):
    x, labels = torch.ones(4, 3), torch.zeros(4).long()
    for args, message in (
        ((x[0], labels, True), "expected embeddings of rank 2, got 1"),
        ((x, labels.int(), True), "expected int64 labels or indices"),
        ((x, labels[:2], True), "one for each of 4 rows"),
        ((x.int(), labels, True), "expected a floating dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulated.weighted_triplet_loss(*args)
    values = torch.ones(4)
    for grad, slope, stats in (
        (torch.ones(2), values, torch.ones(4, 6)),
        (torch.ones(()), values.double(), torch.ones(4, 6)),
        (torch.ones(()), values, torch.ones(4, 5)),
    ):
        with pytest.raises(RuntimeError, match="values in the accumulation dtype"):
            emulated.weighted_triplet_loss_backward(
                grad, x, labels, labels, labels, slope, stats, True
            )
