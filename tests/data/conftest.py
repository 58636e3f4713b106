"""Small SYSU-MM01 trees of real JPEG files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastreid_vi.data import Permutations

Counts = Mapping[tuple[int, int], int]
WriteTree = Callable[..., Path]

# Three training, one validation and three test identities; pid 90 is in no split.
SMALL: dict[tuple[int, int], int] = {
    **{(cam, pid): 3 + (cam + pid) % 3 for cam in range(1, 7) for pid in (3, 7, 12)},
    **{(cam, 9): 4 for cam in (3, 4, 5)},
    **{(cam, pid): 2 + (cam * pid) % 5 for cam in range(1, 7) for pid in (5, 21)},
    **{(cam, 30): 12 for cam in (3, 4, 5, 6)},
    (1, 90): 2,
}
SMALL_SPLITS = {"train": (12, 3, 7), "val": (9,), "test": (5, 21, 30)}


def jpeg(seed: int, *, height: int = 48, width: int = 24, grey: bool = False) -> bytes:
    """A JPEG of smooth noise, different for every seed."""
    random = np.random.default_rng(seed)
    shape = (height // 8 + 1, width // 8 + 1)
    low = random.integers(0, 256, shape if grey else (*shape, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


def write_lists(root: Path, splits: Mapping[str, Iterable[int]]) -> None:
    (root / "exp").mkdir(parents=True, exist_ok=True)
    for split, pids in splits.items():
        (root / "exp" / f"{split}_id.txt").write_text(",".join(map(str, pids)) + "\n")


def write_files(root: Path, counts: Counts, content: Callable[[int, int, int], bytes]) -> None:
    for cam in range(1, 7):
        (root / f"cam{cam}").mkdir(parents=True, exist_ok=True)
    for (cam, pid), count in counts.items():
        if count:
            folder = root / f"cam{cam}" / f"{pid:04d}"
            folder.mkdir()
            for number in range(1, count + 1):
                (folder / f"{number:04d}.jpg").write_bytes(content(cam, pid, number))


def permutations_for(counts: Counts, seed: int = 0) -> Permutations:
    random = np.random.default_rng(seed)
    return Permutations(
        {
            folder: np.stack([random.permutation(count) + 1 for _ in range(10)])
            for folder, count in counts.items()
            if count
        }
    )


@pytest.fixture
def write_tree(tmp_path: Path) -> WriteTree:
    """Writes a tree, by default the small one, and returns its root."""

    def write(
        counts: Counts = SMALL,
        splits: Mapping[str, Iterable[int]] = SMALL_SPLITS,
        *,
        name: str = "SYSU",
    ) -> Path:
        root = tmp_path / name
        write_files(
            root,
            counts,
            lambda cam, pid, number: jpeg(pid * 1000 + cam * 100 + number, grey=cam in (3, 6)),
        )
        write_lists(root, splits)
        permutations_for(counts).to_mat(root / "exp" / "rand_perm_cam.mat")
        return root

    return write


@pytest.fixture
def sysu(write_tree: WriteTree) -> Path:
    """The small tree."""
    return write_tree()
