"""One training step: every phase forward, backward and update, in the precision asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fastreid_vi._checks import NonFiniteError
from fastreid_vi.config import Batch, OptimConfig, Precision
from fastreid_vi.methods.base import Losses, Method
from fastreid_vi.train.errors import TrainError
from fastreid_vi.train.optim import build_optimizer, phase_parameters, set_lr

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The autocast dtype: "auto" is bfloat16 on CUDA devices that have it, float32 elsewhere.

    Raises:
        TrainError: bfloat16 asked of a CUDA device without it.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.bfloat16 if has_bf16 else torch.float32
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise TrainError(
            f"precision: bf16 is not supported by {torch.cuda.get_device_name(device)}"
        )
    return _DTYPES[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The autocast context of `dtype`; float32 runs without."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def choose_device(device: torch.device | str | None) -> torch.device:
    """`device`, or the current CUDA device, or the CPU.

    Raises:
        TrainError: a device that this machine does not have.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise TrainError(f"device: unknown device {device!r}") from error
    if chosen.type == "cuda":
        index = chosen.index if chosen.index is not None else 0
        if index >= torch.cuda.device_count():
            raise TrainError(
                f"device: no {chosen} here, {torch.cuda.device_count()} CUDA devices found"
            )
        return torch.device("cuda", index)
    return chosen


@contextmanager
def deterministic() -> Iterator[None]:
    """Same inputs, same bits: needed to resume exactly. Ops that cannot promise it warn.

    Buffers are not filled with NaN meanwhile, and cuDNN does not pick algorithms by racing them.
    """
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # read when the first cuBLAS handle is made
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = benchmark


def move(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    """The batch on `device`, images in the network's memory format."""
    images, labels, modality, cams = (tensor.to(device, non_blocking=True) for tensor in batch[:4])
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images, labels, modality, cams, batch.paired)


class Stepper:
    """Owns the optimisers of a method's phases and the loss scaler.

    Args:
        method: moved to `device` in place.
        config: the optimiser, the same for every phase.
        device: where the step runs.
        precision: as in `RunConfig`.
        channels_last: memory format of the network and its images.
    """

    def __init__(
        self,
        method: Method,
        config: OptimConfig,
        device: torch.device,
        *,
        precision: Precision = "auto",
        channels_last: bool = True,
    ) -> None:
        self.method, self.device, self.channels_last = method, device, channels_last
        self.dtype = compute_dtype(precision, device)
        self._clip = config.clip_norm
        method.to(device)
        if channels_last:
            method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        named = {phase: phase_parameters(method, phase) for phase in method.phases}
        self._parameters = {phase: [p for _, p in pairs] for phase, pairs in named.items()}
        self.optimizers = {
            phase: build_optimizer(pairs, config, fused=True) for phase, pairs in named.items()
        }
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def set_lr(self, lr: float) -> None:
        """Base rate of every optimiser."""
        for optimizer in self.optimizers.values():
            set_lr(optimizer, lr)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Run all phases on one batch.

        Returns:
            Detached scalars on the device: terms and `total`, after "phase/" if there are several.
        Raises:
            TrainError: the embeddings hold NaN or infinity and a loss cannot rank them.
        """
        batch = move(batch, self.device, self.channels_last)
        several = len(self.optimizers) > 1
        terms: dict[str, Tensor] = {}
        for phase, optimizer in self.optimizers.items():
            self.method.zero_grad(set_to_none=True)
            with autocast(self.device, self.dtype):
                losses = self._losses(batch, phase)
            torch.autograd.backward(self.scaler.scale(losses.total))
            if self._clip:
                self.scaler.unscale_(optimizer)
                clip_grad_norm_(self._parameters[phase], self._clip)
            self._update(optimizer)
            prefix = f"{phase}/" if several else ""
            named = {**losses.terms, "total": losses.total}
            terms.update({prefix + name: value.detach() for name, value in named.items()})
        return terms

    def _losses(self, batch: Batch, phase: str) -> Losses:
        try:
            losses: Losses = self.method(batch, phase)
        except NonFiniteError as error:  # a loss that ranks cannot go on with NaN
            raise TrainError(f"loss is not finite: {error}") from error
        return losses

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.scaler.is_enabled():
            optimizer.step()
            self.method.after_step()
            return
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        if (
            self.scaler.get_scale() >= before
        ):  # it falls when the gradient overflowed and the step was skipped
            self.method.after_step()

    def state_dict(self) -> dict[str, Any]:
        """Optimisers and scaler, for a checkpoint."""
        optimizers = {phase: optimizer.state_dict() for phase, optimizer in self.optimizers.items()}
        return {"optimizers": optimizers, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            KeyError, ValueError: other phases or parameters.
        """
        for phase, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][phase])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
