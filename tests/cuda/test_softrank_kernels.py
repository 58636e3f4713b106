"""The kernels of csrc/cuda/softrank.cu, executed on the CPU: both paths, warps and blocks, vectors,
alignment, rows that cannot be ranked.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda import emulator
from tests.cuda.conftest import Emulated
from tests.cuda.room import EmulatedRoom
from tests.ops import test_softrank

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ULPS = {torch.float64: 64}  # of the scale; other dtypes are rounded once from double


class TestSoftRankRoom(EmulatedRoom, test_softrank.TestSoftRank):
    """Forward, gradient, golden vectors, ties, rows of both kinds, run-to-run bits."""


def seeded(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def exact(values: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Ranks and blocks of one row from the min-max formula of isotonic regression, in float64."""
    n = values.numel()
    s, order = (values.double() / strength).sort(descending=True)
    y = s - torch.arange(n, 0, -1, dtype=torch.float64)
    sums = torch.cat([y.new_zeros(1), y.cumsum(0)])
    position = torch.arange(n)
    count = position[None, :] - position[:, None] + 1
    means = torch.where(count > 0, (sums[None, 1:] - sums[:-1, None]) / count, -torch.inf)
    best = means.flip(1).cummax(1).values.flip(1)  # over the last member; [first, position]
    v = torch.where(count > 0, best, torch.inf).amin(0)
    begins = torch.cat([torch.ones(1, dtype=torch.bool), (v[:-1] - v[1:]) > 1e-7])
    starts = torch.where(begins, position, 0).cummax(0).values
    back = order.argsort()
    return (s - v)[back], starts[back].int()


def exact_gradient(grad: Tensor, blocks: Tensor, strength: float) -> Tensor:
    result = grad.double()
    for row, block in zip(result, blocks, strict=True):
        for number in block.unique():
            row[block == number] -= row[block == number].mean()
    return result / strength


def check(
    emulated: Emulated, values: Tensor, strength: float, descending: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs both kernels once and compares; returns ranks, blocks and gradient."""
    launches = emulated.emulation.launches
    grad = seeded((*values.shape, 1)).squeeze(2).to(values.dtype)
    ranks, blocks = emulated.soft_rank(values, strength, descending)
    dvalues = emulated.soft_rank_backward(grad, blocks, strength, descending)
    assert emulated.emulation.launches == launches + 2
    assert (ranks.dtype, blocks.dtype, dvalues.dtype) == (values.dtype, torch.int32, grad.dtype)
    signed = -strength if descending else strength
    rows = [exact(row, signed) for row in values]
    want, starts = (torch.stack(column) for column in zip(*rows, strict=True))
    eps = ULPS.get(values.dtype, 1) * torch.finfo(values.dtype).eps
    n = values.shape[1]
    torch.testing.assert_close(ranks.double(), want, rtol=eps, atol=1e-12 * n)
    assert torch.equal(blocks, starts)
    slope = exact_gradient(grad, blocks, signed)
    torch.testing.assert_close(dvalues.double(), slope, rtol=eps, atol=1e-12 / strength)
    return ranks, blocks, dvalues


def mixed(n: int, dtype: torch.dtype) -> Tensor:
    """Rows of both paths: ordinary, closed, wide, ties, constant, ramp, partly separated."""
    x = seeded((7, n)).double()
    x[1] *= 0.05
    x[2] *= n
    x[3] = (3 * x[3]).round() * 4
    x[4] = 0.7
    x[5] = -0.37 * torch.arange(n)
    x[6] = (x[6].abs() + 0.3).cumsum(0)[torch.randperm(n, generator=torch.Generator())]
    return x.to(dtype)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 31, 33, 64, 200])
def test_sizes(emulated: Emulated, n, descending):
    for strength in (0.1, 1.0):
        check(emulated, mixed(n, torch.float32), strength, descending)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(emulated: Emulated, dtype):
    blocks = check(emulated, mixed(50, dtype), 0.1)[1]
    several = blocks.amax(1) > 0
    assert several.any()
    assert not several.all()


@pytest.mark.parametrize("n", [1024, 1025])
def test_longest_row_of_a_warp(emulated: Emulated, n):
    """1024 entries go to a warp, more to a block."""
    x = seeded((2, n))
    x[1] *= 1e-3
    blocks = check(emulated, x, 1e-3, n == 1025)[1]
    assert blocks[0].any()
    assert not blocks[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_rows(emulated: Emulated, dtype):
    x = seeded((3, 3000), dtype)
    x[2] *= 1e-3
    check(emulated, x[1:], 1e-4)


@pytest.mark.parametrize("n", [40, 1100])
def test_closed_form_ends_where_blocks_begin(emulated: Emulated, n):
    """Two levels: at a spread of n/2 one block, above it two, each of many threads."""
    x = torch.cat([torch.zeros(n // 2), torch.full((n // 2,), n / 2)])[None]
    assert not check(emulated, x, 1.0)[1].any()
    assert set(check(emulated, x * 1.001, 1.0)[1].flatten().tolist()) == {0, n // 2}


def test_ties_get_equal_ranks(emulated: Emulated):
    x = seeded((3, 90)).mul(4).round() * 5
    ranks, blocks, _ = check(emulated, x, 0.01)
    for value in x.unique():
        for row in range(3):
            assert ranks[row][x[row] == value].unique().numel() <= 1
            assert blocks[row][x[row] == value].unique().numel() <= 1
    flat = torch.full((1, 90), 3.0)
    assert torch.equal(check(emulated, flat, 1e-3)[0], torch.full((1, 90), 45.5))


@pytest.mark.parametrize("n", [40, 1100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_cannot_be_ranked(emulated: Emulated, bad, n):
    x = torch.cat([seeded((1, n)), seeded((1, n)) * 1e-3, seeded((2, n))[:1]])
    x[1, n // 2] = bad
    ranks, blocks = emulated.soft_rank(x, 0.1, False)
    assert torch.equal(ranks.isnan().all(1), torch.tensor([False, True, False]))
    assert torch.equal(ranks.isnan().any(1), torch.tensor([False, True, False]))
    assert torch.equal((blocks == -1).all(1), torch.tensor([False, True, False]))
    dvalues = emulated.soft_rank_backward(torch.ones_like(x), blocks, 0.1, False)
    assert torch.equal(dvalues.isnan().all(1), torch.tensor([False, True, False]))
    assert torch.equal(dvalues.isnan().any(1), torch.tensor([False, True, False]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("offset", range(3))
def test_rows_may_begin_anywhere(emulated: Emulated, offset, dtype):
    """Vectors cover the aligned part of a row; outputs are aligned otherwise than inputs."""
    memory = seeded((300,), dtype)
    for strength in (0.02, 100.0):
        check(emulated, memory[offset : offset + 3 * 45].view(3, 45), strength)
        check(emulated, memory[offset : offset + 2 * 64].view(2, 64), strength)


VIEWS = {
    "row slice": lambda x: x[1:3],
    "columns": lambda x: x[:, 3:60],
    "every second column": lambda x: x[:, ::2],
    "transposed": lambda x: x[:5, :5].t(),
    "expanded rows": lambda x: x[:1].expand(3, -1),
    "expanded columns": lambda x: x[:, :1].expand(-1, 9),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(emulated: Emulated, view):
    for strength in (0.02, 100.0):
        x = VIEWS[view](seeded((5, 72)))
        ranks, blocks, _ = check(emulated, x, strength)
        assert ranks.is_contiguous()
        assert blocks.is_contiguous()


def test_many_rows(emulated: Emulated):
    """More rows than the warps of a block, and a tail."""
    check(emulated, seeded((11, 12)), 0.2)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_empty(emulated: Emulated, shape):
    x, launches = torch.zeros(shape), emulated.emulation.launches
    ranks, blocks = emulated.soft_rank(x, 1.0, False)
    assert ranks.shape == blocks.shape == shape
    assert emulated.soft_rank_backward(x, blocks, 1.0, False).shape == shape
    assert emulated.emulation.launches == launches


@pytest.mark.parametrize("n", [120, 1030])
def test_the_order_of_threads_does_not_matter(emulation: emulator.Emulator, n):
    """The same bits from every order: sums run in one order, by one thread."""
    x = seeded((3, n))
    x[1] *= 1e-3
    results = []
    for order in emulator.ORDERS:
        emulation.order(order, seed=len(results))
        results.append(check(Emulated(emulation), x, 1e-2))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals(emulated: Emulated):
    x, blocks = torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="expected values of rank 2, got 1"):
        emulated.soft_rank(x[0], 1.0, False)
    with pytest.raises(RuntimeError, match="expected a floating dtype"):
        emulated.soft_rank(x.int(), 1.0, False)
    with pytest.raises(RuntimeError, match="rows of 16385 entries do not fit the shared memory"):
        emulated.soft_rank(torch.zeros(1, 16385), 1.0, False)
    with pytest.raises(RuntimeError, match="expected grad and blocks of one shape"):
        emulated.soft_rank_backward(x[:1], blocks, 1.0, False)
    with pytest.raises(RuntimeError, match="expected int32 blocks"):
        emulated.soft_rank_backward(x, blocks.long(), 1.0, False)
