"""Launch of the pooling kernels, as csrc/cuda/pool.cu does it."""

from __future__ import annotations

import ctypes
from itertools import product
from typing import Final

from torch import Tensor

from fastreid_vi.nvrtc import compiler
from fastreid_vi.nvrtc.kernel import Kernel, floating
from fastreid_vi.nvrtc.layout import (
    FLAGS,
    FLOATING,
    VECTOR_BYTES,
    WARP,
    FeatureMap,
    accumulator,
    blocks,
    c_type,
    check_rank,
    empty_like_map,
    feature_map,
)

_THREADS: Final = compiler.constants("pool.cuh")["kPoolThreads"]
_INSTANCES: Final = tuple(product(FLOATING, FLAGS))
_CHANNELS_LAST = Kernel("pool.cuh", "gem_pool_channels_last_kernel", _INSTANCES)
_POSITIONS = Kernel("pool.cuh", "gem_pool_positions_kernel", _INSTANCES)
_BACKWARD_CHANNELS_LAST = Kernel("pool.cuh", "gem_pool_backward_channels_last_kernel", _INSTANCES)
_BACKWARD_POSITIONS = Kernel("pool.cuh", "gem_pool_backward_positions_kernel", _INSTANCES)


class _Shape(ctypes.Structure):
    _fields_ = (("channels", ctypes.c_int), ("positions", ctypes.c_int))


class _Strides(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("position", ctypes.c_int64),
    )


def gem_pool(features: Tensor, p: float, eps: float) -> tuple[Tensor, Tensor]:
    """Pooled features and the moments that backward needs."""
    check_rank("gem_pool", "features", features, 4)
    rows = feature_map(features)
    pooled = features.new_empty(rows.batches, rows.channels)
    kind = accumulator(features.dtype)
    moment = features.new_empty(rows.batches, rows.channels, dtype=kind)
    if pooled.numel() == 0:
        return pooled, moment
    columns = _vectors_along_channels(rows)
    (_CHANNELS_LAST if columns else _POSITIONS).launch(
        (c_type(features), p == 3.0),
        _grid(rows, columns),
        _THREADS,
        0,
        rows.tensor,
        pooled,
        moment,
        _shape(rows),
        _strides(rows),
        floating(kind, p),
        floating(kind, eps),
    )
    return pooled, moment


def gem_pool_backward(grad: Tensor, features: Tensor, moment: Tensor, p: float) -> Tensor:
    """Gradient of the features."""
    op = "gem_pool_backward"
    check_rank(op, "features", features, 4)
    if grad.dtype != features.dtype or moment.dtype != accumulator(features.dtype):
        raise RuntimeError(
            f"{op}: expected grad like features and moment in their accumulation dtype"
        )
    shape = features.shape[:2]
    if not (grad.is_contiguous() and moment.is_contiguous()) or {grad.shape, moment.shape} != {
        shape
    }:
        raise RuntimeError(f"{op}: expected contiguous grad and moment of shape [B, C]")
    rows = feature_map(features)
    dx = empty_like_map(features)
    if dx.numel() == 0:
        return dx
    to = feature_map(dx)
    columns = _vectors_along_channels(rows) and _vectors_along_channels(to)
    (_BACKWARD_CHANNELS_LAST if columns else _BACKWARD_POSITIONS).launch(
        (c_type(features), p == 3.0),
        _grid(rows, columns),
        _THREADS,
        0,
        grad,
        rows.tensor,
        moment,
        dx,
        _shape(rows),
        _strides(rows),
        _strides(to),
        floating(moment.dtype, p),
    )
    return dx


def _shape(rows: FeatureMap) -> _Shape:
    if max(rows.channels, rows.positions) >= 2**30:  # indices may overshoot by a block
        raise RuntimeError("gem_pool: expected fewer than 2^30 channels and positions")
    return _Shape(rows.channels, rows.positions)


def _strides(rows: FeatureMap) -> _Strides:
    return _Strides(rows.batch, rows.channel, rows.position)


def _vectors_along_channels(rows: FeatureMap) -> bool:
    """Whether 16-byte vectors can run along the channels at every position."""
    size = VECTOR_BYTES // rows.tensor.element_size()
    return (
        rows.channel == 1
        and rows.channels % size == 0
        and rows.position % size == 0
        and (rows.batches == 1 or rows.batch % size == 0)
        and rows.tensor.data_ptr() % VECTOR_BYTES == 0
    )


def _grid(rows: FeatureMap, columns: bool) -> int:
    size = VECTOR_BYTES // rows.tensor.element_size()
    channels_per_block = WARP * size if columns else _THREADS // WARP
    return blocks(rows.batches * -(-rows.channels // channels_per_block))
