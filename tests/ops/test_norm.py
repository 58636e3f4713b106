from __future__ import annotations

from typing import Any

import pytest
import torch

import fastreid_vi
from fastreid_vi import ops
from tests.conftest import golden
from tests.contract import LAYOUTS, OpContract, device_of
from tests.ops.test_pool import assert_close, seeded, tensor


class TestModalityAlleviation(OpContract):
    op, layouts = "modality_alleviation", LAYOUTS
    cases = (
        ((2, 20, 4, 3), 5),
        ((1, 16, 6, 1), 1),
        ((0, 8, 4, 3), 2),
        ((3, 33, 9, 7), 4),
        ((2, 7, 1, 8), 3),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape, hidden = case
        channels = shape[1]
        reduce_weight = seeded(hidden, channels, 1, 1) * (2 / hidden) ** 0.5
        return seeded(*shape) + 0.5, reduce_weight, seeded(channels, hidden, 1, 1) * 0.5

    @pytest.mark.parametrize("name", ["a", "b"])
    def test_golden(self, room: str, name: str) -> None:
        v, device = golden("mpanet/mam"), device_of(room)
        leaves = [tensor(v[f"{name}/{k}"], device).requires_grad_() for k in ("x", "w1", "w2")]
        with fastreid_vi.backend(room):
            y = ops.modality_alleviation(*leaves, eps=float(v[f"{name}/eps"]))
            y.backward(tensor(v[f"{name}/cot"], device))
        assert_close(y, v[f"{name}/y"], 1e-5)
        for leaf, key in zip(leaves, ("x", "w1", "w2"), strict=True):
            assert_close(leaf.grad, v[f"{name}/grad_{key}"], 1e-4)

    def test_large_means_keep_their_precision(self, room: str) -> None:
        """Statistics are centred: unit variance around 1000 still normalises within 1e-4."""
        device = device_of(room)
        x = (seeded(2, 8, 12, 6) + 1000.0).float().to(device)
        weights = torch.zeros(2, 8, 1, 1, device=device), torch.zeros(8, 2, 1, 1, device=device)
        with fastreid_vi.backend(room):
            y = ops.modality_alleviation(x, *weights).double().cpu()
        exact = x.double().cpu()
        centred = exact - exact.mean((2, 3), keepdim=True)
        norm = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
        # The gate is one half; half of x itself carries one rounding of a number near 500.
        assert (y - (exact + norm) / 2).abs().max() < 1e-4

    def test_open_gate_is_the_identity_and_closed_gate_has_zero_mean(self, room: str) -> None:
        device = device_of(room)
        x = seeded(2, 4, 5, 3, low=0.5).float().to(device)
        reduce_weight = torch.ones(1, 4, 1, 1, device=device)
        for sign in (1.0, -1.0):
            expand = torch.full((4, 1, 1, 1), 100.0 * sign, device=device)
            with fastreid_vi.backend(room):
                y = ops.modality_alleviation(x, reduce_weight, expand)
            if sign > 0:
                torch.testing.assert_close(y, x)
            else:
                assert y.mean((2, 3)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"reduce_weight": torch.ones(2, 7, 1, 1)},
            ValueError,
            r"reduce_weight: expected shape \[2, 8",
        ),
        (
            {"expand_weight": torch.ones(8, 3, 1, 1)},
            ValueError,
            r"expand_weight: expected shape \[8, 2",
        ),
        (
            {"reduce_weight": torch.ones(0, 8, 1, 1)},
            ValueError,
            "reduce_weight: expected at least one row",
        ),
        ({"features": torch.ones(2, 8)}, ValueError, r"features: expected shape \[B, C, H, W\]"),
        ({"eps": 0.0}, ValueError, "eps: expected > 0"),
        (
            {"expand_weight": torch.ones(8, 2, 1, 1).half()},
            TypeError,
            "expand_weight: expected dtype",
        ),
    ],
)
def test_alleviation_bad_input(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = {
        "features": torch.ones(2, 8, 4, 4),
        "reduce_weight": torch.ones(2, 8, 1, 1),
        "expand_weight": torch.ones(8, 2, 1, 1),
    }
    with pytest.raises(error, match=message):
        ops.modality_alleviation(**{**good, **change})
