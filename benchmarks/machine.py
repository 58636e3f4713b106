"""Which machine this is: what a record says of it, and the class whose baseline it is held to."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastreid_vi

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def slug(text: str) -> str:
    """`NVIDIA H200` as `nvidia-h200`: a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def cpu_model() -> str:
    """The processor's own name for itself."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    family = re.search(r"^cpu family\s*:\s*(\d+)$", text, re.MULTILINE)
    name = found[1].strip() if found else platform.machine()
    # Virtual machines say "AMD EPYC" of every generation.
    return f"{name} family {family[1]}" if family and not re.search(r"\d", name) else name


def vectors() -> str:
    """The widest vector instructions that PyTorch uses here, such as `AVX512`."""
    return str(torch.backends.cpu.get_cpu_capability())


def device_class() -> str:
    """Machines whose ratios may be compared: a GPU's name, or processor, vectors and threads."""
    if torch.cuda.is_available():
        return slug(torch.cuda.get_device_name())
    return slug(f"cpu {cpu_model()} {vectors()} {torch.get_num_threads()} threads")


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The checkout's commit, eight digits, and a mark of what was changed since.

    COMMIT from outside where there is no repository; "unknown" without that.
    """
    if given := os.environ.get("COMMIT"):
        return slug(given)[:13]
    found = _git("rev-parse", "--short=8", "HEAD")
    if found is None:
        return "unknown"
    changes = _git("diff", "HEAD", "--", "fastreid_vi", "kernels", "csrc", "setup.py")
    if not changes:
        return found
    return f"{found}-{hashlib.sha256(changes.encode()).hexdigest()[:4]}"


def machine() -> dict[str, Any]:
    """Device, versions and threads, for a record."""
    found: dict[str, Any] = {
        "class": device_class(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model(),
        "vectors": vectors(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python_version": platform.python_version(),
        "torch": torch.__version__,
        "fastreid_vi": fastreid_vi.__version__,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
        try:
            import triton
        except ImportError:
            pass
        else:
            found["triton"] = triton.__version__
    return found
