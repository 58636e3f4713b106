"""Checkpoints: one folder each, written atomically; the links `last` and `best` switch in one step.

checkpoints/step-00000182/model.safetensors  weights; method, class count, epoch, step in the header
                          state.pt           optimisers, loss scaler, random states; no pickled code
                          state.json         epoch, step, sampler cursor, running means, log length
checkpoints/last -> step-00000182            what `resume` continues from
checkpoints/best -> step-00000120            the best evaluated epoch
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from fastreid_vi.train import files
from fastreid_vi.train.errors import CheckpointError

WEIGHTS, TENSORS, COUNTERS = "model.safetensors", "state.pt", "state.json"
_HEADER, _FORMAT = "fastreid_vi", 1


class Header(NamedTuple):
    """What the weights belong to."""

    method: str
    num_ids: int
    epoch: int
    step: int


class Checkpoint(NamedTuple):
    """Everything that was saved."""

    path: Path
    header: Header
    weights: dict[str, Tensor]
    tensors: dict[str, Any]
    counters: dict[str, Any]


def save(
    folder: Path,
    header: Header,
    weights: Mapping[str, Tensor],
    tensors: dict[str, Any],
    counters: dict[str, Any],
) -> Path:
    """Write one checkpoint and let `last` point to it.

    Args:
        folder: the run's `checkpoints` folder.
        header: method, class count, epoch, step.
        weights: a state dict; any device and memory format.
        tensors: nested plain containers of tensors and numbers.
        counters: plain JSON.
    Returns:
        The checkpoint's folder.
    Raises:
        CheckpointError: disk full, no permission; nothing half-written stays, older ones stay.
    """
    name = _name(header.step)
    content: dict[str, list[bytes | memoryview]] = {
        WEIGHTS: [pack_weights(weights, header)],
        TENSORS: [_pack(tensors)],
        COUNTERS: [json.dumps(counters, allow_nan=False).encode()],
    }
    files.write_folder(folder / name, content)
    files.point(folder / "last", name)
    return folder / name


def pack_weights(weights: Mapping[str, Tensor], header: Header) -> bytes:
    """The safetensors file of `weights`: same weights and header, same bytes."""
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }
    # One metadata key: the library keeps them in a hash map, whose order differs between processes.
    return serialize(plain, {_HEADER: json.dumps({"format": _FORMAT, **header._asdict()})})


def _pack(tensors: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getbuffer()


def load(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        CheckpointError: missing, damaged or written by something else.
    """
    weights, header = load_safetensors(path / WEIGHTS)
    if header is None:
        raise CheckpointError(
            f"{path / WEIGHTS}: no fastreid_vi header; expected a checkpoint of a training run"
        )
    try:
        tensors = torch.load(path / TENSORS, map_location="cpu", weights_only=True)
        counters = json.loads((path / COUNTERS).read_text())
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint: {first_line(error)}") from error
    return Checkpoint(path, header, weights, tensors, counters)


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], Header | None]:
    """Weights of a safetensors file, and our header if it has one.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights {path}: {first_line(error)}") from error
    return weights, _parse(text, path) if text is not None else None


def _parse(text: str, path: Path) -> Header:
    try:
        values = json.loads(text)
        if values.pop("format") != _FORMAT:
            raise ValueError
        return Header(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: unknown checkpoint header {text!r}") from error


def load_weights(module: nn.Module, path: Path, *, method: str, num_ids: int) -> Header | None:
    """Fill `module` from a run folder (its best epoch), a checkpoint folder or a safetensors file.

    Args:
        module: the method to fill.
        path: where to look.
        method: name that the module was created under.
        num_ids: class count that it was created with.
    Returns:
        The header; None for a bare safetensors file.
    Raises:
        CheckpointError: nothing there, another method or class count, other keys or shapes.
    """
    file = find(path)
    weights, header = load_safetensors(file)
    if header is not None:
        expect(header, file, method=method, num_ids=num_ids)
    fill(module, weights, file)
    return header


def expect(header: Header, path: Path, *, method: str, num_ids: int) -> None:
    """Refuse a checkpoint of another method or class count.

    Raises:
        CheckpointError: names both.
    """
    if (header.method, header.num_ids) != (method, num_ids):
        raise CheckpointError(
            f"{path}: checkpoint of method {header.method!r} with {header.num_ids} identities, "
            f"expected {method!r} with {num_ids}"
        )


def fill(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy `weights` into `module`; every key and shape must agree.

    Raises:
        CheckpointError: names the first missing and unexpected key, or the first wrong shape.
    """
    own = module.state_dict()
    faults = [
        f"{what} {keys[0]!r}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for what, keys in (
            ("missing", [k for k in own if k not in weights]),
            ("unexpected", [k for k in weights if k not in own]),
        )
        if keys
    ]
    if not faults:
        faults = [
            f"{key!r} has shape {list(weights[key].shape)}, expected {list(own[key].shape)}"
            for key in own
            if weights[key].shape != own[key].shape
        ][:1]
    if faults:
        raise CheckpointError(
            f"{path}: weights do not fit {type(module).__name__}: {'; '.join(faults)}"
        )
    module.load_state_dict(dict(weights))


def find(path: Path, which: Literal["best", "last"] = "best") -> Path:
    """The weights file that `path` stands for: a run or checkpoint folder, or the file itself.

    A run folder gives its best epoch (its last where nothing was evaluated), or `last` when asked.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        return path
    names = ("best", "last") if which == "best" else ("last",)
    for folder in (path, *(path / "checkpoints" / name for name in names)):
        if (folder / WEIGHTS).is_file():
            return folder / WEIGHTS
    raise CheckpointError(
        f"{path}: expected a run folder, a checkpoint folder or a safetensors file"
    )


def last(folder: Path) -> Path | None:
    """The checkpoint that `last` names, or None before the first one.

    Raises:
        CheckpointError: the link leads nowhere.
    """
    link = folder / "last"
    if not link.is_symlink():
        return None
    if not link.is_dir():
        raise CheckpointError(f"{link}: leads to {link.readlink()}, which is gone")
    return folder / link.readlink()


def _name(step: int) -> str:
    return f"step-{step:08d}"


def point_best(folder: Path, step: int) -> None:
    """Let `best` name the checkpoint of `step`.

    Raises:
        CheckpointError: it is gone, or the link cannot be written.
    """
    if not (folder / _name(step)).is_dir():
        raise CheckpointError(f"{folder / _name(step)}: the best checkpoint is gone")
    link = folder / "best"
    if not link.is_symlink() or link.readlink().name != _name(step):
        files.point(link, _name(step))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; the one that `best` names stays besides."""
    best = folder / "best"
    named = {best.readlink().name} if best.is_symlink() else set()
    found = sorted(path for path in folder.glob("step-*") if path.name not in named)
    for path in found[:-keep]:
        files.remove(path)


def discard_unfinished(folder: Path, step: int) -> None:
    """After a kill: remove temporary files, and checkpoints after `step`: no link named them."""
    for path in list(files.leftovers(folder)):
        files.remove(path)
    for path in folder.glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            files.remove(path)


def first_line(error: BaseException) -> str:
    """An exception as the tail of a one-line message."""
    return (str(error) or type(error).__name__).splitlines()[0]
