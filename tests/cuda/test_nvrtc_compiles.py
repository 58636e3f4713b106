"""NVRTC compiles every kernel that launchers name, for three architectures and within its budget;
what it made is kept on disk.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastreid_vi.nvrtc import compiler
from tests.cuda import toolkit
from tests.cuda.nvrtc import kernels
from tests.cuda.test_cuda_compiles import ARCHITECTURES, assert_within_budget

POSITIONS = "fastreid_vi::gem_pool_positions_kernel<float, true>"


def no_compiler() -> str | None:
    """Why NVRTC cannot be tried here."""
    try:
        major = compiler._nvrtc().getVersion()[0]
    except (ImportError, OSError, RuntimeError) as error:
        return f"no NVRTC: pip install 'fastreid-vi[test]' ({str(error).splitlines()[0]})"
    return None if compiler.header_folder(major) else f"no headers of CUDA {major}"


needs_nvrtc = pytest.mark.skipif(no_compiler() is not None, reason=no_compiler() or "")


@pytest.fixture(scope="session")
def cubins(build_folder: Path) -> dict[tuple[str, str], Path]:
    """Header and architecture -> all instantiations, compiled two at a time."""

    def made(job: tuple[str, str]) -> Path:
        header, architecture = job
        expressions = kernels()[header]
        key = toolkit.key(expressions, compiler._options(architecture), compiler._version())
        cubin = build_folder / f"nvrtc-{header.removesuffix('.cuh')}-{architecture}-{key}.cubin"
        if not cubin.exists():
            machine_code = compiler.compiled(header, expressions, architecture)
            assert machine_code.symbols.keys() == set(expressions)
            partial = cubin.with_suffix(f".{os.getpid()}")
            partial.write_bytes(machine_code.image)
            partial.replace(cubin)
        return cubin

    jobs = [(header, architecture) for header in kernels() for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(made, jobs), strict=True))


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("header", sorted(kernels()))
def test_every_instantiation_compiles(cubins, header: str, architecture: str):
    """Registers aside, of which NVRTC takes a few more here and there, what nvcc is held to."""
    found = list(toolkit.usage(cubins[header, architecture]))
    assert len(found) == len(kernels()[header])
    for kernel in found:
        assert_within_budget(kernel, architecture, registers=False)


@needs_nvrtc
class TestArchitecture:
    def test_the_one_of_the_device(self):
        assert compiler.architecture((8, 0)) == "sm_80"
        assert compiler.architecture((8, 6)) == "sm_86"
        assert compiler.architecture((9, 0)) == "sm_90a"

    def test_ptx_for_a_device_that_nvrtc_does_not_know(self):
        target = compiler.architecture((99, 0))
        assert target == f"compute_{max(compiler._nvrtc().getSupportedArchs())}"
        image, symbols = compiler.compiled("pool.cuh", [POSITIONS], target)
        assert f".entry {symbols[POSITIONS]}" in image.decode()

    def test_a_device_that_is_too_old(self):
        with pytest.raises(RuntimeError, match=r"does not compile for compute capability 1\.0"):
            compiler.architecture((1, 0))


@needs_nvrtc
def test_mistakes_come_with_the_compilers_words():
    with pytest.raises(RuntimeError, match=r"(?s)pool\.cuh for sm_80.*no_such_kernel"):
        compiler.compiled("pool.cuh", ["fastreid_vi::no_such_kernel<float>"], "sm_80")


@needs_nvrtc
class TestCache:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        self.folder = tmp_path / "fastreid-vi" / "nvrtc"
        self.compilations = 0
        whole = compiler.compiled

        def counted(*args: Any) -> compiler.Compiled:
            self.compilations += 1
            return whole(*args)

        monkeypatch.setattr(compiler, "compiled", counted)

    def ask(self, target: str = "sm_80") -> tuple[bytes, str]:
        return compiler.cached("pool.cuh", POSITIONS, target)

    def test_the_second_process_reads_what_the_first_compiled(self):
        first = self.ask()
        assert self.ask() == first
        assert self.compilations == 1
        image, symbol = first
        assert symbol.encode() in image
        assert [p.suffix for p in self.folder.iterdir()] == [".bin"]

    def test_each_architecture_is_kept_apart(self):
        assert self.ask("sm_80") != self.ask("sm_90a")
        assert self.compilations == 2

    @pytest.mark.parametrize("damage", [b"", b"\n\n", b"rubbish", None])
    def test_damage_is_noticed(self, damage):
        first = self.ask()
        (file,) = self.folder.iterdir()
        file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
        again = self.ask()  # not always the same bytes: the compiler does not promise that
        assert again[1] == first[1]
        assert self.compilations == 2
        assert self.ask() == again

    def test_other_device_code_is_compiled_anew(self, tmp_path: Path, monkeypatch):
        """CuPy's own cache would not look into an included file."""
        self.ask()
        changed = tmp_path / "device"
        shutil.copytree(compiler.DEVICE, changed)
        with (changed / "common.cuh").open("a") as file:
            file.write("// another line\n")
        monkeypatch.setattr(compiler, "DEVICE", changed)
        self.ask()
        assert self.compilations == 2

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert self.ask()[1] == self.ask()[1]
        assert self.compilations == 2
