"""What `fastreid-vi doctor` finds: versions, what is built, what runs where and why not.

Every look is guarded: the doctor must speak when torch, Triton or the extensions are missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

from fastreid_vi._console import table
from fastreid_vi.version import __version__

CORE = ("torch", "numpy", "scipy", "pillow", "safetensors", "tyro", "rich")
OPTIONAL = {
    "triton": "fused kernels on CUDA",
    "matplotlib": "report",
    "tensorboard": "training curves beside metrics.jsonl",
    "cupy": "CUDA rooms without nvcc",
}
ROOMS = ("reference", "cpu", "triton", "cuda", "retrieval")
RANKING = "rank_metrics"  # works on NumPy arrays, so the table of tensor ops does not know it
COMPILE = "pip install --no-build-isolation -e . with a C++20 compiler"


def inspect() -> dict[str, Any]:
    """Look at this installation.

    Returns:
        JSON-ready: `versions`, `device`, `native` (module -> "built" or the reason why not), `ops`
        (op -> room -> the same, or "built (how)"), `live` (op -> room that CPU and CUDA tensors
        use), `check` (op -> verdict of a small computation), `optional`, `missing` (one line each),
        `ok`.
    """
    versions = {"fastreid-vi": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in CORE}
    torch = _torch()
    found: dict[str, Any] = {
        "versions": versions,
        "device": _device(torch),
        "native": {"_C": _native_tensor(torch), "_retrieval": _native_ranking()},
        "ops": {},
        "live": {},
        "check": {},
        "optional": {name: _version(name) for name in OPTIONAL},
    }
    if not isinstance(torch, str):
        try:
            found["ops"], found["live"], found["check"] = _ops(torch)
        except (ImportError, OSError, AttributeError) as error:
            found["check"] = {"ops": f"do not load: {_first_line(error)}"}
    found["ops"][RANKING], found["live"][RANKING] = _ranking(found["native"]["_retrieval"])
    found["missing"] = list(_missing(torch, found))
    found["ok"] = not isinstance(torch, str) and set(found["check"].values()) <= {"right"}
    return found


def text(found: dict[str, Any]) -> str:
    """`inspect`'s findings for people."""
    lines = [f"{name} {version}" for name, version in found["versions"].items()]
    lines += [f"{name}: {what}" for name, what in found["device"].items()]
    lines += [f"{name} ({OPTIONAL[name]}): {v}" for name, v in found["optional"].items()]
    code = [room for room in ("cpu", "cuda") if _any_room(found["ops"], room)]
    for name, what in found["native"].items():
        holds = f", with code for {' and '.join(code)}" if name == "_C" and code else ""
        lines.append(f"{name}: {what}{holds}")
    lines += ["", *_op_table(found), ""]
    lines += [f"check: {name}: {verdict}" for name, verdict in found["check"].items()]
    lines += [f"missing: {line}" for line in found["missing"]]
    return "\n".join(lines)


def is_built(state: str) -> bool:
    """Whether a cell of the table names a room that runs: "built", or "built (how)"."""
    return state.startswith("built")


def _op_table(found: dict[str, Any]) -> list[str]:
    """Op x room, reasons as footnotes."""
    reasons: dict[str, int] = {}
    rows = []
    for name in found["live"]:
        cells = []
        for room in ROOMS:
            state = found["ops"][name].get(room, f"{name} has no {room} room")
            if is_built(state):
                uses = [device for device, live in found["live"][name].items() if live == room]
                how = state.removeprefix("built").strip(" ()")
                note = f" [{reasons.setdefault(how, len(reasons) + 1)}]" if how else ""
                cells.append(f"built{note}" + (f", {'+'.join(uses)} uses it" if uses else ""))
            elif state == f"{name} has no {room} room":
                cells.append("-")
            else:
                cells.append(f"no [{reasons.setdefault(state, len(reasons) + 1)}]")
        rows.append([name, *cells])
    notes = [f"[{number}] {reason}" for reason, number in reasons.items()]
    return [table(["op", *ROOMS], rows), *notes]


def _version(name: str) -> str:
    names = [name]
    if name == "cupy":  # one distribution per CUDA major version
        names += ["cupy-cuda12x", "cupy-cuda13x"]
    for distribution in names:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _torch() -> Any:
    """The module, or why it does not load."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return f"torch does not load: {_first_line(error)}"


def _device(torch: Any) -> dict[str, str]:
    device = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores"}
    if isinstance(torch, str):
        device["cuda"] = torch
    elif torch.version.cuda is None:
        device["cuda"] = "this build of torch has no CUDA"
    elif not torch.cuda.is_available():
        device["cuda"] = f"torch was built for CUDA {torch.version.cuda}; no usable GPU found"
    else:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        device["cuda"] = f"CUDA {torch.version.cuda}: {', '.join(names)}"
    return device


def _native_tensor(torch: Any) -> str:
    if isinstance(torch, str):
        return torch
    reason = importlib.import_module("fastreid_vi._dispatch").native_missing
    return reason or "built"


def _native_ranking() -> str:
    if importlib.util.find_spec("fastreid_vi._retrieval") is None:
        return "the C++ extension _retrieval was not built"
    try:
        importlib.import_module("fastreid_vi._retrieval")
    except ImportError as error:
        return f"the C++ extension _retrieval does not load: {_first_line(error)}"
    return "built"


def _ranking(retrieval: str) -> tuple[dict[str, str], dict[str, str]]:
    """Rooms of the ranking, and the one it uses."""
    rooms = {room: f"{RANKING} has no {room} room" for room in ROOMS}
    rooms |= {"reference": "built", "retrieval": retrieval}
    return rooms, {"cpu": "retrieval" if is_built(retrieval) else "reference"}


def _ops(torch: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    dispatch = importlib.import_module("fastreid_vi._dispatch")
    ops = dispatch.backends()
    live = {
        name: {
            device: next(room for room in order if is_built(rooms.get(room, "")))
            for device, order in dispatch.ORDER.items()
            if device == "cpu" or torch.cuda.is_available()
        }
        for name, rooms in ops.items()
        if not name.endswith("_backward")
    }
    return ops, live, _check(torch)


def _check(torch: Any) -> dict[str, str]:
    """One small op, live room against reference, on every device that is there."""
    ops = importlib.import_module("fastreid_vi.ops")
    backend = importlib.import_module("fastreid_vi._backend").backend
    verdicts = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            x = torch.linspace(0.1, 2.0, 96, device=device).reshape(2, 3, 4, 4)
            found = ops.gem_pool(x)
            with backend("reference"):
                right = ops.gem_pool(x)
            close = torch.allclose(found, right, rtol=1e-5)
            verdicts[f"gem_pool on {device}"] = "right" if close else "WRONG"
        except (RuntimeError, ImportError) as error:
            verdicts[f"gem_pool on {device}"] = f"fails: {_first_line(error)}"
    return verdicts


def _missing(torch: Any, found: dict[str, Any]) -> Any:
    """One line per thing that is missing, with how to get it."""
    if isinstance(torch, str):
        yield f"{torch}: pip install torch; without it only fastreid_vi.evaluation works"
    native = found["native"]
    if native["_C"] != "built" and not isinstance(torch, str):
        yield f"{native['_C']}: {COMPILE}; the reference and triton rooms work without it"
    elif torch_cuda(torch) and not any(is_built(r["cuda"]) for r in found["ops"].values()):
        cupy = f"pip install 'fastreid-vi[cuda{torch.version.cuda.split('.')[0]}]'"
        yield (
            f"no CUDA code: {COMPILE} and nvcc, or {cupy}; "
            "the triton and reference rooms work without it"
        )
    if native["_retrieval"] != "built":
        yield f"{native['_retrieval']}: {COMPILE}; evaluation uses NumPy, slower, same results"
    if torch_cuda(torch) and found["optional"]["triton"] == "not installed":
        yield "no Triton: pip install triton; CUDA tensors use the reference rooms"
    if found["optional"]["matplotlib"] == "not installed":
        yield "no matplotlib: pip install 'fastreid-vi[report]'; needed by `fastreid-vi report`"


def torch_cuda(torch: Any) -> bool:
    """Whether this torch sees a GPU."""
    return not isinstance(torch, str) and bool(torch.cuda.is_available())


def _any_room(ops: dict[str, dict[str, str]], room: str) -> bool:
    """Whether the compiled library has code for a room."""
    return any(rooms.get(room) == "built" for rooms in ops.values())


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
