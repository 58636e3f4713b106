"""What a check of a data set reports, and the images that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastreid_vi.config import DatasetName
from fastreid_vi.data.images import DataError, ImageList

Progress = Callable[[int, int], None]
Against = Literal["auto", "official", "itself"]

COLUMNS: dict[DatasetName, tuple[str, ...]] = {
    "sysu": tuple(f"cam{cam}" for cam in range(1, 7)),
    "regdb": ("visible", "thermal"),
    "llcm": ("vis", "nir"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    where: str
    """The offender: a file or folder inside the data set."""
    problem: str
    """What is wrong with it, without its name."""

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a check saw. Tuples are over `columns`."""

    root: str
    layout: DatasetName
    official: bool
    """Judged against the counts of the real data set, not only against itself."""
    identities: dict[str, int]
    """Identities per split, from the lists."""
    images: dict[str, tuple[int, ...]]
    """Images per split and column."""
    pids: dict[str, tuple[int, ...]]
    """Identities per split and column."""
    decoded: int
    """Images read in full; 0 when decoding was turned off."""
    findings: tuple[Finding, ...]
    """In the order found; the first is the first offender."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.findings

    @property
    def columns(self) -> tuple[str, ...]:
        """The cameras of SYSU-MM01, the modalities of the others."""
        return COLUMNS[self.layout]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, with `ok` and `columns`."""
        return {"ok": self.ok, "columns": self.columns, **asdict(self)}


def opened(root: str | os.PathLike[str], against: str) -> Path:
    """The folder to check.

    Raises:
        DataError: it is not one.
        ValueError: `against` is no word of `Against`.
    """
    if against not in ("auto", "official", "itself"):
        raise ValueError(f'against: expected "auto", "official" or "itself", got {against!r}')
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    return folder


def broken_images(
    images: ImageList, *, threads: int | None = None, progress: Progress | None = None
) -> dict[int, str]:
    """Read every image; position -> one line that names the file and what is wrong with it."""
    from fastreid_vi.data.transform import verify_image

    broken: dict[int, str] = {}
    pool = ThreadPoolExecutor(threads or os.cpu_count() or 1)
    try:
        results = pool.map(verify_image, (images.file(i) for i in range(len(images))))
        for index, problem in enumerate(results):
            if problem is not None:
                broken[index] = problem
            if progress is not None:
                progress(index + 1, len(images))
    finally:
        # An interrupted check must not first read the images still queued.
        pool.shutdown(cancel_futures=True)
    return broken


def finding(root: Path, problem: str | DataError) -> Finding:
    """Messages begin with the path they are about, mostly in full."""
    where, _, text = str(problem).removeprefix(f"{root}/").partition(": ")
    return Finding(where, text)
