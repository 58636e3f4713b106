"""One side's features: rows are copied, checked and scaled when they are needed, never all."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fastreid_vi.evaluation.arrays import Int, Real, check_real, real_matrix, to_numpy
from fastreid_vi.evaluation.galleries import Embeddings

# Bytes looked at in one go where rows are only checked.
CHECK_BYTES: Final = 2**24


class Features:
    """Rows of `images.features`, which may be a memory-mapped file and stays as it is.

    Args:
        side: "query" or "gallery", for messages.
        images: features [n, D] of real numbers and n identities.
        normalize: divide every row by its L2 norm; a zero row stays zero.
    Raises:
        TypeError, ValueError: not a real matrix, or not one row per identity.
    """

    def __init__(self, side: str, images: Embeddings, *, normalize: bool) -> None:
        self.name = f"{side}.features"
        self._array: npt.NDArray[Any] = to_numpy(self.name, images.features)
        self._normalize = normalize
        check_real(self.name, self._array, "[n, D]")
        if len(self._array) != len(images.ids):
            raise ValueError(
                f"{self.name}: expected {len(images.ids)} rows, got {len(self._array)}"
            )
        self.dim = self._array.shape[1]
        self.dtype: np.dtype[Any] = real_matrix(self.name, self._array[:0], "[n, D]").dtype

    def rows(self, rows: Int) -> Real:
        """Some rows, copied, checked, unit vectors if asked for."""
        features = real_matrix(self.name, self._array[rows], "[n, D]")
        squares = np.einsum("nd,nd->n", features, features)
        # Sums of squares far from 1 may have over- or underflowed, or hold infinities and NaN.
        odd = np.flatnonzero(~((squares > 1e-30) & (squares < 1e30)))
        largest = np.abs(features[odd]).max(axis=1, initial=0)
        if not np.isfinite(largest).all():
            row = rows[odd[~np.isfinite(largest)][0]]
            raise ValueError(f"{self.name}: row {row} is not finite")
        if self._normalize:
            features[odd] /= np.where(largest > 0, largest, 1)[:, None]
            squares[odd] = np.einsum("nd,nd->n", features[odd], features[odd])
            features /= np.sqrt(np.where(squares > 0, squares, 1))[:, None]
        return features

    def check_others(self, rows: Int) -> None:
        """Refuse infinities and NaN in the rows that are not among `rows`."""
        others = np.ones(len(self._array), bool)
        others[rows] = False
        left = np.flatnonzero(others)
        block = max(1, CHECK_BYTES // max(1, self.dim * self._array.itemsize))
        for begin in range(0, len(left), block):
            part = left[begin : begin + block]
            finite = np.isfinite(self._array[part]).all(axis=1)
            if not finite.all():
                raise ValueError(f"{self.name}: row {part[~finite][0]} is not finite")


def column_offset(right: Real, *, squared: bool) -> Real | None:
    """What `distances` adds to every column: |g|^2 for squared Euclidean distances.

    Ranking needs no |q|^2, the same for a query's whole row, and no root.
    """
    return np.einsum("nd,nd->n", right, right) if squared else None


def distances(left: Real, right: Real, offset: Real | None, room: Real) -> Real:
    """Keys that order every row's columns, [rows of left, rows of right], written into flat `room`.

    With an offset squared Euclidean distances less |q|^2, else negative dot products; `left` is
    scaled in place.
    """
    left *= -1 if offset is None else -2
    out = room[: len(left) * len(right)].reshape(len(left), len(right))
    np.matmul(left, right.T, out=out)
    if offset is not None:
        out += offset
    return out
