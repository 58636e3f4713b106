"""Times on a GPU: a cold and a warm L2, a replayed CUDA graph, the host, and the roofline."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.ceilings import GPU, floor_seconds
from benchmarks.clock import FLUSHED, TINY, Step, submitted, timed


def spoiler() -> Step:
    """Fills the cache with something else."""
    size = (1 << 10) if TINY else FLUSHED
    buffer = torch.empty(size, dtype=torch.uint8, device="cuda" if GPU else "cpu")
    return buffer.zero_


def replayed(step: Step) -> list[float]:
    """Quartiles of the step as a CUDA graph: what it costs without the host."""
    if not GPU:
        return timed(step)  # a rehearsal: nothing to capture
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


def device_times(
    step: Step, *, graph: bool, bytes_moved: int, flops: int, dtype: str = "float32"
) -> dict[str, Any]:
    """All that is recorded of a step on the GPU.

    Args:
        step: launches the work on the current stream.
        graph: also replay it from a CUDA graph; other formulations may wait for the device.
        bytes_moved, flops: read and written at least once, and multiplied; 0 where not known.
        dtype: of the arguments, by name.
    Returns:
        Quartiles in seconds under "cold", "warm", "host" and "graph"; "floor" and the "fraction" of
        the cold time that it is.
    """
    found: dict[str, Any] = {
        "warm": timed(step),
        "cold": timed(step, spoiler()),
        "host": submitted(step),
    }
    if graph:
        found["graph"] = replayed(step)
    found["floor"] = floor_seconds(bytes_moved, flops, dtype)
    if found["floor"]:
        found["fraction"] = found["floor"] / found["cold"][1]
    return found
