"""A kernel of csrc/cuda, the types it is compiled for, and its launch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import ClassVar, Final

import torch

from fastreid_vi.nvrtc import runtime
from fastreid_vi.nvrtc.runtime import Argument

_SPELLING: Final = {True: "true", False: "false"}


class Kernel:
    """One `__global__` function of a .cuh and every instantiation that launchers may name.

    Tests compile all of them and run them on the CPU; a launch of any other is refused.
    """

    all: ClassVar[list[Kernel]] = []

    def __init__(
        self, header: str, name: str, instances: Iterable[tuple[str | int, ...]] = ((),)
    ) -> None:
        self.header = header
        self.name = name
        self.expressions = {self._spelled(instance): None for instance in instances}
        Kernel.all.append(self)

    def _spelled(self, instance: tuple[str | int, ...]) -> str:
        words = [_SPELLING[a] if isinstance(a, bool) else str(a) for a in instance]
        return f"fastreid_vi::{self.name}" + (f"<{', '.join(words)}>" if words else "")

    def launch(
        self,
        instance: tuple[str | int, ...],
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        shared_bytes: int,
        *arguments: Argument,
    ) -> None:
        """Start the kernel on the current stream of the device of its tensors.

        Args:
            instance: template arguments, in order; bool for a flag.
            grid, block: one to three axes.
            shared_bytes: dynamic shared memory.
            arguments: in the kernel's order: a tensor or None for a pointer, a ctypes scalar or
                structure of the parameter's very type for anything else.
        """
        expression = self._spelled(instance)
        if expression not in self.expressions:
            raise KeyError(f"{expression} is not among the instantiations of {self.header}")
        runtime.present.launch(
            self.header, expression, _axes(grid), _axes(block), shared_bytes, arguments
        )


def floating(dtype: torch.dtype, value: float) -> Argument:
    """A scalar of the accumulation type `dtype`."""
    return ctypes.c_double(value) if dtype == torch.float64 else ctypes.c_float(value)


def _axes(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*(size if isinstance(size, tuple) else (size,)), 1, 1)[:3]
    return x, y, z
