"""The tests of the compiled module once more, under the address and undefined-behaviour sanitizers:
a read or write outside an array, a misaligned access, an overflowing index stops them.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda import emulator, toolkit
from tests.evaluation.preloaded import LIBRARY

HERE = Path(__file__).resolve().parent
FOLDER = toolkit.ROOT / "csrc" / "retrieval"
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "-fno-omit-frame-pointer",
]
# Every family's own tests; the protocols reach the same loops by way of real galleries.
FAMILIES = ("rank", "streaming", "rerank", "search", "sysu", "cameras")
# NumPy rooms run no compiled line, a process of a test's own loads the usual library, and the
# sanitizers take memory of their own.
WATCHED = "not reference and not environment and not torch and not memory and not forecast"
TESTS = sorted({path for family in FAMILIES for path in HERE.glob(f"test_{family}*.py")})


@pytest.fixture(scope="session")
def sanitized(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of all of csrc/retrieval under the sanitizers, kept where pytest has a cache."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    cache = getattr(pytestconfig, "cache", None)
    folder = Path(cache.mkdir("retrieval")) if cache else tmp_path_factory.mktemp("retrieval")
    return build(folder, FLAGS)


def build(folder: Path, flags: list[str]) -> Path:
    """Compile what is not yet in `folder` and link."""
    pybind11 = pytest.importorskip("pybind11")
    headers = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.h")))
    common = hashlib.sha256(headers + repr((flags, emulator.compiler_version())).encode())
    include = ["-isystem", pybind11.get_include(), f"-I{sysconfig.get_path('include')}"]
    compiler = ["g++", *flags, *include, f"-I{FOLDER.parent}", "-c"]

    def compiled(source: Path) -> str:
        digest = common.copy()
        digest.update(source.read_bytes())
        target = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        toolkit.produce([*compiler, str(source)], target)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sorted(FOLDER.glob("*.cpp"))))
    name = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    target = folder / f"_retrieval-{name}.so"
    toolkit.produce(["g++", "-shared", *flags, *objects, "-lpthread"], target)
    return target


def test_every_family_is_watched() -> None:
    """A new csrc/retrieval/<family>_bindings.cpp needs tests/evaluation/test_<family>*.py."""
    families = {path.stem.removesuffix("_bindings") for path in FOLDER.glob("*_bindings.cpp")}
    watched = {family for family in FAMILIES for path in TESTS if f"test_{family}" in path.stem}
    assert {"rank" if family == "ranking" else family for family in families} <= watched


@pytest.mark.skipif(LIBRARY in os.environ, reason="this process runs another library already")
def test_under_the_sanitizers(sanitized: Path) -> None:
    command = "-m pytest -q -x -s -p no:cacheprovider -p tests.evaluation.preloaded -k"
    run = subprocess.run(
        [sys.executable, *shlex.split(command), WATCHED, *map(str, TESTS)],
        cwd=toolkit.ROOT,
        env={**emulator.sanitizer_environment(), LIBRARY: str(sanitized), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[:6000]
    assert " passed" in run.stdout
