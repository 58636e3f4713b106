"""What can stop a training run: one clear line each, and the exit code of the command line."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """The batches of a step, and the terms they gave."""

    step: int
    epoch: int
    first: int
    """Number of its first batch in the epoch, from 0."""
    count: int
    terms: dict[str, float]


class TrainError(RuntimeError):
    """Training cannot start or go on; the message is one line that says why."""

    exit_code = 1


class NonFiniteLoss(TrainError):
    """A loss or gradient is NaN or infinite."""

    def __init__(self, message: str, origin: Origin | None = None) -> None:
        super().__init__(message)
        self.origin = origin


class StoppedElsewhere(TrainError):
    """Another process of this run failed and says why; this one cannot go on without it."""


class CheckpointError(TrainError):
    """A checkpoint cannot be written or read, or belongs to another method or class count."""


class Interrupted(TrainError):
    """A signal ended the run after a whole step; the checkpoint named in the message is good."""

    def __init__(self, signum: int, step: int, checkpoint: Path | None, hint: str) -> None:
        name = signal.Signals(signum).name
        kept = f"checkpoint {checkpoint}" if checkpoint is not None else "no checkpoint yet"
        super().__init__(f"stopped by {name} after step {step}; {kept}; resume with: {hint}")
        self.exit_code = 128 + signum
        self.signum = signum
        self.step = step
        self.checkpoint = checkpoint
