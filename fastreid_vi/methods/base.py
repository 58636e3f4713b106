"""What every method is: a network with `embed` for testing and `training_step` for training."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastreid_vi.backbone import Trunk
from fastreid_vi.config import INFRARED, VISIBLE, Batch

IGNORED: int = -1
"""Label that the identity losses leave out."""


class OfficialKeyError(ValueError):
    """A state dict does not have the keys of an official checkpoint; the first ones are named."""

    def __init__(
        self, missing: Iterable[str] = (), unknown: Iterable[str] = (), what: str = "checkpoint"
    ) -> None:
        self.missing, self.unknown = tuple(missing), tuple(unknown)
        faults = [
            f"{kind} {', '.join(map(repr, keys[:3]))}"
            + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            for kind, keys in (("missing", self.missing), ("unknown", self.unknown))
            if keys
        ]
        super().__init__(f"{what}: {'; '.join(faults) or 'keys do not fit'}")


class Losses(NamedTuple):
    """Named scalars and the weighted sum that is minimised."""

    terms: dict[str, Tensor]
    """Every term before its weight, and detached figures worth logging (`accuracy`)."""
    total: Tensor
    """Scalar, float32 (float64 for a float64 network)."""


class Method(nn.Module, ABC):
    """A published method.

    The training loop calls, for epoch e = 1, 2, ...: `begin_epoch(e)`; for every batch and every
    one of `active_phases` in order `training_step(phase_batch(batch, phase), phase)`, backward, the
    step of that phase's optimiser, `after_step()`. Only the phase's own parameters ask for
    gradients meanwhile.
    """

    phases: ClassVar[tuple[str, ...]] = ("main",)
    """All steps an iteration can have, in order."""

    backbone: Trunk
    embed_dim: int
    num_ids: int

    @abstractmethod
    def test_features(self, images: Tensor, modality: Tensor) -> Tensor:
        """Compute what `embed` returns; the network is in evaluation mode."""

    @abstractmethod
    def training_step(self, batch: Batch, phase: str = "main") -> Losses:
        """Losses of one batch; the loop calls backward on `total`.

        Raises:
            ValueError: labels, modalities or the phase do not fit.
        """

    def embed(self, images: Tensor, modality: Tensor) -> Tensor:
        """Test-time features, with running statistics whatever mode the network is in.

        Args:
            images: [B, 3, H, W], floating, normalised.
            modality: [B] int64, `VISIBLE` or `INFRARED`.
        Returns:
            [B, embed_dim], float32 (float64 for a float64 network).
        Raises:
            TypeError, ValueError: a dtype, shape, device or value does not fit.
        """
        _vector("modality", modality, images)
        _values("modality", modality, VISIBLE, INFRARED)
        with evaluation_mode(self):
            return self.test_features(images, modality)

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        """Run `training_step`: wrappers such as DistributedDataParallel call the module itself."""
        return self.training_step(batch, phase)

    def begin_epoch(self, epoch: int) -> None:
        """Set what a method schedules by epoch (1-based)."""
        if epoch < 1:
            raise ValueError(f"epoch: expected >= 1, got {epoch}")

    @property
    def active_phases(self) -> tuple[str, ...]:
        """The phases of an iteration of the current epoch, in order."""
        return self.phases

    def player(self, phase: str) -> str:
        """Name of the optimiser of `phase`; phases of one player share its optimiser and state."""
        return phase

    def phase_batch(self, batch: Batch, phase: str) -> Batch:
        """The rows of the loader's batch that `phase` works on; all by default."""
        return batch

    def compile_backbone(self) -> None:
        """Compile what takes most of a step, in place; names of parameters stay as they are."""
        self.backbone.compile()

    def phase_parameters(self, phase: str) -> Iterable[nn.Parameter]:
        """Parameters that the optimiser of `phase` moves, those without gradient included."""
        return self.parameters()

    def after_step(self) -> None:
        """Update what follows the optimiser's step; nothing by default.

        Not called when the loss scaler skipped the step.
        """

    def check_batch(self, batch: Batch, phase: str, *, both_modalities: bool = False) -> None:
        """Check labels, modalities and phase before any work.

        Values are read on CPU always, on CUDA only with FASTREID_VI_CHECK_VALUES=1 (it would wait
        for the device).

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if phase not in self.phases:
            raise ValueError(f"phase: expected one of {', '.join(self.phases)}, got {phase!r}")
        _vector("labels", batch.labels, batch.images)
        _vector("modality", batch.modality, batch.images)
        _values("labels", batch.labels, IGNORED, self.num_ids - 1)
        _values("modality", batch.modality, VISIBLE, INFRARED)
        if both_modalities and _values_are_read(batch.modality):
            for name, value in (("visible", VISIBLE), ("infrared", INFRARED)):
                if not bool((batch.modality == value).any()):
                    raise ValueError(f"modality: expected images of both modalities, got no {name}")


def _vector(name: str, tensor: Tensor, images: Tensor) -> None:
    rows = images.shape[0]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected int64 of shape [{rows}], got {type(tensor).__name__}")
    if tensor.dtype != torch.int64 or tuple(tensor.shape) != (rows,):
        kind = TypeError if tensor.dtype != torch.int64 else ValueError
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise kind(f"{name}: expected int64 of shape [{rows}], got {dtype} {list(tensor.shape)}")
    if tensor.device != images.device:
        raise ValueError(f"{name}: expected device {images.device}, got {tensor.device}")


def _values_are_read(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or os.environ.get("FASTREID_VI_CHECK_VALUES") == "1"


def _values(name: str, tensor: Tensor, low: int, high: int) -> None:
    if tensor.numel() == 0 or not _values_are_read(tensor):
        return
    least, most = int(tensor.min()), int(tensor.max())
    if least < low or most > high:
        raise ValueError(
            f"{name}: expected values from {low} to {high}, got {least if least < low else most}"
        )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every submodule's own mode afterwards."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def widened(tensor: Tensor) -> Tensor:
    """float32 for half precision: losses and distances are never computed in less."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows [B, n] that have a label, 0 with a graph where there are none."""
    counted = (labels != IGNORED).sum().clamp(min=1)
    total = functional.cross_entropy(widened(logits), labels, ignore_index=IGNORED, reduction="sum")
    return total / counted


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Fraction of rows whose largest logit is their label's; no gradient."""
    return (logits.detach().argmax(1) == labels).float().mean()
