"""All pairs of rows of two matrices, as csrc/cuda/pairs.h divides them among launches."""

from __future__ import annotations

import ctypes
from itertools import product
from typing import Final, NamedTuple

from torch import Tensor

from fastreid_vi.nvrtc import compiler
from fastreid_vi.nvrtc.kernel import Kernel
from fastreid_vi.nvrtc.layout import FLAGS, FLOATING, VECTOR_BYTES, c_type, check_rank

_SIZES: Final = compiler.constants("pairs.cuh")
_TILE: Final = _SIZES["kPairTile"]
_DEPTH: Final = _SIZES["kPairDepth"]
_ONE_PANEL: Final = 512  # rows up to which all pairs are taken at once
_MOST_PAIRS: Final = 1 << 22  # of a panel
_BLOCKS: Final = 264  # two for each SM of an H100 or H200
_PARTIALS = Kernel("pairs.cuh", "pair_partials_kernel", tuple(product(FLOATING, FLAGS)))


class RowMatrix(ctypes.Structure):
    """Rows of unit stride."""

    _fields_ = (("stride", ctypes.c_int64), ("rows", ctypes.c_int), ("columns", ctypes.c_int))


class PairPanel(ctypes.Structure):
    """The part of a matrix of pairs that one launch covers."""

    _fields_ = (("first", ctypes.c_int), ("rows", ctypes.c_int), ("splits", ctypes.c_int))


class Rows(NamedTuple):
    """A matrix [N, D] with unit stride along D; a dense copy where it had another."""

    tensor: Tensor
    shape: RowMatrix

    @property
    def fits_vectors(self) -> bool:
        """Whether 16-byte vectors fit every row."""
        size = VECTOR_BYTES // self.tensor.element_size()
        return (
            self.shape.columns % size == 0
            and (self.shape.rows <= 1 or self.shape.stride % size == 0)
            and self.tensor.data_ptr() % VECTOR_BYTES == 0
        )


def rows_of(x: Tensor, op: str) -> Rows:
    """See embeddings as rows; copies them where their stride does not allow that."""
    check_rank(op, "embeddings", x, 2)
    count, columns = x.shape
    if max(count, columns) > (2**31 - 1) // 4:
        raise RuntimeError(f"{op}: expected fewer than 2^29 rows and columns")
    rows = x if columns <= 1 or x.stride(1) == 1 else x.contiguous()
    return Rows(rows, RowMatrix(rows.stride(0), count, columns))


class PairPlan:
    """Panels of rows that are searched one after another, the depth split among blocks."""

    def __init__(self, x: RowMatrix, y: RowMatrix, own: bool) -> None:
        self.rows, self.columns, depth = int(x.rows), int(y.rows), int(x.columns)
        self.panel = self.rows
        if max(self.rows, self.columns) > _ONE_PANEL:
            fitting = min(_MOST_PAIRS // self.columns, self.rows // 2)
            self.panel = min(max(fitting // _TILE, 1) * _TILE, self.rows)
        self.symmetric = own and self.panel == self.rows
        down, across = _tiles(self.panel), _tiles(self.columns)
        count = down * (down + 1) // 2 if self.symmetric else down * across
        rounds = -(-depth // _DEPTH)
        parts = min(max(_BLOCKS // count, 1), rounds)
        self.depth = -(-rounds // parts) * _DEPTH
        self.splits = -(-depth // self.depth)

    def panels(self) -> list[PairPanel]:
        """All of them, in order."""
        return [
            PairPanel(first, min(self.panel, self.rows - first), self.splits)
            for first in range(0, self.rows, self.panel)
        ]

    @property
    def scratch(self) -> int:
        """Partial sums of a panel."""
        return self.splits * self.panel * self.columns

    @property
    def norms(self) -> int:
        """Partial squared norms of its rows and columns."""
        return self.splits * (self.panel + self.columns)


def _tiles(count: int) -> int:
    return -(-count // _TILE)


def launch_pairs(
    plan: PairPlan,
    panel: PairPanel,
    x: Rows,
    y: Rows,
    wide: bool,
    partial: Tensor,
    norms: Tensor | None,
    *,
    dot: bool,
    counters: Tensor | None = None,
    limit: Tensor | None = None,
) -> None:
    """Sums of one panel, of products with `dot`, else of squared differences."""
    _PARTIALS.launch(
        (c_type(x.tensor), dot),
        (_tiles(plan.columns), _tiles(panel.rows), panel.splits),
        _SIZES["kPairThreads"],
        0,
        x.tensor[panel.first :],
        y.tensor,
        partial,
        norms,
        counters if panel.first == 0 else None,
        limit,
        RowMatrix(x.shape.stride, panel.rows, x.shape.columns),
        y.shape,
        ctypes.c_int(panel.first),
        ctypes.c_int(plan.depth),
        ctypes.c_bool(plan.symmetric),
        ctypes.c_bool(wide),
    )
