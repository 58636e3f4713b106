"""The benchmark fixture: the correctness gate, timing and what is recorded with it.

    pytest benchmarks --benchmark-only
    pytest benchmarks --benchmark-only --benchmark-autosave --benchmark-compare

Groups are `<op> <mode> <shape>`; a slower row is published like a faster one. Rounds fill a budget
of time, so that quick steps are repeated often and slow ones two or three times.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

import fastreid_vi
from benchmarks.ceilings import ceilings, floor_seconds
from benchmarks.clock import TINY, host_seconds, quartiles, rounds_for
from benchmarks.device import device_times
from benchmarks.machine import machine
from benchmarks.memory import extra_memory, kept_memory
from benchmarks.workload import (
    COMPILED,
    DEVICE,
    GPU,
    MODES,
    Truth,
    Workload,
    floats,
    is_ours,
    lowered,
    peers,
    prepared,
    relative_error,
    rooms_of,
    truth_of,
)
from fastreid_vi._dispatch import native_missing

__all__ = ["DEVICE", "GPU", "MODES", "Workload", "peers", "relative_error", "rooms_of"]

PRECISIONS = ("float32", "bfloat16") if GPU else ("float32",)
LONGEST_PROFILED = 0.7  # seconds; memory of slower steps is not measured


@pytest.fixture
def rehearsal(benchmark: Any) -> bool:
    """One round, or one of nothing: it says nothing about time."""
    return TINY or bool(benchmark.disabled)


@pytest.fixture(params=PRECISIONS)
def run(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`run(workload, peer, mode, shape)`: check, warm up, time, record."""
    precision: str = request.param

    def timed(work: Workload, peer: str, mode: str, shape: str) -> None:
        work = lowered(work) if precision == "bfloat16" else work
        benchmark.group = f"{work.op} {mode} {shape}" + (f" {precision}" if GPU else "")
        truth = remembered((work.op, shape, precision), work)
        room, turn = rooms_of(work.op)[0], None
        if not (GPU or benchmark.disabled or peer == room):
            with prepared(work, room, mode, truth) as (ours, _):
                ours()
            turn = Turn(ours, room)
        with prepared(work, peer, mode, truth) as (step, error):
            benchmark.extra_info.update(
                op=work.op, peer=peer, mode=mode, shape=shape, precision=precision, error=error,
                threads=torch.get_num_threads(),
            )  # fmt: skip
            if benchmark.disabled:
                benchmark.pedantic(step)
                return
            measured(benchmark, step, work, peer, mode, precision, turn)

    with kept_memory():
        yield timed


_remembered: dict[tuple[Any, ...], Truth] = {}


def remembered(key: tuple[Any, ...], work: Workload) -> Truth:
    """The truth of the last workload, if this one has the same name and numbers."""
    numbers = tuple(a.detach().double().sum().item() for a in floats(work.args))
    if (*key, numbers) not in _remembered:
        _remembered.clear()
        _remembered[(*key, numbers)] = truth_of(work)
    return _remembered[(*key, numbers)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Peers and modes of one workload stand together, so that its truth is computed once."""
    places: dict[tuple[Any, ...], int] = {}

    def place(item: pytest.Item) -> int:
        call = getattr(item, "callspec", None)
        if call is None or "run" not in getattr(item, "fixturenames", ()):
            return places.setdefault((item.nodeid,), len(places))
        shared = {k: str(v) for k, v in call.params.items() if k not in ("peer", "mode")}
        name = item.nodeid.split("[")[0]
        return places.setdefault((name, *sorted(shared.items())), len(places))

    items.sort(key=place)


class Turn(NamedTuple):
    """Our step, which takes turns with a peer's."""

    step: Callable[[], Any]
    room: str

    def seconds(self) -> float:
        """Of one call in its room."""
        with fastreid_vi.backend(self.room):
            return host_seconds(self.step)


def measured(
    benchmark: Any,
    step: Callable[[], Any],
    work: Workload,
    peer: str,
    mode: str,
    precision: str,
    ours: Turn | None,
) -> None:
    """Time a checked step, and record bytes, products, memory and the fraction of the ceiling.

    On a CPU our step runs before every round of a peer: what else the machine does at the time
    hits both, and the multiple of our time is that of two neighbours.
    """
    bytes_moved, flops = work.floor_of(mode)
    info = benchmark.extra_info
    info.update(bytes=bytes_moved, flops=flops)
    if GPU:

        def synchronised() -> None:
            step()
            torch.cuda.synchronize()

        benchmark.pedantic(synchronised, rounds=50, warmup_rounds=10)
        info["device"] = device_times(
            step, graph=is_ours(peer), bytes_moved=bytes_moved, flops=flops, dtype=precision
        )
    else:
        if peer in COMPILED:
            step()  # compiles
        before: list[float] = []
        benchmark.pedantic(
            step, setup=ours and (lambda: before.append(ours.seconds())), rounds=rounds_for(step)
        )
        if ours:
            pairs = zip(benchmark.stats.stats.data, before, strict=True)
            info["multiple"] = quartiles([theirs / own for theirs, own in pairs])
        floor = floor_seconds(bytes_moved, flops, precision)
        if floor:
            info.update(floor=floor, fraction=floor / benchmark.stats.stats.median)
    if benchmark.stats.stats.median < LONGEST_PROFILED:
        info["extra_memory"] = extra_memory(step)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Device, versions and ceilings beside every record."""
    machine_info.update(machine())
    machine_info["processor"] = platform.processor()
    machine_info["native"] = native_missing or "built"
    machine_info["fastreid_vi"] = fastreid_vi.__version__
    machine_info["ceilings"] = ceilings()
