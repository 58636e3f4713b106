"""The kernels of csrc/cuda/pattern_pool.cu, executed on the CPU: the contract of the ops, and what
is the kernels' own business: vectors, alignment, tails of tiles and groups, strides.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda import emulator
from tests.cuda.conftest import Emulated
from tests.cuda.room import EmulatedRoom
from tests.cuda.test_pool_kernels import VIEWS
from tests.ops import test_pool

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = ("sigmoid", "softmax")


class TestPatternPoolRoom(EmulatedRoom, test_pool.TestPatternPool):
    """Forward, gradients, golden vectors, run-to-run bits."""


def seeded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def exact(x: Tensor, w: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """Pooled features and maps in float64."""
    z = torch.einsum("pc,bchw->bphw", w.double().flatten(1), x.double())
    if bias is not None:
        z = z + bias.double()[:, None, None]
    a = z.sigmoid() if activation == "sigmoid" else z.flatten(2).softmax(2).view(z.shape)
    pooled = torch.einsum("bphw,bchw->bpc", a, x.double())
    return pooled / (x[0, 0].numel() if activation == "sigmoid" else 1), a


def exact_gradients(
    grad: Tensor, grad_maps: Tensor, x: Tensor, w: Tensor, maps: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias in float64, of the maps that forward rounded."""
    x, w, a, grad = x.double(), w.double().flatten(1), maps.double(), grad.double()
    if activation == "sigmoid":
        grad = grad / x[0, 0].numel()
    da = grad_maps.double() + torch.einsum("bpc,bchw->bphw", grad, x)
    if activation == "sigmoid":
        dz = da * a * (1 - a)
    else:
        dz = a * (da - (a * da).sum((2, 3), keepdim=True))
    dx = torch.einsum("bphw,bpc->bchw", a, grad) + torch.einsum("bphw,pc->bchw", dz, w)
    dw = torch.einsum("bphw,bchw->pc", dz, x)[..., None, None]
    return dx, dw, dz.sum((0, 2, 3)) * (activation == "sigmoid")


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Half an ulp of the result's dtype, and a few of the accumulator's of the largest entry."""
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    narrow = 0.5 * torch.finfo(dtype).eps
    scale = want.abs().max().item()
    # Subnormals of float16 are rounded to its smallest step.
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(
        got.double(), want, rtol=1.01 * narrow, atol=64 * wide * scale + step, equal_nan=True
    )


def check(
    emulated: Emulated, x: Tensor, count: int = 6, activation: str = "sigmoid", bias: bool = True
) -> list[Tensor]:
    """Runs forward and backward once and compares; returns what they gave."""
    launches, dtype = emulated.emulation.launches, x.dtype
    batch, channels, height, width = x.shape
    w = (seeded((count, channels, 1, 1), torch.float64) / channels**0.5).to(dtype)
    b = seeded((count,), dtype) if bias else None
    pooled, maps = emulated.pattern_pool(x, w, b, activation)
    grad, grad_maps = seeded((batch, count, channels), dtype), seeded(maps.shape, dtype)
    assert maps.shape == (batch, count, height, width)
    gradients = emulated.pattern_pool_backward(grad, grad_maps, x, w, maps, activation)
    # scores, softmax, sums; logit gradient, softmax gradient, sums, dx, dw and db
    assert emulated.emulation.launches == launches + (6 if activation == "sigmoid" else 8)
    want = (
        *exact(x, w, b, activation),
        *exact_gradients(grad, grad_maps, x, w, maps, activation),
    )
    results = [pooled, maps, *gradients]
    for got, expected in zip(results, want, strict=True):
        assert got.dtype == dtype
        assert got.shape == expected.shape
        assert_near(got, expected, dtype)
    return results


# Tails of vectors, of a block's channels, of tiles of positions; more positions than threads share.
SHAPES = [(2, 264, 3, 3), (1, 520, 1, 2), (2, 13, 9, 7), (1, 72, 12, 6), (2, 16, 18, 15)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts(emulated: Emulated, shape, dtype, layout):
    x = seeded(shape, dtype).contiguous(memory_format=layout)
    dx = check(emulated, x, activation=ACTIVATIONS[shape[1] % 3 % 2])[2]
    assert dx.stride() == x.stride()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [1, 6, 8, 9, 12, 17])
def test_any_number_of_maps(emulated: Emulated, count, activation):
    """Groups of eight, full or not."""
    x = seeded((2, 40, 5, 7), torch.float32)
    check(emulated, x, count, activation, bias=count % 2 == 0)
    x = x.bfloat16().contiguous(memory_format=torch.channels_last)
    check(emulated, x, count, activation, bias=count % 2 == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(emulated: Emulated, view, dtype):
    base = seeded((3, 24, 10, 6), dtype)
    x = VIEWS[view](base, base.contiguous(memory_format=torch.channels_last))
    dx = check(emulated, x, 3)[2]
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert dx.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("offset", range(9))
def test_rows_may_begin_anywhere(emulated: Emulated, offset):
    memory = seeded((2 * 5 * 7 * 16 + 16,), torch.bfloat16)
    check(emulated, memory[offset : offset + 2 * 35 * 16].view(2, 5, 7, 16).permute(0, 3, 1, 2))
    check(emulated, memory[offset : offset + 2 * 64].view(2, 64, 1, 1))


def test_weights_and_gradients_may_begin_anywhere(emulated: Emulated):
    x = seeded((2, 16, 3, 5), torch.float32).contiguous(memory_format=torch.channels_last)
    w = seeded((4 * 16 + 1,), torch.float32)[1:].view(4, 16, 1, 1)
    pooled, maps = emulated.pattern_pool(x, w, None, "sigmoid")
    for got, want in zip((pooled, maps), exact(x, w, None, "sigmoid"), strict=True):
        assert_near(got, want, x.dtype)
    grad = seeded((2 * 4 * 16 + 1,), torch.float32)[1:].view(2, 4, 16)
    zero = torch.zeros_like(maps)
    got = emulated.pattern_pool_backward(grad, zero, x, w, maps, "sigmoid")
    for one, want in zip(got, exact_gradients(grad, zero, x, w, maps, "sigmoid"), strict=True):
        assert_near(one, want, x.dtype)


def test_many_samples_share_a_block(emulation: emulator.Emulator):
    """The weight gradient's blocks take several samples each, the last one fewer."""
    emulation.order("ascending")
    with emulation.unwatched():
        check(Emulated(emulation), seeded((517, 3, 2, 1), torch.float32), 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_logits_stay_finite(emulated: Emulated, activation):
    x = 200 * seeded((2, 24, 4, 3), torch.float32)
    pooled, maps = emulated.pattern_pool(x, torch.ones(3, 24, 1, 1), None, activation)
    assert_near(maps, exact(x, torch.ones(3, 24, 1, 1), None, activation)[1], torch.bfloat16)
    assert ((maps == 0) | (maps == 1)).any()
    gradients = emulated.pattern_pool_backward(
        torch.ones_like(pooled), torch.ones_like(maps), x, torch.ones(3, 24, 1, 1), maps, activation
    )
    assert all(result.isfinite().all() for result in (pooled, *gradients))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_sample(emulated: Emulated, activation):
    x = seeded((2, 16, 5, 5), torch.float32).contiguous(memory_format=torch.channels_last)
    x[1, 3, 2, 2] = float("nan")
    pooled, maps = emulated.pattern_pool(x, torch.ones(3, 16, 1, 1), None, activation)
    assert pooled[0].isfinite().all()
    assert pooled[1].isnan().all()
    spoilt = torch.zeros(2, 5, 5, dtype=torch.bool)
    spoilt[1, 2, 2] = True
    if activation == "softmax":
        spoilt[1] = True
    assert torch.equal(maps.isnan(), spoilt[:, None].expand(-1, 3, -1, -1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_empty_batch_has_zero_weight_gradients(emulated: Emulated, activation):
    x, w = torch.zeros(0, 8, 3, 3), torch.ones(9, 8, 1, 1)
    pooled, maps = emulated.pattern_pool(x, w, None, activation)
    assert pooled.shape == (0, 9, 8)
    assert maps.shape == (0, 9, 3, 3)
    dx, dw, db = emulated.pattern_pool_backward(pooled, maps, x, w, maps, activation)
    assert dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(w))
    assert torch.equal(db, torch.zeros(9))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_order_of_threads_does_not_matter(emulation: emulator.Emulator, activation):
    """The same bits from every order: no float atomics, one writer for each element."""
    x = seeded((3, 72, 6, 7), torch.float32).contiguous(memory_format=torch.channels_last)
    results = []
    for order in emulator.ORDERS:
        emulation.order(order, seed=len(results))
        results.append(check(Emulated(emulation), x, 9, activation))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals(emulated: Emulated):
    x, w = torch.ones(2, 4, 3, 3), torch.ones(6, 4, 1, 1)
    with pytest.raises(RuntimeError, match="pattern_pool: expected features of rank 4, got 3"):
        emulated.pattern_pool(x[0], w, None, "sigmoid")
    with pytest.raises(RuntimeError, match="expected a floating dtype"):
        emulated.pattern_pool(x.int(), w.int(), None, "sigmoid")
    for weight in (w.double(), w[:, :3], w[:0]):
        with pytest.raises(RuntimeError, match=r"pattern_pool: expected a weight \[P, C, 1, 1\]"):
            emulated.pattern_pool(x, weight, None, "sigmoid")
    with pytest.raises(RuntimeError, match="expected a bias of 6 elements"):
        emulated.pattern_pool(x, w, torch.ones(5), "sigmoid")
    with pytest.raises(RuntimeError, match="expected activation sigmoid or softmax, got tanh"):
        emulated.pattern_pool(x, w, None, "tanh")
    pooled, maps = emulated.pattern_pool(x, w, None, "sigmoid")
    for grads in (
        (pooled.double(), maps, maps),
        (pooled[1:], maps, maps),
        (pooled, maps, maps[1:]),
    ):
        with pytest.raises(RuntimeError, match="pattern_pool_backward: expected"):
            emulated.pattern_pool_backward(*grads[:2], x, w, grads[2], "sigmoid")
