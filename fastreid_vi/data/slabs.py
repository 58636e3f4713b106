"""Memory of batches that is used again once nobody holds it.

A batch of floats is larger than what the C library keeps for later: allocated anew, all its pages
are mapped and cleared by the kernel again, which costs more than writing the batch.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Slabs:
    """Float32 images in channels_last, in memory of earlier ones that are gone.

    Args:
        keep: free blocks that are kept for later.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._free: list[Any] = []

    def take(self, count: int, height: int, width: int) -> Tensor:
        """[count, 3, height, width], not initialised; the block is free when no tensor uses it."""
        size = count * height * width * 3
        block = self._block(size)
        # The tensor's storage holds this view, and nobody else does.
        lent = block[:size]
        images = torch.from_numpy(lent).view(count, height, width, 3).permute(0, 3, 1, 2)
        weakref.finalize(lent, self._give_back, block).atexit = False
        return images

    def _block(self, size: int) -> Any:
        # Threads take and give back at the same time: ask for forgiveness.
        with contextlib.suppress(IndexError):
            while True:
                block = self._free.pop()
                if len(block) >= size:
                    return block
        return np.empty(size, dtype=np.float32)

    def _give_back(self, block: Any) -> None:
        if len(self._free) < self._keep:
            self._free.append(block)
