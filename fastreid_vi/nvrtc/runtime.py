"""Launches on the present device: PyTorch's stream and memory, CuPy's driver calls."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from fastreid_vi.nvrtc import compiler

# ctypes keeps the base class of its scalars and structures private.
Scalar = (
    ctypes.c_bool
    | ctypes.c_int
    | ctypes.c_uint
    | ctypes.c_int64
    | ctypes.c_uint64
    | ctypes.c_float
    | ctypes.c_double
)
Argument = Tensor | Scalar | ctypes.Structure | None
Axes = tuple[int, int, int]
_MAX_SHARED_BYTES: Final = 97  # cudaDevAttrMaxSharedMemoryPerBlockOptin
_FREE_SHARED_BYTES: Final = 48 * 1024  # more than the default needs the kernel's consent


class Runtime(Protocol):
    """What launchers need; tests put the emulation in its place."""

    def launch(
        self,
        header: str,
        expression: str,
        grid: Axes,
        block: Axes,
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        """Start one kernel."""

    def shared_memory_limit(self, tensor: Tensor) -> int:
        """Bytes of shared memory, static and dynamic, that a block may have."""


def packed(arguments: Sequence[Argument]) -> tuple[ctypes.Array[ctypes.c_void_p], list[Any]]:
    """The array of addresses that cuLaunchKernel reads, and the values it points to.

    Both must live until the launch has returned.
    """
    values: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            values.append(ctypes.c_void_p(argument.data_ptr()))
        elif argument is None:
            values.append(ctypes.c_void_p(None))
        elif isinstance(argument, Scalar | ctypes.Structure):
            values.append(argument)
        else:  # a bare int or float: its width would be a guess
            raise TypeError(f"expected a tensor or a ctypes value, got {type(argument).__name__}")
    return (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values)), values


def device_index(arguments: Sequence[Argument]) -> int:
    """Which device the tensors of a launch are on."""
    return int(next(a.device.index for a in arguments if isinstance(a, Tensor)))


class CupyRuntime:
    """Compiles on first use for each device, then launches."""

    def __init__(self) -> None:
        self._functions: dict[tuple[int, str], int] = {}
        self._shared: dict[int, int] = {}  # function -> bytes it has consented to
        self._lock = threading.Lock()  # autograd calls from threads of its own

    def launch(
        self,
        header: str,
        expression: str,
        grid: Axes,
        block: Axes,
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        """Start one kernel on the current stream of its tensors' device."""
        from cupy.cuda import driver
        from cupy.cuda import runtime as cuda

        index = device_index(arguments)
        addresses, values = packed(arguments)
        with torch.cuda.device(index):
            # Driver calls need a context in this thread: the primary one, which PyTorch uses too.
            # PyTorch itself may not have bound it yet where its allocator had memory left.
            cuda.setDevice(index)
            try:
                function = self._function(header, expression, index)
                self._consent(function, shared_bytes)
                stream = torch.cuda.current_stream(index).cuda_stream
                where = ctypes.addressof(addresses)
                driver.launchKernel(function, *grid, *block, shared_bytes, stream, where, 0)
            except driver.CUDADriverError as error:
                raise RuntimeError(f"launch of {expression}: {error}") from error
        del values  # the launch has copied them

    def shared_memory_limit(self, tensor: Tensor) -> int:
        """Bytes of shared memory, static and dynamic, that a block may have on its device."""
        from cupy.cuda import runtime as cuda

        return int(cuda.deviceGetAttribute(_MAX_SHARED_BYTES, tensor.device.index))

    def _function(self, header: str, expression: str, index: int) -> int:
        from cupy.cuda import driver

        key = (index, expression)
        if key not in self._functions:
            with self._lock:
                if key not in self._functions:
                    capability = torch.cuda.get_device_capability(index)
                    image, symbol = compiler.cached(
                        header, expression, compiler.architecture(capability)
                    )
                    module = driver.moduleLoadData(image)  # stays loaded as long as the process
                    self._functions[key] = driver.moduleGetFunction(module, symbol)
        return self._functions[key]

    def _consent(self, function: int, shared_bytes: int) -> None:
        from cupy.cuda import driver

        if shared_bytes > max(_FREE_SHARED_BYTES, self._shared.get(function, 0)):
            attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(function, attribute, shared_bytes)
            self._shared[function] = shared_bytes


present: Runtime = CupyRuntime()
