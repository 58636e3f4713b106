"""Times on a GPU: CUDA events with a cold and a warm L2, a replayed CUDA graph, and the roofline.

Cold is the headline: in training the last kernel left something else in the cache. The fraction of
the roofline is the time of the necessary bytes and products at the rates measured here, over ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

FLUSHED = 256 << 20  # bytes written before a cold round; four times the L2 of an H200
WARM_UP, ROUNDS = 10, 50
Step = Callable[[], Any]


def quartiles(seconds: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    points = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return [float(p) for p in points]


def timed(step: Step, before: Step | None = None) -> list[float]:
    """Quartiles of the seconds between two events around the step; `before` is not counted."""
    for _ in range(WARM_UP):
        step()
    pairs = []
    for _ in range(ROUNDS):
        if before is not None:
            before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return quartiles([begin.elapsed_time(end) / 1e3 for begin, end in pairs])


def replayed(step: Step) -> list[float]:
    """Quartiles of the step as a CUDA graph: what it costs without the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return timed(graph.replay)


@functools.cache
def ceilings() -> dict[str, float]:
    """This device's copy rate (bytes read and written per second) and bf16 product rate."""
    a = torch.empty(1 << 29, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    copy = 2 * a.numel() / timed(lambda: b.copy_(a))[1]
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = 2 * 8192**3 / timed(lambda: x @ x)[1]
    return {"copy": copy, "bf16": product}


def device_times(step: Step, *, ours: bool, bytes_moved: int, flops: int) -> dict[str, Any]:
    """All that is recorded of a step on the GPU.

    Args:
        step: launches the work on the current stream.
        ours: also replay it from a CUDA graph; other formulations may wait for the device.
        bytes_moved, flops: read and written at least once, and multiplied; 0 where not known.
    Returns:
        Quartiles in seconds under "cold", "warm" and "graph", "fraction" of the roofline.
    """
    spoiler = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    found: dict[str, Any] = {"warm": timed(step), "cold": timed(step, spoiler.zero_)}
    if ours:
        found["graph"] = replayed(step)
    rates = ceilings()
    floor = max(bytes_moved / rates["copy"], flops / rates["bf16"])
    if floor:
        found["fraction"] = floor / found["cold"][1]
    return {**found, "floor": floor, "ceilings": rates}
