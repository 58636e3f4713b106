"""How much memory a training step will take, before the first one.

A copy of the method runs forward once on fake tensors, which have shapes and no memory, and what
autograd keeps for backward is counted. Nothing real is touched. Fake tensors pretend to be on the
CPU, which every build of PyTorch knows; the shapes are the same elsewhere.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fastreid_vi.methods.base as base
from fastreid_vi._distributed import alone
from fastreid_vi.config import Batch, OptimConfig, Recipe
from fastreid_vi.methods.base import Method
from fastreid_vi.train.errors import TrainError
from fastreid_vi.train.players import Phase, phases_of
from fastreid_vi.train.state import undisturbed
from fastreid_vi.train.step import autocast, compute_dtype

_PLACE = torch.device("cpu")
_GIB = 2**30
_RESERVE = 2 * _GIB


@dataclass(frozen=True)
class Forecast:
    """Bytes of the largest moment of a training step, by what holds them."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    batch: int
    activations: int
    """What autograd keeps, of the phase that keeps most."""
    work: int
    """Gradients of activations that backward holds at a time."""

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in vars(self).items())
        return f"{self.total / _GIB:.1f} GiB ({parts})"


def forecast(
    method: Method,
    recipe: Recipe,
    *,
    rows: int,
    paired: int,
    dtype: torch.dtype = torch.float32,
) -> Forecast:
    """Peak memory of a training step in one process.

    Args:
        method: not moved, not changed; only its copy on fake tensors runs.
        recipe: image size, optimisers, accumulation.
        rows: images of a batch in this process.
        paired: as in `Batch`.
        dtype: of autocast; float32 for none.
    Raises:
        Exception: whatever the method raises there, for example where it looks at a value.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    shape = (rows, 3, recipe.data.height, recipe.data.width)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), fakes, alone(), _unread():
        warnings.simplefilter("ignore")
        fake = _without_memory(method)
        labels, modality, cams = torch.zeros(3, rows, dtype=torch.int64, device=_PLACE).unbind()
        images = torch.empty(shape, device=_PLACE)
        images = images.contiguous(memory_format=torch.channels_last)
        batch = Batch(images, labels, modality, cams, paired)
        own = [*fake.parameters(), *fake.buffers(), *batch[:4]]
        phases = phases_of(fake)
        kept = {name: _kept(fake, batch, phase, own, dtype) for name, phase in phases.items()}
    most = max(phases, key=lambda name: kept[name][0] + _bytes(phases[name].parameters))
    return Forecast(
        weights=_bytes([*method.parameters(), *method.buffers()]),
        gradients=_bytes(phases[most].parameters),
        optimizer=_moments(method, phases, recipe),
        batch=images.nbytes * recipe.run.accumulate,
        activations=kept[most][0],
        work=2 * kept[most][1],
    )


def _without_memory(method: Method) -> Method:
    """A copy whose parameters and buffers have shapes only."""
    memo: dict[int, Any] = {}
    for tensor in (*method.parameters(), *method.buffers()):
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_PLACE)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return copy.deepcopy(method, memo).train()


@contextmanager
def _unread() -> Iterator[None]:
    """Methods look at labels on the CPU; those of fake tensors have no values."""
    before = base._values_are_read
    base._values_are_read = lambda tensor: False
    try:
        yield
    finally:
        base._values_are_read = before


def _kept(
    method: Method, batch: Batch, phase: Phase, own: Iterable[Tensor], dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes that autograd keeps in a phase: all of them, and of the largest tensor."""
    known = {tensor.untyped_storage()._cdata for tensor in own}
    seen: dict[int, Tensor] = {}  # keeps the tensors, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in known:
            seen[place] = tensor
        return tensor

    kept = saved_tensors_hooks(keep, lambda tensor: tensor)
    with phase.alone(), kept, autocast(_PLACE, dtype):
        # The losses hold the graph; without them autograd would drop what it keeps.
        losses = method(method.phase_batch(batch, phase.name), phase.name)
    del losses
    sizes = [tensor.untyped_storage().nbytes() for tensor in seen.values()]
    return sum(sizes), max(sizes, default=0)


def _moments(method: Method, phases: Mapping[str, Phase], recipe: Recipe) -> int:
    """Bytes of the optimisers' states."""
    held: dict[str, dict[int, Tensor]] = {}
    for phase in phases.values():
        held.setdefault(phase.player, {}).update({id(p): p for p in phase.parameters})
    return sum(
        _copies(recipe.optim_of(player)) * _bytes(list(moved.values()))
        for player, moved in held.items()
    )


def _copies(config: OptimConfig) -> int:
    return 2 if config.name == "adam" else int(config.momentum != 0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def free_memory(device: torch.device) -> tuple[int, str] | None:
    """Bytes that are free on a device, and its name; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = {line.split(":")[0]: line.split()[1] for line in lines}
        free = int(values["MemAvailable"]) * 1024
    except (OSError, KeyError, IndexError, ValueError):
        return None
    try:  # a container may have less than its machine
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        free = free if limit == "max" else min(free, max(int(limit) - used, 0))
    except (OSError, ValueError):
        pass
    return free, "this machine"


def spare_memory(
    method: Method, recipe: Recipe, device: torch.device, *, rows: int, paired: int
) -> int:
    """Bytes of a CUDA device that training steps will leave free; 0 where that is not known.

    To be asked before the method is moved there. A quarter of the forecast and some more are kept
    back, for what it does not see: workspaces, fragments, evaluation.
    """
    free = free_memory(device) if device.type == "cuda" else None
    if free is None:
        return 0
    try:
        found = _forecast_on(method, recipe, device, rows=rows, paired=paired)
    except Exception:
        return 0
    return max(free[0] - found.total * 5 // 4 - _RESERVE, 0)


def _forecast_on(
    method: Method, recipe: Recipe, device: torch.device, *, rows: int, paired: int
) -> Forecast:
    dtype = compute_dtype(recipe.run.precision, device)
    # Two stems split an unpaired batch by its values. Halves need as much memory.
    assumed = paired or recipe.data.images // 2
    with undisturbed(device):
        return forecast(method, recipe, rows=rows, paired=assumed, dtype=dtype)


def describe(
    method: Method, recipe: Recipe, device: torch.device, *, rows: int, paired: int
) -> list[str]:
    """Lines for people: the forecast beside what is free, and what to lower if it is not enough.

    Never raises: a method that cannot run without values has no forecast, and the line says why.
    """
    try:
        found = _forecast_on(method, recipe, device, rows=rows, paired=paired)
    except TrainError:
        return []  # said by those who need it
    except Exception as error:
        reason = (str(error) or "no reason given").splitlines()[0]
        return [f"no forecast of memory: {type(error).__name__}: {reason}"]
    free = free_memory(device)
    if free is None:
        return [f"forecast: {found}"]
    size, name = free
    lines = [f"forecast: {found}; {size / _GIB:.1f} GiB free on {name}"]
    if found.total > size:
        lines.append(
            f"warning: a step needs {found.total / _GIB:.1f} GiB and {size / _GIB:.1f} GiB are "
            "free: lower data.identities or data.images (run.accumulate keeps the gradient's "
            'batch), the image size, or use run.precision "bf16"'
        )
    return lines
