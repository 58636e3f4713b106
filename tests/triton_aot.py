"""Compiles the Triton kernels for GPUs that are not there, exactly as their launchers start them.

A case in tests/triton_cases/<module>.py calls a function of fastreid_vi.kernels.<module> with
tensors of a real size, which no kernel reads. What it launches is compiled instead of started: the
types, alignment hints, block sizes, warps and grid are the launcher's own and cannot drift from it.

    python -m tests.triton_aot [results.json]     without TRITON_INTERPRET; prints a table
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.cuda import toolkit

TARGETS = (80, 90, 100)
GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of a room's function."""

    call: Callable[[], object]
    wide: bool = True  # shapes and strides allow 128-bit accesses
    matrix: bool = False  # the dtype lets products run on tensor cores


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a kernel may cost in every case and on every target."""

    registers: int  # per thread
    shared: int = 0  # bytes per program
    wide_loads: bool = True  # 128-bit loads where the case allows them
    wide_stores: bool = False
    matrix: bool = False  # tensor-core instructions where the case allows them


def features(
    batch: int, channels: int, height: int, width: int, dtype: torch.dtype, *, last: bool = True
) -> torch.Tensor:
    """A map of that size in channels_last (or NCHW), for its shape only: its memory stays empty."""
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty((batch, channels, height, width), dtype=dtype, memory_format=layout)


def modules() -> list[str]:
    """Modules of fastreid_vi.kernels with launchers; `_common` holds kernels that they share."""
    folder = toolkit.ROOT / "kernels"
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def page(module: str) -> ModuleType:
    """tests/triton_cases/<module>.py: `CASES` by name and `BUDGETS` by kernel."""
    if not (toolkit.ROOT / "tests" / "triton_cases" / f"{module}.py").is_file():
        raise FileNotFoundError(f"kernels/{module}.py needs a page tests/triton_cases/{module}.py")
    return importlib.import_module(f"tests.triton_cases.{module}")


def budgets() -> dict[str, Budget]:
    """Kernel -> its budget, from every page there is."""
    folder = toolkit.ROOT / "tests" / "triton_cases"
    return {k: b for path in folder.glob("*.py") for k, b in page(path.stem).BUDGETS.items()}


def jit_functions(source: str) -> Iterator[ast.FunctionDef]:
    """Functions that a file decorates with `triton.jit`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any(
            ast.unparse(decorator).split("(")[0].split(".")[-1] == "jit"
            for decorator in node.decorator_list
        ):
            yield node


def kernels_in(sources: dict[str, str]) -> dict[str, str]:
    """Kernel -> the file it is in. A jit function that another one uses is a part, not a kernel."""
    functions = [(file, f) for file, source in sources.items() for f in jit_functions(source)]
    used = {
        node.id
        for _, function in functions
        for statement in function.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name)
    }
    return {function.name: file for file, function in functions if function.name not in used}


def kernels() -> dict[str, str]:
    """Kernel -> module, of the package."""
    files = (toolkit.ROOT / "kernels").glob("*.py")
    return kernels_in({path.stem: path.read_text() for path in files})


class NoDriver:
    """Stands for a GPU of one architecture; each is a device of its own to Triton's caches."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


class Recorder:
    """Takes the place of `JITFunction.run`."""

    def __init__(self) -> None:
        from triton.runtime.jit import JITFunction

        self.launched: list[tuple[Any, Any, tuple[int, ...]]] = []
        compile_only = JITFunction.run

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiled = compile_only(kernel, *args, grid=grid, warmup=True, **options)
            if callable(grid):
                grid = grid({**dict(zip(kernel.arg_names, args, strict=False)), **options})
            self.launched.append((kernel, compiled, tuple(grid)))
            return compiled

        JITFunction.run = run


def measure(launch: dict[str, Any], cubin: bytes) -> dict[str, Any]:
    """The record of a launch, with what the assembly shows."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (usage,) = toolkit.usage(Path(file.name))
    return {
        **launch,
        "registers": usage.registers,
        "stack": usage.stack,
        "spills": usage.spills,
        "wide_loads": usage.wide_loads,
        "wide_stores": usage.wide_stores,
        "matrix": usage.count(r"HMMA|HGMMA|UTC\w*MMA|DMMA"),
    }


def compile_case(recorder: Recorder, case: Case) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Every launch of a case on every target: what is known of it, and its machine code."""
    from triton.runtime import driver

    for architecture in TARGETS:
        driver.set_active(NoDriver(architecture))
        recorder.launched.clear()
        case.call()
        for kernel, compiled, grid in recorder.launched:
            known = {
                "kernel": kernel.__name__,
                "architecture": architecture,
                "wide": case.wide,
                "products": case.matrix,
                "grid": grid,
                "warps": compiled.metadata.num_warps,
                "shared": compiled.metadata.shared,
            }
            yield known, compiled.asm["cubin"]


def main(target: Path | None = None) -> None:
    recorder = Recorder()
    launches: list[Future[dict[str, Any]]] = []
    errors: dict[str, str] = {}
    with ThreadPoolExecutor(2) as pool:  # disassembles while the next kernel compiles
        for module in modules():
            try:
                for name, case in page(module).CASES.items():
                    for known, cubin in compile_case(recorder, case):
                        record = {"module": module, "case": name, **known}
                        launches.append(pool.submit(measure, record, cubin))
            except Exception:
                errors[module] = traceback.format_exc()
    results = {"launches": [launch.result() for launch in launches], "errors": errors}
    for entry in results["launches"]:
        print(*(f"{key}={value}" for key, value in entry.items()))
    print(*errors.values(), sep="\n")
    if target is not None:
        target.write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
