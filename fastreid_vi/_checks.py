"""Argument checks and their messages: which argument, what was expected, what came.

Plain `if ... raise` on static facts (rank, dtype, device, sizes), so that
`torch.compile(fullgraph=True)` passes through; never a closure over tensors.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def described(tensor: Tensor) -> str:
    """Dtype and shape, for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def floating(name: str, tensor: Tensor, shape: str) -> None:
    """A floating tensor whose rank is that of `shape`, for example "B, C, H, W"."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor [{shape}], got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating tensor [{shape}], got {described(tensor)}")
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: expected shape [{shape}], got {described(tensor)}")


def feature_map(name: str, tensor: Tensor) -> None:
    """A feature map [B, C, H, W] with at least one channel and one position."""
    floating(name, tensor, "B, C, H, W")
    if tensor.shape[1] == 0 or tensor.shape[2] == 0 or tensor.shape[3] == 0:
        raise ValueError(
            f"{name}: expected at least one channel and position, got {described(tensor)}"
        )


def shaped_like(name: str, tensor: Tensor, shape: tuple[int, ...], features: Tensor) -> None:
    """A floating tensor of exactly this shape, on the device and of the dtype of `features`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {list(shape)}, got {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {described(tensor)}")
    same_kind(name, tensor, features)


def same_kind(name: str, tensor: Tensor, features: Tensor) -> None:
    """Same dtype and device as `features`."""
    if tensor.dtype != features.dtype:
        raise TypeError(
            f"{name}: expected dtype {features.dtype} like argument one, got {described(tensor)}"
        )
    if tensor.device != features.device:
        raise ValueError(f"{name}: expected device {features.device}, got {tensor.device}")


def parameter(name: str, tensor: Tensor, shape: tuple[int, ...], features: Tensor) -> None:
    """A parameter of exactly this shape: dtype of `features` or, beside half precision, float32."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {list(shape)}, got {type(tensor).__name__}")
    wide = tensor.dtype == torch.float32 and features.dtype in (torch.bfloat16, torch.float16)
    if wide and tuple(tensor.shape) == shape and tensor.device == features.device:
        return
    shaped_like(name, tensor, shape, features)


def buffer(name: str, tensor: Tensor, channels: int, features: Tensor) -> None:
    """Running statistics [C] of any floating dtype, on the device of `features`."""
    floating(name, tensor, "C")
    if tuple(tensor.shape) != (channels,):
        raise ValueError(f"{name}: expected shape [{channels}], got {described(tensor)}")
    if tensor.device != features.device:
        raise ValueError(f"{name}: expected device {features.device}, got {tensor.device}")


def labels_of(name: str, labels: Tensor, rows: int, device: torch.device) -> None:
    """An int64 vector with one entry per row."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected int64 of shape [{rows}], got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 of shape [{rows}], got {described(labels)}")
    if labels.dim() != 1 or labels.shape[0] != rows:
        raise ValueError(f"{name}: expected int64 of shape [{rows}], got {described(labels)}")
    if labels.device != device:
        raise ValueError(f"{name}: expected device {device}, got {labels.device}")


def within(name: str, index: Tensor, count: int) -> None:
    """Entries of an index in [0, count); looks at the values."""
    bad = (index < 0) | (index >= count)
    if bool(bad.any()):
        at = int(bad.to(torch.uint8).argmax())
        raise ValueError(
            f"{name}: expected entries in [0, {count}), got {int(index[at])} at position {at}"
        )


class NonFiniteError(ValueError):
    """An argument holds NaN or infinity where no answer is possible."""


def values_wanted(device: str) -> bool:
    """Whether values are checked: a look at CUDA tensors would stop their stream."""
    return device == "cpu" or os.environ.get("FASTREID_VI_CHECK_VALUES") == "1"


def explain_nan(result: Tensor, name: str, rows: Tensor) -> None:
    """Raise if the scalar `result` is NaN and a row of `rows` [N, D] is the reason."""
    if not bool(torch.isnan(result)):
        return
    bad = ~rows.isfinite().all(dim=1)
    if bool(bad.any()):
        row = int(bad.to(torch.uint8).argmax())
        value = rows[row][~rows[row].isfinite()][0].item()
        raise NonFiniteError(f"{name}: expected finite numbers, got {value} in row {row}")


def embeddings(name: str, tensor: Tensor) -> None:
    """Embeddings [N, D], floating, D >= 1."""
    floating(name, tensor, "N, D")
    if tensor.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [N, D] with D >= 1, got {described(tensor)}")


def choice(name: str, value: str, allowed: object) -> None:
    """One of the values of a `Literal`."""
    values = get_args(allowed)
    if value not in values:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, values))}, got {value!r}")


def at_least(name: str, value: float, low: float) -> None:
    """A number not below `low` (NaN is refused)."""
    if not value >= low:
        raise ValueError(f"{name}: expected >= {low:g}, got {value}")


def above(name: str, value: float, low: float) -> None:
    """A number greater than `low` (NaN is refused)."""
    if not value > low:
        raise ValueError(f"{name}: expected > {low:g}, got {value}")


def number(name: str, value: float) -> None:
    """Any number but NaN."""
    if value != value:
        raise ValueError(f"{name}: expected a number, got nan")


Metric = Literal["euclidean", "sqeuclidean", "cosine"]
