"""Seconds of a step: CUDA events on a GPU, the host's clock elsewhere; rounds by what a step costs.

Cold is the headline of a GPU: in training the last kernel left something else in the cache.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Step = Callable[[], Any]
TINY = os.environ.get("FASTREID_VI_BENCH_TINY") == "1"  # a rehearsal: sizes and rounds of nothing

FLUSHED = 256 << 20  # bytes written before a cold round; four times the L2 of an H200
# Seconds of timed rounds on a CPU.
BUDGET = float(os.environ.get("FASTREID_VI_BENCH_SECONDS", "0.2"))
FEWEST, MOST = 3, 200
TEDIOUS = 2.0  # seconds; steps that take longer are timed twice
WARM_UP, ROUNDS = (1, 2) if TINY else (10, 50)  # of a GPU
SLOW, SLOW_ROUNDS = 5e-3, 10  # a step that takes longer is timed less often


def quartiles(seconds: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile."""
    values = list(seconds)
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def host_seconds(step: Step) -> float:
    """Of one call, until it returns."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def rounds_for(step: Step, budget: float = BUDGET) -> int:
    """How many rounds fit into the budget; runs the step once, a quick one twice."""
    if TINY:
        return 1
    once = host_seconds(step)
    if once < budget / 4:  # the first call may have loaded something
        once = host_seconds(step)
    fewest = 2 if once > TEDIOUS else FEWEST
    return max(fewest, min(MOST, int(budget / max(once, 1e-9))))


def _rounds(step: Step) -> int:
    """Warm up; how often to time the step."""
    slow = False
    for _ in range(WARM_UP):
        seconds = host_seconds(step)
        if slow:
            break
        slow = seconds > SLOW
    return min(ROUNDS, SLOW_ROUNDS) if slow else ROUNDS


def timed(step: Step, before: Step | None = None) -> list[float]:
    """Quartiles of the seconds between two events around the step; `before` is not counted."""
    rounds = _rounds(step)
    if not torch.cuda.is_available():
        return quartiles([_one_on_host(step, before) for _ in range(rounds)])
    pairs = []
    for _ in range(rounds):
        if before is not None:
            before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return quartiles([begin.elapsed_time(end) / 1e3 for begin, end in pairs])


def _one_on_host(step: Step, before: Step | None) -> float:
    if before is not None:
        before()
    return host_seconds(step)


def submitted(step: Step) -> list[float]:
    """Quartiles of the host's seconds until a step is queued, the device not waited for."""
    found = []
    for _ in range(_rounds(step)):
        found.append(host_seconds(step))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return quartiles(found)
