"""Every launcher of fastreid_vi.nvrtc, run for real: all tests of the kernels once more, with the
launcher in the place of the host code of the .cu and held to its launches and its bits.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from fastreid_vi import nvrtc
from fastreid_vi.nvrtc import runtime
from tests.cuda import emulator
from tests.cuda.nvrtc import Alike, EmulatedRuntime
from tests.cuda.room import EmulatedRoom
from tests.cuda.test_sanitizers import KERNEL_TESTS


@pytest.fixture(scope="session")
def launchers(build_folder: Path) -> EmulatedRuntime:
    return EmulatedRuntime(build_folder / "nvrtc")


@pytest.fixture
def emulated(
    emulation: emulator.Emulator, launchers: EmulatedRuntime, monkeypatch: pytest.MonkeyPatch
) -> Alike:
    """In the place of conftest's: one thread order is enough, the kernels are the same."""
    monkeypatch.setattr(runtime, "present", launchers)
    monkeypatch.setenv("FASTREID_VI_CLUSTERS", "0")  # CuPy starts none
    for machine in (emulation, launchers.emulator):
        machine.order("ascending")
    return Alike(emulation, launchers)


def uses_the_fixture(found: object) -> bool:
    if inspect.isclass(found):
        return issubclass(found, EmulatedRoom) and found is not EmulatedRoom
    return inspect.isfunction(found) and "emulated" in inspect.signature(found).parameters


def family_of(path: Path) -> str:
    return path.stem.removeprefix("test_").removesuffix("_kernels")


TESTED = [path for path in KERNEL_TESTS if family_of(path) in nvrtc.ROOMS.values()]

for path in TESTED:
    family = family_of(path)
    module = importlib.import_module(f"tests.cuda.{path.stem}")
    for name, found in vars(module).items():
        if name.startswith(("test_", "Test")) and uses_the_fixture(found):
            prefix = "Test" if name[0] == "T" else "test_"
            globals()[f"{prefix}{family}_{name.removeprefix(prefix)}"] = found


def test_every_launcher_was_compared():
    """Each family of launchers has tests above."""
    assert set(nvrtc.ROOMS.values()) == {family_of(path) for path in TESTED}
