"""A tiny drawn data set and two runs on it, made by the command line itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastreid_vi import cli
from tests.cli.runs import SMALL, Said, quietly


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*argv: object) -> Said:
        capfd.readouterr()
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli") / "toy"
    sizes = "--train-ids 6 --val-ids 2 --test-ids 5 --images 2 3 --height 32 --width 16 --workers 1"
    quietly("data", "synth", root, *sizes.split())
    return root


@pytest.fixture(scope="session")
def mpanet(tree: Path) -> Path:
    folder = tree.parent / "mpanet"
    quietly("train", "mpanet-sysu", "--data-root", tree, "--run-dir", folder, *SMALL)
    quietly("eval", folder)
    return folder


@pytest.fixture(scope="session")
def baseline(tree: Path) -> Path:
    folder = tree.parent / "baseline"
    quietly("train", "baseline-sysu", "--data-root", tree, "--run-dir", folder, *SMALL)
    return folder


@pytest.fixture(scope="session")
def mcja(tree: Path) -> Path:
    folder = tree.parent / "mcja"
    quietly("train", "mcja-sysu", "--data-root", tree, "--run-dir", folder, *SMALL)
    return folder


@pytest.fixture(scope="session")
def saved(tree: Path, mpanet: Path) -> Path:
    """MPANet's embeddings of the test images."""
    folder = tree.parent / "saved"
    quietly("embed", mpanet, tree, "--out", folder)
    return folder


@pytest.fixture(scope="session")
def saved_mcja(tree: Path, mcja: Path) -> Path:
    """MCJA's embeddings of the test images, single channels too."""
    folder = tree.parent / "saved-mcja"
    quietly("embed", mcja, tree, "--out", folder)
    return folder


@pytest.fixture
def damaged(tree: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(tree, tmp_path / "damaged")
