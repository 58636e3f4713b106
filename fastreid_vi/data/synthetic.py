"""A stand-in for SYSU-MM01: its tree, lists and permutations, with drawn pedestrians in real JPEGs.

Nobody needs a licence form to try the package, and every released loader accepts the tree. Who
exists is drawn in `drawing.roster`, what they look like in `drawing.pedestrian`, the pictures are
taken in `drawing.scene`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fastreid_vi.data.drawing.camera import CAMERAS, draw_walk
from fastreid_vi.data.drawing.pedestrian import draw_person
from fastreid_vi.data.drawing.roster import Entry, Range, draw_roster
from fastreid_vi.data.drawing.scene import photograph
from fastreid_vi.data.images import DataError
from fastreid_vi.data.permutations import TRIALS, Permutations, folder_name, save_mat

Progress = Callable[[int, int], None]

RECORD = "synthetic.json"  # in exp/: says that the folder is ours, and how it was made


def synthesize(
    root: str | os.PathLike[str],
    *,
    layout: Literal["sysu"] = "sysu",
    train_ids: int = 60,
    val_ids: int = 12,
    test_ids: int = 30,
    seed: int = 0,
    height: int = 128,
    width: int = 64,
    images: Range = (2, 14),
    train_images: Range | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Draw a stand-in data set in the layout of SYSU-MM01.

    Equal arguments give equal files, whatever the number of workers. The folder appears whole or
    not at all. With 24 test identities or more, every presence pattern of the real set occurs and
    the indoor gallery holds the 20 identities that the released evaluation code requires.

    Args:
        root: folder to create; must be absent or empty unless `overwrite`.
        layout: only "sysu" so far.
        train_ids: identities in train_id.txt, >= 1.
        val_ids: identities in val_id.txt, >= 1, seen by cameras 3, 4, 5 only; the field trains on
            train + val.
        test_ids: identities in test_id.txt, >= 1.
        seed: other seeds give other people, places and pids.
        height: of the files, pixels.
        width: of the files, pixels.
        images: fewest and most pictures of a person in a camera.
        train_images: the same for persons of train and val, where it differs.
        workers: processes; None takes one for each CPU core, 1 draws in this process.
        overwrite: replace an earlier stand-in; any other folder is refused.
        progress: called with (pictures written, pictures in all).
    Returns:
        `root`.
    Raises:
        ValueError: an argument out of range.
        DataError: `root` is not empty, cannot be written, or the disk is full.
    Spec: datasets 6.
    """
    counts = {"train": train_ids, "val": val_ids, "test": test_ids}
    ranges = {"train": train_images or images, "val": train_images or images, "test": images}
    _check(layout, counts, ranges, height, width, seed, workers)
    target = Path(root)
    made = {"layout": layout, "seed": seed, "height": height, "width": width}
    made |= {f"{split}_ids": count for split, count in counts.items()}
    made |= {"images": list(images), "train_images": list(ranges["train"])}
    place = target.absolute()
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        _check_target(target, overwrite)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        rng = np.random.default_rng([seed, 0])
        roster = draw_roster(counts, ranges, rng)
        _write_lists(partial / "exp", roster, rng)
        (partial / "exp" / RECORD).write_text(json.dumps(made, indent=1) + "\n", encoding="ascii")
        _write_pictures(partial, roster, seed, (height, width), workers, progress)
        _move(partial, place)
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"{target}: cannot be written: {why}; nothing was kept") from error
    except BrokenExecutor as error:
        why = "a drawing process was killed"
        raise DataError(f"{target}: {why}, perhaps for its memory; nothing was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _move(partial: Path, place: Path) -> None:
    """Put the finished folder in its place; an earlier one goes only when the new one stands."""
    earlier = partial.with_suffix(".earlier")
    if place.exists():
        place.rename(earlier)
    try:
        partial.rename(place)
    except OSError:
        if earlier.exists():
            earlier.rename(place)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _check(
    layout: str,
    counts: Mapping[str, int],
    ranges: Mapping[str, Range],
    height: int,
    width: int,
    seed: int,
    workers: int | None,
) -> None:
    if layout != "sysu":
        raise ValueError(f"layout: expected 'sysu', got {layout!r}")
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"{split}_ids: expected >= 1, got {count}")
    if sum(counts.values()) > 7000:
        raise ValueError(f"identities: expected <= 7000 in all, got {sum(counts.values())}")
    for name, (low, high) in (("images", ranges["test"]), ("train_images", ranges["train"])):
        if not 1 <= low <= high <= 9999:
            raise ValueError(f"{name}: expected 1 <= fewest <= most <= 9999, got {(low, high)}")
    if min(height, width) < 16:
        raise ValueError(f"height, width: expected >= 16 pixels, got {height} x {width}")
    if seed < 0:
        raise ValueError(f"seed: expected >= 0, got {seed}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected >= 1, got {workers}")


def _check_target(root: Path, overwrite: bool) -> None:
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise DataError(f"{root}: expected a folder or nothing, found a file or a link")
    if not root.exists() or not any(root.iterdir()):
        return
    if not overwrite:
        raise DataError(f"{root}: is not empty; name another folder, or ask to overwrite it")
    if not (root / "exp" / RECORD).is_file():
        # A real data set costs a licence form and hours: never delete one.
        raise DataError(f"{root}: was not made by synth (no exp/{RECORD}) and is not overwritten")


def _write_lists(exp: Path, roster: Sequence[Entry], rng: np.random.Generator) -> None:
    """The identity lists and the gallery permutations."""
    exp.mkdir()
    ids = {s: [e.pid for e in roster if e.split == s] for s in ("train", "val", "test")}
    for split, pids in ids.items():
        save_mat(exp / f"{split}_id.mat", {"id": np.array([pids], np.uint16)})
    ids["available"] = sorted(pid for pids in ids.values() for pid in pids)
    for name, pids in ids.items():
        (exp / f"{name}_id.txt").write_text(",".join(map(str, pids)) + "\n", encoding="ascii")
    orders = {
        (cam, entry.pid): np.stack([rng.permutation(count) + 1 for _ in range(TRIALS)])
        for entry in roster
        for cam, count in entry.images.items()
    }
    Permutations(orders).to_mat(exp / "rand_perm_cam.mat")


def _write_pictures(
    folder: Path,
    roster: Sequence[Entry],
    seed: int,
    size: tuple[int, int],
    workers: int | None,
    progress: Progress | None,
) -> None:
    total = sum(sum(entry.images.values()) for entry in roster)
    done = 0
    if progress is not None:
        progress(0, total)
    for count in _finished(folder, roster, seed, size, workers):
        done += count
        if progress is not None:
            progress(done, total)


def _finished(
    folder: Path, roster: Sequence[Entry], seed: int, size: tuple[int, int], workers: int | None
) -> Iterator[int]:
    """Pictures written, person by person, in the order they are done."""
    processes = min(workers or len(os.sched_getaffinity(0)), len(roster))
    if processes < 2:
        for entry in roster:
            yield _write_person(str(folder), entry, seed, *size)
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
        jobs = [pool.submit(_write_person, str(folder), entry, seed, *size) for entry in roster]
        for job in as_completed(jobs):
            yield job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_person(folder: str, entry: Entry, seed: int, height: int, width: int) -> int:
    """Write every picture of one person and count them; the process does not matter."""
    person = draw_person(np.random.default_rng([seed, 1, entry.pid]))
    for cam, count in entry.images.items():
        rng = np.random.default_rng([seed, 2, entry.pid, cam])
        place = Path(folder, folder_name(cam, entry.pid))
        place.mkdir(parents=True)
        # One or two passes, so that a folder shows more than one side.
        second = int(rng.integers(1, count)) if count > 2 and rng.random() < 0.6 else count
        for k in range(count):
            if k in (0, second):
                walk = draw_walk(rng, CAMERAS[cam])
            pixels = photograph(person, cam, walk, k, rng, seed=seed, height=height, width=width)
            Image.fromarray(pixels).save(place / f"{k + 1:04d}.jpg", quality=92, subsampling=0)
    return sum(entry.images.values())
