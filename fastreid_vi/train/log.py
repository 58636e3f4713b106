"""What a run tells: metrics.jsonl always, TensorBoard where installed, a progress bar or lines.

metrics.jsonl holds one JSON object per line, told apart by `kind`:

    step   epoch, step, lr, terms (means since the last step record), images_per_second
           lr is that of the first phase's player; `lrs` holds all where there are several players
    epoch  epoch, step, lr, terms (means over the epoch), images_per_second, seconds
    eval   epoch, step, split, metrics (R1, R5, R10, R20, mAP, mINP as fractions)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from fastreid_vi.train.errors import CheckpointError, TrainError

Display = Literal["auto", "bar", "plain", "none"]


class Metrics:
    """metrics.jsonl, opened where a checkpoint left it: steps to be repeated are cut off."""

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115
            _claim(self._file, path)
            found = os.path.getsize(path)
            if found < length:
                raise CheckpointError(
                    f"{path}: the checkpoint needs its first {length} bytes, found {found}"
                )
            self._file.truncate(length)
        except OSError as error:
            raise TrainError(f"cannot write {path}: {error.strerror or error}") from error
        self._length = length

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; if that fails nothing of it stays.

        Raises:
            TrainError: disk full.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):  # the disk took a part; the rest says why
                self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(self._length)
            raise TrainError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._length += len(line)

    def flush(self) -> int:
        """Put everything on the disk; returns the file's length.

        Raises:
            TrainError: disk full.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise TrainError(f"cannot write {self.path}: {error.strerror or error}") from error
        return self._length

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _claim(file: IO[bytes], path: Path) -> None:
    """Two processes in one run folder would spoil it: hold a lock for the life of this process."""
    try:
        # Not flock: the loader's processes inherit that, and may outlive a killed run by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise TrainError(f"{path}: another process is training this run") from error
    except OSError:  # a file system without locks
        return


class Board:
    """TensorBoard scalars; does nothing where the package is not installed."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        # purge_step hides what a killed run had written beyond its last checkpoint.
        self._writer = SummaryWriter(str(folder), purge_step=step or None)

    def write(self, record: dict[str, Any]) -> None:
        """Draw the numbers of a record."""
        if self._writer is None:
            return
        group = record["split"] if record["kind"] == "eval" else record["kind"]
        shown = ("lr", "images_per_second")
        more: dict[str, float] = {name: record[name] for name in shown if name in record}
        more |= {f"lr/{player}": lr for player, lr in record.get("lrs", {}).items()}
        values = {**(record.get("metrics") or record["terms"]), **more}
        try:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, record["step"])
        except OSError as error:
            raise TrainError(f"cannot write TensorBoard events: {error}") from error

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            with contextlib.suppress(OSError):  # metrics.jsonl holds the same numbers
                self._writer.close()


class Screen(Protocol):
    """Where a person reads along."""

    def begin_epoch(self, epoch: int, batches: int, done: int) -> None:
        """`done` of `batches` batches are behind us when a run resumes."""

    def step(self, loss: float | None) -> None:
        """One more batch; the loss when it is known."""

    def line(self, text: str) -> None:
        """A sentence that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Silent:
    """No output."""

    def begin_epoch(self, epoch: int, batches: int, done: int) -> None:
        """Nothing."""

    def step(self, loss: float | None) -> None:
        """Nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Plain(Silent):
    """Lines on standard error, for files and pipes."""

    def line(self, text: str) -> None:
        """Print at once."""
        print(text, file=sys.stderr, flush=True)


class Bar(Silent):
    """A bar for the epoch on standard error, lines above it."""

    def __init__(self, epochs: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._epochs = epochs
        text = TextColumn("{task.description}"), TextColumn("{task.fields[loss]}")
        self._progress = Progress(
            text[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text[1],
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", loss="")
        self._progress.start()

    def begin_epoch(self, epoch: int, batches: int, done: int) -> None:
        """Start the bar over."""
        title = f"epoch {epoch}/{self._epochs}"
        self._progress.reset(self._task, total=batches, completed=done, description=title, loss="")

    def step(self, loss: float | None) -> None:
        """Advance."""
        shown = {} if loss is None else {"loss": f"loss {loss:.4f}"}
        self._progress.update(self._task, advance=1, **shown)  # type: ignore[arg-type]

    def line(self, text: str) -> None:
        """Print above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()


def make_screen(display: Display, epochs: int) -> Screen:
    """The screen that `display` names; "auto" is a bar on a terminal, plain lines elsewhere.

    Raises:
        ValueError: an unknown name.
    """
    if display == "none":
        return Silent()
    if display not in ("auto", "bar", "plain"):
        raise ValueError(f'display: expected "auto", "bar", "plain" or "none", got {display!r}')
    if display == "plain" or (display == "auto" and not sys.stderr.isatty()):
        return Plain()
    try:
        return Bar(epochs)
    except ImportError:
        if display == "bar":
            raise
        return Plain()


class RunLog:
    """All of the above as one."""

    def __init__(self, run_dir: Path, screen: Screen, *, length: int = 0, step: int = 0) -> None:
        self.screen = screen
        self._metrics = Metrics(run_dir / "metrics.jsonl", length)
        self._board = Board(run_dir / "tensorboard", step)
        self.flush = self._metrics.flush

    def write(self, record: dict[str, Any]) -> None:
        """Keep a record and say it, except step records, which the bar shows."""
        self._metrics.write(record)
        self._board.write(record)
        if record["kind"] != "step":
            self.screen.line(sentence(record))

    def close(self) -> None:
        """Close everything."""
        self.screen.close()
        self._board.close()
        self._metrics.close()


class Mute:
    """A log that keeps and says nothing: of processes beside the first."""

    def __init__(self) -> None:
        self.screen: Screen = Silent()

    def write(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def flush(self) -> int:
        """Nothing is written."""
        return 0

    def close(self) -> None:
        """Nothing."""


Log = RunLog | Mute


def sentence(record: dict[str, Any]) -> str:
    """An epoch or evaluation record as one line for people."""
    if record["kind"] == "eval":
        shown = " ".join(f"{name} {100 * value:.2f}" for name, value in record["metrics"].items())
        return f"epoch {record['epoch']}: {record['split']}: {shown}"
    terms = " ".join(f"{name} {value:.4f}" for name, value in record["terms"].items())
    return (
        f"epoch {record['epoch']}: {terms} | lr {record['lr']:.3g}, step {record['step']}, "
        f"{record['images_per_second']:.1f} images/s, {record['seconds']:.0f} s"
    )
