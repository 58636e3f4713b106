"""The launchers of fastreid_vi.nvrtc on the CPU: their kernels from the emulation, called through
the very array of argument addresses that the driver would get.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastreid_vi import nvrtc
from fastreid_vi.nvrtc import runtime
from fastreid_vi.nvrtc.kernel import Kernel
from tests.cuda import emulator
from tests.cuda.conftest import Emulated

SHARED_LIMIT = 227 * 1024  # emulation_memory.h
INVOKE = emulator.HERE / "invoke.h"
_ELEMENTS = {
    torch.float32: "f4",
    torch.float64: "f8",
    torch.float16: "h2",
    torch.bfloat16: "b2",
    torch.int32: "i4",
    torch.int64: "i8",
    torch.uint8: "u1",
}
_SCALARS = {
    ctypes.c_float: "f4",
    ctypes.c_double: "f8",
    ctypes.c_int: "i4",
    ctypes.c_int64: "i8",
    ctypes.c_uint: "u4",
    ctypes.c_uint64: "u8",
    ctypes.c_bool: "u1",
}


def kernels() -> dict[str, list[str]]:
    """Header -> every name expression that launchers may use."""
    for module in set(nvrtc.ROOMS.values()):
        importlib.import_module(f"fastreid_vi.nvrtc.{module}")
    found: dict[str, list[str]] = {}
    for kernel in Kernel.all:
        found.setdefault(kernel.header, []).extend(kernel.expressions)
    return found


def _table(folder: Path, header: str, expressions: Sequence[str]) -> Path:
    """A C function for each instantiation of one header."""
    key = emulator.toolkit.key(INVOKE)  # in the text, for the object is named after that
    lines = [f'#include "{header}"', f'#include "{INVOKE}"  // {key}']
    stem = header.removesuffix(".cuh")
    lines += [f"FASTREID_VI_INVOKE({stem}_{i}, {e})" for i, e in enumerate(expressions)]
    file = folder / f"invoke_{stem}.cpp"
    file.write_text("\n".join(lines) + "\n")
    return file


def _kind(argument: runtime.Argument) -> bytes:
    if isinstance(argument, Tensor):
        return f"*{_ELEMENTS[argument.dtype]}".encode()
    if argument is None:
        return b"*"
    size = f"s{ctypes.sizeof(argument)}"
    return _SCALARS.get(type(argument), size).encode()


class EmulatedRuntime:
    """Stands in for the device: `runtime.present` of the launchers."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        tables = [_table(folder, *item) for item in kernels().items()]
        self.emulator = emulator.Emulator(emulator.build(folder, "plain", tables))
        self.launched: set[str] = set()

    @cache  # noqa: B019  lives as long as the run
    def _function(self, header: str, expression: str) -> Any:
        index = kernels()[header].index(expression)
        function = getattr(self.emulator.functions, f"{header.removesuffix('.cuh')}_{index}")
        function.restype = ctypes.c_char_p
        return function

    def launch(
        self,
        header: str,
        expression: str,
        grid: runtime.Axes,
        block: runtime.Axes,
        shared_bytes: int,
        arguments: Sequence[runtime.Argument],
    ) -> None:
        self.launched.add(expression)
        addresses, values = runtime.packed(arguments)
        axes = ctypes.c_uint * 3
        kinds = (ctypes.c_char_p * len(values))(*map(_kind, arguments))
        error = self._function(header, expression)(
            axes(*grid), axes(*block), ctypes.c_size_t(shared_bytes), addresses, kinds, len(values)
        )
        if error is not None:
            raise RuntimeError(f"{expression}: {self.emulator.located(error.decode())}")

    def shared_memory_limit(self, tensor: Tensor) -> int:
        return SHARED_LIMIT


def bits(result: Any) -> list[tuple[Any, ...]]:
    """What two rooms must agree on: dtype, layout and every bit."""
    tensors = result if isinstance(result, tuple) else (result,)
    return [
        (t.dtype, t.shape, t.stride(), bytes(t.contiguous().flatten().view(torch.uint8)))
        for t in tensors
    ]


class Alike(Emulated):
    """The launchers as functions on CPU tensors, each held to what the host code of the .cu does:
    the same launches, the same bits.
    """

    def __init__(self, emulation: emulator.Emulator, launchers: EmulatedRuntime) -> None:
        super().__init__(launchers.emulator)
        self.rooms = Emulated(emulation)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        room = getattr(self.rooms, name)
        if name not in nvrtc.ROOMS:
            return room
        launcher = getattr(importlib.import_module(f"fastreid_vi.nvrtc.{nvrtc.ROOMS[name]}"), name)

        def call(*arguments: Any) -> Any:
            try:
                with self.rooms.emulation.recorded() as theirs, self.rooms.emulation.unwatched():
                    expected = room(*arguments)
            except RuntimeError as error:
                launcher(*arguments)  # must refuse as well, in words that the test expects
                raise AssertionError(f"only the .cu refuses: {error}") from error
            with self.emulation.recorded() as ours:
                result = launcher(*arguments)
            assert ours == theirs, f"{name}: grid, block, shared memory {ours}, of the .cu {theirs}"
            for i, (got, want) in enumerate(zip(bits(result), bits(expected), strict=True)):
                assert got == want, f"{name}: result {i}"
            return result

        return call
