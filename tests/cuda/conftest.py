"""Fixtures that run CUDA kernels on the CPU; how to use them: csrc/cuda/device.h."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda import emulator

# Set by test_sanitizers.py for the process that runs under the sanitizers: the library to load.
SANITIZED = "FASTREID_VI_SANITIZED_LIBRARY"


@pytest.fixture(scope="session")
def build_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled files are kept, between runs where pytest has a cache."""
    if (reason := emulator.why_not()) is not None:
        pytest.skip(reason)
    cache = getattr(pytestconfig, "cache", None)
    if cache is None:
        return tmp_path_factory.mktemp("cuda")
    return Path(cache.mkdir("cuda"))


@pytest.fixture(scope="session")
def emulation(build_folder: Path) -> emulator.Emulator:
    """The library of all CUDA rooms, its ops registered for CPU tensors."""
    library = Path(os.environ.get(SANITIZED) or emulator.build(build_folder, "races"))
    torch.ops.load_library(str(library))
    return emulator.Emulator(library)


class Emulated:
    """The ops of csrc/cuda as functions on CPU tensors."""

    def __init__(self, emulation: emulator.Emulator) -> None:
        self.emulation = emulation

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.fastreid_vi_emulated, name)

        def call(*args: Any) -> Any:
            try:
                return op(*args)
            except RuntimeError as error:
                raise RuntimeError(self.emulation.located(str(error))) from None

        return call


@pytest.fixture(params=["ascending"] if os.environ.get(SANITIZED) else [*emulator.ORDERS])
def emulated(request: pytest.FixtureRequest, emulation: emulator.Emulator) -> Emulated:
    """The CUDA ops on CPU tensors, in each thread order."""
    emulation.order(request.param)
    return Emulated(emulation)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a contract's tests an emulated room runs those that take a room; others ran before."""
    stays, leaves = [], []
    for item in items:
        emulated = getattr(getattr(item, "cls", None), "emulated", False)
        names = getattr(item, "fixturenames", ())
        (leaves if emulated and "room" not in names else stays).append(item)
    if leaves:
        config.hook.pytest_deselected(items=leaves)
        items[:] = stays
