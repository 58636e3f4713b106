"""Examples in docstrings and in the README run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [
    "fastreid_vi._backend",
    "fastreid_vi._dispatch",
    "fastreid_vi.methods",
    "fastreid_vi.ops.distance",
    "fastreid_vi.ops.norm",
    "fastreid_vi.ops.pool",
    "fastreid_vi.ops.triplet",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        scope: dict[str, Any] = {}
        exec(block, scope)
        assert scope["features"].grad is not None
