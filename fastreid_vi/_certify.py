"""Golden vectors in, a verdict out: what `fastreid-vi certify` does."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from fastreid_vi import _backend, _console, certify
from fastreid_vi.certify import Check, Row, Selection
from fastreid_vi.certify.runner import EXACT, devices
from fastreid_vi.version import __version__

_PACKAGES = ("torch", "numpy", "triton", "safetensors")
_KINDS = ("forward", "gradient")


class CertifyError(ValueError):
    """Nothing can be certified; one line that says why."""


class Group(NamedTuple):
    """Rows that share a line of the table."""

    section: str
    name: str
    backend: str
    device: str


def run(
    *,
    golden: Path | None = None,
    only: Iterable[str] = (),
    backends: Iterable[str] = (),
    device: str | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Run every case that is asked for.

    Args:
        golden: folder of the vectors; by default FASTREID_VI_GOLDEN or this checkout's.
        only: names of ops or methods, parts of their or their cases' names; all by default.
        backends: rooms to try; by default the one of FASTREID_VI_BACKEND or all that are built, and
            methods with the ones that are chosen.
        device: "cpu" or "cuda"; all that are here by default.
        out: JSON file to write the result to.
        progress: called with (done, total).
    Returns:
        JSON-ready: `ok`, `golden`, `versions`, `devices`, `rows`, `failed`, `skipped`.
    Raises:
        CertifyError, GoldenError: no vectors, no such backend, nothing to run.
        TrainError: `out` cannot be written.
    """
    if out is not None and not out.parent.is_dir():
        raise CertifyError(f"--out: {out.parent}: no such folder")
    asked = tuple(backends) or tuple(filter(None, [_backend.forced()]))
    selection = Selection(only=tuple(only), backends=asked, devices=devices(device))
    for name in selection.backends:
        if name not in _backend.BACKENDS:
            known = ", ".join(_backend.BACKENDS)
            raise CertifyError(f"--backend: expected one of {known}, got {name!r}")
    vectors = certify.find(golden)
    found = []
    planned = certify.tasks(vectors, selection)
    for task in planned:
        found.append(task.run())
        if progress is not None:
            progress(len(found), len(planned))
    if all(row.skipped is not None for row in found):
        reason = found[0].skipped if found else "no case has that name, backend and device"
        raise CertifyError(f"nothing to certify: {reason}")
    failed = [row for row in found if row.skipped is None and not row.ok]
    result = {
        "ok": not failed,
        "golden": str(vectors.folder),
        "versions": _versions(),
        "devices": {name: _device(name) for name in selection.devices},
        "rows": [_plain(row) for row in found],
        "failed": [{"what": row.title(), "why": row.why()} for row in failed],
        "skipped": sorted({f"{r.name} in {r.backend}: {r.skipped}" for r in found if r.skipped}),
    }
    if out is not None:
        from fastreid_vi.train.files import write_json

        write_json(out, result)
    return result


def text(result: dict[str, Any]) -> str:
    """The result as a table for people: the worst case of every line."""
    groups: dict[Group, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        key = Group(row["section"], row["name"], row["backend"], row["device"])
        groups.setdefault(key, []).append(row)
    header = ["", "room", "cases", *(f"{d} {k}" for d in ("f32", "f64") for k in _KINDS), ""]
    lines: list[list[str]] = []
    for section in ("op", "method"):
        lines += [[]] if lines else []
        lines += [_line(key, rows) for key, rows in groups.items() if key.section == section]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    where = ", ".join(f"{name}: {what}" for name, what in result["devices"].items())
    said = [
        f"{versions}\n{where}\ngolden vectors: {result['golden']}",
        "largest error (allowed), relative to the largest expected entry",
        _console.table(header, lines),
    ]
    said += [f"skipped: {line}" for line in result["skipped"]]
    said += [f"FAILED: {row['what']}: {row['why']}" for row in result["failed"]]
    ran = sum(row["skipped"] is None for row in result["rows"])
    verdict = "all right" if result["ok"] else f"{len(result['failed'])} failed"
    return "\n".join([*said, f"{ran} runs: {verdict}"])


def _line(key: Group, rows: list[dict[str, Any]]) -> list[str]:
    place = f"{key.backend} on {key.device}"
    ran = [row for row in rows if row["skipped"] is None]
    cases = len({row["case"] for row in ran})
    if not ran:
        return [key.name, place, "0", *["-"] * 4, "skipped"]
    cells = [_worst(ran, dtype, kind) for dtype in ("float32", "float64") for kind in _KINDS]
    return [key.name, place, str(cases), *cells, "ok" if all(r["ok"] for r in ran) else "FAILED"]


def _worst(rows: list[dict[str, Any]], dtype: str, kind: str) -> str:
    """The check nearest to, or furthest beyond, its tolerance; exact ones count as float64."""
    kinds = {dtype, EXACT} if dtype == "float64" else {dtype}
    checks = [
        check
        for row in rows
        if row["dtype"] in kinds
        for check in row["checks"]
        if check["kind"] == kind
    ]
    if not checks:
        return "-"
    worst = max(checks, key=_excess)
    if worst["error"] is None:
        return "differs"
    return f"{worst['error']:.1e} ({worst['tolerance']:.0e})" if worst["tolerance"] else "exact"


def _excess(check: dict[str, Any]) -> float:
    if check["error"] is None:
        return float("inf")
    if not check["tolerance"]:
        return float("inf") if check["error"] else -1.0
    return float(check["error"] / check["tolerance"])


def _plain(row: Row) -> dict[str, Any]:
    return {
        "section": row.section,
        "name": row.name,
        "case": row.case,
        "backend": row.backend,
        "device": row.device,
        "dtype": row.dtype,
        "ok": row.ok,
        "fault": row.fault,
        "skipped": row.skipped,
        "checks": [_check(check) for check in row.checks],
    }


def _check(check: Check) -> dict[str, Any]:
    """JSON has no infinity and no NaN: an error of null is a shape or a NaN that differs."""
    finite = check.error < float("inf")
    return {
        "quantity": check.quantity,
        "kind": check.kind,
        "error": check.error if finite else None,
        "tolerance": check.tolerance,
        "ok": check.ok,
    }


def _versions() -> dict[str, str]:
    found = {"fastreid-vi": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _device(name: str) -> str:
    import torch

    if name == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
