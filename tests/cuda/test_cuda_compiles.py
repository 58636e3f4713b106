"""Every CUDA kernel, compiled for each architecture: no spills, within budget, wide accesses."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda import toolkit
from tests.cuda.budgets import BUDGETS

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "--fmad=true")  # as setup.py
SYSTEM_SHARED = {"sm_80": 0, "sm_90a": 1024, "sm_100": 1024}  # bytes the system adds to a block
SOURCES = sorted(toolkit.CUDA_SOURCES.glob("*.cu"))

needs_nvcc = pytest.mark.skipif(toolkit.nvcc() is None, reason="no nvcc")


@pytest.fixture(scope="session")
def kernels(build_folder: Path) -> dict[tuple[str, str], list[toolkit.Usage]]:
    """Source and architecture -> its kernels. All files are compiled at once."""
    folder = build_folder / "cubins"
    folder.mkdir(exist_ok=True)

    def compiled(job: tuple[Path, str]) -> list[toolkit.Usage]:
        source, architecture = job
        command = [str(toolkit.nvcc()), *FLAGS, *toolkit.torch_flags(), f"-arch={architecture}"]
        command += ["-cubin", str(source)]
        target = folder / f"{source.stem}-{architecture}-{toolkit.key(source, command)}.cubin"
        toolkit.produce(command, target)
        return list(toolkit.usage(target))

    jobs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(compiled, jobs)
        return {(s.stem, a): usage for (s, a), usage in zip(jobs, results, strict=True)}


def assert_within_budget(
    kernel: toolkit.Usage, architecture: str, *, registers: bool = True
) -> None:
    """Whether the compiler kept to the kernel's line in budgets.py."""
    name = kernel.name.split("<")[0]
    assert name in BUDGETS, f"{name} has no line in tests/cuda/budgets.py"
    budget = BUDGETS[name]
    about = f"{kernel.name} for {architecture}"
    assert kernel.spills == 0, f"{about}: {kernel.spills} accesses to local memory"
    assert kernel.stack == 0, f"{about}: {kernel.stack} bytes of stack"
    if registers:
        assert kernel.registers <= budget.registers, f"{about}: {kernel.registers} registers"
    shared = kernel.shared - (SYSTEM_SHARED[architecture] if kernel.shared else 0)
    assert shared <= budget.shared, f"{about}: {shared} bytes of shared memory"
    if budget.wide_loads:
        assert kernel.wide_loads > 0, f"{about}: no 128-bit load"
    if budget.wide_stores:
        assert kernel.wide_stores > 0, f"{about}: no 128-bit store"
    if budget.products:
        assert kernel.count("HMMA") > 0, f"{about}: no product on tensor cores"
        assert kernel.count("LDSM") > 0, f"{about}: no matrix load from shared memory"
    if budget.clusters and architecture != "sm_80":
        assert kernel.count("UCGABAR") > 0, f"{about}: no barrier of a cluster"


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_keep_their_budget(kernels, source: Path, architecture: str):
    found = kernels[source.stem, architecture]
    assert found, f"{source.name} has no kernel"
    for kernel in found:
        assert_within_budget(kernel, architecture)


@needs_nvcc
def test_budgets_belong_to_kernels(kernels):
    names = {kernel.name.split("<")[0] for found in kernels.values() for kernel in found}
    assert BUDGETS.keys() == names


INCLUDE = re.compile(r"^\s*#\s*include\s+[<\"]([^>\"]+)[>\"]", re.MULTILINE)


@pytest.mark.parametrize("header", sorted(toolkit.CUDA_SOURCES.glob("*.cuh")), ids=lambda p: p.name)
def test_device_code_includes_device_code_only(header: Path):
    """NVRTC has no host headers: a .cuh reaches CUDA through device.h alone."""
    included = INCLUDE.findall(header.read_text())
    assert all(name == "device.h" or name.endswith(".cuh") for name in included), included
    assert not re.search(r"\b__shared__\b|<<<|\bstd::", header.read_text())


def test_every_device_header_is_compiled():
    reached: set[str] = set()
    waiting = [path.name for path in SOURCES]
    while waiting:
        name = waiting.pop()
        if name not in reached and (toolkit.CUDA_SOURCES / name).is_file():
            reached.add(name)
            waiting += INCLUDE.findall((toolkit.CUDA_SOURCES / name).read_text())
    assert {path.name for path in toolkit.CUDA_SOURCES.glob("*.cuh")} <= reached
