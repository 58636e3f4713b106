"""The C++ room of pattern pooling beyond the op's contract: threads, instruction sets, row ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastreid_vi.ops  # noqa: F401  fills the table
from fastreid_vi._dispatch import OPS

NATIVE = OPS["pattern_pool"].room("cpu")
pytestmark = pytest.mark.skipif(isinstance(NATIVE, str), reason=str(NATIVE))
CAPABILITIES = ("default", "avx2", "avx512")


def results(
    shape: tuple[int, ...],
    count: int,
    activation: str,
    layout: torch.memory_format,
    dtype: torch.dtype,
    room: str = "cpu",
) -> list[torch.Tensor]:
    """Forward and backward of a room on seeded data."""
    generator = torch.Generator().manual_seed(0)

    def values(*size: int) -> torch.Tensor:
        # Not randn: its numbers follow the instruction set.
        return (torch.randint(-300, 301, size, generator=generator) / 128).to(dtype)

    x = values(*shape).contiguous(memory_format=layout)
    weight, bias = values(count, shape[1], 1, 1) / shape[1] ** 0.5, values(count)
    pooled, maps = OPS["pattern_pool"].room(room)(x, weight, bias, activation)
    grads = values(*pooled.shape), values(*maps.shape)
    backward = OPS["pattern_pool_backward"].room(room)(*grads, x, weight, maps, activation)
    return [pooled, maps, *backward]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
def test_results_do_not_follow_the_threads(batch: int, layout: torch.memory_format) -> None:
    # One sample is shared by threads and three are dealt out: enough work for several of them.
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results((batch, 310, 18, 9), 6, "softmax", layout, torch.float32))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 12, 13])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_group_of_maps(count: int, layout: torch.memory_format) -> None:
    shape = (2, 70, 5, 7)
    exact = results(shape, count, "sigmoid", layout, torch.float64, "reference")
    for dtype, allowed in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        for got, want in zip(results(shape, count, "sigmoid", layout, dtype), exact, strict=True):
            assert (got - want).abs().max() <= allowed * want.abs().max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_nan_stays_where_it_is(layout: torch.memory_format) -> None:
    # 21 channels and 15 positions fill no vector: the tail of a row lies beside its neighbour.
    x = torch.rand(3, 21, 5, 3).contiguous(memory_format=layout)
    weight = torch.rand(6, 21, 1, 1)
    forward = OPS["pattern_pool"].room("cpu")
    clean_pooled, clean_maps = forward(x, weight, None, "sigmoid")
    x[1, 4, 2, 2] = float("nan")
    pooled, maps = forward(x, weight, None, "sigmoid")
    assert maps[1, :, 2, 2].isnan().all()
    assert pooled[1].isnan().all()
    maps[1, :, 2, 2] = clean_maps[1, :, 2, 2]
    assert torch.equal(maps, clean_maps)
    assert torch.equal(pooled[::2], clean_pooled[::2])


def digest(path: str) -> None:
    """What a process with other instruction sets computes (see the test below)."""
    runs = [
        results((2, 70, 9, 5), count, activation, layout, dtype)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        for layout in (torch.contiguous_format, torch.channels_last)
        for count, activation in ((6, "sigmoid"), (13, "softmax"))
    ]
    torch.save(runs, path)


def test_instruction_sets_agree(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    saved = []
    for capability in CAPABILITIES:
        file = tmp_path / f"{capability}.pt"
        code = f"from tests.ops.test_pattern_tiles import digest; digest({str(file)!r})"
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(root)}
        subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, check=True)
        saved.append(torch.load(file))
    for other in saved[1:]:
        for run, reference in zip(other, saved[0], strict=True):
            for got, want in zip(run, reference, strict=True):
                ulp = torch.finfo(got.dtype).eps
                scale = want.double().abs().max().item()
                error = (got.double() - want.double()).abs().max().item()
                assert error <= 32 * ulp * scale + 1e-12
