"""What this machine can do, measured in the same run: copy rate, product rates, launches.

The fraction of the ceiling of a row is the time of its necessary bytes and products at these rates
over its measured time. Rows that fit into a CPU's cache may exceed 1: the copy is one of memory.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.clock import TINY, Step, submitted, timed

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
COPIED = (1 << 16) if TINY else (1 << 29 if GPU else 1 << 27)  # bytes of the copied tensor
SIDE = 64 if TINY else (8192 if GPU else 1536)  # of the multiplied matrices


def _best(step: Step) -> float:
    """The first quartile: a ceiling is what the machine does when nobody disturbs it."""
    return timed(step)[0]


def _product(dtype: torch.dtype) -> float:
    x = torch.randn(SIDE, SIDE, device=DEVICE).to(dtype)  # random: zeros multiply faster
    out = torch.empty_like(x)
    return 2 * SIDE**3 / _best(lambda: torch.mm(x, x, out=out))


def _copy(size: int) -> float:
    a = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()
    b = a.clone()
    return 2 * size / _best(lambda: b.copy_(a))


@functools.cache
def ceilings() -> dict[str, float]:
    """Rates of this device.

    Returns:
        `copy` in bytes read and written per second, `float32` and `bfloat16` products per second;
        on a GPU also `tf32`, `cache` (a copy inside the L2) and `launch`, seconds of one of many
        small kernels; `dispatch`, seconds that the host needs to queue an eager op.
    """
    found = {
        "copy": _copy(COPIED),
        "float32": _product(torch.float32),
        "bfloat16": _product(torch.bfloat16),
    }
    small = torch.zeros(32, device=DEVICE)

    def many() -> None:
        for _ in range(100):
            small.add_(1.0)

    found["dispatch"] = submitted(many)[1] / 100
    if GPU:
        found["cache"] = _copy(8 << 20)
        found["launch"] = timed(many)[1] / 100
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            found["tf32"] = _product(torch.float32)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    return found


def product_rate(rates: dict[str, float], dtype: str) -> float:
    """Of results as exact as the type: in float32 plain products or three of TF32."""
    rate = rates[dtype]
    return max(rate, rates.get("tf32", 0.0) / 3) if dtype == "float32" else rate


def floor_seconds(bytes_moved: int, flops: int, dtype: str) -> float:
    """Least seconds for these bytes and products here; 0 where neither was counted."""
    rates = ceilings()
    return max(bytes_moved / rates["copy"], flops / product_rate(rates, dtype))


def main() -> None:
    """Print them."""
    units: dict[str, tuple[float, str]] = {
        "copy": (1e9, "GB/s"), "cache": (1e9, "GB/s"), "launch": (1e-6, "us"),
        "dispatch": (1e-6, "us"),
    }  # fmt: skip
    for name, value in ceilings().items():
        scale, unit = units.get(name, (1e9, "GFLOP/s"))
        print(f"{name:10} {value / scale:10.1f} {unit}")


def record() -> dict[str, Any]:
    """`ceilings` with what they were measured on."""
    return {"rates": ceilings(), "copied_bytes": COPIED, "side": SIDE}


if __name__ == "__main__":
    main()
