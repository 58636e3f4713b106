"""Device code to machine code: CuPy's NVRTC, one instantiation at a time, kept on disk.

CuPy's RawModule is not used: it adds -ftz=true, which nvcc's build does not have, and before 14.2
it compiles templates anew in every process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

DEVICE: Final = Path(__file__).with_name("device")
_OPTIONS: Final = ("--std=c++20", "--fmad=true", "--device-as-default-execution-space")
_INCLUDE: Final = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_CONSTANT: Final = re.compile(r"\b(k[A-Z]\w*)\s*=\s*(\d+)[,;]")
_CUDA_VERSION: Final = re.compile(r"^\s*#\s*define\s+CUDA_VERSION\s+(\d+)", re.MULTILINE)


class Compiled(NamedTuple):
    """Machine code of some kernels."""

    image: bytes  # a cubin, or PTX where the device is newer than NVRTC
    symbols: dict[str, str]  # name expression -> name in the image


def why_not() -> str | None:
    """Why kernels cannot be compiled and run in this process; None when they can."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) has no CUDA"
    if importlib.util.find_spec("cupy") is None:
        extra = f"cuda{torch.version.cuda.split('.')[0]}"
        return f"CuPy is not installed: pip install 'fastreid-vi[{extra}]'"
    try:
        major = _nvrtc().getVersion()[0]
    except (ImportError, OSError, RuntimeError) as error:
        return f"CuPy's NVRTC does not load: {str(error).splitlines()[0]}"
    if header_folder(major) is None:
        return (
            f"no headers of CUDA {major} (cuda_fp16.h) were found: set CUDA_HOME "
            "or pip install nvidia-cuda-runtime"
        )
    if not torch.cuda.is_available():
        return "no usable CUDA device to compile for"
    try:
        _count_devices()
    except RuntimeError as error:  # a CuPy for a newer CUDA than the driver's, say
        return f"CuPy does not reach the device: {str(error).splitlines()[0]}"
    return None


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for, as in setup.py where it compiles for this device too."""
    number = 10 * capability[0] + capability[1]
    known = _nvrtc().getSupportedArchs()
    if number in known:
        return f"sm_{number}a" if number == 90 else f"sm_{number}"
    older = [k for k in known if k < number]
    if not older:
        raise RuntimeError(
            f"NVRTC {_version()} does not compile for compute capability "
            f"{capability[0]}.{capability[1]}; the oldest it knows is {min(known) / 10}"
        )
    return f"compute_{max(older)}"  # PTX: the driver does the rest


def sources(header: str) -> dict[str, str]:
    """A .cuh and all of ours that it includes: name -> text."""
    found: dict[str, str] = {}
    waiting = [header]
    while waiting:
        name = waiting.pop()
        # device.h leads to the emulation too, where the compiler is g++.
        if name not in found and (name == "device.h" or name.endswith(".cuh")):
            found[name] = (DEVICE / name).read_text()
            waiting += _INCLUDE.findall(found[name])
    return found


def constants(header: str) -> dict[str, int]:
    """The plain numbers among a .cuh's constants: sizes of blocks and tiles."""
    text = (DEVICE / header).read_text()
    return {name: int(value) for name, value in _CONSTANT.findall(text)}


def compiled(header: str, expressions: Sequence[str], target: str) -> Compiled:
    """Compile instantiations of the kernels in one .cuh.

    Args:
        header: its file name in csrc/cuda.
        expressions: C++ names, such as `fastreid_vi::gem_pool_positions_kernel<float, true>`.
        target: "sm_90a" for a cubin, "compute_90" for PTX.
    Returns:
        The machine code and what the linker calls each kernel there.
    Raises:
        RuntimeError: with the compiler's messages.
    """
    nvrtc = _nvrtc()
    ours = sources(header)
    program = nvrtc.createProgram(
        f'#include "{header}"\n',
        header.replace(".cuh", ".cu"),
        tuple(text.encode() for text in ours.values()),
        tuple(name.encode() for name in ours),
    )
    try:
        for expression in expressions:
            nvrtc.addNameExpression(program, expression)
        try:
            nvrtc.compileProgram(program, _options(target))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"NVRTC: {header} for {target}: {error}\n{log}") from None
        symbols = {e: nvrtc.getLoweredName(program, e) for e in expressions}
        if target.startswith("sm_"):
            # CuPy takes the last byte for the end of a string; in a cubin it is a zero that counts.
            return Compiled(nvrtc.getCUBIN(program) + b"\0", symbols)
        return Compiled(nvrtc.getPTX(program), symbols)
    finally:
        nvrtc.destroyProgram(program)


def cached(header: str, expression: str, target: str) -> tuple[bytes, str]:
    """Machine code of one instantiation and its symbol, from the disk if it was ever compiled."""
    key = hashlib.sha256(
        repr((sources(header), expression, _options(target), _version())).encode()
    ).hexdigest()
    file = _cache_folder() / f"{key[:32]}.bin"
    if (kept := _read(file)) is not None:
        return kept
    image, symbols = compiled(header, [expression], target)
    _write(file, image, symbols[expression])
    return image, symbols[expression]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "fastreid-vi", "nvrtc")


def _read(file: Path) -> tuple[bytes, str] | None:
    """What `_write` left, unless it is absent or damaged."""
    try:
        digest, symbol, image = file.read_bytes().split(b"\n", 2)
    except (OSError, ValueError):
        return None
    if digest.decode(errors="replace") != hashlib.sha256(symbol + image).hexdigest():
        return None
    return image, symbol.decode()


def _write(file: Path, image: bytes, symbol: str) -> None:
    """Whole or not at all; a folder that cannot be written costs time in the next process only."""
    digest = hashlib.sha256(symbol.encode() + image).hexdigest()
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(b"\n".join((digest.encode(), symbol.encode(), image)))
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()


@functools.cache
def _preload() -> None:
    """Load the NVRTC that came with PyTorch: CuPy's search may not lead to its wheels."""
    major = (torch.version.cuda or "").split(".")[0]
    for root in _package_folders("nvidia"):
        for folder in ("cuda_nvrtc", f"cu{major}"):
            library = root / folder / "lib" / f"libnvrtc.so.{major}"
            if library.is_file():
                ctypes.CDLL(str(library))


def _count_devices() -> int:
    return int(importlib.import_module("cupy.cuda").runtime.getDeviceCount())


def _nvrtc() -> Any:
    _preload()
    return importlib.import_module("cupy.cuda").nvrtc


def _version() -> str:
    return ".".join(map(str, _nvrtc().getVersion()))


def _options(target: str) -> tuple[str, ...]:
    return (*_OPTIONS, f"--gpu-architecture={target}", *(f"-I{f}" for f in _include_folders()))


def _include_folders() -> Iterator[Path]:
    major = _nvrtc().getVersion()[0]
    folder = header_folder(major)
    if folder is None:
        raise RuntimeError(f"no headers of CUDA {major} (cuda_fp16.h) were found")
    yield folder
    # <nv/target>, which cuda_fp16.h needs, is not in every installation of the headers.
    bundled = (f / "_core/include/cupy/_cccl/libcudacxx" for f in _package_folders("cupy"))
    yield from (f for f in (folder / "cccl", *bundled) if (f / "nv" / "target").is_file())


@functools.cache
def header_folder(major: int) -> Path | None:
    """CUDA's own headers, of the version that NVRTC has."""
    for folder in _header_folders(major):
        cuda = folder / "cuda.h"
        if (folder / "cuda_fp16.h").is_file() and cuda.is_file():
            found = _CUDA_VERSION.search(cuda.read_text(errors="replace"))
            if found and int(found[1]) // 1000 == major:
                return folder
    return None


def _header_folders(major: int) -> Iterable[Path]:
    """Where they may be: a CUDA PyTorch's own wheels first, for NVRTC comes from there too."""
    for root in _package_folders("nvidia"):
        yield root / f"cu{major}" / "include"
        yield root / "cuda_runtime" / "include"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += [importlib.import_module("cupy.cuda").get_cuda_path(), "/usr/local/cuda"]
    homes += sorted(map(str, Path("/usr/local").glob(f"cuda-{major}*")), reverse=True)
    yield from (Path(home, "include") for home in homes if home)
    yield from (root / "backends" / "nvidia" / "include" for root in _package_folders("triton"))


def _package_folders(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [Path(f) for f in spec.submodule_search_locations or ()] if spec else []
