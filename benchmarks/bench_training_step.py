"""Whole training steps, from bytes on the host to moved parameters, in four forms.

`ours`; `published`, the same method computing with the published formulations; `reference`, with
our ops in plain PyTorch; `backbone`, the same images through the bare network. On a GPU the
published size (ResNet-50, official batch and images), on a CPU a small variant. `overhead` is the
time of a step over that of the bare backbone, minus one.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks.clock import host_seconds
from benchmarks.conftest import DEVICE, GPU
from benchmarks.counts import counts
from benchmarks.memory import extra_memory
from benchmarks.steps import FORMS, step_of
from fastreid_vi import methods

BUDGET = 2.0  # seconds of timed steps on a CPU


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", methods.METHODS)
def bench_training_step(benchmark: Any, name: str, form: str, rehearsal: bool) -> None:
    with step_of(name, form, torch.device(DEVICE), small=not GPU) as step:
        benchmark.group = f"training_step {step.shape}"
        benchmark.extra_info.update(
            op="training_step", peer=form, mode="training", shape=step.shape,
            precision=step.precision, threads=torch.get_num_threads(),
        )  # fmt: skip
        if form in ("ours", "published"):
            expected = first_loss(name)
            # Published code sums in another order, and random networks have large losses.
            assert total(step.run()) == pytest.approx(expected, rel=0.05)
        if rehearsal:
            benchmark.pedantic(step.run)
            return

        def finished() -> None:
            step.run()
            if GPU:
                torch.cuda.synchronize()

        rounds = 20 if GPU else max(2, min(20, int(BUDGET / host_seconds(finished))))
        benchmark.pedantic(finished, rounds=rounds, warmup_rounds=5 if GPU else 0)
        found: dict[str, Any] = {}
        memory = extra_memory(lambda: found.update(counts(step.run)))
        per_second = step.images / benchmark.stats.stats.median
        benchmark.extra_info.update(images_per_second=per_second, extra_memory=memory, **found)


@functools.cache
def first_loss(name: str) -> float:
    """Of the first step on reference ops."""
    with step_of(name, "reference", torch.device(DEVICE), small=not GPU) as step:
        return total(step.run())


def total(terms: Any) -> float:
    """Sum of all phases' losses in one step."""
    return sum(float(value) for name, value in terms.items() if name.endswith("total"))
