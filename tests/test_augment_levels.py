"""The rows of augment's C++ room give the same bytes on every instruction set."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
INCLUDE = Path(torch.__file__).parent / "include"
LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4")


def supported(level: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text()
    wanted = {"x86-64": "", "x86-64-v3": " avx2 ", "x86-64-v4": " avx512vl "}[level]
    return wanted in flags


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(),
    reason="the levels are those of x86-64 under Linux",
)
def test_bytes_do_not_follow_the_instruction_set(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    digests = {}
    # Without clones the whole file is compiled for one level; "-O1" has no vectors.
    for options in (("-O1",), *(("-O3", f"-march={level}") for level in LEVELS)):
        if options[-1].startswith("-march") and not supported(options[-1].removeprefix("-march=")):
            continue
        program = tmp_path / "rows"
        subprocess.run(
            [compiler, "-std=c++20", *options, "-w", "-D__SANITIZE_ADDRESS__", "-isystem", INCLUDE,
             f"-I{ROOT / 'csrc'}", ROOT / "tests/augment_rows.cpp", "-o", program],
            check=True,
        )  # fmt: skip
        done = subprocess.run([program], check=True, capture_output=True, text=True)
        digests[options] = done.stdout.strip()
    assert len(digests) >= 2
    assert len(set(digests.values())) == 1, digests
