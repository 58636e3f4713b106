"""Loss terms on their way from the device to the log: read in one go, checked, averaged, timed."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from fastreid_vi.train.errors import NonFiniteLoss, Origin
from fastreid_vi.train.nonfinite import sentence
from fastreid_vi.train.state import Means


class Terms:
    """Collects the terms of every step without waiting for the device.

    Args:
        window: means since the last step record.
        whole: means since the epoch began.
    """

    def __init__(self, window: Means, whole: Means) -> None:
        self.last: float | None = None
        """The newest total that was read."""
        self._window, self._whole = window, whole
        self._pending: list[tuple[Origin, dict[str, Tensor]]] = []

    def add(self, origin: Origin, terms: dict[str, Tensor]) -> None:
        """Keep one step's terms; on the CPU, where nothing runs ahead, read them at once."""
        self._pending.append((origin, terms))
        if next(iter(terms.values())).device.type == "cpu":
            self.read()

    def read(self) -> None:
        """Fetch what is pending.

        Raises:
            NonFiniteLoss: a term is not finite; the message names the step and its terms.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        flat = torch.stack([term.double() for _, terms in pending for term in terms.values()])
        values = iter(flat.tolist())
        for origin, terms in pending:
            row = {name: next(values) for name in terms}
            if not all(map(math.isfinite, row.values())):
                raise NonFiniteLoss(sentence(origin.step, row), replace(origin, terms=row))
            self._window.add(row)
            self._whole.add(row)
            self.last = next(value for name, value in row.items() if name.endswith("total"))


class Clock:
    """Images per second since it was started."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin again at zero."""
        self._start, self.images = time.perf_counter(), 0

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self._start

    @property
    def rate(self) -> float:
        """Images per second."""
        return round(self.images / max(self.seconds, 1e-9), 2)
