"""Players and phases: who moves what, when, at which rate and loss scale."""

from __future__ import annotations

import json
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastreid_vi.config import Batch, OptimConfig
from fastreid_vi.data import SysuMM01
from fastreid_vi.methods.base import Losses
from fastreid_vi.train import TrainError, train
from fastreid_vi.train.step import Stepper
from tests.train.small import Small, SmallOptions, SmallRecipe, build, recipe
from tests.train.test_step import batch

CPU = torch.device("cpu")


class Cast(Small):
    """Two phases of one player, a third of another that joins in epoch 2."""

    phases = ("warm", "joint", "critic")

    def __init__(self, num_ids: int, width: int = 8) -> None:
        super().__init__(num_ids, width)
        self.head = nn.Linear(width, num_ids)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.epoch = 1
        self.seen: list[Any] = []

    @property
    def active_phases(self) -> tuple[str, ...]:
        return self.phases if self.epoch > 1 else self.phases[:2]

    def player(self, phase: str) -> str:
        return "critic" if phase == "critic" else "network"

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        self.epoch = epoch

    def phase_parameters(self, phase: str) -> Iterable[nn.Parameter]:
        parts = {
            "warm": [self.backbone],
            "joint": [self.backbone, self.classifier],
            "critic": [self.head],
        }
        yield self.frozen
        for part in parts[phase]:
            yield from part.parameters()

    def phase_batch(self, batch: Batch, phase: str) -> Batch:
        return batch.rows(0, 4) if phase == "warm" else batch

    def training_step(self, batch: Batch, phase: str = "main") -> Losses:
        asking = {n for n, p in self.named_parameters() if p.requires_grad}
        self.seen.append((phase, len(batch.labels), asking))
        if phase != "critic":
            return super().training_step(batch, phase)
        loss = nn.functional.cross_entropy(self.head(self._pooled(batch.images)), batch.labels)
        return Losses({"id": loss}, loss)


def names(method: Cast, *prefixes: str) -> set[str]:
    return {n for n, _ in method.named_parameters() if n.startswith(prefixes)}


def moved(method: Cast, step: Stepper) -> set[str]:
    before = {n: p.detach().clone() for n, p in method.named_parameters()}
    step(batch())
    return {n for n, p in method.named_parameters() if not torch.equal(p, before[n])}


def test_only_the_phase_asks_for_gradients() -> None:
    method = Cast(3)
    method.begin_epoch(2)
    asked = [p.requires_grad for p in method.parameters()]
    step = Stepper(method, OptimConfig(lr=0.01), CPU)
    everything = names(method, "backbone", "classifier", "head")
    assert moved(method, step) == everything
    assert [(phase, rows) for phase, rows, _ in method.seen] == [
        ("warm", 4), ("joint", 6), ("critic", 6),
    ]  # fmt: skip
    assert [asking for *_, asking in method.seen] == [
        names(method, "backbone"), names(method, "backbone", "classifier"), names(method, "head"),
    ]  # fmt: skip
    assert [p.requires_grad for p in method.parameters()] == asked
    assert not method.frozen.requires_grad


def test_an_error_gives_the_parameters_back() -> None:
    class Failing(Cast):
        def training_step(self, batch: Batch, phase: str = "main") -> Losses:
            raise RuntimeError("no")

    method = Failing(3)
    asked = [p.requires_grad for p in method.parameters()]
    with pytest.raises(RuntimeError, match="no"):
        Stepper(method, OptimConfig(), CPU)(batch())
    assert [p.requires_grad for p in method.parameters()] == asked


def test_an_optimiser_holds_the_union_of_its_phases() -> None:
    method = Cast(3)
    step = Stepper(method, OptimConfig(lr=0.01), CPU)
    held = {
        name: {id(p) for group in player.optimizer.param_groups for p in group["params"]}
        for name, player in step.players.items()
    }
    by_name = dict(method.named_parameters())
    network = {id(by_name[n]) for n in names(method, "backbone", "classifier")}
    critic = {id(by_name[n]) for n in names(method, "head")}
    assert held == {"network": network, "critic": critic}
    step(batch())
    assert {n.split("/")[0] for n in step(batch())} == {"warm", "joint"}
    # Adam counts: the backbone moved in both phases, the classifier in one.
    state = step.players["network"].optimizer.state
    assert int(state[method.backbone[0].weight]["step"]) == 4
    assert int(state[method.classifier.weight]["step"]) == 2
    assert not step.players["critic"].optimizer.state


def test_a_player_that_has_not_run_comes_back() -> None:
    method = Cast(3)
    step = Stepper(method, OptimConfig(lr=0.01), CPU)
    step(batch())
    other = Cast(3)
    other.load_state_dict(method.state_dict())
    copy = Stepper(other, OptimConfig(lr=0.01), CPU)
    copy.load_state_dict(deepcopy(step.state_dict()))
    for each, steps in ((method, step), (other, copy)):
        each.begin_epoch(2)
        torch.manual_seed(1)
        steps(batch())
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    state = step.state_dict()
    del state["optimizers"]["critic"]
    with pytest.raises(KeyError):
        copy.load_state_dict(state)


def test_an_overflow_concerns_one_player_only() -> None:
    class Overflowing(Cast):
        def training_step(self, batch: Batch, phase: str = "main") -> Losses:
            losses = super().training_step(batch, phase)
            return losses._replace(total=losses.total * (1e36 if phase == "critic" else 1.0))

    method = Overflowing(3)
    method.begin_epoch(2)
    step = Stepper(method, OptimConfig(lr=0.01), CPU, precision="fp16")
    scales = {name: player.scaler.get_scale() for name, player in step.players.items()}
    assert moved(method, step) == names(method, "backbone", "classifier")
    assert step.players["critic"].scaler.get_scale() == scales["critic"] / 2
    assert step.players["network"].scaler.get_scale() == scales["network"]
    assert int(method.steps) == 2
    copy = Stepper(Overflowing(3), OptimConfig(lr=0.01), CPU, precision="fp16")
    copy.load_state_dict(step.state_dict())
    assert copy.players["critic"].scaler.get_scale() == scales["critic"] / 2


def test_a_phase_without_parameters() -> None:
    class Idle(Cast):
        def phase_parameters(self, phase: str) -> Iterable[nn.Parameter]:
            return [self.frozen] if phase == "critic" else super().phase_parameters(phase)

    with pytest.raises(TrainError, match="phase 'critic' of Idle has no trainable parameter"):
        Stepper(Idle(3), OptimConfig(), CPU)


@dataclass(frozen=True, kw_only=True)
class CastRecipe(SmallRecipe):
    model: SmallOptions = field(default_factory=SmallOptions)

    def optim_of(self, player: str) -> OptimConfig:
        return replace(self.optim, lr=0.5, name="sgd") if player == "critic" else self.optim


def cast_run(tree: Path, run_dir: Path, epochs: int = 3, resume: bool = False) -> Cast:
    small = recipe(eval_every=0)
    chosen = CastRecipe(
        method="small", dataset="sysu", data=small.data, optim=small.optim, run=small.run,
        schedule=replace(small.schedule, epochs=epochs),
    )  # fmt: skip
    dataset = SysuMM01(tree)
    method = Cast(build(dataset, chosen).num_ids)
    torch.manual_seed(3)
    for parameter in method.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    train(method, chosen, dataset, run_dir, device="cpu", display="none", resume=resume)
    return method


def test_every_player_has_its_rate_and_resumes(tree: Path, tmp_path: Path) -> None:
    whole = cast_run(tree, tmp_path / "whole")
    cast_run(tree, tmp_path / "parts", epochs=1)  # the critic has not moved yet
    parts = cast_run(tree, tmp_path / "parts", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["kind"] == "epoch"]
    rates = [{"network": 0.01, "critic": 0.5}] * 2 + [{"network": 0.001, "critic": 0.05}]
    assert [r["lrs"] for r in records] == [pytest.approx(rate) for rate in rates]
    assert [r["lr"] for r in records] == [0.01, 0.01, 0.001]
    first, second, _ = [{n.split("/")[0] for n in r["terms"]} for r in records]
    assert first == {"warm", "joint"}
    assert second == {"warm", "joint", "critic"}
