"""Losses that are not finite: the batch is kept for a look, or the step is taken back."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from fastreid_vi.data.loader import TrainLoader
from fastreid_vi.methods.base import Method
from fastreid_vi.train import files
from fastreid_vi.train.errors import Origin, TrainError
from fastreid_vi.train.players import Player


def sentence(step: int, terms: Mapping[str, float]) -> str:
    """One line that names the step and its terms, those that are not finite first."""
    wrong = [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
    others = [f"{name} {value:.4g}" for name, value in terms.items() if math.isfinite(value)]
    if not wrong:
        return f"gradient is not finite at step {step}; terms: {', '.join(others) or 'none'}"
    return (
        f"loss is not finite at step {step}: {', '.join(wrong)}; "
        f"other terms: {', '.join(others) or 'none'}"
    )


def all_finite(values: Iterable[Tensor]) -> Tensor:
    """Whether every number of some tensors is finite: a bool scalar on their device."""
    tensors = list(values)
    # The largest magnitude is NaN or infinite exactly if an entry is: one pass, no overflow.
    return torch.stack([t.float() for t in torch._foreach_norm(tensors, math.inf)]).isfinite().all()


class Undo:
    """What a step may change before it turns out not to be finite, as it was before.

    Buffers, parameters that the method moves by itself, extra state of modules; and where an
    iteration has several phases also what earlier ones will have moved: parameters and optimisers.

    Args:
        method: before the step.
        players: those that may have moved when a later phase fails; none for a single phase.
    """

    def __init__(self, method: Method, players: Mapping[str, Player]) -> None:
        tensors = [
            *method.buffers(),
            *(p for p in method.parameters() if players or not p.requires_grad),
        ]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._extra = [
            (module, copy.deepcopy(module.get_extra_state()))
            for module in method.modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]
        self._players = [(p, copy.deepcopy(p.state_dict())) for p in players.values()]

    @torch.no_grad()
    def __call__(self) -> None:
        """Put everything back."""
        for tensor, before in self._tensors:
            tensor.copy_(before)
        for module, state in self._extra:
            module.set_extra_state(state)
        for player, state in self._players:
            player.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:
                player.scaler.load_state_dict(state["scaler"])


def keep(run_dir: Path, loader: TrainLoader, origin: Origin, rank: int = 0) -> Path:
    """Write the batches of a step to `run_dir`/nonfinite/step-N.

    Batches are pure functions of (seed, epoch, number): they are read again, not remembered.
    `batch.safetensors` holds images, labels, modality and cams, rows of consecutive batches one
    after the other; `batch.json` step, epoch, terms (numbers, or "nan", "inf", "-inf") and of every
    batch its number, rows, `paired` and the paths of its images.

    Args:
        run_dir: run folder.
        loader: of the run.
        origin: the step.
        rank: a process other than 0 adds its number to the names and writes its own rows.
    Returns:
        The folder.
    Raises:
        TrainError: it cannot be written.
    """
    numbers = range(origin.first, origin.first + origin.count)
    batches = [loader.batch(origin.epoch, number) for number in numbers]
    names = ("images", "labels", "modality", "cams")
    columns = zip(names, zip(*(batch[:4] for batch in batches), strict=True), strict=True)
    sampler, paths = loader.sampler, loader.images.paths
    record: dict[str, Any] = {
        "step": origin.step,
        "epoch": origin.epoch,
        "terms": {n: v if math.isfinite(v) else str(v) for n, v in origin.terms.items()},
        "batches": [
            {
                "number": number,
                "rows": len(batch.labels),
                "paired": batch.paired,
                "paths": [str(paths[i]) for i in sampler.plan(origin.epoch)[number, sampler.slots]],
            }
            for number, batch in zip(numbers, batches, strict=True)
        ],
    }
    folder = run_dir / "nonfinite" / f"step-{origin.step:08d}"
    name = "batch" if rank == 0 else f"batch-{rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"cannot create {folder}: {error.strerror or error}") from error
    tensors = {column: torch.cat(parts).contiguous() for column, parts in columns}
    files.replace_file(folder / f"{name}.safetensors", [serialize(tensors)])
    files.write_json(folder / f"{name}.json", record)
    return folder
