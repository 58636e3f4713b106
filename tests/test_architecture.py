"""Rules of the house that a machine can read: who imports whom, size of files, every op covered."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastreid_vi"

# What each room may import from ours. "*" is everything; leaf modules may be imported by all.
LEAVES = {"version", "_backend"}
MAY: dict[str, set[str]] = {
    "_backend": set(),
    "version": set(),
    "config": set(),
    "_checks": set(),
    "_dispatch": {"kernels", "nvrtc", "_checks"},
    "nvrtc": {"nvrtc"},
    "kernels": {"kernels"},
    "ops": {"_dispatch", "_checks", "ops"},
    "augment": {"_dispatch", "_checks", "augment", "config"},
    "backbone": {"ops", "config"},
    "layers": {"ops", "config"},
    "losses": {"ops", "_checks", "_distributed"},
    "_distributed": {"_checks"},
    "evaluation": {"_dispatch", "_checks", "ops", "evaluation", "_retrieval"},
    "data": {"config", "augment", "data"},
    "methods": {
        "ops",
        "layers",
        "losses",
        "backbone",
        "config",
        "methods",
        "_checks",
        "_distributed",
    },
    "train": {
        "_checks",
        "_distributed",
        "methods",
        "data",
        "evaluation",
        "augment",
        "config",
        "train",
    },
    "report": {"evaluation", "_page", "figures", "ranklists"},
    "ranklists": {"evaluation", "_page", "figures", "report"},  # `report` for its record's type
    "_page": {"figures"},
    "figures": set(),
    "_console": set(),
    "_flags": {"config", "methods"},
    "_parsers": {"methods"},
    "_doctor": {"*"},
    "_selfcheck": {"*"},
    "_evaluate": {"*"},
    "_embed": {"*"},
    "_neighbors": {"evaluation"},
    "_rerank": {"_console", "_neighbors", "_score", "evaluation"},
    "_search": {"*"},
    "_verbs": {"*"},
    "_averages": {"_score", "evaluation"},
    "_score": {"_console", "_rerank", "data", "evaluation"},
    "_pack": {"*"},
    "_convert": {"*"},
    "_certify": {"*"},
    "certify": {"*"},
    "_reported": {"*"},
    "cli": {"*"},
    "__main__": {"*"},
    "__init__": {"*"},
}
SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h"}


def python_files() -> list[Path]:
    found = [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts]
    return sorted([*found, *(ROOT / "kernels").rglob("*.py")])


def source_files() -> list[Path]:
    folders = ("fastreid_vi", "kernels", "csrc", "benchmarks", "tests", "scripts")
    found = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in SUFFIXES]
    return sorted({p.resolve() for p in found} | {ROOT / "setup.py"})


def room(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Full dotted names of our own modules that a file imports, at any depth, types included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "fastreid_vi":
                yield from (f"fastreid_vi.{alias.name}" for alias in node.names)
            elif node.module.startswith("fastreid_vi."):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("fastreid_vi."))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", python_files(), ids=name_of)
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    assert here in MAY, f"{here} has no place in the house: add it to MAY with what it may import"
    for module in imported(path):
        there = module.split(".")[1]
        allowed = there in LEAVES or there in MAY[here] or "*" in MAY[here]
        assert allowed, f"{here} may not import {module}"


@pytest.mark.parametrize("path", python_files(), ids=name_of)
def test_no_relative_imports_and_no_forbidden_packages(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: they read the same everywhere"
            assert (node.module or "").split(".")[0] not in ("torchvision", "kernels")
        elif isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & {"torchvision", "kernels"}


def test_a_method_does_not_know_another() -> None:
    folder = PACKAGE / "methods"
    methods = {p.name for p in folder.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert methods
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).parts[0]
        for module in imported(path):
            parts = module.split(".")
            if own in methods and len(parts) > 2 and parts[1] == "methods":
                assert parts[2] in (own, "base", "official"), f"{path.name} imports {module}"


def test_training_knows_no_method() -> None:
    for path in (PACKAGE / "train").rglob("*.py"):
        for module in imported(path):
            if module.startswith("fastreid_vi.methods"):
                assert module == "fastreid_vi.methods.base", f"{path.name} imports {module}"


@pytest.mark.parametrize("path", source_files(), ids=name_of)
def test_files_fit_in_a_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_native_rooms_do_not_know_each_other() -> None:
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in SUFFIXES:
            continue
        here = path.relative_to(ROOT / "csrc").parts[0]
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        for line in includes:
            if here in ("cpu", "cuda"):
                assert "pybind11" not in line, path
                assert "ATen" not in line, path
                assert "<Python.h>" not in line, path
            if here == "retrieval":
                assert "torch" not in line, path
            for other in {"cpu", "cuda", "retrieval"} - {here}:
                assert f'"{other}/' not in line, path


def families() -> list[str]:
    return sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_"))


@pytest.mark.parametrize("family", families())
def test_every_family_has_a_test_and_a_benchmark(family: str) -> None:
    assert (ROOT / "tests" / "ops" / f"test_{family}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{family}.py").is_file()


@pytest.mark.parametrize("family", families())
def test_every_public_op_names_its_spec_and_golden_file(family: str) -> None:
    tree = ast.parse((PACKAGE / "ops" / f"{family}.py").read_text())
    exported = ast.parse((PACKAGE / "ops" / "__init__.py").read_text())
    names = {a.name for n in ast.walk(exported) if isinstance(n, ast.ImportFrom) for a in n.names}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            text = ast.get_docstring(node) or ""
            for heading in ("Args:", "Returns:", "Raises:", ">>>", "Spec:", "Golden:", "Backends:"):
                assert heading in text, f"{node.name}: its docstring lacks {heading}"
            golden = text.split("Golden:")[1].split(". Backends")[0]
            for name in golden.replace("\n", " ").split(","):
                assert (ROOT / "tests" / "golden" / f"{name.strip()}.npz").is_file(), name


def test_every_op_runs_the_contract() -> None:
    import fastreid_vi.ops  # noqa: F401  fills the table
    from fastreid_vi._dispatch import OPS

    text = "".join(p.read_text() for p in (ROOT / "tests" / "ops").glob("test_*.py"))
    public = {name for name in OPS if not name.endswith("_backward")}
    for name in public:
        assert f'"{name}"' in text, f"{name} has no OpContract"
