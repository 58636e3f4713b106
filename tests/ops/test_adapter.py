from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastreid_vi
from fastreid_vi import ops
from tests.conftest import golden
from tests.contract import LAYOUTS, OpContract, arranged, device_of
from tests.ops.test_pool import assert_close, seeded, tensor

PARAMETERS = ("sc_w", "sc_b", "ca_w", "ca_bn_w", "ca_bn_b", "norm_w", "norm_b")
BUFFERS = {
    "ca_running_mean": "ca_rm",
    "ca_running_var": "ca_rv",
    "norm_running_mean": "norm_rm",
    "norm_running_var": "norm_rv",
}


def parameters(channels: int, maps: int) -> list[torch.Tensor]:
    """sc_weight, sc_bias, ca_weight and the weight and bias of both norms; far from trivial."""
    shapes = [(maps, channels, 1, 1), (maps,), (channels, 1, maps), *[(channels,)] * 4]
    generator = torch.Generator().manual_seed(channels + maps)
    return [torch.randn(s, generator=generator, dtype=torch.float64) * 0.7 for s in shapes]


def published(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """The module's own sequence, training."""
    sc_w, sc_b, ca_w, ca_bn_w, ca_bn_b, norm_w, norm_b = weights
    f = nn.functional
    channels = x.shape[1]
    mask = f.conv2d(x, sc_w, sc_b).flatten(2).softmax(dim=2)  # [B, M, S]
    context = (x.flatten(2)[:, None] @ mask[..., None]).squeeze(3)  # [B, M, C], x expanded M times
    z = f.conv1d(context.transpose(1, 2), ca_w, groups=channels)  # [B, C, 1]
    gate = torch.sigmoid(f.batch_norm(z, None, None, ca_bn_w, ca_bn_b, training=True))
    return f.batch_norm(x * gate[..., None], None, None, norm_w, norm_b, training=True) + x


class TestDistributionAdapter(OpContract):
    op, layouts = "distribution_adapter", LAYOUTS
    # shape, M
    cases = (
        ((4, 20, 4, 3), 2),
        ((6, 33, 9, 7), 5),
        ((5, 7, 1, 8), 3),
        ((4, 16, 6, 1), 12),
        ((4, 1, 5, 4), 2),
        ((8, 261, 3, 4), 2),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape, maps = case
        return seeded(*shape) + 0.5, *parameters(shape[1], maps)

    @pytest.mark.parametrize("kind", [torch.float32, torch.float64])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", ["a", "b", "zero", "eval", "peaky", "wide"])
    def test_golden(self, room: str, name: str, layout: str, kind: torch.dtype) -> None:
        v = {k.removeprefix(f"{name}__"): a for k, a in golden("mcja/mda").items()}
        v = {k: tensor(a).to(kind) if a.dtype.kind == "f" else a for k, a in v.items()}
        device = device_of(room)
        x = arranged(v["x"], layout).to(device).requires_grad_()
        leaves = [v[p].to(device).clone().requires_grad_() for p in PARAMETERS]
        buffers = {k: v[f"{p}_in"].to(device).clone() for k, p in BUFFERS.items()}
        with fastreid_vi.backend(room):
            y = ops.distribution_adapter(x, *leaves, **buffers, training=bool(v["train"]))
            y.backward(arranged(v["gout"], layout).to(device))
        exact = kind == torch.float64 and name != "wide"
        assert_close(y, v["y64" if exact else "y"].double().numpy(), 1e-10 if exact else 1e-5)
        assert_close(
            x.grad, v["gx64" if exact else "gx"].double().numpy(), 1e-10 if exact else 1e-4
        )
        for leaf, p in zip(leaves, PARAMETERS, strict=True):
            if p == "sc_b":  # rounding noise there, nothing here
                assert torch.equal(leaf.grad, torch.zeros_like(leaf))
            else:
                assert_close(leaf.grad, v[f"g_{p}"].double().numpy(), 1e-4)
        for key, p in BUFFERS.items():
            assert_close(buffers[key], v[f"{p}_out"].double().numpy(), 1e-5)

    @pytest.mark.parametrize("size", [((3, 6, 5, 4), 3), ((5, 3, 1, 1), 2), ((4, 6, 3, 2), 1)])
    def test_equals_the_published_sequence(self, room: str, size: Any) -> None:
        """Both norms of PyTorch, the context product with x expanded M times.

        With one position or one map the gate's norm undoes `ca_weight`: its gradient is near zero.
        """
        shape, maps = size
        x = seeded(*shape).requires_grad_()
        leaves = [p.requires_grad_() for p in parameters(shape[1], maps)]
        want = published(x, *leaves)
        grads = torch.autograd.grad(want.square().sum(), [x, *leaves])
        ours = [t.detach().to(device_of(room)).requires_grad_() for t in (x, *leaves)]
        with fastreid_vi.backend(room):
            y = ops.distribution_adapter(*ours)
            got = torch.autograd.grad(y.square().sum(), ours)
        torch.testing.assert_close(y.cpu(), want)
        for g, w in zip(got, grads, strict=True):
            torch.testing.assert_close(g.cpu(), w, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_large_means_keep_their_precision(self, room: str, layout: str) -> None:
        """Mean 1000, deviation 1: running statistics of the map within 1e-6 of float64's."""
        device = device_of(room)
        x = (seeded(4, 8, 12, 6) + 1000.0).float()
        weights = [p.float() for p in parameters(8, 2)]
        weights[3], weights[4] = torch.zeros(8), torch.full((8,), 2.0)  # the same gate everywhere
        buffers = {k: torch.zeros(8, device=device) for k in BUFFERS}
        with fastreid_vi.backend(room):
            ops.distribution_adapter(
                arranged(x, layout).to(device), *(w.to(device) for w in weights),
                **buffers, momentum=1.0,
            )  # fmt: skip
        gated = x.double() * torch.sigmoid(torch.tensor(2.0, dtype=torch.float64))
        var, mean = torch.var_mean(gated, dim=(0, 2, 3))
        assert ((buffers["norm_running_mean"].double().cpu() / mean - 1).abs() < 1e-6).all()
        assert ((buffers["norm_running_var"].double().cpu() / var - 1).abs() < 1e-6).all()

    @pytest.mark.parametrize("batch", [0, 1])
    def test_evaluation_takes_any_batch(self, room: str, batch: int) -> None:
        device = device_of(room)
        weights = [p.float().to(device).requires_grad_() for p in parameters(5, 2)]
        buffers = {k: torch.ones(5, device=device) for k in BUFFERS}
        x = seeded(3, 5, 4, 3).float().to(device)
        with fastreid_vi.backend(room):
            whole = ops.distribution_adapter(x, *weights, **buffers, training=False)
            part = x[:batch].requires_grad_()
            y = ops.distribution_adapter(part, *weights, **buffers, training=False)
            y.sum().backward()
        torch.testing.assert_close(y, whole[:batch])
        assert part.grad.shape == part.shape
        assert all(torch.equal(b, torch.ones_like(b)) for b in buffers.values())
        if batch == 0:
            assert all(torch.equal(w.grad, torch.zeros_like(w)) for w in weights)

    def test_half_precision_with_float32_parameters(self, room: str) -> None:
        device = device_of(room)
        x = seeded(4, 6, 5, 4).to(torch.float16).to(device).requires_grad_()
        weights = [p.float().to(device).requires_grad_() for p in parameters(6, 2)]
        with fastreid_vi.backend(room):
            y = ops.distribution_adapter(x, *weights)
            y.backward(torch.ones_like(y))
        wide = [t.detach().cpu().double().requires_grad_() for t in (x, *weights)]
        with fastreid_vi.backend("reference"):
            exact = ops.distribution_adapter(*wide)
            exact.backward(torch.ones_like(exact))
        assert (y.dtype, weights[0].grad.dtype) == (torch.float16, torch.float32)
        torch.testing.assert_close(y.double().cpu(), exact, rtol=1e-3, atol=1e-3)
        for got, want in zip(weights, wide[1:], strict=True):
            scale = want.grad.abs().max().item()
            torch.testing.assert_close(
                got.grad.double().cpu(), want.grad, rtol=0, atol=1e-4 * scale + 1e-5
            )


@settings(deadline=None, max_examples=15)
@given(shift=st.floats(-20, 20), maps=st.integers(1, 4))
def test_bias_of_the_logits_has_no_effect(shift: float, maps: int) -> None:
    x, weights = seeded(3, 4, 3, 5), parameters(4, maps)
    y = ops.distribution_adapter(x, *weights)
    weights[1] = weights[1] + shift
    assert torch.equal(ops.distribution_adapter(x, *weights), y)


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(4)))
def test_samples_in_any_order(order: list[int]) -> None:
    x, weights = seeded(4, 5, 3, 2), parameters(5, 2)
    y = ops.distribution_adapter(x, *weights)
    torch.testing.assert_close(ops.distribution_adapter(x[order], *weights), y[order])


def test_zero_norm_weights_are_the_identity() -> None:
    """A fresh module; its first step moves the norm's parameters alone."""
    x, weights = seeded(3, 4, 5, 2).requires_grad_(), parameters(4, 2)
    weights[5], weights[6] = torch.zeros(4).double(), torch.zeros(4).double()
    leaves = [w.requires_grad_() for w in weights]
    y = ops.distribution_adapter(x, *leaves)
    assert torch.equal(y, x)
    g = seeded(*y.shape).flip(1)
    dx, *grads = torch.autograd.grad(y, [x, *leaves], g)
    torch.testing.assert_close(dx, g)
    assert all(not grad.any() for grad in grads[:5])
    assert all(grad.any() for grad in grads[5:])


def test_running_statistics_compile() -> None:
    x, weights = seeded(3, 4, 5, 6), parameters(4, 2)
    compiled_buffers = {k: torch.ones(4, dtype=torch.float64) for k in BUFFERS}
    eager_buffers = {k: torch.ones(4, dtype=torch.float64) for k in BUFFERS}

    def step(x: torch.Tensor, buffers: dict[str, torch.Tensor]) -> torch.Tensor:
        return ops.distribution_adapter(x, *weights, **buffers)

    torch._dynamo.reset()
    y = torch.compile(step, fullgraph=True)(x, compiled_buffers)
    torch.testing.assert_close(y, step(x, eager_buffers))
    for key in BUFFERS:
        torch.testing.assert_close(compiled_buffers[key], eager_buffers[key])


def test_autocast_narrows_the_map_alone() -> None:
    x = seeded(2, 3, 4, 4).float().requires_grad_()
    weights = [p.float().requires_grad_() for p in parameters(3, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.distribution_adapter(x, *weights)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {t.grad.dtype for t in (x, *weights)} == {torch.float32}


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.ones(2, 8), ValueError, r"features: expected shape \[B, C, H, W\]"),
        (0, torch.ones(1, 8, 4, 4), ValueError, "features: expected B >= 2 in training"),
        (0, torch.ones(0, 8, 4, 4), ValueError, "features: expected B >= 2 in training"),
        (1, torch.ones(2, 7, 1, 1), ValueError, r"sc_weight: expected shape \[2, 8, 1, 1\]"),
        (1, torch.ones(0, 8, 1, 1), ValueError, "sc_weight: expected at least one row"),
        (2, torch.ones(3), ValueError, r"sc_bias: expected shape \[2\]"),
        (3, torch.ones(8, 2, 1), ValueError, r"ca_weight: expected shape \[8, 1, 2\]"),
        (4, torch.ones(7), ValueError, r"ca_bn_weight: expected shape \[8\]"),
        (7, torch.ones(8).half(), TypeError, "norm_bias: expected dtype"),
        ("eps", 0.0, ValueError, "eps: expected > 0"),
        ("momentum", -1.0, ValueError, "momentum: expected a number"),
        ("training", False, ValueError, "expected all four in evaluation, got 0"),
        ("ca_running_mean", torch.ones(8), ValueError, "expected all four or none, got 1"),
        ("norm_running_var", torch.ones(9), ValueError, r"norm_running_var: expected shape \[8\]"),
    ],
)
def test_bad_input(position: int | str, value: Any, error: type[Exception], message: str) -> None:
    good = [torch.ones(2, 8, 4, 4), *(p.float() for p in parameters(8, 2))]
    options = {}
    if isinstance(position, str):
        options[position] = value
    else:
        good[position] = value
    with pytest.raises(error, match=message):
        ops.distribution_adapter(*good, **options)
