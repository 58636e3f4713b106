"""run.json: the recipe, seed, versions and data root of a run, enough to repeat or resume it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from fastreid_vi.config import Recipe, from_dict, to_dict
from fastreid_vi.train import files
from fastreid_vi.train.errors import TrainError
from fastreid_vi.version import __version__

NAME = "run.json"
_FORMAT = 1
# What a resumed run may change: it moves work around or lengthens the run; done steps stay as is.
_FREE = (
    "schedule.epochs", "data.workers", "data.cache", "data.packed", "data.resident",
    "run.eval_every", "run.checkpoint_every", "run.checkpoint_steps", "run.keep",
    "run.skip_nonfinite",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What run.json says."""

    recipe: Recipe
    num_ids: int
    """Training identities, the class count of the method."""
    root: Path
    """Folder of the data set."""
    eval_on: str
    """Split that chose the best epoch."""
    versions: dict[str, str]
    """Software, device and thread count of the run's last start."""

    @property
    def seed(self) -> int:
        """Seed of weights, sampler and augmentation."""
        return self.recipe.run.seed


def surroundings(device: torch.device, dtype: torch.dtype, processes: int = 1) -> dict[str, str]:
    """Everything outside the recipe that the bits of a result depend on."""
    cuda = device.type == "cuda"
    return {
        "fastreid_vi": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cuda": str(torch.version.cuda) if cuda else "",
        "precision": str(dtype).removeprefix("torch."),
        "threads": "" if cuda else str(torch.get_num_threads()),
        "processes": str(processes),
    }


def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def write_run(run_dir: Path, record: RunRecord) -> None:
    """Write run.json, atomically.

    Raises:
        TrainError: it cannot be written.
    """
    values = {
        "format": _FORMAT,
        "method": record.recipe.method,
        "dataset": {"name": record.recipe.dataset, "root": str(record.root)},
        "seed": record.seed,
        "num_ids": record.num_ids,
        "eval_on": record.eval_on,
        "recipe": to_dict(record.recipe),
        "versions": record.versions,
    }
    files.write_json(run_dir / NAME, values)


def read_run(path: Path, recipe_type: Callable[[str, str], type[Recipe]]) -> RunRecord:
    """Read run.json.

    Args:
        path: the file or its run folder.
        recipe_type: gives the recipe class of a method's name and a data set's name.
    Raises:
        TrainError: not there, not JSON, not a run of ours, a field unknown or wrong.
    """
    if path.is_dir():
        path = path / NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise TrainError(f"{path}: not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise TrainError(
            f"{path}: not a run of fastreid_vi (expected an object with format {_FORMAT})"
        )
    try:
        return _parse(values, recipe_type)
    except (KeyError, TypeError, AttributeError) as error:
        raise TrainError(
            f"{path}: not a run of fastreid_vi: {type(error).__name__} {error}"
        ) from error
    except ValueError as error:
        raise TrainError(f"{path}: {error}") from error


def _parse(values: dict[str, Any], recipe_type: Callable[[str, str], type[Recipe]]) -> RunRecord:
    kind = recipe_type(values["recipe"]["method"], values["recipe"]["dataset"])
    recipe = from_dict(kind, values["recipe"])
    num_ids = values["num_ids"]
    if type(num_ids) is not int or num_ids < 1:
        raise ValueError(f"num_ids: expected an integer > 0, got {num_ids!r}")
    return RunRecord(
        recipe=recipe,
        num_ids=num_ids,
        root=Path(values["dataset"]["root"]),
        eval_on=str(values["eval_on"]),
        versions={str(k): str(v) for k, v in values["versions"].items()},
    )


def open_run(run_dir: Path, record: RunRecord, resume: bool) -> list[str]:
    """Create the run folder, or check that it holds the run to resume; write run.json.

    Returns:
        Sentences worth telling: what differs from the run's last start.
    Raises:
        TrainError: a run is there but not to be resumed, none is there to resume, it has another
            recipe, or the folder cannot be written.
    """
    held = [name for name in (NAME, "metrics.jsonl", "checkpoints") if (run_dir / name).exists()]
    if held and not resume:
        raise TrainError(
            f"{run_dir}: holds a run already ({held[0]}); resume it or choose another folder"
        )
    if resume and not run_dir.is_dir():
        raise TrainError(f"{run_dir}: nothing to resume, no such folder")
    if held and NAME not in held:
        raise TrainError(f"{run_dir}: cannot resume, {NAME} is missing")
    notes = []
    if held:
        notes = expect_same(
            read_run(run_dir, lambda *names: _same_kind(names, record)), record, run_dir
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(
            f"cannot create run folder {run_dir}: {error.strerror or error}"
        ) from error
    write_run(run_dir, record)
    return notes


def _same_kind(names: tuple[str, str], record: RunRecord) -> type[Recipe]:
    asked = record.recipe.method, record.recipe.dataset
    if names != asked:
        raise TrainError(
            f"cannot resume a run of {names[0]!r} on {names[1]!r} as {asked[0]!r} on {asked[1]!r}"
        )
    return type(record.recipe)


def expect_same(old: RunRecord, new: RunRecord, run_dir: Path) -> list[str]:
    """Refuse to resume a run as another one.

    Returns:
        Sentences on differences that can change the last bits only: versions, device, threads.
    Raises:
        TrainError: names the first field of the recipe that differs, with both values.
    """
    before = {"num_ids": old.num_ids, "eval_on": old.eval_on, **_flat(to_dict(old.recipe))}
    after = {"num_ids": new.num_ids, "eval_on": new.eval_on, **_flat(to_dict(new.recipe))}
    for name in before | after:
        if name not in _FREE and before.get(name) != after.get(name):
            raise TrainError(
                f"{run_dir}: cannot resume with another {name}: the run has {before.get(name)!r}, "
                f"this recipe {after.get(name)!r}"
            )
    one = {"processes": "1"}  # not written by earlier versions
    changed = {n: v for n, v in new.versions.items() if {**one, **old.versions}.get(n) != v}
    return [
        f"resumed with {name} = {value!r}, before {old.versions.get(name)!r}: "
        "the last bits may differ"
        for name, value in changed.items()
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat
