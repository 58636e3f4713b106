"""A deliberately slowed op: what the regression gate must catch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastreid_vi._dispatch import OPS

CYCLES = 1.8e9  # per second, of the GPU's sleep


def _later(inner: Callable[..., Any], share: float) -> Callable[..., Any]:
    """Computes, then keeps the thread busy for a share of the time that took."""

    def outer(*args: Any) -> Any:
        began = time.thread_time()
        result = inner(*args)
        now = time.thread_time()
        until = now + share * (now - began)
        while time.thread_time() < until:
            pass
        return result

    return outer


def _later_on_device(inner: Callable[..., Any], share: float) -> Callable[..., Any]:
    """The same on the stream: the time of the kernels is measured once."""
    cycles: list[int] = []

    def outer(*args: Any) -> Any:
        if not cycles:
            inner(*args)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            inner(*args)
            end.record()
            end.synchronize()
            cycles.append(int(share * begin.elapsed_time(end) / 1e3 * CYCLES))
        result = inner(*args)
        torch.cuda._sleep(cycles[0])
        return result

    return outer


@contextmanager
def slowed(op: str, share: float = 0.2) -> Iterator[None]:
    """Every room of the op and of its gradient takes that much longer; "" slows nothing."""
    later = _later_on_device if torch.cuda.is_available() else _later
    changed: list[tuple[str, str, Any]] = []
    for name in (op, f"{op}_backward"):
        for room in ("cpu", "triton", "cuda") if name in OPS else ():
            inner = OPS[name].room(room)
            if callable(inner):
                changed.append((name, room, inner))
                OPS[name]._found[room] = later(inner, share)
    try:
        yield
    finally:
        for name, room, inner in changed:
            OPS[name]._found[room] = inner
