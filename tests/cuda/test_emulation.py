"""The harness itself: right kernels pass in every order, and each kind of mistake is named."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cuda import emulator

HERE = Path(__file__).resolve().parent
THREADS = 64


class Kernels:
    """Functions of broken.cu on NumPy arrays; each returns the emulation's error or None."""

    def __init__(self, library: Path) -> None:
        self.emulator = emulator.Emulator(library)

    def __getattr__(self, name: str) -> Callable[..., str | None]:
        function = getattr(self.emulator.functions, name)
        function.restype = ctypes.c_char_p

        def call(*args: np.ndarray | int) -> str | None:
            raw = [
                a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in args
            ]
            error = function(*raw)
            return None if error is None else self.emulator.located(error.decode())

        return call


@pytest.fixture(scope="module")
def kernels(build_folder: Path) -> Kernels:
    return Kernels(emulator.build(build_folder / "broken", "races", [HERE / "broken.cu"]))


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    values = np.random.default_rng(7).standard_normal(4 * THREADS).astype(np.float32)
    return values, np.full(8 * THREADS, np.nan, np.float32)


def line_of(text: str) -> int:
    """The line of broken.cu that holds `text`, once."""
    lines = (HERE / "broken.cu").read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if text in line]
    return number


@pytest.mark.parametrize("order", emulator.ORDERS)
class TestRightKernels:
    def test_shared_memory_and_barriers(self, kernels, data, order):
        kernels.emulator.order(order)
        values, out = data
        assert kernels.reverse(values, out) is None
        np.testing.assert_array_equal(out[:THREADS], values[:THREADS][::-1])
        assert kernels.two_tiles(values, out) is None
        expected = np.roll(values[:THREADS], -1) + np.roll(values[THREADS : 2 * THREADS], -1)
        np.testing.assert_array_equal(out[:THREADS], expected)
        assert kernels.within_a_warp(values, out) is None
        expected = np.roll(values[:THREADS].reshape(2, 32), -1, axis=1).ravel()
        np.testing.assert_array_equal(out[:THREADS], expected)

    def test_reductions(self, kernels, data, order):
        kernels.emulator.order(order)
        x, out = data[0][:THREADS], data[1]
        assert kernels.reductions(x, out) is None
        total, high, low, warp, positive, ballot, above, below = out.reshape(8, THREADS)
        np.testing.assert_allclose(total, x.astype(np.float64).sum(), rtol=1e-5)
        assert (high == x.max()).all()
        assert (low == x.min()).all()
        halves = x.reshape(2, 32)
        np.testing.assert_allclose(warp, np.repeat(halves.sum(axis=1), 32), rtol=1e-5)
        assert (positive == (x > 0).sum()).all()
        assert (ballot == np.repeat((halves > 0).sum(axis=1), 32)).all()
        lane = np.arange(THREADS) % 32
        np.testing.assert_array_equal(above, np.where(lane % 16 == 0, x, np.roll(x, 1)))
        np.testing.assert_array_equal(below, np.where(lane > 28, x, np.roll(x, -3)))

    def test_nan_reaches_the_maximum(self, kernels, data, order):
        kernels.emulator.order(order)
        x, out = data[0][:THREADS].copy(), data[1]
        x[37] = np.nan
        assert kernels.reductions(x, out) is None
        assert np.isnan(out[: 3 * THREADS]).all()

    def test_atomics_and_dynamic_shared_memory(self, kernels, order):
        kernels.emulator.order(order)
        values = np.random.default_rng(3).integers(0, 9, 500).astype(np.int32)
        out = np.zeros(9, np.int32)
        assert kernels.histogram(values, 500, out, 9, 36) is None
        np.testing.assert_array_equal(out, np.bincount(values, minlength=9))

    def test_the_last_block_reads_what_the_others_wrote(self, kernels, data, order):
        kernels.emulator.order(order)
        values, out = data
        assert kernels.last_block(values, out) is None
        np.testing.assert_allclose(out[0], values[:8].astype(np.float64).sum(), rtol=1e-5)

    def test_indices(self, kernels, order):
        kernels.emulator.order(order)
        out = np.full((12, 24), -1, np.int32)
        assert kernels.where(out) is None
        np.testing.assert_array_equal(out, np.arange(12)[:, None] * 1000 + np.arange(24))


MISTAKES = {
    "missing_barrier": (r"before it is written|race on shared array tile", "tile[kThreads - 1"),
    "missing_second_barrier": (r"race on shared array tile", "in[round * kThreads"),
    "missing_warp_barrier": (
        r"before it is written|race on shared array tile",
        "tile[threadIdx.x / 32",
    ),
    "written_twice": (r"race on global memory.*writes.*writes", "% kThreads] = 1;"),
    "blocks_overlap": (r"race on global memory.*block \(.,0,0\).*block", "blockIdx.x / 2"),
    "not_handed_over": (r"race on global memory.*writes.*block.*reads", "sum += out[1 + i]"),
    "not_taken_over": (r"race on global memory.*writes.*block.*reads", "sum += out[1 + i]"),
    "unwritten_shared": (
        r"shared array tile, byte 20 before it is written",
        "= tile[threadIdx.x];",
    ),
    "misaligned": (r"accesses 16 bytes at an address that is not a multiple", None),
    "wrong_mask": (r"mask that leaves its own lane out", "0x0000FFFFu"),
    "divergent_shuffle": (r"divergent warp operation in block \(0,0,0\)", "x, 2);"),
    "past_shared": (r"wrote outside the shared array tile, 0 bytes past its end|race on", None),
    "past_dynamic": (r"wrote outside the shared array dynamic shared memory, 0 bytes past", None),
    "read_past_shared": (r"reads shared memory outside any array before it is written", None),
}


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_in_every_order(kernels, data, mistake, order):
    kernels.emulator.order(order)
    pattern, place = MISTAKES[mistake]
    error = getattr(kernels, mistake)(*data)
    assert error is not None
    assert re.search(pattern, error), error
    if place is not None:
        assert f"broken.cu:{line_of(place)}" in error


def test_divergent_barrier_is_reported(kernels, data):
    error = kernels.half_at_barrier(*data)
    assert error is not None
    assert error.startswith(
        "divergent barrier in block (0,0,0): thread (0,0,0) waits at broken.cu:"
    )
    assert "thread (16,0,0) at broken.cu:" in error


def test_deadlock_counts_the_threads(kernels, data):
    error = kernels.barrier_against_shuffle(*data)
    assert error is not None
    assert error.startswith(
        "deadlock in block (0,0,0): 16 of 64 threads ((0,0,0) first) wait at the barrier"
    )
    assert "16 of 64 threads ((16,0,0) first) wait at the warp operation broken.cu:" in error


def test_a_missing_barrier_changes_the_result_in_some_order(kernels, data):
    """Without the detector the thread orders alone tell: that is what three of them are for."""
    values, out = data
    wrong = {"missing_barrier": 0, "missing_second_barrier": 0}
    right = {"missing_barrier": "reverse", "missing_second_barrier": "two_tiles"}
    for name in wrong:
        expected = np.full_like(out, np.nan)
        assert getattr(kernels, right[name])(values, expected) is None
        for order in emulator.ORDERS:
            kernels.emulator.order(order)
            with kernels.emulator.unwatched():
                assert getattr(kernels, name)(values, out) is None
            wrong[name] += not np.array_equal(out[:THREADS], expected[:THREADS])
    assert all(count > 0 for count in wrong.values())


def test_a_run_repeats_itself(kernels, data):
    values, out = data
    errors = set()
    for _ in range(3):
        kernels.emulator.order("shuffled", seed=5)
        errors.add(kernels.missing_barrier(values, out))
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_many_threads", "expected 1 to 1024 threads a block, got 1025"),
        ("empty_grid", "grid (0,1,1) is outside the device's limits"),
        ("grid_too_high", "grid (1,65536,1) is outside the device's limits"),
        ("too_much_shared", "300000 bytes of dynamic shared memory"),
    ],
)
def test_impossible_launches_are_refused(kernels, name, message):
    error = getattr(kernels, name)(np.zeros(4096, np.int32))
    assert error is not None
    assert message in error


def test_forgotten_dynamic_shared_memory(kernels):
    zeros = np.zeros(16, np.int32)
    error = kernels.histogram(zeros, 16, zeros.copy(), 9, 0)
    assert error is not None
    assert "launched with none" in error


def test_the_emulation_survives_an_error(kernels, data):
    for _ in range(2):
        assert kernels.half_at_barrier(*data) is not None
        assert kernels.reverse(*data) is None
    np.testing.assert_array_equal(data[1][:THREADS], data[0][:THREADS][::-1])


def test_portable_fibres(build_folder, data):
    """On processors other than x86-64 ucontext switches between threads."""
    kernels = Kernels(emulator.build(build_folder / "broken", "ucontext", [HERE / "broken.cu"]))
    for order in emulator.ORDERS:
        kernels.emulator.order(order)
        assert kernels.two_tiles(*data) is None
        assert kernels.reductions(*data) is None
        assert "race on shared array tile" in (kernels.missing_second_barrier(*data) or "")
        assert "divergent barrier" in (kernels.half_at_barrier(*data) or "")


SANITIZED_RUN = """
import ctypes, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
values, out = np.ones(256, np.float32), np.zeros(64, np.float32)
function = getattr(library, sys.argv[2])
function.restype = ctypes.c_char_p
pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (values, out)]
print("error:", function(*pointers))
"""


@pytest.mark.parametrize(
    ("name", "reported", "place"),
    [
        ("past_the_end", "heap-buffer-overflow", "out[threadIdx.x + 1] = 1;"),
        ("past_dynamic", "use-after-poison", None),
        ("read_past_shared", "index 64 out of bounds", "= tile[threadIdx.x + 1];"),
        ("past_shared", "index 64 out of bounds", None),
        ("reverse", None, None),
        ("two_tiles", None, None),
    ],
)
def test_the_address_sanitizer_sees_kernels(build_folder, name, reported, place):
    library = emulator.build(build_folder / "broken", "address", [HERE / "broken.cu"])
    run = subprocess.run(
        [sys.executable, "-c", SANITIZED_RUN, str(library), name],
        capture_output=True,
        text=True,
        env=emulator.sanitizer_environment(),
    )
    if reported is None:
        assert run.stdout == "error: None\n", run.stderr
    else:
        assert reported in run.stderr
        assert f"broken.cu:{line_of(place) if place else ''}" in run.stderr
        assert run.returncode != 0
