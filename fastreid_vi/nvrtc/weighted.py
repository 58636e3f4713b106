"""Launch of the weighted triplet kernels, as csrc/cuda/weighted.cu does it."""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from fastreid_vi.nvrtc import compiler
from fastreid_vi.nvrtc.kernel import Kernel
from fastreid_vi.nvrtc.layout import (
    ACCUMULATORS,
    C_TYPES,
    FLOATING,
    VECTOR_BYTES,
    accumulator,
    blocks,
    c_type,
    indices_of,
    values_of,
)
from fastreid_vi.nvrtc.pairs import PairPlan, launch_pairs, rows_of

_OP: Final = "weighted_triplet_loss"
_MINING_THREADS: Final = compiler.constants("mining.cuh")["kMiningThreads"]
_THREADS: Final = compiler.constants("weighted.cuh")["kWeightedThreads"]
_ROWS = Kernel("weighted.cuh", "weighted_rows_kernel", tuple((a,) for a in ACCUMULATORS))
_BACKWARD = Kernel("weighted.cuh", "weighted_backward_kernel", tuple((t,) for t in FLOATING))


def weighted_triplet_loss(
    embeddings: Tensor, labels: Tensor, stable: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, correct anchors, hardest pairs, slope and statistics of each anchor."""
    x = rows_of(embeddings, _OP)
    own = indices_of(_OP, labels, x.shape.rows)
    n, kind, device = x.shape.rows, accumulator(embeddings.dtype), embeddings.device
    make = torch.zeros if n == 0 else torch.empty
    loss = make((), dtype=kind, device=device)
    correct = make((), dtype=torch.int64, device=device)
    positive, negative = (make(n, dtype=torch.int64, device=device) for _ in range(2))
    slope, stats = make(n, dtype=kind, device=device), make((n, 6), dtype=kind, device=device)
    if n == 0:
        return loss, correct, positive, negative, slope, stats
    plan = PairPlan(x.shape, x.shape, True)
    partial, terms = slope.new_empty(plan.scratch), slope.new_empty(n)
    counters = slope.new_empty(2, dtype=torch.int32)
    for panel in plan.panels():
        launch_pairs(plan, panel, x, x, x.fits_vectors, partial, None, dot=False, counters=counters)
        _ROWS.launch(
            (C_TYPES[kind],),
            blocks(panel.rows),
            _MINING_THREADS,
            0,
            partial,
            own,
            terms,
            counters,
            loss,
            correct,
            positive,
            negative,
            slope,
            stats,
            panel,
            ctypes.c_int(n),
            ctypes.c_bool(stable),
        )
    return loss, correct, positive, negative, slope, stats


def weighted_triplet_loss_backward(
    grad: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    positive: Tensor,
    negative: Tensor,
    slope: Tensor,
    stats: Tensor,
    stable: bool,
) -> Tensor:
    """Gradient of the embeddings; distances are taken once more."""
    x = rows_of(embeddings, _OP)
    n, columns = x.shape.rows, x.shape.columns
    slope_of = values_of(_OP, grad, embeddings, 1)
    saved = [indices_of(_OP, t, n) for t in (labels, positive, negative)]
    saved += [values_of(_OP, slope, embeddings, n), values_of(_OP, stats, embeddings, 6 * n)]
    dx = embeddings.new_empty(n, columns)
    if n == 0:
        return dx
    vector = VECTOR_BYTES // embeddings.element_size()
    rows = 4 if vector > 4 else 8  # of a block
    wide = x.fits_vectors
    plan = PairPlan(x.shape, x.shape, True)
    partial = slope.new_empty(plan.scratch)
    for panel in plan.panels():
        launch_pairs(plan, panel, x, x, wide, partial, None, dot=False)
        _BACKWARD.launch(
            (c_type(embeddings),),
            (blocks(-(-panel.rows // rows)), -(-columns // (_THREADS * vector))),
            _THREADS,
            0,
            slope_of,
            x.tensor,
            partial,
            *saved,
            dx,
            x.shape,
            panel,
            ctypes.c_bool(stable),
            ctypes.c_bool(wide),
        )
    return dx
