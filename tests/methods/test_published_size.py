"""Baseline and MPANet: a step at the published size, and work that does not grow with the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastreid_vi import methods
from fastreid_vi.config import Batch


class Counted(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def paired(count: int, ids: int, height: int, width: int) -> Batch:
    """Visible rows, then infrared ones, identity by identity."""
    generator = torch.Generator().manual_seed(5)
    half = torch.arange(ids).repeat_interleave(count // ids // 2)
    modality = torch.tensor([0, 1]).repeat_interleave(count // 2)
    images = torch.randn(count, 3, height, width, generator=generator)
    return Batch(images, torch.cat((half, half)), modality, modality + 2, count // ids // 2)


@pytest.mark.parametrize(("name", "ceiling"), [("baseline", 500), ("mpanet", 600)])
def test_work_per_step_does_not_grow_with_the_batch(name: str, ceiling: int) -> None:
    calls = []
    for count, ids in ((8, 2), (24, 4)):
        torch.manual_seed(0)
        network = methods.create(name, 4, depth=18, weights="none")
        batch = paired(count, ids, 64, 32)
        with Counted() as counter:
            network.training_step(batch).total.backward()
        calls.append(counter.calls)
    assert calls[0] == calls[1] < ceiling


@pytest.mark.parametrize("name", ["baseline", "mpanet"])
def test_one_step_at_the_published_size(name: str) -> None:
    recipe = methods.recipe(name, "sysu")
    torch.manual_seed(0)
    network = methods.create(name, 395, weights="none")
    losses = network(paired(4, 2, recipe.data.height, recipe.data.width))
    losses.total.backward()
    assert bool(losses.total.isfinite())
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert bool(parameter.grad.isfinite().all()), key
