"""Official checkpoint files, read without running anything they bring, and written back.

A file holds a state dict, bare or in a wrapper; AlignGAN's checkpoint is a folder of numbered files
model-<index>_<step>.pkl, whose keys get the prefix "<index>/". What the keys mean is said by
`methods.<method>.official`; here are files, wrappers and shapes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastreid_vi.train import files
from fastreid_vi.train.checkpoint import Header, load_safetensors, pack_weights
from fastreid_vi.train.errors import CheckpointError
from fastreid_vi.train.unpickle import load_plain

WRAPPERS: Final = ("net", "state_dict", "model", "model_state_dict", "network")
"""Entries under which released checkpoints keep their state dict."""
PARALLEL: Final = "module."
"""What a data-parallel wrapper puts before every key."""

_PART = re.compile(r"model-(\d+)_(\d+)\.pkl")


class Official(NamedTuple):
    """An official checkpoint."""

    state: dict[str, Tensor]
    beside: tuple[str, ...] = ()
    """Entries beside the state dict that are not read (metrics, optimisers)."""
    epoch: int = 0
    step: int = 0


def is_parts(path: Path) -> bool:
    """Whether `path` is a folder of numbered files."""
    return path.is_dir() and any(_PART.fullmatch(p.name) for p in path.iterdir())


def read_official(path: Path) -> Official:
    """Read one file: safetensors, or anything `torch.save` wrote that holds plain data only.

    Raises:
        CheckpointError: missing, truncated, no state dict, or it asks to run code.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder without files model-<index>_<step>.pkl")
    if _PART.fullmatch(path.name):
        raise CheckpointError(f"{path}: one of several files; name their folder: {path.parent}")
    if path.suffix == ".safetensors":
        return Official(load_safetensors(path)[0])
    value = load_plain(path)
    state, rest = _state(value, path)
    if state and all(key.startswith(PARALLEL) for key in state):
        state = {key.removeprefix(PARALLEL): tensor for key, tensor in state.items()}
    epoch = rest.pop("epoch", 0)
    return Official(state, tuple(rest), epoch if isinstance(epoch, int) and epoch > 0 else 0)


def read_parts(folder: Path, count: int, step: int | None = None) -> Official:
    """Read the numbered files of one step.

    Args:
        folder: holds model-<index>_<step>.pkl.
        count: how many files belong together, indices 0 to count - 1.
        step: which; the newest by default.
    Returns:
        Keys "<index>/module.<key>", whether the files have that "module." or not.
    Raises:
        CheckpointError: the step or one of its files is missing or damaged.
    """
    found = {
        (int(match[2]), int(match[1])): path
        for path in sorted(folder.iterdir())
        if (match := _PART.fullmatch(path.name))
    }
    steps = sorted({number for number, _ in found})
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise CheckpointError(
            f"{folder}: no files of step {chosen}; there are steps {', '.join(map(str, steps))}"
        )
    missing = [index for index in range(count) if (chosen, index) not in found]
    if missing:
        names = ", ".join(f"model-{index}_{chosen}.pkl" for index in missing)
        raise CheckpointError(f"{folder}: missing {names} of {count} files")
    state = {
        f"{index}/{key if key.startswith(PARALLEL) else PARALLEL + key}": tensor
        for index in range(count)
        for key, tensor in _state(load_plain(found[chosen, index]), found[chosen, index])[0].items()
    }
    return Official(state, step=chosen)


def unfit(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> list[str]:
    """Why `weights` are not a state dict of these shapes; one line per key."""
    lines = [f"missing {key!r}" for key in shapes if key not in weights]
    lines += [f"unexpected {key!r}" for key in weights if key not in shapes]
    lines += [
        f"{key!r} has shape {list(weights[key].shape)}, expected {list(shape)}"
        for key, shape in shapes.items()
        if key in weights and weights[key].shape != shape
    ]
    return lines


def write_weights(path: Path, weights: Mapping[str, Tensor], header: Header) -> None:
    """Write our safetensors file, atomically.

    Raises:
        TrainError: it cannot be written.
    """
    files.replace_file(path, [pack_weights(weights, header)])


def write_official(
    path: Path, state: Mapping[str, Tensor], *, wrapper: str | None = None, epoch: int = 0
) -> None:
    """Write one official file, atomically.

    Args:
        path: safetensors by its suffix (never wrapped), `torch.save` otherwise.
        state: official keys.
        wrapper: entry that holds the state dict, with `epoch` beside it; None for a bare one.
        epoch: what the wrapper says.
    Raises:
        TrainError: it cannot be written.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        files.replace_file(path, [save({k: t.contiguous() for k, t in state.items()})])
        return
    whole = dict(state) if wrapper is None else {wrapper: dict(state), "epoch": epoch}
    files.replace_file(path, [_packed(whole)])


def write_parts(folder: Path, state: Mapping[str, Tensor], step: int) -> None:
    """Write a folder of numbered files, all of them or none.

    Raises:
        CheckpointError: the folder holds other files, or it cannot be written.
    """
    if folder.is_dir() and not all(_PART.fullmatch(p.name) for p in folder.iterdir()):
        raise CheckpointError(f"{folder}: holds other files than model-<index>_<step>.pkl")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        index, _, name = key.partition("/")
        parts.setdefault(index, {})[name] = tensor
    named = {f"model-{index}_{step}.pkl": [_packed(part)] for index, part in parts.items()}
    files.write_folder(folder, named)


def _packed(value: Any) -> memoryview:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getbuffer()


def _state(value: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in what a file holds, and what lies beside it."""
    beside: dict[str, Any] = {}
    if isinstance(value, dict):
        for name in WRAPPERS:
            if isinstance(value.get(name), dict):
                beside = {str(k): v for k, v in value.items() if k != name}
                value = value[name]
                break
    if not isinstance(value, dict) or not any(isinstance(v, Tensor) for v in value.values()):
        kind = f"entries {_listed(value)}" if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(f"{path}: expected a state dict or one of {', '.join(WRAPPERS)} "
                              f"with one, got {kind}")  # fmt: skip
    odd = [key for key, v in value.items() if not isinstance(key, str) or not isinstance(v, Tensor)]
    if odd:
        raise CheckpointError(f"{path}: expected tensors only, got others: {_listed(odd)}")
    return {key: tensor.detach() for key, tensor in value.items()}, beside


def _listed(names: Iterable[Any]) -> str:
    given = list(map(str, names))
    return ", ".join(given[:5]) + (f" and {len(given) - 5} more" if len(given) > 5 else "")
