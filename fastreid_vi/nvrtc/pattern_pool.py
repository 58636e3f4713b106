"""Launch of the pattern kernels, as csrc/cuda/pattern_pool.cu does it without clusters."""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from fastreid_vi.nvrtc import compiler
from fastreid_vi.nvrtc.kernel import Kernel, floating
from fastreid_vi.nvrtc.layout import (
    C_TYPES,
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

_SIZES: Final = compiler.constants("pattern_pool.cuh")
_THREADS: Final = _SIZES["kPatternThreads"]
_GROUP: Final = _SIZES["kMapGroup"]
_PROGRAM_BLOCKS: Final = 512  # that share the weight gradient: little is left to add
_INSTANCES: Final = tuple((t,) for t in FLOATING)
_WIDE: Final = {t: C_TYPES[accumulator(dtype)] for dtype, t in C_TYPES.items()}
_SCORES = Kernel("pattern_pool.cuh", "pattern_scores_kernel", _INSTANCES)
_SOFTMAX = Kernel("pattern_pool.cuh", "pattern_softmax_kernel", _INSTANCES)
_SUMS = Kernel(
    "pattern_pool.cuh",
    "pattern_sums_kernel",
    sorted({(t, out) for t in FLOATING for out in (t, _WIDE[t])}),
)
_LOGIT = Kernel("pattern_gradient.cuh", "pattern_logit_gradient_kernel", _INSTANCES)
_SOFTMAX_GRADIENT = Kernel("pattern_gradient.cuh", "pattern_softmax_gradient_kernel", _INSTANCES)
_WEIGHT = Kernel("pattern_gradient.cuh", "pattern_weight_gradient_kernel", _INSTANCES)
_FEATURES = Kernel(
    "pattern_gradient.cuh",
    "pattern_features_gradient_kernel",
    tuple((t, last) for t in FLOATING for last in FLAGS),
)


class _Shape(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("channels", ctypes.c_int),
        ("positions", ctypes.c_int),
        ("maps", ctypes.c_int),
    )


class _Problem:
    """A call's sizes."""

    def __init__(self, op: str, features: Tensor, weight: Tensor, activation: str) -> None:
        check_rank(op, "features", features, 4)
        limit, channels = (2**31 - 1) // 16, features.shape[1]
        positions = features.shape[2] * features.shape[3]
        if not (0 < channels <= limit and 0 < positions <= limit):
            raise RuntimeError(f"{op}: expected 1 to {limit} channels and positions")
        self.maps = weight.shape[0] if weight.dim() > 0 else 0
        if (
            weight.dtype != features.dtype
            or not 0 < self.maps <= 65535 * _GROUP
            or weight.numel() != self.maps * channels
        ):
            raise RuntimeError(
                f"{op}: expected a weight [P, C, 1, 1], P >= 1, in the dtype of the features"
            )
        if activation not in ("sigmoid", "softmax"):
            raise RuntimeError(f"{op}: expected activation sigmoid or softmax, got {activation}")
        self.x = _channel_rows(features)
        self.shape = _Shape(
            self.x.batch, self.x.position, self.x.channels, self.x.positions, self.maps
        )
        self.sigmoid = activation == "sigmoid"
        self.samples = self.x.batches
        self.groups = -(-self.maps // _GROUP)
        self.tiles = -(-self.x.positions // _SIZES["kScoreTile"])
        self.columns = WARP * VECTOR_BYTES // features.element_size()  # of a block
        self.chunks = -(-self.x.channels // self.columns)

    def grid(self, count: int) -> tuple[int, int]:
        return blocks(count), self.groups

    def grouped(self, like: Tensor) -> Tensor:
        kind = accumulator(like.dtype)
        return like.new_empty(self.samples, self.groups, self.x.positions, _GROUP, dtype=kind)

    def fits_vectors(self, *others: Tensor) -> ctypes.c_bool:
        """Whether 16-byte vectors can run along the channels of all these."""
        x, size = self.x, VECTOR_BYTES // self.x.tensor.element_size()
        return ctypes.c_bool(
            x.channels % size == 0
            and (x.positions == 1 or x.position % size == 0)
            and (x.batches == 1 or x.batch % size == 0)
            and all(t.data_ptr() % VECTOR_BYTES == 0 for t in (x.tensor, *others))
        )

    def launch_sums(self, scores: Tensor, out: Tensor, each: int, divisor: float) -> None:
        """Sums of scores x over all positions of every `each` samples."""
        _SUMS.launch(
            (c_type(self.x.tensor), c_type(out)),
            self.grid(-(-self.samples // each) * self.chunks),
            _THREADS,
            0,
            self.x.tensor,
            scores,
            out,
            self.shape,
            ctypes.c_int(self.samples),
            ctypes.c_int(each),
            floating(scores.dtype, divisor),
            self.fits_vectors(),
        )


def pattern_pool(
    features: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Pooled features [B, P, C] and pattern maps [B, P, H, W]."""
    problem = _Problem("pattern_pool", features, weight, activation)
    samples, count, instance = problem.samples, problem.maps, (c_type(features),)
    pooled = features.new_empty(samples, count, problem.x.channels)
    maps = features.new_empty(samples, count, *features.shape[2:])
    weight = weight.contiguous()
    if bias is not None:
        bias = _dense("pattern_pool", "a bias", bias, features.dtype, count)
    if samples == 0:
        return pooled, maps
    scores = problem.grouped(maps)
    _SCORES.launch(
        instance,
        problem.grid(samples * problem.tiles),
        _THREADS,
        0,
        problem.x.tensor,
        weight,
        bias,
        scores,
        maps,
        problem.shape,
        ctypes.c_bool(problem.sigmoid),
        problem.fits_vectors(weight),
    )
    if not problem.sigmoid:
        _SOFTMAX.launch(
            instance, problem.grid(samples), _THREADS, 0, scores, maps, problem.shape
        )  # fmt: skip
    problem.launch_sums(scores, pooled, 1, problem.x.positions if problem.sigmoid else 1)
    return pooled, maps


def pattern_pool_backward(
    grad_pooled: Tensor,
    grad_maps: Tensor,
    features: Tensor,
    weight: Tensor,
    maps: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the features, in their memory format, of the weight and of the bias."""
    op, dtype = "pattern_pool_backward", features.dtype
    problem = _Problem(op, features, weight, activation)
    pooled_size = problem.samples * problem.maps * problem.x.channels
    size = problem.samples * problem.maps * problem.x.positions
    grad_pooled = _dense(op, "grad_pooled", grad_pooled, dtype, pooled_size)
    grad_maps = _dense(op, "grad_maps", grad_maps, dtype, size)
    weight, maps = weight.contiguous(), _dense(op, "maps", maps, dtype, size)
    dx = empty_like_map(features)
    dw, db = torch.empty_like(weight), weight.new_empty(problem.maps)
    rows, instance = problem.samples * problem.tiles, (c_type(features),)
    each = max(1, -(-problem.samples * problem.chunks * problem.groups // _PROGRAM_BLOCKS))
    units = -(-problem.samples // each)
    dz = problem.grouped(maps)
    weight_parts = dz.new_empty(units, weight.numel())
    bias_parts = dz.new_empty(rows, problem.groups * _GROUP, dtype=torch.float64)
    if problem.samples > 0:
        _LOGIT.launch(
            instance,
            problem.grid(rows),
            _THREADS,
            0,
            problem.x.tensor,
            grad_pooled,
            grad_maps,
            maps,
            dz,
            bias_parts,
            problem.shape,
            ctypes.c_bool(problem.sigmoid),
            problem.fits_vectors(grad_pooled),
        )
        if not problem.sigmoid:
            _SOFTMAX_GRADIENT.launch(
                instance, problem.grid(problem.samples), _THREADS, 0, maps, dz, problem.shape
            )
        problem.launch_sums(dz, weight_parts, each, 1)
        _features_gradient(problem, grad_pooled, weight, maps, dz, dx)
    _WEIGHT.launch(
        instance,
        blocks(-(-weight.numel() // _THREADS) + 1),
        _THREADS,
        0,
        weight_parts,
        bias_parts,
        dw,
        db,
        ctypes.c_int64(weight.numel()),
        ctypes.c_int(problem.maps),
        ctypes.c_int(units),
        ctypes.c_int(rows if problem.sigmoid else 0),
    )
    return dx, dw, db


def _features_gradient(
    problem: _Problem, grad_pooled: Tensor, weight: Tensor, maps: Tensor, dz: Tensor, dx: Tensor
) -> None:
    to = feature_map(dx)
    last = to.channel == 1 and to.position != 1
    rows, columns = to.positions, to.channels
    if not last:
        rows, columns = columns, rows
    tiles = -(-rows // _SIZES["kRowTile"]) * -(-columns // problem.columns)
    _FEATURES.launch(
        (c_type(dx), last),
        blocks(problem.samples * tiles),
        _THREADS,
        0,
        grad_pooled,
        weight,
        maps,
        dz,
        dx,
        problem.shape,
        floating(dz.dtype, to.positions if problem.sigmoid else 1),
        ctypes.c_bool(columns % (VECTOR_BYTES // dx.element_size()) == 0),
    )


def _channel_rows(x: Tensor) -> FeatureMap:
    """The features with unit stride along channels; others are copied, once."""
    channels, h, w = x.shape[1:]
    collapse = h == 1 or w == 1 or x.stride(2) == w * x.stride(3)
    if not (collapse and (channels == 1 or x.stride(1) == 1)):
        layout = torch.channels_last
        x = torch.empty_like(x, memory_format=layout).copy_(x)
    return feature_map(x)._replace(channel=1)


def _dense(op: str, name: str, x: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """A contiguous tensor of `count` elements in the features' dtype."""
    if x.dtype != dtype or x.numel() != count:
        raise RuntimeError(
            f"{op}: expected {name} of {count} elements in the dtype of the features"
        )
    return x.contiguous()
