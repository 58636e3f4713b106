"""Launch of the retrieval loss's kernels, as csrc/cuda/cmr.cu does it."""

from __future__ import annotations

import ctypes
from itertools import product
from typing import Final

import torch
from torch import Tensor

from fastreid_vi.nvrtc import compiler, runtime
from fastreid_vi.nvrtc.kernel import Kernel
from fastreid_vi.nvrtc.layout import (
    FLAGS,
    FLOATING,
    VECTOR_BYTES,
    accumulator,
    blocks,
    c_type,
    check_rank,
)

_SIZES: Final = (
    compiler.constants("softrank.cuh")
    | compiler.constants("cmr.cuh")
    | compiler.constants("cmr_rows.cuh")
)
_THREADS: Final = _SIZES["kCmrThreads"]
_INSTANCES: Final = tuple((t,) for t in FLOATING)
_BATCH = Kernel("cmr.cuh", "cmr_batch_kernel", _INSTANCES)
_COLUMNS = Kernel("cmr.cuh", "cmr_columns_kernel", tuple(product(FLOATING, FLAGS)))
_LOSS = Kernel("cmr_rows.cuh", "cmr_loss_kernel", _INSTANCES)
_SLOPES = Kernel("cmr_rows.cuh", "cmr_slopes_kernel", _INSTANCES)
_GRADIENT = Kernel("cmr_rows.cuh", "cmr_gradient_kernel", _INSTANCES)


class _Batch:
    """The batch as the kernels take it, and their buffers."""

    def __init__(
        self, op: str, embeddings: Tensor, labels: Tensor, modalities: Tensor, strength: float
    ) -> None:
        check_rank(op, "embeddings", embeddings, 2)
        self.rows, self.columns = embeddings.shape
        for numbers in (labels, modalities):
            if numbers.dtype != torch.int64 or numbers.shape != (self.rows,):
                raise RuntimeError(
                    f"{op}: expected int64 labels and modalities of shape [{self.rows}]"
                )
        self.kind = accumulator(embeddings.dtype)
        if self.rows > _SIZES["kCmrLongest"]:
            most = _SIZES["kCmrLongest"]
            raise RuntimeError(f"{op}: expected at most {most} rows, got {self.rows}")
        self.longest = int(min(max(2 / strength, 1), self.rows))  # gallery of the general path
        self.padded = max(2, 1 << (self.longest - 1).bit_length()) if self.longest else 2
        entry = _SIZES["kSoftRankSlotBytes"] + self.kind.itemsize
        if self.padded * entry + 2048 > runtime.present.shared_memory_limit(embeddings):
            raise RuntimeError(
                f"{op}: galleries of up to {self.longest} rows, at or below 2 / strength, do not "
                "fit the shared memory of this device"
            )
        self.row_bytes = self.padded * entry
        unit = self.columns == 1 or embeddings.stride(1) == 1
        self.x = embeddings if unit else embeddings.contiguous()
        self.labels, self.modalities = labels.contiguous(), modalities.contiguous()
        ints = _SIZES["kCmrPlanInts"] + _SIZES["kCmrItemInts"] * self.rows
        self.tables = self.x.new_empty(ints, dtype=torch.int32)
        self.scales = self.x.new_empty(2 * self.rows, dtype=self.kind)
        vector = VECTOR_BYTES // self.x.element_size()
        self.width = _SIZES["kCmrGroup"] * vector  # columns of a block of cmr_columns_kernel
        self.column_blocks = -(-self.columns // self.width)

    @property
    def instance(self) -> tuple[str]:
        return (c_type(self.x),)

    @property
    def row_blocks(self) -> int:
        return min(self.rows, _SIZES["kCmrRowBlocks"])

    @property
    def shape(self) -> tuple[ctypes.c_int64, ctypes.c_int, ctypes.c_int]:
        """Pitch, rows, columns."""
        return (
            ctypes.c_int64(self.x.stride(0)),
            ctypes.c_int(self.rows),
            ctypes.c_int(self.columns),
        )

    def prepare(self, backward: bool, shares: Tensor | None, sums: Tensor | None) -> None:
        """The tables and norms, then the sums over the batch or the shares of the loss."""
        _BATCH.launch(
            self.instance,
            blocks(self.rows),
            _SIZES["kCmrBatchThreads"],
            0,
            self.x,
            self.labels,
            self.modalities,
            *self.shape,
            self.tables,
            self.scales,
        )
        _COLUMNS.launch(
            (*self.instance, backward),
            blocks(self.column_blocks),
            _THREADS,
            2 * self.rows,
            self.x,
            *self.shape,
            _aligned(self.x, self.x.stride(0)),
            self.tables,
            self.scales,
            shares,
            sums,
            ctypes.c_int64(self.column_blocks * self.width),
        )


def _aligned(x: Tensor, pitch: int) -> ctypes.c_bool:
    """Whether 16-byte vectors can run along every row."""
    vector = VECTOR_BYTES // x.element_size()
    return ctypes.c_bool(pitch % vector == 0 and x.data_ptr() % VECTOR_BYTES == 0)


def cross_modality_retrieval_loss(
    embeddings: Tensor, labels: Tensor, modalities: Tensor, strength: float
) -> Tensor:
    """The loss alone: backward computes all anew."""
    batch = _Batch("cross_modality_retrieval_loss", embeddings, labels, modalities, strength)
    if batch.rows == 0:
        return embeddings.new_zeros((), dtype=batch.kind)
    loss = embeddings.new_empty((), dtype=batch.kind)
    count = batch.column_blocks
    shares = batch.x.new_empty(2 * count + batch.rows, dtype=torch.float64)
    batch.prepare(False, shares, None)
    _LOSS.launch(
        batch.instance,
        batch.row_blocks,
        _THREADS,
        batch.row_bytes,
        batch.x,
        *batch.shape,
        batch.tables,
        batch.scales,
        shares,
        ctypes.c_int(count),
        shares[2 * count :],
        loss,
        ctypes.c_int(batch.padded),
        ctypes.c_double(strength),
    )
    return loss


def cross_modality_retrieval_loss_backward(
    grad: Tensor, embeddings: Tensor, labels: Tensor, modalities: Tensor, strength: float
) -> Tensor:
    """Gradient of the embeddings."""
    op = "cross_modality_retrieval_loss_backward"
    if grad.numel() != 1 or grad.dtype != accumulator(embeddings.dtype):
        raise RuntimeError(f"{op}: expected one grad in the accumulation dtype")
    batch = _Batch(op, embeddings, labels, modalities, strength)
    dx = embeddings.new_empty(batch.rows, batch.columns)
    if dx.numel() == 0:
        return dx
    pitch = batch.column_blocks * batch.width
    sums = grad.new_empty((_SIZES["kCmrCommonSums"] + batch.rows) * pitch)
    slopes = grad.new_empty(batch.rows * batch.longest)
    batch.prepare(True, None, sums)
    _SLOPES.launch(
        batch.instance,
        batch.row_blocks,
        _THREADS,
        batch.row_bytes,
        batch.x,
        *batch.shape,
        batch.tables,
        batch.scales,
        slopes,
        ctypes.c_int(batch.longest),
        ctypes.c_int(batch.padded),
        ctypes.c_double(strength),
    )
    _GRADIENT.launch(
        batch.instance,
        blocks(batch.rows),
        _THREADS,
        0,
        grad,
        batch.x,
        *batch.shape,
        _aligned(batch.x, batch.x.stride(0)),
        _aligned(dx, batch.columns),
        batch.tables,
        batch.scales,
        sums,
        ctypes.c_int64(pitch),
        slopes,
        ctypes.c_int(batch.longest),
        dx,
        ctypes.c_double(strength),
    )
    return dx
