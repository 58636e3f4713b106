"""Shared by all tests: golden vectors, poisoned memory, Triton's interpreter without a GPU.

`pytest -n auto --dist loadfile --no-loadscope-reorder` shares the files among processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # before torch is loaded
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).parent
LONGEST = "test_triton_compiles"  # begins first, so that no process waits for it at the end
GOLDEN = Path(os.environ.get("FASTREID_VI_GOLDEN", TESTS / "golden"))


def golden(name: str) -> dict[str, np.ndarray]:
    """Arrays of tests/golden/<name>.npz; a missing file fails the test, for it is ours."""
    path = GOLDEN / f"{name}.npz"
    if not path.is_file():
        pytest.fail(f"golden vectors are missing: {path}", pytrace=False)
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A class that inherits the contract lists its cases; its op lists its rooms."""
    cls = metafunc.cls
    if not hasattr(cls, "op"):
        return
    from fastreid_vi._dispatch import OPS

    emulated = getattr(cls, "emulated", False)  # tests/cuda: CUDA rooms on CPU tensors
    rooms = ("cuda",) if emulated else ("reference", *OPS[cls.op].backends)
    gpu = () if emulated else pytest.mark.gpu
    values = {
        "case": cls.cases,
        "dtype": cls.dtypes,
        "room": [pytest.param(r, marks=gpu) if r == "cuda" else r for r in rooms],
    }
    for name, choices in values.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, choices, ids=lambda v: str(v).removeprefix("torch."))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem != LONGEST)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised floats are NaN, so that a kernel that skips an element cannot pass."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(enabled, warn_only=True)
