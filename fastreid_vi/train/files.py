"""Writing so that a crash, a full disk or a SIGKILL leaves the old state or the new, no mixture.

Everything is written under a temporary name in the same folder, flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastreid_vi.train.errors import CheckpointError, TrainError

_TEMPORARY = ".writing-"


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `parts` one after the other and flush them to the disk (not atomic by itself)."""
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Make renames inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as readable JSON, atomically.

    Raises:
        TrainError: the disk is full, the folder is not writable.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, [text.encode()])


def replace_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Replace `path` by `parts`, atomically.

    Raises:
        TrainError: the disk is full, the folder is not writable.
    """
    temporary = path.with_name(_TEMPORARY + path.name)
    try:
        write_file(temporary, parts)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise TrainError(f"cannot write {path}: {error.strerror or error}") from error


def write_folder(path: Path, files: Mapping[str, Iterable[bytes | memoryview]]) -> None:
    """Create the folder `path` with `files` (name -> content) in it, atomically.

    Raises:
        CheckpointError: it could not be written; nothing of it is left, others are untouched.
    """
    temporary = path.with_name(_TEMPORARY + path.name)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in files.items():
            write_file(temporary / name, content)
        flush_folder(temporary)
        if path.exists():  # a folder whose run was killed before anything pointed to it
            shutil.rmtree(path)
        os.rename(temporary, path)
        flush_folder(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"cannot save checkpoint {path}: {error.strerror or error}"
        ) from error


def point(link: Path, target: str) -> None:
    """Let the symbolic link `link` name `target`, a sibling folder; switches in one step.

    Raises:
        CheckpointError: the link could not be written; the old one still stands.
    """
    temporary = link.with_name(_TEMPORARY + link.name)
    try:
        temporary.unlink(missing_ok=True)
        os.symlink(target, temporary, target_is_directory=True)
        os.replace(temporary, link)
        flush_folder(link.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot switch {link} to {target}: {error.strerror or error}"
        ) from error


def leftovers(folder: Path) -> Iterator[Path]:
    """Temporary files and folders that a killed process left in `folder`."""
    return folder.glob(_TEMPORARY + "*") if folder.is_dir() else iter(())


def remove(path: Path) -> None:
    """Remove a file, link or folder."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            if not path.name.startswith(_TEMPORARY):  # a kill must not leave half of it visible
                path = path.rename(path.with_name(_TEMPORARY + path.name))
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
