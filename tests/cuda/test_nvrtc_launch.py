"""What a launch hands to CUDA's driver, with the driver's functions replaced."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fastreid_vi.nvrtc import compiler, runtime
from fastreid_vi.nvrtc.kernel import Kernel
from tests.cuda.nvrtc import kernels


class TestLaunch:
    @pytest.fixture
    def driver(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        cuda = pytest.importorskip("cupy.cuda", reason="CuPy is not installed")
        seen = SimpleNamespace(devices=[], loaded=[], consented=[], launched=[], module=cuda.driver)

        def launch(function: int, *sizes: int) -> None:
            *sizes, stream, addresses, extra = sizes
            array = ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p))
            seen.launched.append((function, tuple(sizes), stream, array, extra))
            seen.values = [
                ctypes.string_at(array[0], 8), ctypes.string_at(array[1], 8),
                ctypes.string_at(array[2], 4), ctypes.string_at(array[3], 8),
                ctypes.string_at(array[4], 16),
            ] if sizes[0] == 7 else []  # fmt: skip

        def load(image: bytes) -> int:
            seen.loaded.append(image)
            return 100 + len(seen.loaded)

        @contextlib.contextmanager
        def on(index: int) -> Iterator[None]:
            seen.devices.append(index)
            yield

        for name, function in {
            "moduleLoadData": load,
            "moduleGetFunction": lambda module, symbol: (module, symbol),
            "funcSetAttribute": lambda *given: seen.consented.append(given),
            "launchKernel": launch,
        }.items():
            monkeypatch.setattr(cuda.driver, name, function)
        monkeypatch.setattr(cuda.runtime, "setDevice", seen.devices.append)
        monkeypatch.setattr(torch.cuda, "device", on)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        stream = SimpleNamespace(cuda_stream=4242)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
        monkeypatch.setattr(
            compiler, "architecture", lambda capability: "sm_{}{}a".format(*capability)
        )
        monkeypatch.setattr(compiler, "cached", lambda *asked: (repr(asked).encode(), asked[1]))
        return seen

    def launch(self, shared_bytes: int = 0, grid: tuple[int, int, int] = (1, 1, 1)) -> None:
        x = torch.ones(3)
        arguments = (x, None, ctypes.c_int(-5), ctypes.c_double(0.25), Pair(1, 2))
        self.pointer = x.data_ptr()
        present = self.runtime if hasattr(self, "runtime") else runtime.CupyRuntime()
        self.runtime = present
        present.launch("pool.cuh", "kernel<int>", grid, (32, 2, 1), shared_bytes, arguments)

    @pytest.fixture(autouse=True)
    def _device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime, "device_index", lambda arguments: 1)

    def test_arguments_stream_and_device(self, driver):
        self.launch(grid=(7, 3, 1))
        ((function, sizes, stream, _, extra),) = driver.launched
        assert function == (101, "kernel<int>")
        assert sizes == (7, 3, 1, 32, 2, 1, 0)
        assert (stream, extra) == (4242, 0)
        assert driver.devices == [1, 1]  # PyTorch's guard, then this thread's context
        assert driver.values == [
            self.pointer.to_bytes(8, "little"),
            bytes(8),
            (-5).to_bytes(4, "little", signed=True),
            b"\0\0\0\0\0\0\xd0\x3f",
            (1).to_bytes(4, "little") + bytes(4) + (2).to_bytes(8, "little"),
        ]

    def test_a_kernel_is_loaded_once_for_its_device(self, driver):
        for _ in range(3):
            self.launch()
        assert driver.loaded == [repr(("pool.cuh", "kernel<int>", "sm_90a")).encode()]
        assert len(driver.launched) == 3

    def test_more_shared_memory_needs_consent(self, driver):
        attribute = driver.module.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for size in (0, 48 * 1024, 50_000, 49_500, 60_000, 0):
            self.launch(size)
        assert [given[1:] for given in driver.consented] == [
            (attribute, 50_000),
            (attribute, 60_000),
        ]
        assert [launch[1][-1] for launch in driver.launched][-2:] == [60_000, 0]

    def test_the_drivers_error_names_the_kernel(self, driver, monkeypatch):
        class Failed(RuntimeError):
            pass

        monkeypatch.setattr(driver.module, "CUDADriverError", Failed)
        monkeypatch.setattr(
            driver.module, "launchKernel", lambda *a: (_ for _ in ()).throw(Failed("too many"))
        )
        with pytest.raises(RuntimeError, match=r"launch of kernel<int>: too many"):
            self.launch()

    def test_shared_memory_of_the_tensors_device(self, monkeypatch):
        cuda = pytest.importorskip("cupy.cuda", reason="CuPy is not installed").runtime
        asked = cuda.cudaDevAttrMaxSharedMemoryPerBlockOptin
        monkeypatch.setattr(cuda, "deviceGetAttribute", lambda *given: {(asked, 1): 232448}[given])
        tensor = SimpleNamespace(device=SimpleNamespace(index=1))
        assert runtime.CupyRuntime().shared_memory_limit(tensor) == 232448

    def test_cupy_still_has_these_functions(self):
        """The names and orders that the replacements above take for granted."""
        cuda = pytest.importorskip("cupy.cuda", reason="CuPy is not installed")
        driver = cuda.driver
        parameters = re.findall(r"\w+(?=[,)])", driver.launchKernel.__doc__.splitlines()[0])
        assert parameters == [
            "f", "grid_dim_x", "grid_dim_y", "grid_dim_z", "block_dim_x", "block_dim_y",
            "block_dim_z", "shared_mem_bytes", "stream", "kernel_params", "extra",
        ]  # fmt: skip
        assert re.match(
            r"funcSetAttribute\(\w+ f, int attribute, ", driver.funcSetAttribute.__doc__
        )
        assert re.match(r"moduleLoadData\(bytes image", driver.moduleLoadData.__doc__)
        assert re.match(r"moduleGetFunction\(\w+ module, str", driver.moduleGetFunction.__doc__)
        assert cuda.runtime.setDevice.__doc__ == "setDevice(int device)"
        assert re.match(
            r"deviceGetAttribute\(int \w+, int ", cuda.runtime.deviceGetAttribute.__doc__
        )


class Pair(ctypes.Structure):
    _fields_ = (("small", ctypes.c_int), ("large", ctypes.c_int64))


def test_a_bare_number_has_no_width():
    with pytest.raises(TypeError, match="expected a tensor or a ctypes value, got float"):
        runtime.packed([torch.ones(1), 0.5])  # type: ignore[list-item]


def test_an_undeclared_instantiation_is_refused():
    kernels()
    kernel = next(k for k in Kernel.all if k.name == "gem_pool_positions_kernel")
    with pytest.raises(KeyError, match="gem_pool_positions_kernel<int, true> is not among"):
        kernel.launch(("int", True), 1, 1, 0, torch.ones(1))
