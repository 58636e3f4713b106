"""When CUDA rooms go through NVRTC: every one has a launcher, a wheel holds the device code, and
where a part is missing the table and a forced backend say which.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastreid_vi
from fastreid_vi import _dispatch, _doctor, nvrtc, ops
from fastreid_vi.evaluation import device_ops  # noqa: F401  fills the table
from fastreid_vi.nvrtc import compiler, pool
from fastreid_vi.nvrtc.kernel import Kernel
from tests.cuda import toolkit
from tests.cuda.nvrtc import kernels

IMPLEMENTED = re.compile(r'm\.impl\("(\w+)"')
SKIPPED = {"build", "dist", "tests", "benchmarks", "runs", "fastreid_vi.egg-info"}
VERSION = SimpleNamespace(getVersion=lambda: (13, 0))
CUPY = SimpleNamespace(__version__="14.2.0", __spec__=SimpleNamespace())


def test_every_cuda_room_has_a_launcher():
    found = {
        op: source.stem
        for source in toolkit.CUDA_SOURCES.glob("*.cu")
        for op in IMPLEMENTED.findall(source.read_text())
    }
    assert found == nvrtc.ROOMS
    assert nvrtc.ROOMS.keys() <= {n for n, op in _dispatch.OPS.items() if "cuda" in op.backends}


def test_every_kernel_has_a_launcher():
    """What host code launches, by name; template arguments are compared when it runs. CuPy starts
    no clusters: those kernels are a second way to what others compute.
    """
    host = (*toolkit.CUDA_SOURCES.glob("*.cu"), *toolkit.CUDA_SOURCES.glob("*.h"))
    text = "".join(source.read_text() for source in host)
    launched = set(re.findall(r"\b(\w+_kernel)\b", text))
    launched -= set(re.findall(r"\blaunch_clusters\(\s*[\w:]*?(\w+_kernel)\b", text))
    kernels()
    assert {kernel.name for kernel in Kernel.all} == launched


def test_the_package_holds_the_device_code(tmp_path: Path):
    """An installed wheel has no csrc folder."""
    source = tmp_path / "source"
    shutil.copytree(
        toolkit.ROOT, source, symlinks=True,
        ignore=lambda folder, names: {n for n in names if n[0] == "." or n in SKIPPED},
    )  # fmt: skip
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")]
    environment = {**os.environ, "FASTREID_VI_EXTENSIONS": "skip"}
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    built = {p.name for p in (tmp_path / "built" / "fastreid_vi" / "nvrtc" / "device").iterdir()}
    assert built == {"device.h", *(p.name for p in toolkit.CUDA_SOURCES.glob("*.cuh"))}


def test_cupy_is_not_loaded_before_it_is_needed():
    code = "import sys, fastreid_vi; fastreid_vi.backends(); print('cupy' in sys.modules)"
    if torch.version.cuda is not None:
        code = "import sys, fastreid_vi.ops; print('cupy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


class TestReasons:
    """Each part may be missing; the table and a forced backend say which."""

    @pytest.fixture
    def hidden(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
        def hide(**parts: Any) -> None:
            monkeypatch.setattr(torch.version, "cuda", parts.get("cuda", "13.0"))
            available = parts.get("device", True)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
            if "cupy" in parts:
                monkeypatch.setitem(sys.modules, "cupy", parts["cupy"])
            monkeypatch.setattr(compiler, "_count_devices", parts.get("devices", lambda: 1))
            monkeypatch.setattr(compiler, "_nvrtc", parts.get("nvrtc", lambda: VERSION))
            monkeypatch.setattr(
                compiler, "header_folder", lambda major: parts.get("headers", major)
            )

        for op in _dispatch.OPS.values():  # what is found here is forgotten afterwards
            monkeypatch.setattr(op, "_found", {})
        nvrtc._why_not.cache_clear()
        yield hide
        nvrtc._why_not.cache_clear()

    def test_all_is_there(self, hidden):
        hidden(cupy=CUPY)
        assert compiler.why_not() is None

    @pytest.mark.parametrize(
        ("parts", "reason"),
        [
            ({"cuda": None}, r"this PyTorch \(.*\) has no CUDA"),
            ({"cupy": None}, r"CuPy is not installed: pip install 'fastreid-vi\[cuda13\]'"),
            ({"cupy": None, "cuda": "12.8"}, r"pip install 'fastreid-vi\[cuda12\]'"),
            ({"nvrtc": lambda: fail("no libnvrtc\nmore")}, "CuPy's NVRTC does not load: no libnvr"),
            ({"headers": None}, r"no headers of CUDA 13 .*: set CUDA_HOME"),
            ({"device": False}, "no usable CUDA device"),
            ({"devices": lambda: fail("old driver")}, "CuPy does not reach the device: old driver"),
        ],
    )
    def test_what_is_missing_is_named(self, hidden, parts, reason):
        hidden(**{"cupy": CUPY, **parts})
        assert re.search(reason, compiler.why_not() or "")

    @pytest.mark.parametrize("extension", [None, "the C++ extension _C was not built"])
    def test_the_table_names_both_ways(self, hidden, monkeypatch, extension):
        hidden(cupy=None)
        monkeypatch.setattr(_dispatch, "native_missing", extension)
        found = lacking_cuda(monkeypatch)
        why = extension or "the C++ extension was built without cuda code for gem_pool"
        assert found.room("cuda") == (
            f"{why}; CuPy is not installed: pip install 'fastreid-vi[cuda13]'"
        )

    def test_a_forced_backend_is_never_replaced_in_silence(self, hidden, monkeypatch):
        hidden(cupy=None)
        found = lacking_cuda(monkeypatch)
        monkeypatch.setattr(_dispatch, "_device", lambda args: "cuda")
        with (
            fastreid_vi.backend("cuda"),
            pytest.raises(RuntimeError, match=r"'cuda' was asked for but cannot run.*without cuda"),
        ):
            found.choose(torch.ones(1), 3.0, 0.0)

    def test_the_table_names_the_live_path(self, hidden, monkeypatch):
        hidden(cupy=CUPY)
        found = lacking_cuda(monkeypatch)
        assert found.room("cuda") is pool.gem_pool
        monkeypatch.setitem(_dispatch.OPS, "gem_pool", found)
        table = fastreid_vi.backends()
        assert table["gem_pool"]["cuda"] == "built (NVRTC through CuPy 14.2)"
        assert table["gem_pool"]["reference"] == "built"


def fail(message: str) -> Any:
    raise RuntimeError(message)

    def test_the_doctor_names_the_live_path(self, hidden, monkeypatch):
        hidden(cupy=CUPY)
        monkeypatch.setitem(_dispatch.OPS, "gem_pool", lacking_cuda(monkeypatch))
        found = _doctor.inspect() | {"live": {"gem_pool": {"cpu": "cpu", "cuda": "cuda"}}}
        row, note = _doctor._op_table(found)
        assert re.search(r"gem_pool .* built \[(\d)\], cuda uses it", row)
        assert re.fullmatch(r"\[\d\] NVRTC through CuPy 14\.2", note)


def lacking_cuda(monkeypatch: pytest.MonkeyPatch) -> _dispatch.Op:
    """gem_pool as if nothing was compiled for it on CUDA, nothing remembered."""
    monkeypatch.setattr(_dispatch, "_has_native", lambda name, key: False)
    op = _dispatch.OPS[ops.gem_pool.__name__]
    return _dispatch.Op(op.name, op.family, op.reference, op.backends, op.refuses)
