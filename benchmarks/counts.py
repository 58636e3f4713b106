"""What a step asks of PyTorch and of the device: dispatched ops, waits, kernel launches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], Any]

# Ops that hand numbers to the host, for which a GPU must be waited for.
WAITING = {
    "_local_scalar_dense", "_unique2", "equal", "is_nonzero", "item", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip


class _Counter(TorchDispatchMode):
    """An op of ours counts once, whatever it computes inside."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        self.ops += 1
        self.waits += name in WAITING or _by_mask(name, args)
        return func(*args, **(kwargs or {}))


def _by_mask(name: str, args: Any) -> bool:
    """Indexing by a mask has to count its ones first."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def dispatched(step: Step) -> tuple[int, int]:
    """Ops of a warm step that reach a backend, and those that hand numbers to the host."""
    with _Counter() as counter:
        step()
    return counter.ops, counter.waits


def launches(step: Step) -> int | None:
    """Kernels, fills and copies that a warm step starts; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == device for event in profile.events())


def waits(step: Step) -> int | None:
    """How often PyTorch says that a warm step waits for the device; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def counts(step: Step) -> dict[str, int | None]:
    """`dispatched` ops, `waits` and `launches` of a step that has run before.

    Without a GPU, waits are those of the ops that would make one wait, and launches are None.
    """
    ops, would_wait = dispatched(step)
    seen = waits(step)
    return {
        "dispatched": ops,
        "waits": would_wait if seen is None else seen,
        "launches": launches(step),
    }
