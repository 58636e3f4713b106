"""Every Triton kernel, compiled without a GPU for three architectures as its launcher starts it.

A new kernel fails here until a case in tests/triton_cases/<module>.py launches it and a budget
there says what it may cost (`python -m tests.triton_aot` prints what it does cost).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="no triton")

from tests import triton_aot
from tests.cuda import toolkit

SHARED_LIMITS = {80: 166912, 90: 232448, 100: 232448}  # bytes of a block
MODULES = triton_aot.modules()

pytestmark = pytest.mark.skipif(toolkit.binary_tool("cuobjdump") is None, reason="no cuobjdump")


@pytest.fixture(scope="session")
def compiled(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What triton_aot.py found, in a process of its own: this one may be interpreting."""
    target = tmp_path_factory.mktemp("triton") / "results.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(toolkit.ROOT), environment.get("PYTHONPATH", "")]
    )
    cache = getattr(pytestconfig, "cache", None)
    environment["TRITON_CACHE_DIR"] = str(
        cache.mkdir("triton") if cache else target.parent / "cache"
    )
    run = subprocess.run(
        [sys.executable, "-m", "tests.triton_aot", str(target)],
        cwd=toolkit.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(target.read_text())


@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_is_launched_by_a_case(compiled: dict[str, Any], module: str):
    assert module not in compiled["errors"], compiled["errors"][module]
    launched = {entry["kernel"] for entry in compiled["launches"]}
    own = {kernel for kernel, where in triton_aot.kernels().items() if where in (module, "_common")}
    assert own <= launched, f"no case in tests/triton_cases launches {sorted(own - launched)}"


def test_every_kernel_has_a_budget():
    """And no budget outlives its kernel."""
    assert triton_aot.budgets().keys() == triton_aot.kernels().keys()


@pytest.mark.parametrize("architecture", triton_aot.TARGETS)
@pytest.mark.parametrize("module", MODULES)
def test_kernels_keep_their_budget(compiled: dict[str, Any], module: str, architecture: int):
    entries = [
        entry
        for entry in compiled["launches"]
        if (entry["module"], entry["architecture"]) == (module, architecture)
    ]
    assert entries, compiled["errors"].get(module)
    budgets = triton_aot.budgets()
    for entry in entries:
        about = f"{entry['kernel']} in {entry['case']!r} for sm_{architecture}"
        budget = budgets[entry["kernel"]]
        assert entry["spills"] == 0, f"{about}: {entry['spills']} accesses to local memory"
        assert entry["stack"] == 0, f"{about}: {entry['stack']} bytes of stack"
        assert entry["registers"] <= budget.registers, f"{about}: {entry['registers']} registers"
        shared = min(budget.shared, SHARED_LIMITS[architecture])
        assert entry["shared"] <= shared, f"{about}: {entry['shared']} bytes of shared memory"
        if entry["wide"] and budget.wide_loads:
            assert entry["wide_loads"] > 0, f"{about}: no 128-bit load"
        if entry["wide"] and budget.wide_stores:
            assert entry["wide_stores"] > 0, f"{about}: no 128-bit store"
        if entry["products"] and budget.matrix:
            assert entry["matrix"] > 0, f"{about}: no tensor-core instruction"
        for size, limit in zip(entry["grid"], triton_aot.GRID_LIMITS, strict=False):
            assert 0 < size <= limit, f"{about}: grid {entry['grid']}"


def test_kernels_are_found_by_their_decorator():
    source = """
@triton.jit
def _combine(a, b):
    return a + b

@jit
def _part(x):
    return tl.reduce(x, 0, _combine)

@triton.autotune(configs=[], key=[])
@triton.jit(noinline=True)
def _kernel(x_ptr):
    _part(x_ptr)

def launch(x):
    _kernel[(1,)](x)
"""
    other = "@triton.jit\ndef _new_kernel(x_ptr):\n    _elsewhere(x_ptr)\n"
    shared = "@triton.jit\ndef _elsewhere(x_ptr):\n    pass\n"
    found = triton_aot.kernels_in({"pool": source, "norm": other, "_common": shared})
    assert found == {"_kernel": "pool", "_new_kernel": "norm"}
