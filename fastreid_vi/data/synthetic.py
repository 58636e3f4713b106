"""A stand-in for SYSU-MM01, RegDB or LLCM: tree, lists and drawn pedestrians in real image files.

Nobody needs a licence form to try the package, and every released loader accepts the tree. Who
exists and what the lists say is drawn in `layouts`, what people look like in `drawing.pedestrian`,
the pictures are taken in `drawing.scene`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import get_args

from fastreid_vi.config import DatasetName
from fastreid_vi.data.drawing.roster import Range
from fastreid_vi.data.images import DataError
from fastreid_vi.data.layouts import LAYOUTS
from fastreid_vi.data.pictures import Progress, write_pictures
from fastreid_vi.data.regdb import TRIALS

RECORD = "synthetic.json"  # beside the lists: says that the folder is ours, and how it was made

_log = logging.getLogger("fastreid_vi.data")


def synthesize(
    root: str | os.PathLike[str],
    *,
    layout: DatasetName = "sysu",
    train_ids: int | None = None,
    val_ids: int | None = None,
    test_ids: int | None = None,
    seed: int = 0,
    height: int = 128,
    width: int = 64,
    images: Range | None = None,
    train_images: Range | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Draw a stand-in data set in the layout of SYSU-MM01, RegDB or LLCM.

    Equal arguments give equal files, whatever the number of workers. The folder appears whole or
    not at all. The released evaluation code reads rank 20: it needs 20 test identities, and for
    SYSU-MM01 24, with which every presence pattern of the real set occurs and the indoor gallery
    holds 20 of them.

    Args:
        root: folder to create; must be absent or empty unless `overwrite`.
        layout: "sysu"; "regdb": BMP files, ten trials that split the same persons differently;
            "llcm": nine visible and eight infrared cameras, two to four of each for a person.
        train_ids: identities trained on, >= 1; by default 60 (RegDB: in every trial).
        val_ids: SYSU-MM01: identities in val_id.txt, >= 1, seen by cameras 3, 4, 5 only; by default
            12; the field trains on train + val. The other layouts have no such list.
        test_ids: identities tested, >= 1; by default 30 (RegDB: 60 in every trial, its halves).
        seed: other seeds give other people, places and pids.
        height: of the files, pixels.
        width: of the files, pixels.
        images: fewest and most pictures of a person in a camera; by default 2 and 14, RegDB 10 and
            10, LLCM 2 and 5.
        train_images: the same for persons of train and val, where it differs; not for RegDB, whose
            persons are both.
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
    if layout not in get_args(DatasetName):
        raise ValueError(f"layout: expected one of {get_args(DatasetName)}, got {layout!r}")
    plan = LAYOUTS[layout]
    asked = {"train": train_ids, "val": val_ids, "test": test_ids}
    counts = {s: plan.ids[s] if count is None else count for s, count in asked.items()}
    tested = images or plan.images
    ranges = {"train": train_images or tested, "val": train_images or tested, "test": tested}
    _check(layout, counts, ranges, height, width, seed, workers)
    target = Path(root)
    made: dict[str, object] = {"layout": layout, "seed": seed, "height": height, "width": width}
    made |= {f"{split}_ids": count for split, count in counts.items()}
    made |= {"images": list(tested), "train_images": list(ranges["train"])}
    place = target.absolute()
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        _check_target(target, overwrite)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        sittings = plan.plan(partial, counts, ranges, seed)
        record = partial / plan.lists / RECORD
        record.write_text(json.dumps(made, indent=1) + "\n", encoding="ascii")
        write_pictures(partial, sittings, seed, (height, width), workers, progress)
        _move(partial, place)
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"{target}: cannot be written: {why}; nothing was kept") from error
    except BrokenExecutor as error:
        why = "a drawing process was killed"
        raise DataError(f"{target}: {why}, perhaps for its memory; nothing was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if layout == "llcm" and "cam" in str(target):
        _log.warning(
            "%s: the released LLCM code looks for 'cam' in the whole path and fails below this "
            "folder; this package does not", target,
        )  # fmt: skip
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
    for split, count in counts.items():
        if split == "val" and layout != "sysu":
            if count:
                raise ValueError(f"val_ids: layout {layout!r} has no val list, got {count}")
        elif count < 1:
            raise ValueError(f"{split}_ids: expected >= 1, got {count}")
    if sum(counts.values()) > 7000:
        raise ValueError(f"identities: expected <= 7000 in all, got {sum(counts.values())}")
    for name, (low, high) in (("images", ranges["test"]), ("train_images", ranges["train"])):
        if not 1 <= low <= high <= 9999:
            raise ValueError(f"{name}: expected 1 <= fewest <= most <= 9999, got {(low, high)}")
    if layout == "regdb":
        if ranges["train"] != ranges["test"]:
            raise ValueError("train_images: RegDB trains and tests on the same persons' pictures")
        splits = math.comb(counts["train"] + counts["test"], counts["train"])
        if splits < TRIALS:
            raise ValueError(
                f"train_ids, test_ids: expected enough for {TRIALS} different splits, "
                f"got {counts['train']} and {counts['test']}, which allow {splits}"
            )
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
    if not any((root / plan.lists / RECORD).is_file() for plan in LAYOUTS.values()):
        # A real data set costs a licence form and hours: never delete one.
        raise DataError(f"{root}: was not made by synth (no {RECORD}) and is not overwritten")
