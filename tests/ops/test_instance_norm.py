from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastreid_vi
from fastreid_vi import ops
from tests.conftest import golden
from tests.contract import LAYOUTS, OpContract, arranged, device_of
from tests.ops.test_pool import assert_close, seeded, tensor


class TestInstanceNormAct(OpContract):
    op, layouts = "instance_norm_act", LAYOUTS
    # shape, activation, weight and bias, residual
    cases = (
        ((2, 20, 4, 3), "relu", True, False),
        ((3, 33, 9, 7), "leaky_relu", True, True),
        ((1, 16, 6, 1), "none", False, True),
        ((0, 8, 4, 3), "relu", True, True),
        ((2, 3, 1, 1), "leaky_relu", True, False),
        ((2, 7, 17, 23), "relu", False, False),
        ((1, 261, 3, 2), "leaky_relu", True, False),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape, activation, affine, residual = case
        weight = seeded(shape[1]) + 0.5 if affine else None
        bias = seeded(shape[1], low=-0.5) if affine else None
        added = seeded(*shape).flip(0) * 2 if residual else None
        return seeded(*shape) + 0.5, weight, bias, added, activation

    def call(self, *args: Any) -> Any:
        x, weight, bias, residual, activation = args
        return ops.instance_norm_act(x, weight, bias, residual=residual, activation=activation)

    @pytest.mark.parametrize("kind", [torch.float32, torch.float64])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", ["a", "b"])
    def test_golden(self, room: str, name: str, layout: str, kind: torch.dtype) -> None:
        """Training on two batches, then evaluation: outputs, gradients and running statistics."""
        v, device = golden("aligngan/instance_norm"), device_of(room)

        def given(field: str) -> torch.Tensor:
            return arranged(tensor(v[f"{name}__{field}"]).to(kind), layout).to(device)

        running = {"running_mean": given("rm0"), "running_var": given("rv0")}
        for mode, batch in (("train", "1"), ("train", "2"), ("eval", "1")):
            x = given(f"x{batch}").requires_grad_()
            weight, bias = given("w").requires_grad_(), given("bias").requires_grad_()
            options = {"activation": "none", "training": mode == "train", **running}
            with fastreid_vi.backend(room):
                y = ops.instance_norm_act(x, weight, bias, **options)
                y.backward(given("gout"))
            if (mode, batch) != ("train", "2"):
                assert_close(y, v[f"{name}__{mode}_y1"], 1e-5)
                assert_close(x.grad, v[f"{name}__{mode}_gx1"], 1e-4)
                assert_close(weight.grad, v[f"{name}__{mode}_gw"], 1e-4)
                assert_close(bias.grad, v[f"{name}__{mode}_gb"], 1e-4)
            step = batch if mode == "train" else "2"
            assert_close(running["running_mean"], v[f"{name}__rm{step}"], 1e-6)
            assert_close(running["running_var"], v[f"{name}__rv{step}"], 1e-6)

    def test_golden_without_parameters(self, room: str) -> None:
        v, device = golden("aligngan/instance_norm"), device_of(room)
        x = tensor(v["plain__x"], device).requires_grad_()
        with fastreid_vi.backend(room):
            y = ops.instance_norm_act(x, activation="none")
            y.backward(tensor(v["plain__gout"], device))
        assert_close(y, v["plain__y"], 1e-5)
        assert_close(x.grad, v["plain__gx"], 1e-4)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("size", [(12, 6), (40, 33)])
    def test_large_means_keep_their_precision(
        self, room: str, layout: str, size: tuple[int, int]
    ) -> None:
        """Mean 1000, deviation 1: running statistics within 1e-6 of those in float64."""
        device = device_of(room)
        x = (seeded(2, 8, *size) + 1000.0).float()
        mean, var = torch.zeros(8, device=device), torch.zeros(8, device=device)
        with fastreid_vi.backend(room):
            y = ops.instance_norm_act(
                arranged(x, layout).to(device),
                activation="none", running_mean=mean, running_var=var, momentum=1.0,
            ).double().cpu()  # fmt: skip
        exact = x.double()
        var_exact, mean_exact = torch.var_mean(exact, dim=(2, 3))
        assert ((mean.double().cpu() / mean_exact.mean(0) - 1).abs() < 1e-6).all()
        assert ((var.double().cpu() / var_exact.mean(0) - 1).abs() < 1e-6).all()
        # One rounding of a number near 1000 is 3e-5.
        want = torch.nn.functional.instance_norm(exact)
        assert (y - want).abs().max() < 1e-4

    @pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])
    def test_evaluation_is_an_affine_map(self, room: str, activation: str) -> None:
        """Gradients with fixed statistics, of the residual too."""
        device = device_of(room)
        x, residual = (seeded(2, 5, 4, k).requires_grad_() for k in (3, 3))
        mean, var = seeded(5), seeded(5, low=0.5)
        weight, bias = seeded(5, low=0.2).requires_grad_(), seeded(5, low=0.1).requires_grad_()
        shaped = (t[:, None, None] for t in (mean, var, weight, bias))
        m, v, w, b = shaped
        z = w * (x - m) / (v + 1e-3).sqrt() + b
        slope = {"relu": 0.0, "leaky_relu": 0.3, "none": 1.0}[activation]
        want = torch.where(z > 0, z, slope * z) + residual
        leaves = (x, weight, bias, residual)
        grads = torch.autograd.grad(want.square().sum(), leaves)
        ours = [t.detach().to(device).requires_grad_() for t in leaves]
        with fastreid_vi.backend(room):
            y = ops.instance_norm_act(
                *ours[:3], residual=ours[3], activation=activation, negative_slope=0.3, eps=1e-3,
                running_mean=mean.to(device), running_var=var.to(device), training=False,
            )  # fmt: skip
            got = torch.autograd.grad(y.square().sum(), ours)
        torch.testing.assert_close(y.cpu(), want.detach())
        for g, e in zip(got, grads, strict=True):
            torch.testing.assert_close(g.cpu(), e)

    def test_half_precision_with_float32_parameters(self, room: str) -> None:
        """As under autocast: the map is narrow, parameters and their gradients are not."""
        device = device_of(room)
        x = seeded(2, 6, 5, 4).to(torch.float16).to(device).requires_grad_()
        weight = seeded(6).float().to(device).requires_grad_()
        bias = seeded(6, low=0.0).float().to(device).requires_grad_()
        with fastreid_vi.backend(room):
            y = ops.instance_norm_act(x, weight, bias)
            y.backward(torch.ones_like(y))
        wide = [t.detach().cpu().double().requires_grad_() for t in (x, weight, bias)]
        with fastreid_vi.backend("reference"):
            exact = ops.instance_norm_act(*wide)
            exact.backward(torch.ones_like(exact))
        assert (y.dtype, weight.grad.dtype) == (torch.float16, torch.float32)
        torch.testing.assert_close(y.double().cpu(), exact, rtol=1e-3, atol=1e-3)
        for got, want in zip((weight, bias), wide[1:], strict=True):
            torch.testing.assert_close(got.grad.double().cpu(), want.grad, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(
    shift=st.floats(-4, 4), scale=st.floats(0.5, 8), activation=st.sampled_from(["relu", "none"])
)
def test_shift_and_scale_of_the_input_do_not_matter(
    shift: float, scale: float, activation: Any
) -> None:
    x = seeded(2, 3, 6, 5)
    y = ops.instance_norm_act(x, activation=activation, eps=1e-12)
    moved = ops.instance_norm_act(scale * x + shift, activation=activation, eps=1e-12)
    torch.testing.assert_close(moved, y, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=10)
@given(slope=st.floats(0, 1))
def test_leaky_relu_lies_between_relu_and_none(slope: float) -> None:
    x = seeded(2, 3, 5, 4)
    relu = ops.instance_norm_act(x)
    none = ops.instance_norm_act(x, activation="none")
    leaky = ops.instance_norm_act(x, activation="leaky_relu", negative_slope=slope)
    torch.testing.assert_close(leaky, (1 - slope) * relu + slope * none)


def test_running_statistics_compile_and_stay_out_of_the_graph() -> None:
    x = seeded(3, 4, 5, 6).requires_grad_()
    running = [torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    eager = [r.clone() for r in running]

    def step(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return ops.instance_norm_act(x, running_mean=mean, running_var=var)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    y = compiled(x, *running)
    y.sum().backward()
    torch.testing.assert_close(y, step(x, *eager))
    module = torch.nn.InstanceNorm2d(4, track_running_stats=True).double()
    module(x)
    for got, want, plain in zip(
        running, eager, (module.running_mean, module.running_var), strict=True
    ):
        assert not got.requires_grad
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got, plain)


def test_an_empty_batch_moves_nothing() -> None:
    mean, var = torch.ones(3), torch.ones(3)
    y = ops.instance_norm_act(torch.ones(0, 3, 4, 4), running_mean=mean, running_var=var)
    assert y.shape == (0, 3, 4, 4)
    assert torch.equal(mean, torch.ones(3))
    assert torch.equal(var, torch.ones(3))


def test_autocast_narrows_the_map_alone() -> None:
    x = seeded(2, 3, 4, 4).float().requires_grad_()
    weight = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.instance_norm_act(x, weight, residual=x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 8)}, ValueError, r"x: expected shape \[B, C, H, W\]"),
        ({"x": torch.ones(2, 8, 4, 4).int()}, TypeError, "x: expected a floating tensor"),
        ({"weight": torch.ones(7)}, ValueError, r"weight: expected shape \[8\], got float32 \[7\]"),
        ({"bias": torch.ones(8).double()}, TypeError, "bias: expected dtype torch.float32"),
        ({"residual": torch.ones(2, 8, 4, 5)}, ValueError, r"residual: expected shape \[2, 8, 4"),
        ({"residual": torch.ones(2, 8, 4, 4).half()}, TypeError, "residual: expected dtype"),
        ({"activation": "gelu"}, ValueError, "activation: expected one of 'relu', 'leaky_relu'"),
        ({"negative_slope": -0.1}, ValueError, "negative_slope: expected >= 0"),
        ({"eps": 0.0}, ValueError, "eps: expected > 0"),
        ({"momentum": 1.5}, ValueError, r"momentum: expected a number in \[0, 1\], got 1.5"),
        ({"running_mean": torch.ones(8)}, ValueError, "expected both or none, got one"),
        (
            {"running_mean": torch.ones(8), "running_var": torch.ones(9)},
            ValueError,
            r"running_var: expected shape \[8\], got float32 \[9\]",
        ),
        (
            {
                "x": torch.ones(2, 8, 1, 1),
                "running_mean": torch.ones(8),
                "running_var": torch.ones(8),
            },
            ValueError,
            "x: expected more than one position to move running_var",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.instance_norm_act(**{"x": torch.ones(2, 8, 4, 4), **change})
