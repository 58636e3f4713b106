"""The closed-form values that AlignGAN's golden networks are filled with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn


def filled(shape: Iterable[int], s: int, scale: float) -> Tensor:
    """H(shape, s, scale) of the golden README: float32 values, held in float64."""
    sizes = tuple(shape)
    k = np.arange(int(np.prod(sizes)), dtype=np.int64)
    values = scale * (((31 * k * k + 7919 * k + 104729 * s) % 10007) / 10007 - 0.5)
    return torch.from_numpy(values.astype(np.float32).reshape(sizes)).double()


def fill_embedder(network: nn.Module, s: int) -> None:
    """Fill an embedder, parameter q with H(., s + q, .)."""
    for q, (name, p) in enumerate(network.named_parameters()):
        if p.dim() > 1:
            value = filled(p.shape, s + q, float(4 / np.sqrt(p.shape[1])))
        elif name.endswith("bottle.1.weight"):
            value = 1 + filled(p.shape, s + q, 0.5)
        else:
            value = filled(p.shape, s + q, 0.2)
        p.data.copy_(value)
