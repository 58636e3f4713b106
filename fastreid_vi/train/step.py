"""One training step: every phase forward, backward and update, in the precision asked for.

A step is one move of every active phase's optimiser. It takes one batch, or with
`RunConfig.accumulate` a group of consecutive batches whose gradients are averaged; the last group
of an epoch may be smaller.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreid_vi._checks import NonFiniteError
from fastreid_vi._distributed import equal_shares
from fastreid_vi.config import Batch, OptimConfig, Precision
from fastreid_vi.methods.base import Method
from fastreid_vi.train.errors import NonFiniteLoss, TrainError
from fastreid_vi.train.nonfinite import Undo, all_finite
from fastreid_vi.train.players import Phase, phases_of, players_of, set_rates

if TYPE_CHECKING:
    from fastreid_vi.train.distributed import Team

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
    # Batches out of a pack are in channels_last already.
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.contiguous(memory_format=layout)
    return Batch(images, labels, modality, cams, batch.paired)


class Stepper:
    """Owns a method's players and makes its steps.

    Args:
        method: moved to `device` in place.
        config: the optimiser, the same for every player or one by player.
        device: where the step runs.
        precision: as in `RunConfig`.
        channels_last: memory format of the network and its images.
        compiled: compile the backbone.
        skip_nonfinite: take a step back whose loss or gradient is not finite.
        team: the other processes of the run, if there are any.
    """

    def __init__(
        self,
        method: Method,
        config: OptimConfig | Mapping[str, OptimConfig],
        device: torch.device,
        *,
        precision: Precision = "auto",
        channels_last: bool = True,
        compiled: bool = False,
        skip_nonfinite: bool = False,
        team: Team | None = None,
    ) -> None:
        self.method, self.device, self.channels_last = method, device, channels_last
        self.dtype = compute_dtype(precision, device)
        self._skip, self._team = skip_nonfinite, team
        method.to(device)
        if channels_last:
            method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.phases = phases_of(method)
        self.players = players_of(
            method, self.phases.values(), config, device, scaled=self.dtype == torch.float16
        )
        if compiled:
            method.compile_backbone()

    def set_lr(self, lr: float | Mapping[str, float]) -> None:
        """Base rate of every player, or of each by its name."""
        set_rates(self.players, lr)

    def __call__(self, *batches: Batch) -> dict[str, Tensor]:
        """Run all active phases on a group of batches.

        Returns:
            Detached scalars on the device, means over the group and over processes: terms and
            `total`, after "phase/" if the method has several.
        Raises:
            NonFiniteLoss: the embeddings hold NaN or infinity and a loss cannot rank them.
            SkippedStep: with `skip_nonfinite`; everything is as it was before the step.
        """
        group = [move(batch, self.device, self.channels_last) for batch in batches]
        active = [self.phases[name] for name in self.method.active_phases]
        undo = None
        if self._skip:
            undo = Undo(self.method, self.players if len(active) > 1 else {})
        terms: dict[str, Tensor] = {}
        for phase in active:
            new, finite = self._run(phase, group)
            prefix = f"{phase.name}/" if len(self.phases) > 1 else ""
            terms.update({prefix + name: value for name, value in new.items()})
            if undo is not None and not finite:
                undo()
                self.method.zero_grad(set_to_none=True)
                raise SkippedStep({name: float(value) for name, value in terms.items()})
        return terms

    def _run(self, phase: Phase, group: Sequence[Batch]) -> tuple[dict[str, Tensor], bool]:
        """Terms of a phase, and False instead of an update where they are not finite (skipping)."""
        player = self.players[phase.player]
        self.method.zero_grad(set_to_none=True)
        with phase.alone():
            try:
                terms = _mean([self._backward(phase, batch, len(group)) for batch in group])
            except NonFiniteError as error:  # a loss that ranks cannot go on with NaN
                if not self._skip:
                    raise NonFiniteLoss(f"loss is not finite: {error}") from error
                terms = None
        if self._skip and self._anywhere(terms is None):
            return {"total": torch.tensor(torch.nan)}, False
        assert terms is not None
        if self._team is not None:
            self._team.average_gradients(phase.parameters)
            terms = self._team.mean(terms)
        if self._skip and not self._good(terms, phase, scaled=player.scaler.is_enabled()):
            return terms, False
        if player.step(phase.parameters):
            self.method.after_step()
        return terms, True

    def _backward(self, phase: Phase, batch: Batch, share: int) -> dict[str, Tensor]:
        # Shares of a batch hold as many rows in every process: losses need not ask.
        with autocast(self.device, self.dtype), equal_shares():
            losses = self.method(self.method.phase_batch(batch, phase.name), phase.name)
        total = losses.total if share == 1 else losses.total / share
        self.players[phase.player].backward(total)
        named = {**losses.terms, "total": losses.total}
        return {name: value.detach() for name, value in named.items()}

    def _anywhere(self, flag: bool) -> bool:
        return flag if self._team is None else self._team.any(flag)

    def _good(self, terms: dict[str, Tensor], phase: Phase, *, scaled: bool) -> bool:
        # Scaled gradients may overflow: that is the scaler's business.
        grads = [] if scaled else [p.grad for p in phase.parameters if p.grad is not None]
        return bool(all_finite([*terms.values(), *grads]))

    def state_dict(self) -> dict[str, Any]:
        """Optimisers and scalers by player, for a checkpoint."""
        states = {name: player.state_dict() for name, player in self.players.items()}
        return {
            "optimizers": {name: state["optimizer"] for name, state in states.items()},
            "scalers": {name: state["scaler"] for name, state in states.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            KeyError, ValueError: other players or parameters.
        """
        for name, player in self.players.items():
            player.optimizer.load_state_dict(state["optimizers"][name])
            if state["scalers"][name]:
                player.scaler.load_state_dict(state["scalers"][name])


class SkippedStep(Exception):
    """A step that was taken back; no error, for the caller asked to go on."""

    def __init__(self, terms: dict[str, float]) -> None:
        super().__init__("the step was not finite")
        self.terms = terms


def _mean(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Terms of a group of batches, each averaged over the batches that have it."""
    if len(rows) == 1:
        return rows[0]
    names = dict.fromkeys(name for row in rows for name in row)
    return {n: torch.stack([row[n] for row in rows if n in row]).mean() for n in names}
