"""The kernels of csrc/cuda/triplet.cu, executed on the CPU: the op's contract, and what is the
kernels' own business: tiles, splits of the depth, panels, vectors, alignment, ties.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda import emulator
from tests.cuda.conftest import Emulated
from tests.cuda.room import EmulatedRoom
from tests.ops import test_triplet

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MARGIN = 0.3


class TestBatchHardRoom(EmulatedRoom, test_triplet.TestBatchHardTripletLoss):
    """Forward, gradients, golden vectors, every metric, with and without references."""


def seeded(rows: int, size: int, dtype: torch.dtype = torch.float32, salt: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + size + salt)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64).to(dtype)


def drawn_labels(rows: int, identities: int, salt: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(rows + salt)
    return torch.randint(identities, (rows,), generator=generator) * (1 << 33) - 5


def distance_of(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """[..., D] against [..., D], in float64."""
    if metric == "cosine":
        u, v = (w / w.norm(dim=-1, keepdim=True).clamp_min(1e-12) for w in (x, y))
        return 1 - (u * v).sum(-1)
    square = (x - y).square().sum(-1)
    return square if metric == "sqeuclidean" else square.clamp_min(1e-12).sqrt()


class Exact:
    """Loss, mined pairs and gradients in float64."""

    def __init__(
        self, x: Tensor, labels: Tensor, r: Tensor | None, other: Tensor | None, metric: str
    ) -> None:
        wide = x.double().requires_grad_()
        reference = wide if r is None else r.double().requires_grad_()
        same = labels[:, None] == (labels if other is None else other)[None, :]
        d = distance_of(wide[:, None], reference[None], metric)
        near, self.positive = d.detach().masked_fill(~same, -1.0).max(1)
        far, self.negative = d.detach().masked_fill(same, float("inf")).min(1)
        self.near, self.far, self.distances = near, far, d.detach()
        self.valid = same.any(1) & ~same.all(1)
        row = torch.arange(len(x))
        hinge = d[row, self.positive] - d[row, self.negative] + MARGIN
        hinge = torch.where(self.valid, hinge, 0.0)
        loss = hinge.clamp_min(0).mean()
        grads = torch.autograd.grad(loss, [wide] if r is None else [wide, reference])
        self.loss, self.weight = loss.detach(), (hinge.detach() > 0).double() / len(x)
        self.correct = int((self.valid & (far >= near)).sum())
        self.grads = grads


def check(
    emulated: Emulated,
    x: Tensor,
    labels: Tensor,
    r: Tensor | None = None,
    other: Tensor | None = None,
    metric: str = "euclidean",
    panels: int = 1,
) -> tuple[Tensor, ...]:
    """Runs all kernels once and compares; returns what they gave."""
    exact = Exact(x, labels, r, other, metric)
    launches = emulated.emulation.launches
    found = emulated.batch_hard_triplet_loss(x, labels, r, other, MARGIN, metric)
    assert emulated.emulation.launches == launches + 2 * panels
    loss, correct, positive, negative, weight = found
    eps = torch.finfo(loss.dtype).eps
    torch.testing.assert_close(loss.double(), exact.loss, rtol=64 * eps, atol=64 * eps)
    assert correct.item() == exact.correct
    for got, want in ((positive, exact.positive), (negative, exact.negative)):
        assert torch.equal(got[exact.valid], want[exact.valid])
    torch.testing.assert_close(weight.double(), exact.weight, rtol=eps, atol=0)
    assert weight.dtype == loss.dtype == (x.dtype if x.dtype == torch.float64 else torch.float32)
    grads = emulated.batch_hard_triplet_loss_backward(
        torch.ones_like(loss), x, r, positive, negative, weight, metric
    )
    assert emulated.emulation.launches == launches + 2 * panels + 2
    for got, want in zip(grads, exact.grads, strict=False):
        assert got.dtype == x.dtype
        unit = torch.finfo(x.dtype).eps
        scale = want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=unit, atol=scale * max(unit, 64 * eps))
    if r is None:
        assert grads[1].numel() == 0
    return (*found, *grads)


# Tails of tiles and rounds, one element, odd rows, splits of the depth, one anchor.
SHAPES = [(1, 1), (2, 3), (33, 5), (34, 64), (31, 72), (5, 200), (64, 136)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(emulated: Emulated, shape, dtype):
    check(emulated, seeded(*shape, dtype), drawn_labels(shape[0], 5))


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_references(emulated: Emulated, metric, dtype):
    x, r = seeded(35, 72, dtype), seeded(67, 72, dtype, salt=1)
    check(emulated, x, drawn_labels(35, 6), r, drawn_labels(67, 7, salt=1), metric)
    check(emulated, r, drawn_labels(67, 6), x, drawn_labels(35, 7, salt=1), metric)
    check(emulated, x, drawn_labels(35, 6), metric=metric)


def test_many_rows(emulated: Emulated):
    check(emulated, seeded(130, 24), drawn_labels(130, 17))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_panels(emulation: emulator.Emulator, metric):
    """Beyond 512 rows the matrix is never whole: 515 rows are searched in three panels."""
    emulation.order("shuffled")
    with emulation.unwatched():
        check(Emulated(emulation), seeded(515, 7), drawn_labels(515, 40), metric=metric, panels=3)


def test_panels_are_watched(emulated: Emulated):
    check(emulated, seeded(513, 2), drawn_labels(513, 9), panels=3)
    x, r = seeded(3, 4), seeded(516, 4, salt=1)
    check(emulated, x, drawn_labels(3, 9), r, drawn_labels(516, 9, salt=1))


# Views of one matrix [12, 40].
VIEWS = {
    "rows": lambda x: x[3:],
    "every second row": lambda x: x[::2],
    "columns": lambda x: x[:, 8:24],
    "columns, unaligned": lambda x: x[:, 3:19],
    "odd columns": lambda x: x[:, :13],
    "every second column": lambda x: x[:, ::2],
    "odd pitch": lambda x: x.flatten()[:429].view(11, 39)[:, :16],
    "transposed": lambda x: x.t(),
    "expanded": lambda x: x[:1].expand(6, -1),
    "one column": lambda x: x[:, 5:6],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(emulated: Emulated, view, dtype):
    x = VIEWS[view](seeded(12, 40, dtype))
    labels = torch.arange(len(x)) % 3
    result = check(emulated, x, labels)
    assert result[5].is_contiguous()
    r = VIEWS[view](seeded(12, 40, dtype, salt=1))
    check(emulated, x, labels, r, labels.flip(0))
    check(emulated, x, labels, r.contiguous(), labels.flip(0))


def test_labels_and_saved_tensors_may_be_views(emulated: Emulated):
    x, labels = seeded(9, 8), drawn_labels(18, 3)
    assert torch.equal(
        emulated.batch_hard_triplet_loss(x, labels[::2], None, None, MARGIN, "euclidean")[0],
        emulated.batch_hard_triplet_loss(x, labels[::2].clone(), None, None, MARGIN, "euclidean")[
            0
        ],
    )


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_ties_take_the_first_index(emulated: Emulated, metric):
    x = seeded(10, 33).repeat(5, 1)  # rows i, i + 10, ... are equal
    labels = torch.arange(10).remainder(4).repeat(5)
    result = check(emulated, x, labels, metric=metric)
    assert (result[2] < 10).all()
    assert (result[3] < 10).all()


def test_lonely_anchors(emulated: Emulated):
    """Without a negative, without a positive, without either: zero, index zero, no gradient."""
    x, r = seeded(5, 6), seeded(4, 6, salt=1)
    result = check(emulated, x, torch.full((5,), 7))
    assert all((t == 0).all() for t in (*result[:2], *result[3:6]))
    result = check(emulated, x, torch.arange(5), r, torch.tensor([2, 2, 9, 9]))
    assert result[4].tolist() == [0, 0, result[4][2].item(), 0, 0]
    result = check(emulated, x, torch.arange(5), r, torch.full((4,), 2))
    assert all((t == 0).all() for t in (*result[:2], *result[4:]))
    assert check(emulated, x, torch.arange(5))[2].tolist() == list(range(5))


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_equal_rows_have_finite_gradients(emulated: Emulated, metric):
    x = torch.ones(6, 20)
    labels = torch.arange(6) // 2
    found = emulated.batch_hard_triplet_loss(x, labels, None, None, MARGIN, metric)
    assert found[0].item() == pytest.approx(MARGIN, abs=1e-6)
    dx, _ = emulated.batch_hard_triplet_loss_backward(torch.ones(()), x, None, *found[2:], metric)
    assert dx.isfinite().all()
    assert dx.abs().max().item() < 1e-7


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def test_near_equal_rows_keep_their_cosine(emulated: Emulated):
    """The gradient of a mined pair comes from differences, not from the cosine."""
    base = 100 * seeded(6, 96)
    x, r = base + 1e-2 * seeded(6, 96, salt=1), base + 1e-2 * seeded(6, 96, salt=2)
    a, b = x.double().requires_grad_(), r.double().requires_grad_()
    distance = (unit(a) - unit(b)).square().sum(1) / 2
    (distance.sum() / 6).backward()
    assert distance.max() < 1e-7
    partner, none = torch.arange(6), torch.full((6,), -1)
    grads = emulated.batch_hard_triplet_loss_backward(
        torch.ones(()), x, r, partner, none, torch.full((6,), 1 / 6), "cosine"
    )
    for got, want in zip(grads, (a.grad, b.grad), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-7 * want.abs().max())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_zero_rows(emulated: Emulated, metric):
    x = seeded(6, 12)
    x[2] = 0
    labels = torch.arange(6) // 3
    exact = Exact(x, labels, None, None, metric)
    found = emulated.batch_hard_triplet_loss(x, labels, None, None, MARGIN, metric)
    torch.testing.assert_close(found[0].double(), exact.loss, rtol=1e-6, atol=0)


def test_nan_reaches_the_loss(emulated: Emulated):
    for metric in ("euclidean", "sqeuclidean", "cosine"):
        x = seeded(40, 12)
        x[37, 3] = float("nan")
        found = emulated.batch_hard_triplet_loss(
            x, torch.arange(40) % 3, None, None, MARGIN, metric
        )
        assert found[0].isnan()
        assert (found[3][torch.arange(40) % 3 != 1] == 37).all()
        assert (found[2][torch.arange(40) % 3 == 1] == 37)[torch.arange(13) != 12].all()


def test_indices_that_are_none_are_not_read(emulated: Emulated):
    x, weight = seeded(3, 8), torch.full((3,), 1.0)
    wrong = torch.tensor([-1, 3, 1 << 40])
    for r in (None, seeded(3, 8)):
        for g in emulated.batch_hard_triplet_loss_backward(
            torch.ones(()), x, r, wrong, wrong, weight, "euclidean"
        ):
            assert (g == 0).all()


@pytest.mark.parametrize(("rows", "others"), [(0, None), (0, 3), (3, 0)])
def test_empty(emulated: Emulated, rows, others):
    x, labels, launches = seeded(rows, 4), torch.zeros(rows).long(), emulated.emulation.launches
    pair = (None, None) if others is None else (seeded(others, 4), torch.zeros(others).long())
    loss, correct, *saved = emulated.batch_hard_triplet_loss(x, labels, *pair, MARGIN, "cosine")
    assert (loss.shape, loss.item(), correct.item()) == ((), 0.0, 0)
    assert all(s.shape == (rows,) and not s.any() for s in saved)
    dx, dr = emulated.batch_hard_triplet_loss_backward(loss, x, pair[0], *saved, "cosine")
    assert torch.equal(dx, torch.zeros(rows, 4))
    assert dr.shape == ((0,) if others is None else (others, 4))
    assert not dr.any()
    assert emulated.emulation.launches == launches


def test_the_order_of_threads_does_not_matter(emulation: emulator.Emulator):
    """The same bits from every order: no float atomics, one writer for each element."""
    x, labels = seeded(70, 150), drawn_labels(70, 9)
    results: list[Any] = []
    for order in emulator.ORDERS:
        emulation.order(order, seed=len(results))
        results.append(check(Emulated(emulation), x, labels))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals(emulated: Emulated):
    x, labels = torch.ones(4, 3), torch.zeros(4).long()
    forward = emulated.batch_hard_triplet_loss
    for args, message in (
        ((x[0], labels, None, None, MARGIN, "cosine"), "expected embeddings of rank 2, got 1"),
        ((x, labels.int(), None, None, MARGIN, "cosine"), "expected int64 labels or indices"),
        ((x, labels[:2], None, None, MARGIN, "cosine"), "one for each of 4 rows"),
        ((x, labels, None, None, MARGIN, "dot"), "expected a known metric, got dot"),
        ((x, labels, x, None, MARGIN, "cosine"), "expected references and reference_labels"),
        ((x, labels, x.double(), labels, MARGIN, "cosine"), "columns and dtype of the embeddings"),
        ((x, labels, x[:, :2], labels, MARGIN, "cosine"), "columns and dtype of the embeddings"),
        ((x.int(), labels, None, None, MARGIN, "cosine"), "expected a floating dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*args)
    backward = emulated.batch_hard_triplet_loss_backward
    for grad, weight in ((torch.ones(2), torch.ones(4)), (torch.ones(()), torch.ones(4).double())):
        with pytest.raises(RuntimeError, match="values in the accumulation dtype"):
            backward(grad, x, None, labels, labels, weight, "cosine")
