"""Whole training steps: our rooms against the same step on reference ops only.

On a GPU the published size (ResNet-50, official batch and images), on a CPU a small variant. The
first step of both gives the same loss before anything is timed.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import fastreid_vi
from benchmarks.conftest import DEVICE, GPU
from benchmarks.steps import training
from fastreid_vi import methods

ROOMS = ("cuda" if GPU else "cpu", "reference")


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("name", methods.METHODS)
def test_training_step(benchmark: Any, name: str, room: str) -> None:
    device = torch.device(DEVICE)
    with fastreid_vi.backend("reference"):
        plain = total(training(name, device, small=not GPU))
    work = training(name, device, small=not GPU)
    benchmark.group = f"training_step {work.shape}"

    def step() -> None:
        work.stepper(work.batch)
        if GPU:
            torch.cuda.synchronize()

    with fastreid_vi.backend("reference") if room == "reference" else nullcontext():
        assert total(work) == pytest.approx(plain, rel=0.05)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        benchmark.pedantic(step, rounds=20 if GPU else 2, warmup_rounds=5 if GPU else 1)
    seconds = benchmark.stats.stats.median if benchmark.stats else float("nan")
    benchmark.extra_info.update(
        op="training_step",
        peer=room,
        mode="training",
        shape=work.shape,
        images_per_second=len(work.batch.labels) / seconds,
        precision=str(work.stepper.dtype).removeprefix("torch."),
        peak_memory=torch.cuda.max_memory_allocated() if GPU else None,
        threads=torch.get_num_threads(),
    )


def total(work: Any) -> float:
    """Sum of all phases' losses in one step."""
    terms = work.stepper(work.batch)
    return sum(float(value) for name, value in terms.items() if name.endswith("total"))
