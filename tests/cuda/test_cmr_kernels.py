"""The kernels of csrc/cuda/cmr.cu, executed on the CPU: the linear form, the general path, one of
them in each direction; vectors, alignment, identities of any size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda import emulator
from tests.cuda.conftest import Emulated
from tests.cuda.room import EmulatedRoom
from tests.cuda.test_softrank_kernels import exact as exact_rank
from tests.ops import test_softrank

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOOR = 1e-8


class TestCrossModalityRetrievalLossRoom(
    EmulatedRoom, test_softrank.TestCrossModalityRetrievalLoss
):
    """Forward, gradient, golden vectors, both paths, zero rows, run-to-run bits."""


def seeded(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.3).to(dtype)


def integers(count: int, below: int, seed: int = 0) -> Tensor:
    return torch.randint(below, (count,), generator=torch.Generator().manual_seed(count + seed))


def direction(rows: Tensor, gallery: Tensor, match: Tensor, strength: float) -> Tensor:
    """Mean error of kept queries; the blocks of the ranks, once known, make them linear."""
    n, total = gallery.shape[0], rows.new_zeros(())
    for row, hit in zip(rows, match, strict=True):
        theta = (1 - gallery @ row) / 2 / strength
        starts = exact_rank(theta.detach(), 1.0)[1].long()
        size = torch.zeros(n, dtype=rows.dtype).index_add(0, starts, torch.ones_like(theta))
        mean = torch.zeros(n, dtype=rows.dtype).index_add(0, starts, theta) / size.clamp_min(1)
        ranks = theta - mean[starts] + n - (starts + (size[starts] - 1) / 2)
        total = total + (ranks - torch.where(hit, 1.0, float(n))).abs().sum()
    return total / (len(rows) * n)


def exact(x: Tensor, labels: Tensor, modalities: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64."""
    wide = x.detach().double().requires_grad_()
    unit = wide / wide.norm(dim=1, keepdim=True).clamp_min(FLOOR)
    losses, visible = [], modalities == 0
    for side in (visible, ~visible):
        match = labels[side][:, None] == labels[~side][None]
        kept = match.any(1) & ~match.all(1)
        if kept.any():
            losses.append(direction(unit[side][kept], unit[~side], match[kept], strength))
    loss = torch.stack(losses).mean() if losses else (wide * 0).sum()
    return loss.detach(), torch.autograd.grad(loss, wide)[0]


def check(
    emulated: Emulated,
    x: Tensor,
    labels: Tensor,
    modalities: Tensor,
    strength: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Runs both passes once and compares; returns the loss and the gradient of 1.5 x loss."""
    launches = emulated.emulation.launches
    loss = emulated.cross_modality_retrieval_loss(x, labels, modalities, strength)
    assert emulated.emulation.launches == launches + 3
    assert loss.shape == ()
    grad = torch.tensor(1.5, dtype=loss.dtype)
    launches = emulated.emulation.launches
    dx = emulated.cross_modality_retrieval_loss_backward(grad, x, labels, modalities, strength)
    assert emulated.emulation.launches == launches + 4
    assert (dx.dtype, dx.shape) == (x.dtype, x.shape)
    assert dx.is_contiguous()
    want, slope = exact(x, labels, modalities, strength)
    wide, narrow = torch.finfo(loss.dtype).eps, torch.finfo(x.dtype).eps
    torch.testing.assert_close(loss.double(), want, rtol=32 * wide, atol=1e-12)
    norms = x.double().norm(dim=1)
    scale = 200 * slope.abs().max() + 8 / norms[norms > 1e-6].min()  # dh is of order one
    torch.testing.assert_close(
        dx.double(), 1.5 * slope, rtol=narrow, atol=wide * scale.item() + 1e-7 * narrow
    )
    return loss, dx


STRENGTHS = (0.5, 0.03)  # the linear form, the general path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_dtypes(emulated: Emulated, dtype, strength):
    check(emulated, seeded((24, 72), dtype), integers(24, 4), integers(24, 2, 1), strength)


@pytest.mark.parametrize("columns", [1, 2, 7, 31, 33, 64, 200])
def test_columns(emulated: Emulated, columns):
    """Tails of a block of columns; rows that vectors cannot reach."""
    for strength in STRENGTHS:
        check(emulated, seeded((14, columns)), integers(14, 3), integers(14, 2, 1), strength)


def test_more_columns_than_threads(emulated: Emulated):
    for strength in STRENGTHS:
        check(emulated, seeded((8, 1100)), integers(8, 2), integers(8, 2, 1), strength)


@pytest.mark.parametrize("identities", [130])
def test_many_rows(emulated: Emulated, identities):
    """More rows than threads; identities in any order, more than groups, in one modality only."""
    labels = integers(260, identities) * 7 - 100
    check(emulated, seeded((260, 6)), labels, integers(260, 3, 1))


@pytest.mark.parametrize("strength", [0.2, 0.05, 0.011, 0.001])
def test_several_blocks(emulated: Emulated, strength):
    """From galleries of one block to hard ranks."""
    check(emulated, seeded((40, 5), torch.float64), integers(40, 5), integers(40, 2, 1), strength)


def test_a_direction_by_each_path(emulated: Emulated):
    modalities = torch.tensor([0] * 30 + [1] * 10)
    check(emulated, seeded((40, 9)), torch.arange(40) % 5, modalities, 0.1)
    check(emulated, seeded((40, 9)), torch.arange(40) % 5, 1 - modalities, 0.1)


def test_long_galleries(emulated: Emulated):
    modalities = torch.tensor([0] * 2 + [1] * 130)
    labels = torch.cat([torch.arange(2), torch.arange(130) % 20])
    check(emulated, seeded((132, 4), torch.float64), labels, modalities, 0.002)


def test_labels_and_modalities_of_any_value(emulated: Emulated):
    x, labels, modalities = seeded((20, 16)), integers(20, 3), integers(20, 2, 1)
    want = check(emulated, x, labels, modalities)
    far = torch.tensor([2**62, -(2**62), -1])[labels]
    got = check(emulated, x, far, modalities * -5)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("labels", "modalities"),
    [
        ([0, 1, 2, 3], [0, 0, 0, 0]),  # one modality
        ([0, 0, 0, 0], [0, 0, 1, 1]),  # every query matches the whole gallery
        ([0, 1, 2, 3], [0, 0, 1, 1]),  # no query has a match
        ([0], [1]),
    ],
)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_no_kept_query(emulated: Emulated, labels, modalities, strength):
    x = seeded((len(labels), 12))
    loss, dx = check(emulated, x, torch.tensor(labels), torch.tensor(modalities), strength)
    assert loss == 0
    assert not dx.any()


@pytest.mark.parametrize("strength", STRENGTHS)
def test_one_direction(emulated: Emulated, strength):
    """A visible query matches all of the gallery or nothing; infrared ones are kept."""
    labels, modalities = torch.tensor([0, 0, 1, 2, 0, 0, 0]), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    check(emulated, seeded((7, 10)), labels, modalities, strength)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_rows_below_the_norm_floor(emulated: Emulated, strength):
    x = seeded((16, 9), torch.float64)
    x[2] = 0
    x[5] *= 1e-10
    x[11] *= 1e-9
    check(emulated, x, integers(16, 3), integers(16, 2, 1), strength)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_near_equal_rows(emulated: Emulated, strength):
    """Cosines close to one."""
    x = 1 + 1e-3 * seeded((16, 300))
    loss = emulated.cross_modality_retrieval_loss(x, integers(16, 3), integers(16, 2, 1), strength)
    want, slope = exact(x, integers(16, 3), integers(16, 2, 1), strength)
    torch.testing.assert_close(loss.double(), want, rtol=4e-7, atol=0)
    dx = emulated.cross_modality_retrieval_loss_backward(
        torch.ones(()), x, integers(16, 3), integers(16, 2, 1), strength
    )
    assert (dx.double() - slope).abs().max() <= 2e-3 * slope.abs().max()


@pytest.mark.parametrize("strength", STRENGTHS)
def test_nan(emulated: Emulated, strength):
    x, labels, modalities = seeded((20, 16)), integers(20, 3), integers(20, 2, 1)
    x[4, 3] = float("nan")
    assert emulated.cross_modality_retrieval_loss(x, labels, modalities, strength).isnan()
    grad = torch.ones(())
    dx = emulated.cross_modality_retrieval_loss_backward(grad, x, labels, modalities, strength)
    assert dx[4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", range(3))
def test_rows_may_begin_anywhere(emulated: Emulated, offset, dtype):
    memory = seeded((12 * 48 + 3,), dtype)
    x = memory[offset : offset + 12 * 48].view(12, 48)
    for strength in STRENGTHS:
        check(emulated, x, integers(12, 3), integers(12, 2, 1), strength)


VIEWS = {
    "row slice": lambda x: x[2:14],
    "every second row": lambda x: x[::2],
    "columns": lambda x: x[:12, 3:60],
    "every second column": lambda x: x[:12, ::2],
    "transposed": lambda x: x[:, :12].t(),
    "expanded rows": lambda x: x[:1].expand(12, -1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(emulated: Emulated, view):
    x = VIEWS[view](seeded((24, 72)))
    labels, modalities = integers(2 * len(x), 3)[::2], integers(2 * len(x), 2, 1)[::2]
    for strength in STRENGTHS if view != "expanded rows" else STRENGTHS[:1]:
        check(emulated, x, labels, modalities, strength)


def test_empty(emulated: Emulated):
    x, none, launches = torch.zeros(0, 8), torch.zeros(0).long(), emulated.emulation.launches
    assert emulated.cross_modality_retrieval_loss(x, none, none, 0.5) == 0
    grad = torch.ones(())
    dx = emulated.cross_modality_retrieval_loss_backward(grad, x, none, none, 0.5)
    assert dx.shape == (0, 8)
    assert emulated.emulation.launches == launches


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_order_of_threads_does_not_matter(emulation: emulator.Emulator, strength):
    """The same bits from every order, whichever block comes last."""
    x, labels, modalities = seeded((40, 70)), integers(40, 6), integers(40, 2, 1)
    results = []
    for order in emulator.ORDERS:
        emulation.order(order, seed=len(results))
        results.append(check(Emulated(emulation), x, labels, modalities, strength))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals(emulated: Emulated):
    x, labels, grad = torch.ones(4, 3), torch.zeros(4).long(), torch.ones(())
    loss = emulated.cross_modality_retrieval_loss
    with pytest.raises(RuntimeError, match="expected embeddings of rank 2, got 1"):
        loss(x[0], labels, labels, 0.5)
    for bad in (labels[:3], labels.int(), labels[None]):
        with pytest.raises(RuntimeError, match="expected int64 labels and modalities of shape"):
            loss(x, bad, labels, 0.5)
        with pytest.raises(RuntimeError, match="expected int64 labels and modalities of shape"):
            loss(x, labels, bad, 0.5)
    with pytest.raises(RuntimeError, match="expected a floating dtype"):
        loss(x.int(), labels, labels, 0.5)
    many = torch.zeros(16385).long()
    with pytest.raises(RuntimeError, match="expected at most 16384 rows, got 16385"):
        loss(torch.ones(16385, 1), many, many, 0.5)
    many = many[:9000]
    with pytest.raises(RuntimeError, match="galleries of up to 9000 rows"):
        loss(torch.ones(9000, 1), many, many, 1e-6)
    with pytest.raises(RuntimeError, match="expected one grad in the accumulation dtype"):
        emulated.cross_modality_retrieval_loss_backward(grad.double(), x, labels, labels, 0.5)
