"""Writing the pictures of a stand-in data set, person by person, in any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastreid_vi.data.drawing.camera import draw_walk
from fastreid_vi.data.drawing.pedestrian import draw_person
from fastreid_vi.data.drawing.scene import photograph
from fastreid_vi.data.drawing.site import Site

Progress = Callable[[int, int], None]


class Folder(NamedTuple):
    """The pictures of a person by one camera."""

    path: str
    """Below the data set."""
    names: tuple[str, ...]
    """Files, in the order they are taken."""
    site: Site
    key: int
    """Seeds these pictures, with the data set's seed and the pid."""


class Sitting(NamedTuple):
    """Everything that is drawn of one person."""

    pid: int
    folders: tuple[Folder, ...]

    @property
    def pictures(self) -> int:
        """Pictures in all."""
        return sum(len(folder.names) for folder in self.folders)


def write_pictures(
    root: Path,
    sittings: Sequence[Sitting],
    seed: int,
    size: tuple[int, int],
    workers: int | None,
    progress: Progress | None,
) -> None:
    """Draw everybody; equal arguments give equal files, whatever the number of workers.

    Args:
        root: folder of the data set.
        sittings: who is drawn, where and how often.
        seed: of the data set.
        size: height and width, pixels.
        workers: processes; None takes one for each CPU core, 1 draws in this process.
        progress: called with (pictures written, pictures in all).
    """
    total = sum(sitting.pictures for sitting in sittings)
    done = 0
    if progress is not None:
        progress(0, total)
    for count in _finished(root, sittings, seed, size, workers):
        done += count
        if progress is not None:
            progress(done, total)


def _finished(
    root: Path,
    sittings: Sequence[Sitting],
    seed: int,
    size: tuple[int, int],
    workers: int | None,
) -> Iterator[int]:
    """Pictures written, person by person, in the order they are done."""
    processes = min(workers or len(os.sched_getaffinity(0)), len(sittings))
    if processes < 2:
        for sitting in sittings:
            yield _write_person(str(root), sitting, seed, *size)
        return
    # Spawned, not forked: the caller may run threads, for a progress bar or in OpenMP.
    # Ctrl-C reaches them too; only this process speaks.
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        jobs = [pool.submit(_write_person, str(root), who, seed, *size) for who in sittings]
        for job in as_completed(jobs):
            yield job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_person(root: str, sitting: Sitting, seed: int, height: int, width: int) -> int:
    """Write every picture of one person and count them; the process does not matter."""
    person = draw_person(np.random.default_rng([seed, 1, sitting.pid]))
    for folder in sitting.folders:
        rng = np.random.default_rng([seed, 2, sitting.pid, folder.key])
        place, count = Path(root, folder.path), len(folder.names)
        place.mkdir(parents=True, exist_ok=True)
        # One or two passes, so that a folder shows more than one side.
        second = int(rng.integers(1, count)) if count > 2 and rng.random() < 0.6 else count
        for k, name in enumerate(folder.names):
            if k in (0, second):
                walk = draw_walk(rng, folder.site.camera)
            pixels = photograph(
                person, folder.site, walk, k, rng, seed=seed, height=height, width=width
            )
            # BMP files know neither and ignore them.
            Image.fromarray(pixels).save(place / name, quality=92, subsampling=0)
    return sitting.pictures
