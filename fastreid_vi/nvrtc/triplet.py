"""Launch of the batch-hard triplet kernels, as csrc/cuda/triplet.cu does it."""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from fastreid_vi.nvrtc import compiler
from fastreid_vi.nvrtc.kernel import Kernel, floating
from fastreid_vi.nvrtc.layout import (
    FLOATING,
    VECTOR_BYTES,
    accumulator,
    blocks,
    c_type,
    indices_of,
    values_of,
)
from fastreid_vi.nvrtc.pairs import PairPlan, Rows, launch_pairs, rows_of

_OP: Final = "batch_hard_triplet_loss"
_METRICS: Final = {"euclidean": 0, "sqeuclidean": 1, "cosine": 2}
_MINING_THREADS: Final = compiler.constants("mining.cuh")["kMiningThreads"]
_GRADIENT_THREADS: Final = compiler.constants("triplet.cuh")["kGradientThreads"]
_INSTANCES: Final = tuple((t,) for t in FLOATING)
_ROWS = Kernel("triplet.cuh", "batch_hard_rows_kernel", _INSTANCES)
_COEFFICIENTS = Kernel("triplet.cuh", "batch_hard_coefficients_kernel", _INSTANCES)
_GATHER = Kernel("triplet.cuh", "batch_hard_gather_kernel", _INSTANCES)


def batch_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    margin: float,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, correct anchors, the mined pairs and the weight of each anchor."""
    if (references is None) != (reference_labels is None):
        raise RuntimeError(f"{_OP}: expected references and reference_labels, or neither")
    _metric(metric)
    x = rows_of(embeddings, _OP)
    r = _references(references, x)
    n, kind = x.shape.rows, accumulator(embeddings.dtype)
    own = indices_of(_OP, labels, n)
    other = own
    if reference_labels is not None:
        other = indices_of(_OP, reference_labels, r.shape.rows)
    make = torch.zeros if n == 0 or r.shape.rows == 0 else torch.empty
    device, index = embeddings.device, torch.int64
    loss, correct = make((), dtype=kind, device=device), make((), dtype=index, device=device)
    positive, negative = (make(n, dtype=index, device=device) for _ in range(2))
    weight = make(n, dtype=kind, device=device)
    if make is torch.zeros:
        return loss, correct, positive, negative, weight

    cosine, wide = metric == "cosine", x.fits_vectors and r.fits_vectors
    plan = PairPlan(x.shape, r.shape, references is None)
    partial = weight.new_empty(plan.scratch)
    norms = weight.new_empty(plan.norms if cosine else 0)
    terms = weight.new_empty(n)
    counters = weight.new_empty(2, dtype=torch.int32)
    for panel in plan.panels():
        launch_pairs(plan, panel, x, r, wide, partial, norms, dot=cosine, counters=counters)
        _ROWS.launch(
            (c_type(embeddings),),
            blocks(panel.rows),
            _MINING_THREADS,
            0,
            partial,
            norms,
            x.tensor,
            r.tensor,
            own,
            other,
            terms,
            counters,
            loss,
            correct,
            positive,
            negative,
            weight,
            x.shape,
            r.shape,
            panel,
            floating(kind, margin),
            _metric(metric),
            ctypes.c_bool(references is None),
            ctypes.c_bool(wide),
        )
    return loss, correct, positive, negative, weight


def batch_hard_triplet_loss_backward(
    grad: Tensor,
    embeddings: Tensor,
    references: Tensor | None,
    positive: Tensor,
    negative: Tensor,
    weight: Tensor,
    metric: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the embeddings and of the references."""
    _metric(metric)
    x = rows_of(embeddings, _OP)
    r = _references(references, x)
    n, m, columns = x.shape.rows, r.shape.rows, x.shape.columns
    near, far = (indices_of(_OP, t, n) for t in (positive, negative))
    scale, slope = values_of(_OP, weight, embeddings, n), values_of(_OP, grad, embeddings, 1)
    empty = n == 0 or m == 0
    make = embeddings.new_zeros if empty else embeddings.new_empty
    dx = make((n, columns))
    dr = embeddings.new_empty(0) if references is None else make((m, columns))
    if not empty:
        _gradients(slope, x, r, near, far, scale, metric, dx, dr)
    return dx, dr


def _metric(name: str) -> ctypes.c_int:
    if name not in _METRICS:
        raise RuntimeError(f"{_OP}: expected a known metric, got {name}")
    return ctypes.c_int(_METRICS[name])


def _references(references: Tensor | None, x: Rows) -> Rows:
    """The references' rows, the embeddings' own where there are none."""
    if references is None:
        return x
    r = rows_of(references, _OP)
    if r.shape.columns != x.shape.columns or r.tensor.dtype != x.tensor.dtype:
        raise RuntimeError(
            f"{_OP}: expected references with the columns and dtype of the embeddings"
        )
    return r


def _gradients(
    grad: Tensor,
    x: Rows,
    r: Rows,
    positive: Tensor,
    negative: Tensor,
    weight: Tensor,
    metric: str,
    dx: Tensor,
    dr: Tensor,
) -> None:
    """A block for each mined pair, then one for each row and part of its columns."""
    n, own = x.shape.rows, r is x
    wide = ctypes.c_bool(x.fits_vectors and r.fits_vectors)
    chunk = _GRADIENT_THREADS * VECTOR_BYTES // x.tensor.element_size()
    instance = (c_type(x.tensor),)
    sides = weight.new_empty(2 * n * 3)
    _COEFFICIENTS.launch(
        instance,
        blocks(2 * n),
        _GRADIENT_THREADS,
        0,
        grad,
        x.tensor,
        r.tensor,
        positive,
        negative,
        weight,
        sides,
        x.shape,
        r.shape,
        _metric(metric),
        ctypes.c_bool(own),
        wide,
    )
    _GATHER.launch(
        instance,
        (blocks(n + (0 if own else r.shape.rows)), -(-x.shape.columns // chunk)),
        _GRADIENT_THREADS,
        0,
        x.tensor,
        r.tensor,
        positive,
        negative,
        sides,
        dx,
        dr,
        x.shape,
        r.shape,
        ctypes.c_bool(own),
        wide,
    )
