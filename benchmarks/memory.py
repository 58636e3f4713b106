"""Memory of a step: the most bytes that its tensors hold at once, and where they come from."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Of glibc's malloc, by the numbers of its header.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}  # nothing from mmap, nothing given back
# What its own adjustment ends at in a process that frees large blocks.
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}


@contextmanager
def kept_memory() -> Iterator[None]:
    """Large tensors out of memory that this process used before, where the C library is glibc.

    Else some steps get new pages for each of them and others do not, by what the process did
    earlier: times of two kinds, a factor of three apart.
    """
    _tell_malloc(KEPT)
    try:
        yield
    finally:
        _tell_malloc(USUAL)


def _tell_malloc(settings: dict[int, int]) -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version"):
        for name, value in settings.items():
            library.mallopt(name, value)


def extra_memory(step: Callable[[], Any]) -> int:
    """Bytes, results included; of PyTorch's allocators, so ours and everyone else's alike."""
    return _on_device(step) if torch.cuda.is_available() else _on_host(step)


def _on_device(step: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _on_host(step: Callable[[], Any]) -> int:
    """From the profiler's record of allocations: the process' size would hide what is reused."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with _without_chatter(), torch.profiler.profile(activities=kinds, profile_memory=True) as seen:
        step()
    assert seen.profiler is not None
    records = seen.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in records if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most


@contextmanager
def _without_chatter() -> Iterator[None]:
    """The profiler's library writes two lines to standard error whenever it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
