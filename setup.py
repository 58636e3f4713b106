"""Build of the two native modules, driven by ninja.

`fastreid_vi._C`         tensor ops on PyTorch's stable ABI: CPU rooms, CUDA rooms if nvcc is found
`fastreid_vi._retrieval` ranking on NumPy arrays, pybind11

Without a compiler the package still installs and runs its Python and Triton rooms; `fastreid-vi
doctor` says what is missing. Environment:

FASTREID_VI_CUDA        auto (default) | 1: fail without nvcc | 0: no CUDA code
FASTREID_VI_CUDA_ARCHS  "80;90a;100" (default); PTX of the last one is added for later devices
FASTREID_VI_EXTENSIONS  auto (default) | require: a failed build stops the installation | skip
MAX_JOBS                compilations at once
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
if os.environ.get("FASTREID_VI_EXTENSIONS") == "require":
    CXX_FLAGS.append("-Werror")
STABLE_ABI = [
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DPy_LIMITED_API=0x030A0000",
    "-DUSE_CUDA",
]


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def find_nvcc() -> Path | None:
    """The CUDA compiler itself, not a wrapper script: its folder leads to headers and libraries."""
    wanted = os.environ.get("FASTREID_VI_CUDA", "auto")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)
    candidates = [Path(home, "bin/nvcc") for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path).resolve())
    for nvcc in candidates:
        if nvcc.is_file() and (nvcc.parent.parent / "include" / "cuda_runtime.h").is_file():
            return nvcc
    if wanted == "1":
        raise CompileError("FASTREID_VI_CUDA=1, but no nvcc was found (set CUDA_HOME)")
    return None


class NinjaBuild(build_ext):
    """Writes one build.ninja per module and runs it."""

    def run(self) -> None:
        if os.environ.get("FASTREID_VI_EXTENSIONS") != "skip":
            super().run()

    def build_extension(self, ext: Extension) -> None:
        if os.environ.get("FASTREID_VI_EXTENSIONS") == "require":
            ext.optional = False  # setuptools turns the errors of optional extensions into warnings
        ninja = shutil.which("ninja") or shutil.which(
            "ninja", path=str(Path(sys.executable).parent)
        )
        if ninja is None:
            raise CompileError("ninja was not found: pip install ninja")
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        if shutil.which(compiler[0]) is None:
            raise CompileError(f"the C++ compiler {compiler[0]!r} was not found")
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve() / ext.name
        work.mkdir(parents=True, exist_ok=True)
        rules = self.native_rules if ext.name.endswith("._C") else self.retrieval_rules
        (work / "build.ninja").write_text(rules(ext, out, compiler))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        if subprocess.run([ninja, "-C", str(work), "-j", jobs]).returncode:
            raise CompileError(f"{ext.name} did not compile (see the messages above)")

    def native_rules(self, ext: Extension, out: Path, compiler: list[str]) -> str:
        if importlib.util.find_spec("torch") is None:
            raise CompileError(
                "torch is not visible to the build: install it first and use --no-build-isolation"
            )
        import torch

        base = Path(torch.__file__).parent
        include = [*STABLE_ABI, "-isystem", str(base / "include"), f"-I{ROOT / 'csrc'}"]
        include.append(f"-I{sysconfig.get_path('include')}")
        link = ["-Wl,--no-as-needed", f"-L{base / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        link.append("-Wl,--as-needed")
        files = list(ext.sources)
        nvcc, device = find_nvcc(), []
        if nvcc is not None:
            files += sources("cuda", ".cu")
            archs = os.environ.get("FASTREID_VI_CUDA_ARCHS", "80;90a;100").split(";")
            device = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            device.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            home = nvcc.parent.parent
            libraries = home / ("lib64" if (home / "lib64").is_dir() else "lib")
            link += [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return ninja_file(
            files, out, [*compiler, *CXX_FLAGS, *include], link, nvcc, device, include
        )

    def retrieval_rules(self, ext: Extension, out: Path, compiler: list[str]) -> str:
        if importlib.util.find_spec("pybind11") is None:
            raise CompileError("pybind11 was not found: pip install pybind11")
        import pybind11

        include = ["-isystem", pybind11.get_include(), f"-I{sysconfig.get_path('include')}"]
        include.append(f"-I{ROOT / 'csrc'}")
        return ninja_file(
            list(ext.sources), out, [*compiler, *CXX_FLAGS, *include], ["-lpthread"], None, [], []
        )


def ninja_file(
    files: list[str],
    out: Path,
    compile_cpp: list[str],
    link: list[str],
    nvcc: Path | None,
    device: list[str],
    include: list[str],
) -> str:
    """The text of build.ninja: one rule per compiler, one edge per file, one link."""
    ccache = [shutil.which("ccache")] if shutil.which("ccache") else []
    cpp = shlex.join([*ccache, *compile_cpp])
    lines = [
        "rule cpp",
        f"  command = {cpp} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.quote(compile_cpp[0])} -shared -o $out $in {shlex.join(link)}",
    ]
    if nvcc is not None:
        flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "--fmad=true"]
        flags.append("-Xcompiler=-fPIC,-fvisibility=hidden")
        cuda = shlex.join([*ccache, str(nvcc), *flags, *device, *include])
        lines += ["rule cuda", f"  command = {cuda} -MD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
    objects = []
    for name in files:
        objects.append(name.replace("/", "_") + ".o")
        rule = "cuda" if name.endswith(".cu") else "cpp"
        lines.append(f"build {objects[-1]}: {rule} {escaped(ROOT / name)}")
    lines.append(f"build {escaped(out)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def escaped(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


native = Extension(
    "fastreid_vi._C",
    ["csrc/registration.cpp", *sources("cpu", ".cpp")],
    py_limited_api=True,
    optional=True,
)
retrieval = Extension("fastreid_vi._retrieval", sources("retrieval", ".cpp"), optional=True)

setup(
    ext_modules=[native, retrieval],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
