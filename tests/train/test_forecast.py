"""The forecast of memory: near what a real step keeps, without a trace, and never in the way."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastreid_vi import methods
from fastreid_vi.config import Batch, OptimConfig
from fastreid_vi.data import SysuMM01
from fastreid_vi.methods.base import Losses
from fastreid_vi.train import forecast as forecasts
from fastreid_vi.train import train
from fastreid_vi.train.forecast import describe, forecast, free_memory
from fastreid_vi.train.step import autocast
from tests.train.small import Small, build, recipe, run

CPU = torch.device("cpu")


def case(name: str) -> tuple[Any, Any, Batch]:
    published = methods.recipe(name, "sysu")
    data = replace(published.data, height=96, width=48, identities=4, images=4)
    model = replace(published.model, depth=18, weights="none")
    chosen = replace(published, data=data, model=model)
    method = methods.from_recipe(chosen, 20)
    labels = torch.arange(4).repeat_interleave(2).repeat(2)
    modality = torch.arange(2).repeat_interleave(8)
    images = torch.randn(16, 3, 96, 48)
    return method, chosen, Batch(images, labels, modality, torch.ones_like(labels), 2)


def measured(method: Any, batch: Batch, phase: str, dtype: torch.dtype) -> int:
    """Bytes of all storages that a real forward pass keeps for backward, weights left out."""
    own = {t.untyped_storage().data_ptr() for t in (*method.parameters(), *method.buffers())}
    own.add(batch.images.untyped_storage().data_ptr())
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, autocast(CPU, dtype):
        losses = method(method.phase_batch(batch, phase), phase)
    assert losses.total.requires_grad
    return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["baseline", "mpanet", "lba", "mcja"])
def test_activations_within_15_percent(name: str, dtype: torch.dtype) -> None:
    method, chosen, batch = case(name)
    found = forecast(method, chosen, rows=16, paired=2, dtype=dtype)
    with torch.random.fork_rng():
        most = max(measured(method, batch, phase, dtype) for phase in method.phases)
    assert found.activations == pytest.approx(most, rel=0.15)
    assert most > 10e6


def test_parameters_gradients_and_moments() -> None:
    method = Small(3, width=64)
    method.dropout.weight = torch.nn.Parameter(torch.ones(1000), requires_grad=False)
    moved = sum(4 * p.numel() for p in method.parameters() if p.requires_grad)
    buffers = sum(b.nbytes for b in method.buffers())
    chosen = recipe(accumulate=3)
    found = forecast(method, chosen, rows=12, paired=0)
    assert found.weights == moved + 4000 + buffers
    assert (found.gradients, found.optimizer) == (moved, 2 * moved)
    assert found.batch == 3 * 4 * 12 * 3 * 24 * 12
    assert found.total == sum(vars(found).values())
    for config, copies in ((OptimConfig(name="sgd"), 1), (OptimConfig(name="sgd", momentum=0), 0)):
        other = forecast(method, replace(chosen, optim=config), rows=12, paired=0)
        assert other.optimizer == copies * moved
    assert forecast(method, chosen, rows=24, paired=0).activations > 1.9 * found.activations


def test_nothing_is_disturbed(tree: Path, tmp_path: Path) -> None:
    method, chosen, _ = case("lba")
    method.eval()
    state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    asked = [p.requires_grad for p in method.parameters()]
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert describe(method, chosen, CPU, rows=16, paired=2)[0].startswith("forecast: ")
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1]
    np.testing.assert_array_equal(np.random.get_state()[1], draws[2])
    assert not method.training
    assert [p.requires_grad for p in method.parameters()] == asked
    assert all(torch.equal(tensor, state[name]) for name, tensor in method.state_dict().items())
    for name, asked_for in (("with", True), ("without", False)):
        run(tree, tmp_path / name, recipe(eval_every=0), forecast=asked_for)
    final = "checkpoints/last/model.safetensors"
    assert (tmp_path / "with" / final).read_bytes() == (tmp_path / "without" / final).read_bytes()


def test_said_at_the_start(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tree, tmp_path / "run", display="plain", forecast=True)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("forecast: 0.0 GiB (weights 0.00, ")
    assert first.endswith("GiB free on this machine")


def test_a_step_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "free_memory", lambda device: (2**20, "Small Card"))
    method, chosen, _ = case("baseline")
    said = describe(method, chosen, CPU, rows=16, paired=2)
    assert said[0].endswith("; 0.0 GiB free on Small Card")
    assert said[1].startswith("warning: a step needs ")
    assert "lower data.identities or data.images" in said[1]


def test_a_method_that_needs_values(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Reading(Small):
        def training_step(self, batch: Batch, phase: str = "main") -> Losses:
            if float(batch.images.max()) > 1e6:
                raise ValueError("bright")
            return super().training_step(batch, phase)

    method = build(SysuMM01(tree), recipe())
    method.__class__ = Reading
    said = describe(method, recipe(), CPU, rows=12, paired=0)
    assert len(said) == 1
    assert said[0].startswith("no forecast of memory: DataDependentOutputException: ")
    options = {"device": "cpu", "display": "plain", "forecast": True}
    train(method, recipe(), SysuMM01(tree), tmp_path / "run", **options)
    assert "no forecast of memory" in capsys.readouterr().err


def test_free_memory() -> None:
    found = free_memory(CPU)
    assert found is not None
    assert 2**20 < found[0] < 2**50
