"""Launch of the centre cluster kernels, as csrc/cuda/cluster.cu does it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from fastreid_vi.nvrtc import compiler
from fastreid_vi.nvrtc.kernel import Kernel, floating
from fastreid_vi.nvrtc.layout import (
    ACCUMULATORS,
    C_TYPES,
    FLOATING,
    VECTOR_BYTES,
    WARP,
    accumulator,
    blocks,
    c_type,
    indices_of,
    values_of,
)
from fastreid_vi.nvrtc.pairs import PairPanel, PairPlan, RowMatrix, Rows, launch_pairs, rows_of

_OP: Final = "center_cluster_loss"
_SIZES: Final = compiler.constants("cluster.cuh")
_THREADS: Final = _SIZES["kClusterThreads"]
_FINISH_THREADS: Final = _SIZES["kClusterFinishThreads"]
_GAP_SCRATCH: Final = 1 << 24  # elements, for the parts of [N, N]
_INSTANCES: Final = tuple((t,) for t in FLOATING)
_FIRST = Kernel("cluster.cuh", "cluster_first_kernel", (("int64_t",),))
_CENTRES = Kernel("cluster.cuh", "cluster_centres_kernel", _INSTANCES)
_FINISH = Kernel("cluster.cuh", "cluster_finish_kernel", tuple((a,) for a in ACCUMULATORS))
_BACKWARD = Kernel("cluster.cuh", "cluster_backward_kernel", _INSTANCES)


class _Clusters:
    """The centres, what belongs to them, and where their gaps are."""

    def __init__(self, x: Rows, like: Tensor, radii: bool) -> None:
        n, columns = int(x.shape.rows), int(x.shape.columns)
        chunk = WARP * VECTOR_BYTES // x.tensor.element_size()
        chunks = -(-columns // chunk)
        self.whole = n <= _SIZES["kClusterRows"]  # the first kernel does the gaps too
        most = min(max(_GAP_SCRATCH // (n * n), 1), chunks) if self.whole else chunks
        self.depth = -(-chunks // most) * chunk
        self.parts = -(-columns // self.depth)
        shape = RowMatrix(columns, n, columns)
        self.plan = PairPlan(shape, shape, True)
        self.centres = Rows(like.new_empty(n, columns), shape)
        integers = like.new_empty(n + 3, dtype=torch.int32)
        self.speakers, self.identities = integers[:n], integers[n:]
        self.counters = integers[n + 1 :]
        self.squares = like.new_empty(self.parts * n if radii else 0)
        self.gaps = like.new_empty(self.parts * n * n if self.whole else self.plan.scratch)

    def find(self, x: Rows, labels: Tensor | None, first: Tensor) -> None:
        """Fill the centres; `labels` is None where `first` is known."""
        n = int(x.shape.rows)
        batches = blocks(-(-n // _THREADS))
        if not self.whole and labels is not None:
            _FIRST.launch(("int64_t",), batches, _THREADS, 0, labels, first, ctypes.c_int(n))
            labels = None
        if batches > 65535:
            raise RuntimeError(f"{_OP}: expected fewer than 2^24 rows")
        _CENTRES.launch(
            (c_type(x.tensor),),
            (self.parts, 1 if self.whole else batches),
            _THREADS,
            0,
            x.tensor,
            labels,
            first,
            self.centres.tensor,
            self.speakers,
            self.identities,
            self.squares if self.squares.numel() else None,
            self.gaps if self.whole else None,
            self.counters,
            x.shape,
            ctypes.c_int(self.depth),
            ctypes.c_bool(x.fits_vectors),
        )

    def panels(self) -> Iterator[PairPanel]:
        """Each panel, when the gaps of its centres to all others are known."""
        if self.whole:
            yield PairPanel(0, self.centres.shape.rows, self.parts)
            return
        centres = self.centres
        vector = VECTOR_BYTES // centres.tensor.element_size()
        wide = centres.shape.columns % vector == 0
        for panel in self.plan.panels():
            launch_pairs(
                self.plan, panel, centres, centres, wide, self.gaps, None,
                dot=False, limit=self.identities,
            )  # fmt: skip
            yield panel


def center_cluster_loss(
    embeddings: Tensor, labels: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, its two terms, the first row of each identity and each row's distance to its centre."""
    x = rows_of(embeddings, _OP)
    own = indices_of(_OP, labels, x.shape.rows)
    n, kind, device = int(x.shape.rows), accumulator(embeddings.dtype), embeddings.device
    make = torch.zeros if n == 0 else torch.empty
    loss, pull, push = (make((), dtype=kind, device=device) for _ in range(3))
    first = make(n, dtype=torch.int64, device=device)
    radius = make(n, dtype=kind, device=device)
    if n == 0:
        return loss, pull, push, first, radius
    clusters = _Clusters(x, radius, radii=True)
    terms = radius.new_empty(2 * n)
    clusters.find(x, own, first)
    for panel in clusters.panels():
        _FINISH.launch(
            (C_TYPES[kind],),
            blocks(panel.rows),
            _FINISH_THREADS,
            0,
            clusters.squares,
            clusters.gaps,
            clusters.identities,
            terms,
            clusters.counters,
            loss,
            pull,
            push,
            radius,
            panel,
            ctypes.c_int(n),
            ctypes.c_int(clusters.parts),
            floating(kind, margin),
        )
    return loss, pull, push, first, radius


def center_cluster_loss_backward(
    grad_pull: Tensor,
    grad_push: Tensor,
    embeddings: Tensor,
    first: Tensor,
    radius: Tensor,
    margin: float,
) -> Tensor:
    """Gradient of the embeddings; the centres are taken once more."""
    x = rows_of(embeddings, _OP)
    n, columns = int(x.shape.rows), int(x.shape.columns)
    pull, push = (values_of(_OP, grad, embeddings, 1) for grad in (grad_pull, grad_push))
    speaker, length = indices_of(_OP, first, n), values_of(_OP, radius, embeddings, n)
    dx = embeddings.new_empty(n, columns)
    if n == 0:
        return dx
    chunk = _FINISH_THREADS * VECTOR_BYTES // embeddings.element_size()
    clusters = _Clusters(x, length, radii=False)
    clusters.find(x, None, speaker)
    for panel in clusters.panels():
        _BACKWARD.launch(
            (c_type(embeddings),),
            (blocks(panel.rows), -(-columns // chunk)),
            _FINISH_THREADS,
            0,
            pull,
            push,
            x.tensor,
            speaker,
            length,
            clusters.centres.tensor,
            clusters.speakers,
            clusters.identities,
            clusters.gaps,
            dx,
            x.shape,
            panel,
            floating(length.dtype, margin),
            ctypes.c_bool(x.fits_vectors),
        )
    return dx
