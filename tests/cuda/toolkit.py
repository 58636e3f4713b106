"""Finds the CUDA compiler, headers and binary tools of this machine."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA_SOURCES = ROOT / "csrc" / "cuda"


def torch_flags() -> list[str]:
    """What a file of a native room needs to see PyTorch's stable ABI, as in setup.py."""
    import torch

    return [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DPy_LIMITED_API=0x030A0000",
        "-DUSE_CUDA",
        "-isystem",
        str(Path(torch.__file__).parent / "include"),
        f"-I{ROOT / 'csrc'}",
    ]


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a tool; its messages in the error if it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # no tool needs ours
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done


def produce(command: Sequence[str], target: Path) -> None:
    """Run a compiler, no warnings; its output appears whole or not at all, whoever else builds."""
    if target.exists():
        return
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    messages = run([*command, "-o", partial]).stderr
    if "warning" in messages:
        raise RuntimeError(messages)
    partial.replace(target)


def key(*parts: object) -> str:
    """A name for what the CUDA headers and these parts lead to."""
    headers = [*CUDA_SOURCES.glob("*.*h"), *(ROOT / "csrc").glob("*.h")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(headers)))
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return digest.hexdigest()[:16]


@functools.cache
def nvcc() -> Path | None:
    """The CUDA compiler itself, not a wrapper script: its folder leads to the headers."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path).resolve())
    found = (c for c in candidates if (c.parents[1] / "include" / "cuda_runtime.h").is_file())
    return next(filter(Path.is_file, found), None)


def _triton_folder() -> Path | None:
    spec = importlib.util.find_spec("triton")
    origin = spec.origin if spec else None
    return Path(origin).parent / "backends" / "nvidia" if origin else None


@functools.cache
def cuda_headers() -> Path | None:
    """CUDA's headers: the toolkit's, or the ones that Triton brings."""
    compiler, triton = nvcc(), _triton_folder()
    candidates = [compiler.parents[1] / "include"] if compiler else []
    candidates += [triton / "include"] if triton else []
    return next((c for c in candidates if (c / "cuda_bf16.h").is_file()), None)


@functools.cache
def binary_tool(name: str) -> Path | None:
    """`cuobjdump` or `c++filt`: from the PATH, the toolkit or Triton's package."""
    compiler, triton = nvcc(), _triton_folder()
    folders = [compiler.parent] if compiler else []
    folders += [triton / "bin"] if triton else []
    found = next((f / name for f in folders if (f / name).is_file()), None)
    return found or (Path(path) if (path := shutil.which(name)) else None)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the compiler made of one kernel."""

    name: str  # as in the source, with template arguments
    registers: int
    stack: int  # bytes per thread; more than zero means spills or indexed local arrays
    shared: int  # bytes per block, static
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        """How many instructions have an opcode that begins with `pattern`, a regular expression."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    @property
    def spills(self) -> int:
        return self.count("LDL|STL")

    @property
    def wide_loads(self) -> int:
        """128-bit loads from global memory, into registers or straight into shared memory."""
        return self.count(r"LDG\.E.*\.128|LDGSTS\.E.*128|UTMALDG|UBLKCP")

    @property
    def wide_stores(self) -> int:
        return self.count(r"STG\.E.*\.128|UTMASTG")


_RESOURCES = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def usage(cubin: Path) -> Iterator[Usage]:
    """Resources and instructions of every kernel in a cubin."""
    cuobjdump = binary_tool("cuobjdump")
    assert cuobjdump is not None

    def output(*arguments: str) -> str:
        done = run([cuobjdump, *arguments, cubin])
        return done.stdout + done.stderr

    resources = {m[1]: m.groups()[1:] for m in _RESOURCES.finditer(output("-res-usage"))}
    pieces = _FUNCTION.split(output("-sass"))
    bodies = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    if not bodies.keys() <= resources.keys():
        raise AssertionError(f"{cubin.name}: cuobjdump lists {sorted(bodies)}, {sorted(resources)}")
    for symbol, body in bodies.items():
        registers, stack, shared = map(int, resources[symbol])
        yield Usage(
            name=demangled(symbol),
            registers=registers,
            stack=stack,
            shared=shared,
            instructions=Counter(_OPCODE.findall(body)),
        )


def demangled(symbol: str) -> str:
    """`gem_pool_kernel<float>` from a mangled name; the name itself if it is none of C++."""
    tool = binary_tool("c++filt")
    if tool is None:
        return symbol
    text = run([tool, symbol]).stdout.strip()
    return re.sub(r"\(.*|^void |fastreid_vi::|\(anonymous namespace\)::", "", text)
