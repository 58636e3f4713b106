"""What besides weights and optimisers decides how a run goes on: counters, means, random states."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Means:
    """Running sums of named numbers; a checkpoint keeps their bits, so resumed means are equal."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        """Count one step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means so far; starts over."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


@dataclass
class Progress:
    """Where a run stands; plain JSON."""

    epoch: int = 1  # 1-based, the epoch of the next batch
    step: int = 0  # steps done since the start
    skipped: int = 0  # of them left out because they were not finite
    metrics_bytes: int = 0  # length of metrics.jsonl that belongs to these steps
    window: Means = field(default_factory=Means)  # since the last step record
    whole: Means = field(default_factory=Means)  # since the epoch began
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain form for `state.json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """Inverse of `to_json`.

        Raises:
            TypeError, KeyError: not written by `to_json`.
        """
        means = {name: Means(**values[name]) for name in ("window", "whole")}
        return cls(**{**values, **means})


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device: weights made next depend on `seed` only."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def stream_seed(seed: int, rank: int) -> int:
    """Seed of what process `rank` draws while training; process 0 draws as a single one would."""
    return seed if rank == 0 else (seed + rank * 0x9E3779B97F4A7C15) % 2**63


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all generators a method might draw from, as tensors and plain numbers."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Inverse of `random_states`; the CUDA state is used when both runs have a CUDA device."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Leave all generators as they were found, whatever the body draws.

    An evaluation must not change the training after it: a run without one gives the same weights.
    """
    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(states, device)
