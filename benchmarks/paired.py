"""The ratio of two steps, measured so that whatever else the machine does hits both.

Blocks of calls alternate, A B, B A, A B ...; of each side a low quantile of its blocks is kept,
which is what the step costs while nobody else spoils the caches, and the ratio is that of the two.
On a CPU seconds are those that this thread computed, not those of the wall: a process that takes
the core away does not count. So both steps must compute in one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Step = Callable[[], Any]
SECONDS = 0.8  # of a measurement
BLOCK = 2e-3  # least seconds of a block: far above the clock's noise, below a time slice
FEWEST, MOST = 12, 400  # blocks of each side
QUANTILE = 0.1


class Ratio(NamedTuple):
    """What was measured of two steps."""

    ratio: float
    ours: float  # seconds of a call, at the quantile
    peer: float
    rounds: int


def block_seconds(step: Step, calls: int) -> float:
    """Seconds of so many calls: of this thread, or on a GPU until the device is done."""
    if torch.cuda.is_available():
        began = time.perf_counter()
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.thread_time()
    for _ in range(calls):
        step()
    return time.thread_time() - began


def calls_of(step: Step) -> tuple[int, float]:
    """How many calls make a block, and the seconds of one, warmed up."""
    step()
    one = min(block_seconds(step, 1) for _ in range(3))
    calls = max(1, round(BLOCK / one))
    return calls, one


def low(seconds: list[float], calls: int) -> float:
    """The quantile of blocks, for one call."""
    return sorted(seconds)[int(QUANTILE * len(seconds))] / calls


def paired(ours: Step, peer: Step, seconds: float = SECONDS) -> Ratio:
    """Measure the ratio ours / peer.

    Args:
        ours, peer: the two steps; they may not share state.
        seconds: how long to measure, unless a step is so slow that its fewest blocks take longer.
    """
    sides = (ours, peer)
    calls, once = zip(*map(calls_of, sides), strict=True)
    both = sum(n * one for n, one in zip(calls, once, strict=True))
    rounds = max(FEWEST, min(MOST, int(seconds / both)))
    found: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            found[side].append(block_seconds(sides[side], calls[side]))
    a, b = (low(values, n) for values, n in zip(found, calls, strict=True))
    return Ratio(a / b, a, b, rounds)
