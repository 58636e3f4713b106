"""Players: an optimiser with its loss scaler, and the phases that it moves parameters in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from fastreid_vi.config import OptimConfig
from fastreid_vi.methods.base import Method
from fastreid_vi.train.optim import build_optimizer, phase_parameters, set_lr


@dataclass
class Player:
    """One optimiser over all parameters of its phases, with a loss scale of its own.

    A scale for each: players differ in the size of their gradients, and a scaler wants to be
    updated between two steps of an optimiser.
    """

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    clip: float

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the scaled loss."""
        torch.autograd.backward(self.scaler.scale(loss))

    def step(self, parameters: list[nn.Parameter]) -> bool:
        """Clip, move the parameters that have a gradient, adapt the scale.

        Returns:
            Whether they moved: not where the scaled gradient overflowed.
        """
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(parameters, self.clip)
        if not self.scaler.is_enabled():
            self.optimizer.step()
            return True
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before  # it falls when the step was left out

    def state_dict(self) -> dict[str, Any]:
        """Moments of the parameters that have moved so far, and the scale."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}


@dataclass(frozen=True)
class Phase:
    """A phase of the iteration: what it moves, and what must not ask for gradients meanwhile."""

    name: str
    player: str
    parameters: list[nn.Parameter]
    others: list[nn.Parameter]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Only this phase's parameters ask for gradients inside; afterwards all that did before."""
        switched = [p for p in self.others if p.requires_grad]
        for parameter in switched:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in switched:
                parameter.requires_grad_(True)


def phases_of(method: Method) -> dict[str, Phase]:
    """All phases a method can have, by name.

    Raises:
        TrainError: one without a trainable parameter.
    """
    found = {}
    for name in method.phases:
        own = [p for _, p in phase_parameters(method, name)]
        ids = {id(p) for p in own}
        others = [p for p in method.parameters() if p.requires_grad and id(p) not in ids]
        found[name] = Phase(name, method.player(name), own, others)
    return found


def players_of(
    method: Method,
    phases: Iterable[Phase],
    config: OptimConfig | Mapping[str, OptimConfig],
    device: torch.device,
    *,
    scaled: bool,
) -> dict[str, Player]:
    """One player per name; its optimiser holds the union of the parameters of its phases.

    Args:
        method: gives the parameters their names and order.
        phases: all of the method's.
        config: one for every player, or one by player.
        device: of the loss scalers.
        scaled: whether losses are scaled (float16).
    Raises:
        KeyError: a player without a configuration.
    """
    moved: dict[str, set[int]] = {}
    for phase in phases:
        moved.setdefault(phase.player, set()).update(map(id, phase.parameters))
    players = {}
    for name, ids in moved.items():
        own = config if isinstance(config, OptimConfig) else config[name]
        named = [(n, p) for n, p in method.named_parameters() if id(p) in ids]
        scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        players[name] = Player(build_optimizer(named, own, fused=True), scaler, own.clip_norm)
    return players


def set_rates(players: Mapping[str, Player], rate: float | Mapping[str, float]) -> None:
    """Base rate of every player, or of each by its name."""
    for name, player in players.items():
        set_lr(player.optimizer, rate if isinstance(rate, float) else rate[name])
