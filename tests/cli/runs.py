"""A small run, what a command left, and other things the tests of the command line share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from fastreid_vi import cli

# A new interpreter finds the package where this one did, installed or not.
PLACES = [str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, PLACES))}

# Small in every direction: about two seconds of training.
SMALL = [
    *("--model.depth", "18", "--weights", "none", "--data.height", "32", "--data.width", "16"),
    *("--data.identities", "3", "--data.images", "4", "--data.workers", "0", "--data.pad", "2"),
    *("--data.validation", "3", "--run.eval-every", "1", "--schedule.epochs", "1"),
    *("--optim.lr", "1e-3"),
]
SETTINGS = ["all/1", "all/10", "indoor/1", "indoor/10"]


class Said(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of an error."""
        lines = [line for line in self.err.splitlines() if line.startswith("fastreid-vi: error: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0]
        assert "Traceback" not in self.err + self.out
        return lines[0].removeprefix("fastreid-vi: error: ")


def quietly(*argv: object) -> None:
    assert cli.main([str(word) for word in argv]) == 0


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )


def ids(root: Path, split: str) -> list[int]:
    return [int(pid) for pid in (root / f"exp/{split}_id.txt").read_text().split(",")]
