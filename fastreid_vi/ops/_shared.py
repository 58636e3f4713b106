"""What the op families share: accumulation dtype, autocast, statistics of feature maps."""

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


def update_running(running: Tensor | None, batch: Tensor, momentum: float) -> None:
    """Move a running statistic in place; outside the op, so that this stays functional."""
    if running is not None:
        with torch.no_grad():
            running.lerp_(batch.to(running.dtype), momentum)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, C] each: mean (in float64) and biased variance over positions of [B, C, H, W].

    Shifted by the first position and summed twice, so that a large mean costs no precision.
    """
    shift = x[:, :, :1, :1]
    rest = (x - shift).mean(dim=(2, 3), keepdim=True)
    variance = (x - (shift + rest)).square().mean(dim=(2, 3))
    return (shift.double() + rest.double())[:, :, 0, 0], variance
