"""Every kernel test once more, under the address and undefined-behaviour sanitizers: a read or
write outside a buffer or a shared array, a misaligned vector, an overflowing index stops it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda import emulator, toolkit
from tests.cuda.conftest import SANITIZED

HERE = Path(__file__).resolve().parent
KERNEL_TESTS = sorted(HERE.glob("test_*_kernels.py"))


def test_every_cuda_room_is_executed():
    """A new csrc/cuda/<family>.cu needs tests/cuda/test_<family>_kernels.py."""
    families = {path.stem for path in toolkit.CUDA_SOURCES.glob("*.cu")}
    tested = {path.stem.removeprefix("test_").removesuffix("_kernels") for path in KERNEL_TESTS}
    assert families <= tested


@pytest.mark.skipif(SANITIZED in os.environ, reason="this process runs under the sanitizers")
@pytest.mark.parametrize("tests", KERNEL_TESTS, ids=lambda path: path.stem)
def test_kernels_under_the_sanitizers(build_folder: Path, tests: Path):
    library = emulator.build(build_folder, "address")
    environment = {**emulator.sanitizer_environment(), SANITIZED: str(library)}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)],
        cwd=toolkit.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert " passed" in run.stdout
