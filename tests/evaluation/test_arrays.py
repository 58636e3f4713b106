"""A result leaves as the kind of array that came in."""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from fastreid_vi.evaluation.arrays import like


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.bool_])
def test_numpy_and_lists_get_the_array_itself(dtype: Any) -> None:
    array = np.ones((2, 3), dtype)
    for reference in (np.zeros(1), [[1.0]], None):
        assert like(reference, array) is array


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.bool_])
def test_torch_gets_a_tensor(dtype: Any) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    reference = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    found = like(reference, array)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.from_numpy(array).dtype
    assert not found.requires_grad
    assert np.array_equal(found.numpy(), array)
    assert np.shares_memory(found.numpy(), array)
    assert np.array_equal(like(reference, array[::-1, ::-1]).numpy(), array[::-1, ::-1])
    assert like(reference, np.array(3.0)).shape == ()


def test_torch_gets_a_tensor_on_its_device() -> None:
    reference = torch.zeros(1, device="meta")
    assert like(reference, np.zeros((2, 3))).device == reference.device


@pytest.mark.gpu
def test_torch_on_a_gpu() -> None:
    reference = torch.zeros(1, device="cuda")
    found = like(reference, np.arange(3.0))
    assert found.device == reference.device
    assert found.tolist() == [0.0, 1.0, 2.0]


def test_cupy_gets_a_cupy_array_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    class Stub:
        """What CuPy offers for this, without a GPU."""

        @property
        def device(self) -> Any:
            used.append("device")
            return contextlib.nullcontext()

    copied = Stub()
    stub = types.SimpleNamespace(
        ndarray=Stub, asarray=lambda array: (used.append("copy"), copied)[1]
    )
    monkeypatch.setitem(sys.modules, "cupy", stub)
    assert like(Stub(), np.zeros(3)) is copied
    assert used == ["device", "copy"]
    array = np.zeros(3)
    assert like(np.zeros(1), array) is array


@pytest.mark.gpu
def test_cupy_on_a_gpu() -> None:
    cupy = pytest.importorskip("cupy")
    found = like(cupy.zeros(1), np.arange(3.0))
    assert isinstance(found, cupy.ndarray)
    assert found.get().tolist() == [0.0, 1.0, 2.0]
