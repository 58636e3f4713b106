"""RegDB and LLCM trees of a few tiny images, written by hand."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

# Unpadded folders whose text order differs from their numbers'.
REGDB_PIDS = (1, 2, 3, 4, 10, 11)
REGDB_IMAGES = 2
LLCM_TRAIN = {"vis": {2: (1, 3), 5: (1,), 12: (4, 9)}, "nir": {2: (1,), 5: (2, 1), 12: (9,)}}
LLCM_TEST = {"vis": {7: (3, 1), 8: (2, 4)}, "nir": {7: (1, 2), 8: (2, 9)}}


def picture(seed: int, kind: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def regdb_files(pid: int, side: str) -> list[str]:
    """Numbers fall, so that neither list order nor folder order is theirs."""
    letter = side[0].lower()
    return [
        f"{side}/{pid}/male_front_{letter}_{500 - 7 * k - pid:05d}_{pid}.bmp"
        for k in range(REGDB_IMAGES)
    ]


def _halvings() -> list[tuple[list[int], list[int]]]:
    """Ten different ones, the persons of each half in an order of their own."""
    rng, seen, found = np.random.default_rng(100), set[frozenset[int]](), []
    while len(found) < 10:
        order = rng.permutation(REGDB_PIDS).tolist()
        if frozenset(order[:3]) not in seen:
            seen.add(frozenset(order[:3]))
            found.append((order[:3], order[3:]))
    return found


HALVINGS = _halvings()


def write_lines(path: Path, lines: Iterable[tuple[str, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name} {label}\n" for name, label in lines))


def write_regdb(root: Path) -> Path:
    for pid in REGDB_PIDS:
        for side in ("Visible", "Thermal"):
            for k, name in enumerate(regdb_files(pid, side)):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(picture(pid * 10 + k, "BMP"))
    for trial in range(1, 11):
        for split, pids in zip(("train", "test"), HALVINGS[trial - 1], strict=True):
            for side in ("Visible", "Thermal"):
                lines = [(n, i) for i, pid in enumerate(pids) for n in regdb_files(pid, side)]
                write_lines(root / f"idx/{split}_{side.lower()}_{trial}.txt", lines)
    return root


def llcm_name(pid: int, cam: int, frame: int, side: str) -> str:
    return f"{pid:04d}_c{cam:02d}_s185535_f{frame}_{side}.jpg"


def write_llcm(root: Path) -> Path:
    labels = {2: 1, 5: 2, 12: 0}
    for side, persons in LLCM_TRAIN.items():
        lines = [
            (f"{side}/{pid:04d}/{llcm_name(pid, cam, frame, side)}", labels[pid])
            for pid, cams in persons.items()
            for cam in cams
            for frame in (90, 100)
        ]
        write_lines(root / f"idx/train_{side}.txt", lines)
        _write_images(root, lines)
    for side, persons in LLCM_TEST.items():
        lines = [
            (f"test_{side}/cam{cam}/{pid:04d}/{llcm_name(pid, cam, frame, side)}", pid - 7)
            for pid, cams in persons.items()
            for cam in cams
            for frame in (7, 11)
        ]
        write_lines(root / f"idx/test_{side}.txt", lines)
        _write_images(root, lines)
    (root / "idx/test_id.txt").write_text("8,7\n")
    return root


def _write_images(root: Path, lines: Iterable[tuple[str, int]]) -> None:
    for k, (name, _) in enumerate(lines):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(k, "JPEG"))
