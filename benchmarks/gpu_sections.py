"""The sections of `make gpu`, each a process of its own: a kernel that faults ends one, not all.

    python -m benchmarks.gpu_sections timings --rows FILE --seconds 60 --families pool norm

Every finished row is appended to FILE as a line of JSON. Rows named in FILE before are left out, so
that a section goes on where it was cut. Without a GPU, in a rehearsal, sizes are tiny, clocks are
the host's and kernels are compiled but not launched.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.catalogue import Case
from benchmarks.ceilings import ceilings
from benchmarks.clock import timed
from benchmarks.counts import counts
from benchmarks.device import device_times, replayed
from benchmarks.groups import Group, groups
from benchmarks.machine import machine
from benchmarks.memory import extra_memory
from benchmarks.workload import DEVICE, GPU, Truth, Workload, prepared

OURS = {"cuda", "triton", "cpu"}
PLAIN = {"eager", "tidy", "torchsort", "pytorch_metric_learning", "attention", "cdist"}
PRECISIONS = ("bfloat16", "float32") if GPU else ("float32",)
REHEARSED = 90  # compute capability that is compiled for where there is none
Found = Iterator[tuple[str, dict[str, Any]]]


class Task(NamedTuple):
    """What a section is to do."""

    families: frozenset[str]
    done: frozenset[str]
    until: float  # of time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the section's time is up."""
        return time.monotonic() >= self.until


def environment(task: Task) -> Found:
    """The machine, what is built, the clocks as they are found."""
    from fastreid_vi import _doctor

    yield "machine", machine()
    found = _doctor.inspect()
    yield "doctor", {k: found[k] for k in ("versions", "device", "native", "live", "check")}
    if GPU:
        yield "nvidia-smi", {"fields": SMI, "values": smi()}


SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"


def smi() -> str:
    """What the driver says; nothing is set."""
    import subprocess

    command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"


def rates(task: Task) -> Found:
    """What everything is measured against."""
    yield "ceilings", dict(ceilings())


def each(task: Task, **which: Any) -> Iterator[tuple[Group, Case, Truth]]:
    """Groups of rows with their tensors, until the time is up."""
    seen = set()
    for group in groups(families=task.families, done=task.done, **which):
        if task.over:
            raise TimeoutError
        if not GPU and group.rows[0].function in seen:
            continue  # a rehearsal takes one size of each
        seen.add(group.rows[0].function)
        case, truth = group.built()
        yield group, case, truth


def rows_of(
    task: Task, measure: Callable[[Callable[[], Any], Workload, str, str], dict[str, Any]],
    **which: Any,
) -> Found:  # fmt: skip
    """Check every row, measure it; a peer that fails is a row that says so."""
    for group, case, truth in each(task, **which):
        work = case.work
        for row in group.rows:
            if task.over:
                raise TimeoutError
            about = {"op": work.op, "peer": row.peer, "mode": row.mode, "family": row.family,
                     "shape": case.shape, "precision": row.precision}  # fmt: skip
            try:
                with prepared(work, row.peer, row.mode, truth) as (step, error):
                    yield row.name, {**about, "error": error, **measure(step, work, row.mode,
                                                                        row.precision)}  # fmt: skip
            except Exception as failure:  # a peer may fail in its own ways; the others go on
                yield row.name, {**about, "failed": f"{type(failure).__name__}: {failure}"[:600]}
                if "CUDA error" in str(failure):
                    raise  # nothing after it can be trusted


def counted(task: Task) -> Found:
    """Dispatched ops, waits and launches of a training step of each op."""

    def measure(step: Any, work: Workload, mode: str, precision: str) -> dict[str, Any]:
        step()
        return dict(counts(step))

    yield from rows_of(task, measure, peers=OURS | PLAIN, modes=("training",))


def graphs(task: Task) -> Found:
    """Our rooms replayed from a CUDA graph, forward and backward."""

    def measure(step: Any, work: Workload, mode: str, precision: str) -> dict[str, Any]:
        return {"graph": replayed(step), "eager": timed(step)}

    yield from rows_of(task, measure, peers=OURS, modes=("training",), precisions=PRECISIONS[:1])


def clocked(step: Any, work: Workload, mode: str, precision: str) -> dict[str, Any]:
    """Times, memory and the fraction of the ceiling."""
    bytes_moved, flops = work.floor_of(mode)
    found = device_times(step, graph=False, bytes_moved=bytes_moved, flops=flops, dtype=precision)
    return {**found, "bytes": bytes_moved, "flops": flops, "extra_memory": extra_memory(step)}


def timings(task: Task) -> Found:
    """Cold and warm, our rooms beside the plain formulations and libraries."""
    yield from rows_of(task, clocked, peers=OURS | PLAIN, precisions=PRECISIONS)


def compiled(task: Task) -> Found:
    """torch.compile of the tidy formulation."""
    yield from _compiled(task, "compiled")


def autotuned(task: Task) -> Found:
    """torch.compile with max-autotune."""
    yield from _compiled(task, "autotuned")


def _compiled(task: Task, peer: str) -> Found:
    if not GPU:
        for group in groups(peers={"compiled"}, families=task.families):
            yield from ((row.name, {"planned": True}) for row in group.rows)
        return
    yield from rows_of(task, clocked, peers={peer}, precisions=PRECISIONS[:1])


def steps(task: Task) -> Found:
    """Whole training steps in all forms; in a rehearsal one method."""
    from benchmarks.steps import FORMS, step_of
    from fastreid_vi import methods

    for name in methods.METHODS if GPU else ("mpanet",):
        for form in FORMS:
            key = f"{name} {form}"
            if key in task.done:
                continue
            if task.over:
                raise TimeoutError
            with step_of(name, form, torch.device(DEVICE), small=not GPU) as step:
                quartiles = timed(step.run)
                yield key, {"method": name, "peer": form, "shape": step.shape,
                            "precision": step.precision, "seconds": quartiles,
                            "images_per_second": step.images / quartiles[1],
                            "extra_memory": extra_memory(step.run),
                            **counts(step.run)}  # fmt: skip


def small(task: Task) -> Found:
    """Every op of ours once, forward and backward: what compute-sanitizer watches."""

    def measure(step: Any, work: Workload, mode: str, precision: str) -> dict[str, Any]:
        step()
        return {}

    yield from rows_of(task, measure, peers=OURS, modes=("training", "forward"))


def kernels(task: Task) -> Found:
    """In a rehearsal: Triton kernels and CUDA sources, compiled for a GPU that is not there."""
    from fastreid_vi.nvrtc import compiler
    from tests import triton_aot
    from tests.cuda import nvrtc

    recorder = triton_aot.Recorder()
    triton_aot.TARGETS = (REHEARSED,)
    for module in triton_aot.modules():
        if task.families and module not in task.families:
            continue
        name, case = next(iter(triton_aot.page(module).CASES.items()))
        launched = [known for known, _ in triton_aot.compile_case(recorder, case)]
        yield f"triton {module}", {"case": name, "kernels": sorted({k["kernel"] for k in launched})}
    for header, expressions in nvrtc.kernels().items():
        if task.families and header.removesuffix(".cuh") not in task.families:
            continue
        try:
            made = compiler.compiled(header, expressions[:1], f"sm_{REHEARSED}a")
        except (ImportError, OSError) as error:
            yield f"nvrtc {header}", {"skipped": str(error).splitlines()[0]}
            continue
        yield f"nvrtc {header}", {"kernel": expressions[0], "bytes": len(made.image)}


SECTIONS: dict[str, Callable[[Task], Found]] = {
    "environment": environment,
    "kernels": kernels,
    "ceilings": rates,
    "small": small,
    "counts": counted,
    "graphs": graphs,
    "timings": timings,
    "steps": steps,
    "compiled": compiled,
    "autotuned": autotuned,
}


def main(argv: Sequence[str] | None = None) -> int:
    """0: the section is complete; 75: its time was up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--families", nargs="*", default=[])
    arguments = parser.parse_args(argv)
    lines = arguments.rows.read_text().splitlines() if arguments.rows.exists() else []
    done = frozenset(json.loads(line)["name"] for line in lines)
    until = time.monotonic() + arguments.seconds
    importlib.import_module("fastreid_vi.ops")
    try:
        with arguments.rows.open("a") as file:
            task = Task(frozenset(arguments.families), done, until)
            for name, row in SECTIONS[arguments.section](task):
                file.write(json.dumps({"name": name, **row}) + "\n")
                file.flush()
    except TimeoutError:
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
