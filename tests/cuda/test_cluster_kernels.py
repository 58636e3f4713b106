"""The kernels of csrc/cuda/cluster.cu, executed on the CPU: the op's contract, and what is the
kernels' own business: identities anywhere, parts of the depth, panels, vectors, alignment.
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
from tests.ops import test_cluster


class TestCenterClusterRoom(EmulatedRoom, test_cluster.TestCenterClusterLoss):
    """Forward, gradient, golden vectors, one identity, rows on their centre."""


class Exact:
    """Loss, radii and gradient in float64, the gradient by autograd."""

    def __init__(self, x: Tensor, labels: Tensor, margin: float, grads: tuple[float, float]):
        wide = x.double().requires_grad_()
        same = (labels[:, None] == labels[None, :]).double()
        self.first = same.argmax(1)
        centre = (same / same.sum(1, keepdim=True)) @ wide
        away = wide - centre
        square = away.square().sum(1)
        apart = square > 1e-20  # a row on its centre has no gradient
        radius = torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)
        own = centre[self.first.unique()]
        p, q = torch.triu_indices(len(own), len(own), 1)
        gap = (own[p] - own[q]).square().sum(1).clamp_min(1e-12).sqrt()
        pull = radius.mean()
        push = (margin - gap).clamp_min(0).mean() if len(gap) else pull * 0
        (self.grad,) = torch.autograd.grad(grads[0] * pull + grads[1] * push, wide)
        self.pull, self.push, self.radius = pull.detach(), push.detach(), radius.detach()


def check(
    emulated: Emulated,
    x: Tensor,
    labels: Tensor,
    margin: float = 5.0,
    forward_launches: int = 2,
    backward_launches: int = 2,
) -> tuple[Tensor, ...]:
    """Runs all kernels once and compares; returns what they gave."""
    exact = Exact(x, labels, margin, (0.75, -1.5))
    launches = emulated.emulation.launches
    found = emulated.center_cluster_loss(x, labels, margin)
    assert emulated.emulation.launches == launches + forward_launches
    loss, pull, push, first, radius = found
    eps = torch.finfo(loss.dtype).eps
    assert loss.dtype == (x.dtype if x.dtype == torch.float64 else torch.float32)
    assert torch.equal(first, exact.first)
    scale = exact.radius.max().item() + margin
    for got, want in (
        (pull, exact.pull), (push, exact.push), (loss, exact.pull + exact.push),
        (radius, exact.radius),
    ):  # fmt: skip
        torch.testing.assert_close(got.double(), want, rtol=32 * eps, atol=32 * eps * scale)
    dx = emulated.center_cluster_loss_backward(
        torch.full_like(loss, 0.75), torch.full_like(loss, -1.5), x, first, radius, margin
    )
    assert emulated.emulation.launches == launches + forward_launches + backward_launches
    assert dx.dtype == x.dtype
    unit = torch.finfo(x.dtype).eps
    atol = max(unit, 128 * eps) * exact.grad.abs().max().item() + 1e-30
    torch.testing.assert_close(dx.double(), exact.grad, rtol=unit, atol=atol)
    return (*found, dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(emulated: Emulated, shape, dtype):
    check(emulated, seeded(*shape, dtype), drawn_labels(shape[0], 5), margin=shape[1] ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_parts(emulated: Emulated, dtype):
    """Blocks along the depth, the last with a tail."""
    check(emulated, seeded(40, 648, dtype), drawn_labels(40, 7), margin=20.0)


@pytest.mark.parametrize("identities", [1, 3, 40, 1000])
def test_identities_of_any_size(emulated: Emulated, identities):
    """More rows than a batch; from one identity to almost as many as rows, several tiles."""
    check(emulated, seeded(300, 6), drawn_labels(300, identities), margin=3.0)


def test_half_thousand_rows(emulation: emulator.Emulator):
    """The most rows of the two-launch form: the parts of the depth are limited by the scratch."""
    emulation.order("shuffled")
    with emulation.unwatched():
        check(Emulated(emulation), seeded(512, 140), drawn_labels(512, 50), margin=15.0)


@pytest.mark.parametrize("identities", [1, 30, 5000])
def test_panels(emulation: emulator.Emulator, identities):
    """Beyond 512 rows the gaps are taken panel by panel."""
    emulation.order("shuffled")
    with emulation.unwatched():
        check(
            Emulated(emulation), seeded(515, 6), drawn_labels(515, identities), 3.0,
            forward_launches=2 + 2 * 3, backward_launches=1 + 2 * 3,
        )  # fmt: skip


def test_panels_are_watched(emulated: Emulated):
    check(emulated, seeded(513, 2), drawn_labels(513, 70), 1.0, 8, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(emulated: Emulated, view, dtype):
    x = VIEWS[view](seeded(12, 40, dtype))
    assert check(emulated, x, torch.arange(len(x)) % 3)[-1].is_contiguous()


def test_rows_on_their_centre(emulated: Emulated):
    """Equal rows and single rows: radius exactly zero, no gradient of their own."""
    x = seeded(6, 37).repeat_interleave(3, 0) * 7.3
    labels = torch.arange(6).repeat_interleave(3)
    radius, dx = (check(emulated, x, labels, 0.5)[i] for i in (4, 5))
    assert torch.equal(radius, torch.zeros(18))
    assert torch.equal(dx, torch.zeros(18, 37))
    assert torch.equal(check(emulated, x, labels, 90.0)[4], torch.zeros(18))
    assert torch.equal(check(emulated, x[::3], labels[::3], 90.0)[4], torch.zeros(6))


def test_equal_centres(emulated: Emulated):
    """Gaps at the floor count in the loss and have no gradient."""
    x = torch.ones(8, 20)
    result = check(emulated, x, torch.arange(8) // 2, 0.7)
    assert result[2].item() == pytest.approx(0.7 - 1e-6)
    assert torch.equal(result[5], torch.zeros_like(x))


def test_a_common_part_does_not_cost_small_gaps(emulated: Emulated):
    """Centres are rounded once, to float32; squares of them would lose every digit."""
    x, labels = seeded(24, 64) * 0.01 + 100.0, torch.arange(24) % 6
    exact = Exact(x, labels, 0.2, (1.0, 1.0))
    found = emulated.center_cluster_loss(x, labels, 0.2)
    dx = emulated.center_cluster_loss_backward(torch.ones(()), torch.ones(()), x, *found[3:], 0.2)
    assert exact.push > 0.1
    for got, want in ((found[1], exact.pull), (found[2], exact.push), (dx, exact.grad)):
        scale = want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-3 * scale)


def test_nan_reaches_the_loss(emulated: Emulated):
    x = seeded(40, 12)
    x[37, 3] = float("nan")
    loss, pull, push, _, radius = emulated.center_cluster_loss(x, torch.arange(40) % 3, 9.0)
    assert all(t.isnan() for t in (loss, pull, push))
    assert torch.equal(radius.isnan(), torch.arange(40) % 3 == 1)


def test_empty(emulated: Emulated):
    x, labels, launches = seeded(0, 4), torch.zeros(0).long(), emulated.emulation.launches
    *losses, first, radius = emulated.center_cluster_loss(x, labels, 0.7)
    assert [v.item() for v in losses] == [0.0, 0.0, 0.0]
    assert first.shape == radius.shape == (0,)
    dx = emulated.center_cluster_loss_backward(losses[0], losses[0], x, first, radius, 0.7)
    assert dx.shape == (0, 4)
    assert emulated.emulation.launches == launches


def test_the_order_of_threads_does_not_matter(emulation: emulator.Emulator):
    """The same bits from every order: no float atomics, one writer for each element."""
    x, labels = seeded(70, 300), drawn_labels(70, 9)
    results: list[Any] = []
    for order in emulator.ORDERS:
        emulation.order(order, seed=len(results))
        results.append(check(Emulated(emulation), x, labels, 20.0))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals(emulated: Emulated):
    x, labels = torch.ones(4, 3), torch.zeros(4).long()
    for args, message in (
        ((x[0], labels, 0.7), "expected embeddings of rank 2, got 1"),
        ((x, labels.int(), 0.7), "expected int64 labels or indices"),
        ((x, labels[:2], 0.7), "one for each of 4 rows"),
        ((x.int(), labels, 0.7), "expected a floating dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulated.center_cluster_loss(*args)
    one = torch.ones(())
    for pull, push, radius in (
        (torch.ones(2), one, torch.ones(4)),
        (one, one.double(), torch.ones(4)),
        (one, one, torch.ones(3)),
    ):
        with pytest.raises(RuntimeError, match="values in the accumulation dtype"):
            emulated.center_cluster_loss_backward(pull, push, x, labels, radius, 0.7)
