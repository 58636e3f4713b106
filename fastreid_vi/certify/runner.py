"""Every case on every room and device that is here."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from fastreid_vi import _backend, _dispatch
from fastreid_vi.certify.cases import DTYPES, Cases, Check, OpCase, Procedure, run
from fastreid_vi.certify.vectors import Golden, GoldenError

CHOSEN = "chosen"
"""Backend of a row where every op chose its own."""
EXACT = "-"
"""Precision of a row that has but one."""
Section = Literal["op", "method"]


@dataclass(kw_only=True)
class Row:
    """One case in one room, on one device, in one precision."""

    section: Section
    name: str
    case: str
    backend: str
    device: str
    dtype: str
    checks: list[Check] = field(default_factory=list)
    fault: str | None = None
    """What it raised."""
    skipped: str | None = None
    """Why this room cannot compute it."""

    @property
    def ok(self) -> bool:
        """Ran, compared something, and everything was within its tolerance."""
        return self.fault is None and bool(self.checks) and all(c.ok for c in self.checks)

    def title(self) -> str:
        """What failed, in a few words."""
        return f"{self.name}: {self.case} ({self.backend} on {self.device}, {self.dtype})"

    def why(self) -> str:
        """The worst of it."""
        if self.fault is not None:
            return self.fault
        if not self.checks:
            return "compared nothing"
        bad = [c for c in self.checks if not c.ok]
        return ", ".join(
            f"{c.quantity} ({c.kind}) error {c.error:.3g}, allowed {c.tolerance:.3g}" for c in bad
        )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to run."""

    only: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)

    def takes(self, name: str, case: str) -> bool:
        """Whether a name or pattern of `only` is in it."""
        words = f"{name} {case}"
        return not self.only or any(
            pattern in words or fnmatch.fnmatch(name, pattern) for pattern in self.only
        )


@dataclass(frozen=True)
class Task:
    """A row that waits to be filled."""

    row: Row
    run: Callable[[], Row]


def op_tasks(families: Iterable[Cases], golden: Golden, selection: Selection) -> Iterator[Task]:
    """Every case of every op in every room."""
    for family in families:
        for case in family(golden):
            if selection.takes(case.op, case.name):
                yield from _in_rooms(case, selection)


def _in_rooms(case: OpCase, selection: Selection) -> Iterator[Task]:
    op = _dispatch.OPS[case.op]
    for device in selection.devices:
        for room in ("reference", *op.backends):
            if selection.backends and room not in selection.backends:
                continue
            if room in ("cpu", "cuda") and room != device:
                continue
            if room == "triton" and device == "cpu" and not _dispatch.interpreting():
                continue
            for dtype in DTYPES:
                row = Row(
                    section="op",
                    name=case.op,
                    case=case.name,
                    backend=room,
                    device=device,
                    dtype=dtype,
                )
                yield Task(row, partial(_run_op, row, case, op))


def _run_op(row: Row, case: OpCase, op: _dispatch.Op) -> Row:
    missing = op.room(row.backend)
    if isinstance(missing, str):
        row.skipped = missing
        return row
    with _watched(op, row.backend) as ran:
        _fill(row, lambda: run(case, DTYPES[row.dtype], row.device))
    if row.fault is None and row.skipped is None and not ran:
        row.fault = f"the {row.backend} room did not run"
    return row


@contextmanager
def _watched(op: _dispatch.Op, room: str) -> Iterator[list[str]]:
    """Record that this room really ran."""
    inner, ran = op.room(room), list[str]()
    assert not isinstance(inner, str)  # the caller has looked

    def outer(*args: Any) -> Any:
        ran.append(room)
        return inner(*args)

    op._found[room] = outer
    try:
        yield ran
    finally:
        op._found[room] = inner


def procedure_tasks(
    procedures: Iterable[Procedure], golden: Golden, selection: Selection
) -> Iterator[Task]:
    """Methods, samplers, layouts and metrics."""
    for procedure in procedures:
        if not selection.takes(procedure.owner, procedure.name):
            continue
        for device in selection.devices:
            if device not in procedure.devices:
                continue
            for room in _rooms(procedure, selection, device):
                for dtype in procedure.dtypes:
                    row = Row(
                        section="op" if procedure.rooms else "method",
                        name=procedure.owner,
                        case=procedure.name,
                        backend=room,
                        device=device,
                        dtype=dtype if len(procedure.dtypes) > 1 else EXACT,
                    )
                    checks = partial(procedure.run, golden, DTYPES[dtype], device)
                    yield Task(row, partial(_fill, row, checks))


def _rooms(procedure: Procedure, selection: Selection, device: str) -> Iterable[str]:
    if procedure.rooms:
        return [r for r in procedure.rooms if not selection.backends or r in selection.backends]
    others = ({"cpu": "cuda", "cuda": "cpu"}[device], "retrieval")
    return [r for r in selection.backends if r not in others] if selection.backends else [CHOSEN]


def _fill(row: Row, checks: Callable[[], Iterator[Check]]) -> Row:
    """Run; a room's refusal is no fault, anything else that is raised is one."""
    try:
        forced = nullcontext() if row.backend == CHOSEN else _backend.backend(row.backend)
        with forced, _full_precision():
            row.checks = list(checks())
    except GoldenError:
        raise
    except Exception as error:  # whatever an op or method does wrong belongs in the report
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        if "was asked for but cannot run" in text:
            row.skipped = text.split("cannot run: ")[-1]
        else:
            row.fault = text
    return row


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 in float32: cuDNN takes TF32 otherwise, which has 10 bits."""
    cudnn: Any = torch.backends.cudnn
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def devices(wanted: str | None) -> tuple[str, ...]:
    """The devices to run on.

    Raises:
        ValueError: one that is not here.
    """
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if wanted is None:
        return here
    if wanted not in here:
        raise ValueError(f"--device: expected {' or '.join(here)}, got {wanted!r}")
    return (wanted,)
