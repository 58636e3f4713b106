"""The harness for clusters and tensor cores: right kernels pass, mistakes are named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda import emulator
from tests.cuda.test_emulation import Kernels

SOURCE = Path(__file__).resolve().parent / "clusters.cu"
THREADS, BLOCKS = 64, 4


@pytest.fixture(scope="module")
def kernels(build_folder: Path) -> Kernels:
    return Kernels(emulator.build(build_folder / "clusters", "races", [SOURCE]))


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    values = np.random.default_rng(5).standard_normal((2, BLOCKS, THREADS)).astype(np.float32)
    return values, np.full((2, 2, BLOCKS, THREADS), np.nan, np.float32)


@pytest.mark.parametrize("order", emulator.ORDERS)
class TestRightKernels:
    def test_blocks_read_each_other(self, kernels, data, order):
        kernels.emulator.order(order)
        values, out = data
        assert kernels.fetch(values, out) is None
        expected = np.roll(values, -1, axis=1)[:, :, ::-1]
        np.testing.assert_allclose(out[0], expected + (expected + 1), rtol=1e-6)

    def test_blocks_write_into_each_other(self, kernels, data, order):
        kernels.emulator.order(order)
        values, out = data
        assert kernels.push(values, out) is None
        np.testing.assert_array_equal(out[0], np.roll(values, 1, axis=1)[:, :, ::-1])

    def test_the_barrier_orders_global_memory(self, kernels, data, order):
        kernels.emulator.order(order)
        values, out = data
        assert kernels.through_global(values, out) is None
        np.testing.assert_array_equal(out[0], np.roll(values, -1, axis=1))


SHARED = "race on shared array tile"
MISTAKES = {
    "not_there_yet": f"{SHARED}|before it is written|not declared it yet",
    "not_read_yet": rf"{SHARED}.*block \(\d,0,0\).*block|which has returned",
    "not_begun": f"not declared it yet|{SHARED}|before it is written",
    "not_written_yet": f"{SHARED}|before it is written|which has returned",
    "both_write": rf"{SHARED}.*writes.*block \(\d,0,0\).*writes",
    "through_global_unordered": "race on global memory",
    "two_places": "divergent barrier",
    "one_stays_away": "deadlock.*wait at the cluster barrier",
    "beyond": "asks for a block beyond its cluster",
    "no_clusters": r"grid \(6,1,1\) does not divide into clusters of 4 blocks",
    "large_clusters": "does not divide into clusters of 16 blocks, 8 at most",
}


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_in_every_order(kernels, data, mistake, order):
    kernels.emulator.order(order)
    error = getattr(kernels, mistake)(*data)
    assert error is not None
    assert re.search(MISTAKES[mistake], error), error
    assert kernels.fetch(*data) is None  # the emulation survives


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("stored", ["", "_transposed"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_products(kernels, kind, stored, order):
    """Layouts of the operands' and the result's parts as PTX defines them for m16n8k16."""
    kernels.emulator.order(order)
    values = torch.randn(384, generator=torch.Generator().manual_seed(3))
    out = np.full((16, 8), np.nan, np.float32)
    name = f"product_{'half' if kind == torch.float16 else 'bfloat16'}{stored}"
    assert getattr(kernels, name)(values.numpy(), out) is None
    rounded = values.to(kind).double().numpy()
    expected = rounded[:256].reshape(16, 16) @ rounded[256:].reshape(16, 8) + 1
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
