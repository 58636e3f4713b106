"""Feature maps and types of device code, as csrc/common.h and csrc/cuda/stream.h have them."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

# Device type of each element type that kernels take.
C_TYPES: Final = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
}
FLOATING: Final = tuple(C_TYPES.values())
ACCUMULATORS: Final = ("float", "double")
FLAGS: Final = ("true", "false")
VECTOR_BYTES: Final = 16
WARP: Final = 32


def c_type(tensor: Tensor) -> str:
    """The device type of a floating tensor's elements."""
    if tensor.dtype not in C_TYPES:
        raise RuntimeError(f"expected a floating dtype, got {tensor.dtype}")
    return C_TYPES[tensor.dtype]


def check_rank(op: str, name: str, tensor: Tensor, rank: int) -> None:
    """Refuse a tensor of another rank."""
    if tensor.dim() != rank:
        raise RuntimeError(f"{op}: expected {name} of rank {rank}, got {tensor.dim()}")


def indices_of(op: str, tensor: Tensor, count: int) -> Tensor:
    """Contiguous int64 labels or row numbers, `count` of them."""
    if tensor.dtype != torch.int64 or tensor.shape != (count,):
        raise RuntimeError(f"{op}: expected int64 labels or indices, one for each of {count} rows")
    return tensor.contiguous()


def vector_of(name: str, tensor: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """A contiguous vector of one dtype and length."""
    if tensor.dtype != dtype or tensor.shape != (length,):
        kind = str(dtype).removeprefix("torch.")
        raise RuntimeError(f"{name}: expected {kind} of shape [{length}]")
    return tensor.contiguous()


def sort_padded(n: int) -> int:
    """The power of two that a bitonic sort of n entries needs, as in ordered.cuh."""
    return max(2, 1 << (n - 1).bit_length())


def values_of(op: str, tensor: Tensor, like: Tensor, count: int) -> Tensor:
    """`count` contiguous values in the accumulation dtype of `like`."""
    if tensor.dtype != accumulator(like.dtype) or tensor.numel() != count:
        raise RuntimeError(
            f"{op}: expected {count} values in the accumulation dtype of the embeddings"
        )
    return tensor.contiguous()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32 for everything narrower, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def blocks(count: int) -> int:
    """A grid's first axis; the others end at 65535."""
    if count >= 2**31:
        raise RuntimeError(f"a launch of {count} blocks is beyond CUDA's limit")
    return count


class FeatureMap(NamedTuple):
    """A map [B, C, H, W] whose positions collapse to S = H W.

    Element (b, c, s) lies at b * batch + c * channel + s * position.
    """

    tensor: Tensor  # a dense copy where the strides did not collapse
    batches: int
    channels: int
    positions: int
    batch: int
    channel: int
    position: int


def feature_map(x: Tensor) -> FeatureMap:
    """See a map as rows; copies it where its strides do not allow that."""
    batches, channels, h, w = x.shape
    position = x.stride(2) if w == 1 else x.stride(3)
    collapse = h == 1 or w == 1 or x.stride(2) == w * x.stride(3)
    unit = position == 1 or x.stride(1) == 1 or channels == 1 or h * w == 1
    rows = x if collapse and unit else x.contiguous()
    channel = rows.stride(1)
    position = position if collapse and unit else 1
    # Strides of axes of length one are arbitrary; make one of the two read as unit.
    if h * w == 1:
        position = channels if channel == 1 else 1
    if channels == 1:
        channel = h * w if position == 1 else 1
    return FeatureMap(rows, batches, channels, h * w, rows.stride(0), channel, position)


def empty_like_map(x: Tensor) -> Tensor:
    """An empty map, channels_last where `x` is that and not contiguous too."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)
