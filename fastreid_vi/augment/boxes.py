"""Random boxes inside an image, out of uniform numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

ATTEMPTS = 10
"""Tries at a box that fits."""


def below(uniform: NDArray[np.float64], bound: int | Int64) -> Int64:
    """Integers uniform in 0..bound-1 out of uniform numbers in [0, 1)."""
    return np.asarray(np.floor(uniform * bound), dtype=np.int64)


def first_that_fits(
    height: Int64, width: Int64, uniform: NDArray[np.float64], rows: int, columns: int
) -> tuple[Int64, NDArray[np.bool_]]:
    """The first box that is smaller than the area in both directions, put anywhere in it.

    Args:
        height: [B, attempts] of the boxes tried.
        width: [B, attempts].
        uniform: [B, attempts, 2] in [0, 1), for the top row and the left column.
        rows: of the area.
        columns: of the area.
    Returns:
        [B, 4] top, left, height, width, and [B] whether any attempt fits; where none does, the
        box means nothing.
    """
    fits = (height < rows) & (width < columns) & (height > 0) & (width > 0)
    image = np.arange(len(height))
    attempt = fits.argmax(axis=1)
    height, width, uniform = height[image, attempt], width[image, attempt], uniform[image, attempt]
    top, left = below(uniform[:, 0], rows - height + 1), below(uniform[:, 1], columns - width + 1)
    return np.stack([top, left, height, width], axis=1), np.asarray(fits.any(axis=1))
