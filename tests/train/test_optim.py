"""Schedules and parameter groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastreid_vi.config import OptimConfig, ScheduleConfig
from fastreid_vi.train.errors import TrainError
from fastreid_vi.train.optim import build_optimizer, lr_at, phase_parameters, set_lr
from tests.conftest import golden
from tests.train.small import Small


@pytest.mark.parametrize(("name", "milestones"), [("lr_sysu", (80, 120)), ("lr_regdb", (110,))])
def test_mpanet_rates(name: str, milestones: tuple[int, ...]) -> None:
    table = golden("mpanet/sampler_schedule")
    schedule = ScheduleConfig(epochs=140, milestones=milestones)
    ours = [lr_at(int(e), OptimConfig(lr=3.5e-4), schedule) for e in table["epoch"]]
    np.testing.assert_allclose(ours, table[name], rtol=1e-12)


def test_lba_rates_with_warmup_and_a_slower_backbone() -> None:
    table = golden("lba/sampler_schedule")
    schedule = ScheduleConfig(epochs=81, milestones=(20, 50), warmup_epochs=10, warmup_start=0.1)
    optim = OptimConfig(name="sgd", lr=0.1, backbone_lr_scale=0.1)
    optimizer = build_optimizer(phase_parameters(Small(3), "main"), optim)
    for index, (base, head) in enumerate(zip(table["lr_base"], table["lr_head"], strict=True)):
        set_lr(optimizer, lr_at(index + 1, optim, schedule))
        rates = [group["lr"] for group in optimizer.param_groups]
        np.testing.assert_allclose(rates, [base, head], rtol=1e-12)


@given(
    epochs=st.integers(1, 60),
    milestones=st.sets(st.integers(1, 60), max_size=4),
    warmup=st.integers(0, 12),
    start=st.floats(0.01, 1.0),
)
def test_schedule_laws(epochs: int, milestones: set[int], warmup: int, start: float) -> None:
    schedule = ScheduleConfig(
        epochs=epochs,
        milestones=tuple(sorted(milestones)),
        warmup_epochs=warmup,
        warmup_start=start,
    )
    optim = OptimConfig(lr=1.0)
    plain = replace(schedule, warmup_epochs=0)
    rates = [lr_at(e, optim, schedule) for e in range(1, epochs + 1)]
    steps = [lr_at(e, optim, plain) for e in range(1, epochs + 1)]
    for e, (rate, step) in enumerate(zip(rates, steps, strict=True), 1):
        assert step == pytest.approx(0.1 ** len([m for m in milestones if m < e]))
        assert rate <= step * (1 + 1e-12)
        if e > warmup:
            assert rate == step
    if warmup:
        assert rates[0] == pytest.approx(start)
    if 1 < warmup <= epochs:
        assert rates[warmup - 1] == pytest.approx(steps[warmup - 1])


def test_epoch_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="epoch: expected >= 1, got 0"):
        lr_at(0, OptimConfig(), ScheduleConfig(epochs=3))


def test_one_group_decays_biases_and_batch_norm_too() -> None:
    method = Small(3)
    optimizer = build_optimizer(phase_parameters(method, "main"), OptimConfig(weight_decay=0.1))
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert len(optimizer.param_groups[0]["params"]) == len(list(method.parameters()))


@pytest.mark.parametrize("fused", [None, True])
def test_adam_couples_weight_decay_into_the_gradient(fused: bool | None) -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer([("w", weight)], config, fused=fused)
    gradient = torch.tensor([0.25, 0.5], dtype=torch.float64)
    total = gradient + 0.5 * weight.detach()
    first, second = 0.1 * total, 0.001 * total**2
    wanted = weight.detach() - 0.1 * (first / 0.1) / ((second / 0.001).sqrt() + 1e-8)
    weight.grad = gradient
    optimizer.step()
    torch.testing.assert_close(weight.detach(), wanted, rtol=1e-12, atol=0)


def test_sgd_has_its_momentum() -> None:
    config = OptimConfig(name="sgd", momentum=0.8, nesterov=True)
    group = build_optimizer(phase_parameters(Small(2), "main"), config).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.8, True)


def test_frozen_parameters_are_left_out() -> None:
    method = Small(3)
    method.classifier.bias.requires_grad_(False)
    assert "classifier.bias" not in dict(phase_parameters(method, "main"))


def test_a_phase_moves_its_own_parameters() -> None:
    class Players(Small):
        phases = ("encoder", "head")

        def phase_parameters(self, phase: str) -> list[torch.nn.Parameter]:
            part = self.backbone if phase == "encoder" else self.classifier
            return list(part.parameters())

    method = Players(3)
    assert all(name.startswith("backbone.") for name, _ in phase_parameters(method, "encoder"))
    assert set(dict(phase_parameters(method, "head"))) == {"classifier.weight", "classifier.bias"}


def test_nothing_to_train_is_an_error() -> None:
    method = Small(3).requires_grad_(False)
    with pytest.raises(TrainError, match="phase 'main' of Small has no trainable parameter"):
        phase_parameters(method, "main")


def test_backbone_rate_without_a_backbone_is_an_error() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(TrainError, match="backbone_lr_scale: expected parameters under `backbone`"):
        build_optimizer([("head.w", weight)], OptimConfig(backbone_lr_scale=0.1))
