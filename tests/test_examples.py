"""Examples in docstrings and in the README run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
OPS = sorted(p.stem for p in (ROOT / "fastreid_vi/ops").glob("*.py") if p.stem[0] != "_")
MODULES = [
    "fastreid_vi._backend",
    "fastreid_vi._dispatch",
    "fastreid_vi.augment.erase",
    "fastreid_vi.augment.explicit",
    "fastreid_vi.augment.fused",
    "fastreid_vi.augment.plan",
    "fastreid_vi.augment.sampling",
    "fastreid_vi.losses",
    "fastreid_vi.methods",
    *(f"fastreid_vi.ops.{family}" for family in OPS),
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
        if "backward()" not in block:
            continue
        leaves = [v for v in scope.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        assert any(leaf.is_leaf and leaf.grad is not None for leaf in leaves)
