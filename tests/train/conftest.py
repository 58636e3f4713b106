from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.small import write_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set, read only."""
    return write_tree(tmp_path_factory.mktemp("data") / "sysu")
