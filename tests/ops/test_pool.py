from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastreid_vi
from fastreid_vi import ops
from tests.conftest import golden
from tests.contract import LAYOUTS, OpContract, device_of

MAPS = [(2, 20, 4, 3), (1, 1, 1, 1), (0, 3, 4, 3), (3, 5, 9, 7), (2, 33, 1, 8), (1, 16, 6, 1)]


def seeded(*shape: int, low: float | None = None) -> torch.Tensor:
    """Normal values, or uniform ones in [low, low + 1]."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    if low is None:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.rand(shape, generator=generator, dtype=torch.float64) + low


def tensor(array: np.ndarray, device: str = "cpu") -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(device)


def assert_close(got: torch.Tensor | None, want: np.ndarray, relative: float) -> None:
    """Largest error within `relative` of the largest entry."""
    assert got is not None
    error = np.abs(got.detach().cpu().double().numpy() - want).max()
    assert error <= relative * np.abs(want).max()


class TestGemPool(OpContract):
    op, cases, layouts = "gem_pool", MAPS, LAYOUTS

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        return seeded(*case, low=0.05), 3.0

    @pytest.mark.parametrize("p", [1.0, 2.0, 2.5, 4.0, 6.0])
    def test_every_exponent(self, p: float, room: str) -> None:
        x = seeded(2, 5, 4, 3, low=0.1)
        exact = (x.pow(p).mean((2, 3)) + 1e-12).pow(1 / p)
        x32 = x.float().to(device_of(room)).requires_grad_()
        with fastreid_vi.backend(room):
            y = ops.gem_pool(x32, p)
            y.sum().backward()
        want = x.clone().requires_grad_()
        (want.pow(p).mean((2, 3)) + 1e-12).pow(1 / p).sum().backward()
        torch.testing.assert_close(y.detach().cpu().double(), exact, rtol=3e-6, atol=1e-7)
        torch.testing.assert_close(x32.grad.cpu().double(), want.grad, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(
        ("file", "x", "g", "y", "gx"),
        [
            ("lba/gem", "x", "cot", "y", "grad_x"),
            ("mcja/head", "gem__x", "gem__gout", "gem__y64", "gem__gx64"),
        ],
    )
    def test_golden(self, room: str, file: str, x: str, g: str, y: str, gx: str) -> None:
        vectors, device = golden(file), device_of(room)
        features = tensor(vectors[x], device).requires_grad_()
        with fastreid_vi.backend(room):
            pooled = ops.gem_pool(features)
            pooled.backward(tensor(vectors[g], device).float())
        assert_close(pooled, vectors[y], 1e-5)
        assert_close(features.grad, vectors[gx], 1e-5)

    def test_golden_signed(self, room: str) -> None:
        vectors = golden("lba/gem")
        with fastreid_vi.backend(room):
            pooled = ops.gem_pool(tensor(vectors["x_signed"], device_of(room)))
        assert np.isnan(vectors["y_signed"]).any()
        np.testing.assert_allclose(pooled.cpu().numpy(), vectors["y_signed"], rtol=1e-5)


def test_negative_cubes_are_allowed_and_a_negative_mean_is_nan() -> None:
    x = torch.tensor([-1.0, 2.0]).reshape(1, 1, 1, 2)
    for room in ("reference", "cpu", "triton"):
        if device_of(room) == "cpu":
            with fastreid_vi.backend(room):
                assert ops.gem_pool(x).item() == pytest.approx((7 / 2) ** (1 / 3), rel=1e-6)
                assert ops.gem_pool(-x).isnan().all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.floats(0.1, 10), st.floats(1, 8))
def test_gem_scales_with_its_input_and_lies_between_mean_and_maximum(
    b: int, c: int, side: int, k: float, p: float
) -> None:
    x = seeded(b, c, side, side, low=0.1)
    y = ops.gem_pool(x, p, eps=0.0)
    torch.testing.assert_close(ops.gem_pool(x * k, p, eps=0.0), y * k)
    flat = x.flatten(2)
    assert (y >= flat.mean(2) * (1 - 1e-9)).all()
    assert (y <= flat.amax(2) * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.ones(2, 3)}, ValueError, r"features: expected shape \[B, C, H, W\]"),
        (
            {"features": torch.ones(1, 1, 2, 2, dtype=torch.int64)},
            TypeError,
            "features: expected a floating",
        ),
        ({"features": [1.0]}, TypeError, "features: expected a tensor"),
        ({"features": torch.ones(1, 3, 0, 2)}, ValueError, "features: expected at least one"),
        ({"p": 0.0}, ValueError, "p: expected > 0, got 0"),
        ({"p": float("nan")}, ValueError, "p: expected > 0"),
        ({"eps": -1.0}, ValueError, "eps: expected >= 0"),
    ],
)
def test_gem_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.gem_pool(**{"features": torch.ones(1, 1, 2, 2), **change})


class TestPatternPool(OpContract):
    op, layouts = "pattern_pool", LAYOUTS
    cases = (
        ((2, 20, 4, 3), 6, "sigmoid", True),
        ((2, 20, 4, 3), 2, "softmax", True),
        ((0, 3, 4, 3), 6, "sigmoid", True),
        ((1, 1, 1, 1), 1, "softmax", False),
        ((3, 5, 9, 7), 12, "softmax", False),
        ((2, 33, 1, 8), 1, "sigmoid", False),
        ((1, 70, 6, 5), 9, "sigmoid", True),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape, count, activation, has_bias = case
        weight = seeded(count, shape[1], 1, 1) / shape[1] ** 0.5
        return seeded(*shape), weight, seeded(count) if has_bias else None, activation

    def call(self, *args: Any) -> Any:
        return tuple(ops.pattern_pool(*args[:3], activation=args[3]))

    def test_golden(self, room: str) -> None:
        vectors, device = golden("mpanet/pattern_attention"), device_of(room)
        x, w, b = (tensor(vectors[k], device).requires_grad_() for k in "xwb")
        count, channels = vectors["w"].shape[:2]
        with fastreid_vi.backend(room):
            pooled, maps = ops.pattern_pool(x, w, b)
            assert_close(maps, vectors["masks"], 1e-5)
            flat = torch.cat([pooled.flatten(1), x.mean((2, 3))], 1)
            assert_close(flat, vectors["feats"], 1e-5)
            flat.backward(tensor(vectors["cot"], device))
            for name, leaf in zip("xwb", (x, w, b), strict=True):
                assert_close(leaf.grad, vectors[f"feats_grad_{name}"], 3e-5)
                leaf.grad = None
            loss = ops.map_separation_loss(ops.pattern_pool(x, w, b).maps)
            assert_close(loss, vectors["sep"], 1e-5)
            loss.backward()
        for name, leaf in zip("xwb", (x, w, b), strict=True):
            assert_close(leaf.grad, vectors[f"sep_grad_{name}"], 3e-5)
        assert (count, channels) == (6, 32)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(1, 4))
def test_pattern_limits(b: int, c: int, count: int, side: int) -> None:
    x = seeded(b, c, side, side)
    weight = seeded(count, c, 1, 1)
    softmax = ops.pattern_pool(x, weight, activation="softmax")
    torch.testing.assert_close(softmax.maps.sum((2, 3)), torch.ones(b, count, dtype=x.dtype))
    shifted = ops.pattern_pool(x, weight, seeded(count), activation="softmax")
    torch.testing.assert_close(shifted.maps, softmax.maps)  # softmax ignores the bias
    flat = ops.pattern_pool(x, 0 * weight)
    torch.testing.assert_close(flat.pooled, (x.mean((2, 3)) / 2)[:, None].expand(b, count, c))


def test_pattern_pool_casts_both_under_autocast() -> None:
    x, w = seeded(2, 8, 3, 3).float(), seeded(4, 8, 1, 1).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled, maps = ops.pattern_pool(x, w)
    assert pooled.dtype == maps.dtype == torch.bfloat16
    pooled.float().sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(6, 4, 1, 1)}, ValueError, r"weight: expected shape \[6, 3, 1, 1\]"),
        ({"weight": torch.ones(6, 3)}, ValueError, r"weight: expected shape \[P, C, 1, 1\]"),
        ({"weight": torch.ones(0, 3, 1, 1)}, ValueError, "weight: expected at least one map"),
        (
            {"weight": torch.ones(6, 3, 1, 1).double()},
            TypeError,
            "weight: expected dtype torch.float32",
        ),
        ({"bias": torch.ones(5)}, ValueError, r"bias: expected shape \[6\]"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of 'sigmoid', 'softmax'"),
    ],
)
def test_pattern_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"features": torch.ones(2, 3, 4, 4), "weight": torch.ones(6, 3, 1, 1)}
    with pytest.raises(error, match=message):
        ops.pattern_pool(**{**good, **change})


class TestMapSeparationLoss(OpContract):
    op, layouts = "map_separation_loss", LAYOUTS
    cases = ((2, 6, 4, 3), (1, 2, 1, 1), (0, 3, 4, 3), (3, 1, 2, 2), (2, 12, 9, 7))

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        return (seeded(*case, low=0.0),)

    def test_equals_a_loop_over_pairs(self, room: str) -> None:
        maps = seeded(3, 5, 4, 2, low=0.0)
        total = sum(
            (maps[b, i] * maps[b, j]).sum()
            for b in range(3)
            for i in range(5)
            for j in range(i + 1, 5)
        )
        with fastreid_vi.backend(room):
            loss = ops.map_separation_loss(maps.float().to(device_of(room)))
        torch.testing.assert_close(loss.cpu().double(), total / (3 * 10), rtol=1e-6, atol=0)
        assert loss.dtype == torch.float32


def test_separation_bad_input() -> None:
    with pytest.raises(ValueError, match=r"maps: expected shape \[B, C, H, W\]"):
        ops.map_separation_loss(torch.ones(2, 3))
