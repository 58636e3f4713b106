"""Builds CUDA files for the CPU and drives the emulated library.

`build` compiles csrc/cuda/*.cu with g++ (or files of a test's own) into one library, in one of its
variants: "plain", "races" with the detector of races.cpp, "ucontext" that with portable fibres,
"address" with the address and undefined-behaviour sanitizers. The library registers the same ops as
`fastreid_vi._C`, for CPU tensors, as `torch.ops.fastreid_vi_emulated`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.cuda import toolkit

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas"]  # unroll
VARIANTS = {
    "plain": [],
    "races": ["-fsanitize=thread"],  # only the calls; races.cpp answers them, no runtime is linked
    "ucontext": ["-fsanitize=thread", "-DEMULATION_UCONTEXT"],  # the switch of other processors
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ],
}
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}


def why_not() -> str | None:
    """Why nothing can be built here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    return None if toolkit.cuda_headers() else "no CUDA headers (neither nvcc nor triton)"


@functools.cache
def compiler_version() -> str:
    return toolkit.run(["g++", "--version"]).stdout


def _registration(folder: Path) -> Path:
    """The table of schemas, for the emulated namespace."""
    text = (toolkit.ROOT / "csrc" / "registration.cpp").read_text()
    copy = folder / "registration.cpp"
    copy.write_text(text.replace("fastreid_vi_native", "fastreid_vi_emulated"))
    return copy


def build(folder: Path, variant: str, sources: Iterable[Path] | None = None) -> Path:
    """Compile what is not yet in `folder` and link.

    Args:
        folder: keeps objects between runs, named by the hash of everything they depend on.
        variant: one of `VARIANTS`.
        sources: device files without PyTorch; default: every csrc/cuda/*.cu.
    Returns:
        Path of the shared library.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = sorted(toolkit.CUDA_SOURCES.glob("*.cu")) if sources is None else list(sources)
    plain = [HERE / "control.cpp"]
    flags = [*FLAGS, f"-isystem{toolkit.cuda_headers()}", f"-I{toolkit.CUDA_SOURCES}"]
    link = ["-ldl"]
    if sources is None:
        import torch

        library = Path(torch.__file__).parent / "lib"
        flags += [*toolkit.torch_flags(), f"-I{sysconfig.get_path('include')}"]
        plain.append(_registration(folder))
        link += [f"-L{library}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{library}"]
    jobs = [(source, [*flags, *VARIANTS[variant]]) for source in device]
    if variant == "address":
        jobs += [(source, [*flags, *VARIANTS[variant]]) for source in plain]
        link += VARIANTS[variant]
    else:  # the detector must not watch itself
        portable = [flag for flag in VARIANTS[variant] if flag.startswith("-D")]
        plain += [HERE / "races.cpp"] if VARIANTS[variant] else []
        jobs += [(source, [*flags, *portable, "-O2"]) for source in plain]
    made = [
        (
            folder / f"{source.stem}-{toolkit.key(source, flags, compiler_version())}.o",
            source,
            flags,
        )
        for source, flags in jobs
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: _compile(*job), made))
    objects = [str(target) for target, _, _ in made]
    target = folder / f"emulated-{variant}-{toolkit.key(objects)}.so"
    toolkit.produce(["g++", "-shared", *objects, *link], target)
    return target


def _compile(target: Path, source: Path, flags: list[str]) -> None:
    toolkit.produce(["g++", *flags, "-x", "c++", "-c", str(source)], target)


def sanitizer_environment() -> dict[str, str]:
    """Environment in which Python can load a library of the "address" variant."""
    libraries = ("libasan.so", "libubsan.so", "libstdc++.so")
    paths = [toolkit.run(["g++", f"-print-file-name={name}"]).stdout.strip() for name in libraries]
    options = "detect_leaks=0:abort_on_error=0"
    return {**os.environ, "LD_PRELOAD": ":".join(paths), "ASAN_OPTIONS": options}


class Emulator:
    """A loaded library: orders, launch count, race detector."""

    def __init__(self, library: Path) -> None:
        self.path = library
        self.functions = ctypes.CDLL(str(library))
        self._order = self.functions.fastreid_vi_emulation_order
        self._order.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self._order.restype = None

    @property
    def launches(self) -> int:
        """Kernels started since the library was loaded."""
        return int(self.functions.fastreid_vi_emulation_launches())

    def order(self, name: str, seed: int = 1) -> None:
        """In which order threads and blocks run from now on: ascending, descending or shuffled."""
        self._order(ORDERS[name], seed)

    @contextmanager
    def recorded(self) -> Iterator[list[tuple[int, ...]]]:
        """Fills a list with grid, block and dynamic shared memory of every launch within."""
        launches: list[tuple[int, ...]] = []
        self.functions.fastreid_vi_emulation_record(ctypes.c_bool(True))
        try:
            yield launches
        finally:
            self.functions.fastreid_vi_emulation_record(ctypes.c_bool(False))
            read = self.functions.fastreid_vi_emulation_recorded
            read.restype = ctypes.POINTER(ctypes.c_uint64)
            index = 0
            while found := read(ctypes.c_size_t(index)):
                launches.append(tuple(found[:7]))
                index += 1

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Without the race detector, where the library has one."""
        watch = getattr(self.functions, "fastreid_vi_emulation_watch", lambda on: None)
        watch(ctypes.c_bool(False))
        try:
            yield
        finally:
            watch(ctypes.c_bool(True))

    def located(self, message: str) -> str:
        """A detector's message with file and line in the place of code addresses."""

        def line(match: re.Match[str]) -> str:
            found = toolkit.run(["addr2line", "-s", "-e", str(self.path), match[1]])
            return found.stdout.split()[0]

        return re.sub(r"\[\+(0x[0-9a-f]+)\]", line, message)
