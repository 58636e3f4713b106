"""Every row of the benchmarks as data: what pytest would call, for the gate and for a GPU's run.

A benchmark is a function that gives its fixture `run` a workload, a peer, a mode and a shape. Here
the fixture is one that keeps what it is given.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.workload import Workload, lowered

HERE = Path(__file__).resolve().parent


class Case(NamedTuple):
    """What a benchmark hands to its fixture."""

    work: Workload
    peer: str
    mode: str
    shape: str


class Row(NamedTuple):
    """One call of one benchmark; its tensors exist only after `case`."""

    family: str
    function: Callable[..., None]
    arguments: dict[str, Any]
    precision: str = "float32"

    @property
    def peer(self) -> str:
        """The way to compute it."""
        return str(self.arguments["peer"])

    @property
    def mode(self) -> str:
        """`forward` or `training`; what has no mode has no gradient."""
        return str(self.arguments.get("mode", "forward"))

    @property
    def name(self) -> str:
        """As pytest writes it."""
        values = [self.precision, *map(str, self.arguments.values())]
        return f"bench_{self.family}.py::{self.function.__name__}[{'-'.join(values)}]"

    def case(self) -> Case:
        """Make the arguments."""
        found: list[Case] = []
        self.function(run=lambda *given: found.append(Case(*given)), **self.arguments)
        (case,) = found
        return case if self.precision == "float32" else case._replace(work=lowered(case.work))


def families() -> list[str]:
    """Families of ops: files bench_<family>.py with benchmarks on the shared fixture."""
    return sorted({row.family for row in rows()})


def _parameters(function: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """All combinations of the function's `parametrize` marks."""
    axes = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name != "parametrize":
            continue
        names, values = mark.args
        if isinstance(names, str):
            names = [n.strip() for n in names.split(",")]
        single = len(names) == 1
        axes.append([dict(zip(names, (v,) if single else v, strict=True)) for v in values])
    for choice in itertools.product(*axes):
        yield {name: value for part in choice for name, value in part.items()}


def rows(precisions: Sequence[str] = ("float32",)) -> list[Row]:
    """Rows of all families; an op without a peer's library has no row for it."""
    found = []
    for path in sorted(HERE.glob("bench_*.py")):
        if not re.search(r"\brun: ", path.read_text()):
            continue  # a benchmark of something else than an op: whole steps, evaluation, loading
        module = importlib.import_module(f"benchmarks.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = name.startswith("bench_") and function.__module__ == module.__name__
            if own and "run" in inspect.signature(function).parameters:
                family = path.stem.removeprefix("bench_")
                found += [
                    Row(family, function, arguments, precision)
                    for precision in precisions
                    for arguments in _parameters(function)
                    if "peer" in arguments
                ]
    return found
