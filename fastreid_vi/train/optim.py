"""Optimiser, its parameter groups, and the learning rate of an epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastreid_vi.config import OptimConfig, ScheduleConfig
from fastreid_vi.methods.base import Method
from fastreid_vi.train.errors import TrainError


def lr_at(epoch: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Base learning rate during `epoch`.

    Steps: lr * gamma^m, m = milestones before `epoch` (a milestone itself still has the old rate).
    Warm-up of n epochs: times a factor that rises linearly from `warmup_start` in epoch 1 to 1 in
    epoch n.

    Args:
        epoch: 1-based.
        optim: holds the base rate.
        schedule: milestones, gamma, warm-up.
    Returns:
        The rate before `backbone_lr_scale`.
    Raises:
        ValueError: `epoch` < 1.
    Spec: mpanet 4, lba 4. Golden: mpanet/sampler_schedule, lba/sampler_schedule.
    """
    if epoch < 1:
        raise ValueError(f"epoch: expected >= 1, got {epoch}")
    passed = sum(epoch > milestone for milestone in schedule.milestones)
    return optim.lr * schedule.gamma**passed * _warmup(epoch, schedule)


def _warmup(epoch: int, schedule: ScheduleConfig) -> float:
    length, start = schedule.warmup_epochs, schedule.warmup_start
    if epoch > length:
        return 1.0
    return start + (1.0 - start) * (epoch - 1) / max(length - 1, 1)


def phase_parameters(method: Method, phase: str) -> list[tuple[str, nn.Parameter]]:
    """Named trainable parameters that the optimiser of `phase` moves.

    Raises:
        TrainError: there are none.
    """
    chosen = {id(p) for p in method.phase_parameters(phase)}
    named = [(n, p) for n, p in method.named_parameters() if id(p) in chosen and p.requires_grad]
    if not named:
        raise TrainError(f"phase {phase!r} of {type(method).__name__} has no trainable parameter")
    return named


def build_optimizer(
    named: list[tuple[str, nn.Parameter]], config: OptimConfig, *, fused: bool | None = None
) -> Optimizer:
    """Adam with coupled L2 or SGD over one group, or two when the backbone has a rate of its own.

    Every group carries `lr_scale`, the factor that `set_lr` applies.

    Args:
        named: names and parameters; names that begin with `backbone.` form the backbone group.
        config: names the optimiser and its numbers.
        fused: one kernel for all parameters; None leaves the choice to PyTorch.
    Raises:
        TrainError: `backbone_lr_scale` is set but no parameter belongs to a backbone.
    Spec: mpanet 4 (one group, L2 in the gradient, BN and biases included).
    """
    backbone = [p for n, p in named if n.startswith("backbone.")]
    rest = [p for n, p in named if not n.startswith("backbone.")]
    if config.backbone_lr_scale == 1.0:
        groups = [{"params": [p for _, p in named], "lr_scale": 1.0}]
    elif not backbone:
        raise TrainError("backbone_lr_scale: expected parameters under `backbone`, found none")
    else:
        groups = [{"params": backbone, "lr_scale": config.backbone_lr_scale}]
        groups += [{"params": rest, "lr_scale": 1.0}] if rest else []
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused}
    optimizer: Optimizer
    if config.name == "adam":
        optimizer = torch.optim.Adam(groups, betas=config.betas, **shared)
    else:
        momentum, nesterov = config.momentum, config.nesterov
        optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov, **shared)
    set_lr(optimizer, config.lr)
    return optimizer


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group `lr` times its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
