"""Several processes of one test, as torchrun would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_together(module: str, folder: Path, world: int) -> None:
    """Call `work(rank, folder)` of a test module in `world` processes; all must end well."""
    script = (
        f"import os, sys, pathlib; from {module} import work;"
        "work(int(sys.argv[1]), pathlib.Path(sys.argv[2]));"
        "sys.stdout.flush(); os._exit(0)"  # a plain exit after gloo aborts now and then
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(folder)],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        for process in processes:
            _, messages = process.communicate(timeout=300)
            assert process.returncode == 0, messages
    finally:
        for process in processes:
            process.kill()
