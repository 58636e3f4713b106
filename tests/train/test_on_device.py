"""Published training steps on a GPU: at their official size, and without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks.steps import training
from fastreid_vi import methods

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    work = training(name, CUDA, small=True)
    for _ in range(2):  # kernels are compiled, optimiser states made
        work.stepper(work.batch)
    with waiting_is_an_error():
        terms = work.stepper(work.batch)
    assert all(bool(term.isfinite()) for term in terms.values())


def test_waiting_is_noticed() -> None:
    values = torch.ones(3, device=CUDA)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        bool(values.sum() > 0)


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_official_size(name: str) -> None:
    work = training(name, CUDA, small=False)
    for _ in range(3):
        terms = work.stepper(work.batch)
    assert all(bool(term.isfinite()) for term in terms.values())
    assert {term.device.type for term in terms.values()} == {"cuda"}
