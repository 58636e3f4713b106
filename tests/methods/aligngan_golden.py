"""How the AlignGAN tests read the golden files and compare with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn


def tensor(array: Any, kind: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float64)).to(kind)


def close(actual: Tensor | None, expected: Any, tolerance: float) -> None:
    """Largest error against the largest value."""
    assert actual is not None
    want = tensor(expected)
    got = actual.detach().double()
    assert got.shape == want.shape
    scale = max(float(want.abs().max()), 1e-12)
    assert float((got - want).abs().max()) <= tolerance * scale


def case(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    prefix = f"{name}__"
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def check_gradients(network: nn.Module, v: dict[str, np.ndarray], tolerance: float) -> int:
    """Gradients in full, by norm, by first elements; how many were there."""
    counted = 0
    for field, expected in v.items():
        kind, _, name = field.partition("__")
        if kind not in ("g", "gnorm", "gfirst16"):
            continue
        gradient = network.get_parameter(name).grad
        assert gradient is not None, name
        if kind == "gnorm":
            norm = float(gradient.double().norm())
            assert norm == pytest.approx(float(expected), rel=tolerance), name
        elif kind == "gfirst16":
            first = tensor(expected) - gradient.double().flatten()[:16]
            assert float(first.abs().max()) <= tolerance * float(gradient.abs().max()), name
        else:
            close(gradient, expected, tolerance)
        counted += 1
    return counted
