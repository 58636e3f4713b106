"""What the op families share: the accumulation dtype and autocast of mixed arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast maps and weights to the autocast dtype, as convolutions do; float64 is left alone."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    if tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)


def layout_of(features: Tensor) -> torch.memory_format:
    """Memory format that the result of a map-to-map op takes: that of its input."""
    if features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
