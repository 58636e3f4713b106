"""What the tests of correspondences share: maps, pairings, golden vectors, comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.conftest import golden


def seeded(*shape: int) -> Tensor:
    """Normal values in float64."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def person(*shape: int) -> Tensor:
    """A map as a network gives it: half zeros, some positions stronger than others."""
    generator = torch.Generator().manual_seed(sum(shape))
    strength = torch.rand(shape[0], 1, *shape[2:], generator=generator, dtype=torch.float64)
    return seeded(*shape).relu() * (0.25 + 2 * strength)


def plain_mask(features: Tensor) -> Tensor:
    """A mask of eighths, exact in every dtype, zero and one among them; the same for any values."""
    batch, _, height, width = features.shape
    eighths = torch.arange(batch * height * width, device=features.device) * 5 % 9
    return (eighths.to(features.dtype) / 8).reshape(batch, 1, height, width)


def tensor(array: np.ndarray, device: str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    return torch.from_numpy(np.array(array)).to(device, dtype)


def error(got: Tensor, want: np.ndarray | Tensor) -> float:
    """Largest error over the largest entry."""
    wanted = torch.as_tensor(want).double()
    return ((got.detach().cpu().double() - wanted).abs().max() / wanted.abs().max()).item()


def frobenius(got: Tensor, want: Tensor) -> float:
    return ((got.detach().cpu().double() - want).norm() / want.norm()).item()


def aligned_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """The golden cases of alignment with dense triplet: ReLU-ed, K = 4, signed."""
    yield "a", {**golden("lba/cmalign_loss_a_fwd"), **golden("lba/cmalign_loss_a_grad")}
    yield "b", golden("lba/cmalign_loss_b")
    yield "c", golden("lba/cmalign_loss_c_signed")


WEIGHTINGS = (("sample", "paper"), ("batch", "official"))


def at_zeros(features: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient at positions with a norm, and how much of it lies at those without (L11)."""
    dead = torch.linalg.vector_norm(features.detach(), dim=1, keepdim=True) == 0
    rest = gradient.masked_fill(~dead, 0.0).abs().sum()
    return gradient.masked_fill(dead, 0.0), rest
