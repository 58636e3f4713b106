"""The golden vectors: where they are, and arrays by file and case."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

VARIABLE = "FASTREID_VI_GOLDEN"
_MARK = Path("mpanet", "mam.npz")  # a file that every golden folder has


class GoldenError(ValueError):
    """The golden vectors are not there, or one of their files is not."""


class Golden:
    """A folder of golden vectors; files are read once.

    Args:
        folder: holds `<method>/<file>.npz`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, dict[str, Array]] = {}

    def load(self, name: str) -> dict[str, Array]:
        """Arrays of one file.

        Raises:
            GoldenError: missing or damaged.
        """
        if name not in self._read:
            path = self.folder / f"{name}.npz"
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    self._read[name] = {key: arrays[key] for key in arrays.files}
            except FileNotFoundError:
                raise GoldenError(f"golden vectors are missing: {path}") from None
            except Exception as error:  # damaged archives raise many things
                raise GoldenError(f"golden vectors cannot be read: {path}: {error}") from error
        return self._read[name]

    def case(self, name: str, case: str, separator: str = "__") -> dict[str, Array]:
        """The arrays `<case><separator><field>` of a file, by field."""
        prefix = case + separator
        found = {
            key.removeprefix(prefix): array
            for key, array in self.load(name).items()
            if key.startswith(prefix)
        }
        if not found:
            raise GoldenError(f"golden vectors: {name}.npz has no case {case!r}")
        return found


def find(folder: Path | None = None) -> Golden:
    """The golden vectors: `folder`, FASTREID_VI_GOLDEN, or tests/golden of this checkout.

    Raises:
        GoldenError: they are not there; says where to get them.
    """
    given = folder or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    checkout = Path(__file__).parents[2] / "tests" / "golden"
    place = given or checkout
    if not (place / _MARK).is_file():
        where = f"none in {place}" if given is not None else "this is not a checkout"
        raise GoldenError(
            f"golden vectors: {where}; they are tests/golden of the source repository: name that "
            f"folder with --golden or {VARIABLE}"
        )
    return Golden(place)
