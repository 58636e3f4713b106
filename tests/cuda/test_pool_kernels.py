"""The kernels of csrc/cuda/pool.cu, executed on the CPU: the contract of the ops, and what is the
kernels' own business: vectors, alignment, block tails, strides.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastreid_vi import ops
from tests.cuda import emulator
from tests.cuda.conftest import Emulated
from tests.cuda.room import EmulatedRoom
from tests.ops import test_pool

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = 1e-12


class TestGemPoolRoom(EmulatedRoom, test_pool.TestGemPool):
    """Forward, gradient, golden vectors, every exponent, run-to-run bits."""


def seeded(shape: tuple[int, ...], dtype: torch.dtype, low: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.rand(shape, generator=generator, dtype=torch.float64) + low).to(dtype)


def exact(x: Tensor, grad: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled, moment and gradient in float64."""
    wide = x.double()
    moment = wide.pow(p).mean((2, 3)) + EPS
    positions = x.shape[2] * x.shape[3]
    scale = grad.double() * moment.pow(1 / p - 1) / positions
    return moment.pow(1 / p), moment, scale[..., None, None] * wide.pow(p - 1)


def check(emulated: Emulated, x: Tensor, p: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Runs both kernels once and compares; returns what they gave."""
    launches = emulated.emulation.launches
    grad = seeded((x.shape[0], x.shape[1]), x.dtype, low=-0.5)
    pooled, moment = emulated.gem_pool(x, p, EPS)
    dx = emulated.gem_pool_backward(grad, x, moment, p)
    assert emulated.emulation.launches == launches + 2
    narrow, wide = torch.finfo(x.dtype).eps, torch.finfo(moment.dtype).eps
    for got, want, eps in zip(
        (pooled, moment, dx), exact(x, grad, p), (narrow, wide, narrow), strict=True
    ):
        # Half an ulp of the result's dtype, and a few of the accumulator's for sum and powers.
        torch.testing.assert_close(got.double(), want, rtol=0.5 * eps + 16 * wide, atol=1e-7)
    return pooled, moment, dx


# Tails of a block's channels, fewer positions than warps, odd vectors, several groups and rounds.
SHAPES = [(2, 264, 3, 3), (1, 520, 1, 2), (2, 8, 9, 7), (1, 72, 12, 6), (2, 16, 18, 9)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts(emulated: Emulated, shape, dtype, layout):
    x = seeded(shape, dtype).contiguous(memory_format=layout)
    dx = check(emulated, x)[2]
    assert dx.stride() == x.stride()


# Views of one map, contiguous and channels_last.
VIEWS = {
    "batch slice": lambda x, last: x[1:],
    "channel slice": lambda x, last: x[:, 5:21],
    "channels_last channel slice": lambda x, last: last[:, 8:16],
    "channels_last, unaligned": lambda x, last: last[:, 3:19],
    "channels_last, odd channels": lambda x, last: last[:, :13],
    "channels_last, odd pitch of positions": lambda x, last: x.as_strided(
        (3, 16, 4, 5), (380, 1, 95, 19)
    ),
    "channels_last, odd pitch of samples": lambda x, last: x.as_strided(
        (3, 16, 4, 5), (323, 1, 80, 16)
    ),
    "every second channel": lambda x, last: x[:, ::2],
    "rows": lambda x, last: x[:, :, 2:7],
    "columns": lambda x, last: x[:, :, :, 1:4],
    "channels_last rows": lambda x, last: last[:, :, 2:7],
    "channels_last columns": lambda x, last: last[:, :, :, 1:4],
    "every second row": lambda x, last: last[:, :, ::2],
    "transposed": lambda x, last: x.transpose(2, 3),
    "batch last": lambda x, last: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded batch": lambda x, last: x[:1].expand(3, -1, -1, -1),
    "expanded positions": lambda x, last: x[:, :, :1, :1].expand(-1, -1, 5, 4),
    "expanded channels": lambda x, last: x[:, :1].expand(-1, 16, -1, -1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(emulated: Emulated, view, dtype):
    base = seeded((3, 24, 10, 6), dtype)
    x = VIEWS[view](base, base.contiguous(memory_format=torch.channels_last))
    dx = check(emulated, x)[2]
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert dx.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("offset", range(9))
def test_rows_may_begin_anywhere(emulated: Emulated, offset):
    """Vectors cover the aligned part of a row; the rest is read one by one."""
    memory = seeded((1, 1, 1, 400), torch.bfloat16).flatten()
    check(emulated, memory[offset : offset + 3 * 5 * 7].view(1, 3, 5, 7))
    check(emulated, memory[offset : offset + 2 * 64].view(2, 64, 1, 1))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 5.0, 0.5, 3.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exponents(emulated: Emulated, dtype, p):
    x = seeded((2, 12, 5, 4), dtype, low=0.1)
    check(emulated, x, p)
    check(emulated, x.contiguous(memory_format=torch.channels_last), p)


@pytest.mark.parametrize("p", [3.0, 5.0, 2.0, 2.5])
def test_negative_features(emulated: Emulated, p):
    """No clamp: odd powers keep the sign; a negative moment, or one's root, gives NaN."""
    x = seeded((2, 8, 4, 4), torch.float32, low=-0.6)
    pooled, moment = emulated.gem_pool(x, p, EPS)
    want, want_moment, want_dx = exact(x, torch.ones(2, 8), p)
    dx = emulated.gem_pool_backward(torch.ones(2, 8), x, moment, p)
    assert want.isnan().any() == (p != 2.0)
    for got, expected in ((moment, want_moment), (pooled, want), (dx, want_dx)):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_zero_features_have_finite_gradients(emulated: Emulated):
    pooled, _, dx = check(emulated, torch.zeros(2, 8, 3, 3))
    assert pooled.isfinite().all()
    assert (dx == 0).all()


def test_nan_stays_in_its_channel(emulated: Emulated):
    x = seeded((2, 16, 5, 5), torch.float32).contiguous(memory_format=torch.channels_last)
    x[1, 3, 2, 2] = float("nan")
    pooled, _ = emulated.gem_pool(x, 3.0, EPS)
    expected = torch.zeros(2, 16, dtype=torch.bool)
    expected[1, 3] = True
    assert torch.equal(pooled.isnan(), expected)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 0, 3, 3)], ids=str)
def test_empty(emulated: Emulated, shape):
    x, launches = torch.zeros(shape), emulated.emulation.launches
    pooled, moment = emulated.gem_pool(x, 3.0, EPS)
    dx = emulated.gem_pool_backward(torch.zeros(shape[:2]), x, moment, 3.0)
    assert pooled.shape == moment.shape == shape[:2]
    assert dx.shape == shape
    assert emulated.emulation.launches == launches


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_order_of_threads_does_not_matter(emulation: emulator.Emulator, layout):
    """The same bits from every order: no float atomics, one writer for each element."""
    x = seeded((2, 72, 6, 5), torch.float32).contiguous(memory_format=layout)
    results = []
    for order in emulator.ORDERS:
        emulation.order(order, seed=len(results))
        results.append(check(Emulated(emulation), x, 2.5))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_agrees_with_the_public_function(emulated: Emulated):
    x = seeded((2, 24, 4, 3), torch.float32)
    torch.testing.assert_close(emulated.gem_pool(x, 3.0, EPS)[0], ops.gem_pool(x))


def test_refusals(emulated: Emulated):
    x, moment = torch.ones(2, 4, 3, 3), torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="expected features of rank 4, got 3"):
        emulated.gem_pool(x[0], 3.0, EPS)
    with pytest.raises(RuntimeError, match="expected a floating dtype"):
        emulated.gem_pool(x.int(), 3.0, EPS)
    for grad, m in ((moment.double(), moment), (moment, moment.bfloat16()), (moment[:1], moment)):
        with pytest.raises(RuntimeError, match="gem_pool_backward: expected"):
            emulated.gem_pool_backward(grad, x, m, 3.0)
