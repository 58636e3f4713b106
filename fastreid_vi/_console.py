"""What the command line shows: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Progress = Callable[[int, int], None]  # (done, total)

_QUIET_SECONDS = 10.0  # between two lines of progress where there is no terminal


class Console:
    """Human text and machine output of one command.

    Args:
        machine: JSON on standard output, text on standard error; otherwise text on standard output.
    """

    def __init__(self, machine: bool) -> None:
        self.machine = machine

    def say(self, text: str = "") -> None:
        """A line of the result."""
        print(text, file=sys.stderr if self.machine else sys.stdout, flush=True)

    def note(self, text: str) -> None:
        """A line about what goes on."""
        print(text, file=sys.stderr, flush=True)

    def result(self, value: dict[str, Any]) -> None:
        """The machine output, when it was asked for."""
        if self.machine:
            print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)

    @contextmanager
    def progress(self, title: str, unit: str = "") -> Iterator[Progress]:
        """A function to call with (done, total): a bar on a terminal, a few lines elsewhere.

        With a `unit`, such as "images", also how many of them a second.
        """
        bar = _bar(unit) if sys.stderr.isatty() else None
        if bar is None:
            yield _lines(title, unit)
            return
        with bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def waiting(self, title: str) -> Iterator[Progress]:
        """`progress` for work that may not tell how far it is: a line with the time from time to
        time where there is no terminal, until the function is called.
        """
        with self.progress(title) as show:
            done, began = threading.Event(), time.monotonic()

            def told(count: int, total: int) -> None:
                done.set()
                show(count, total)

            def tick() -> None:
                while not done.wait(_QUIET_SECONDS):
                    self.note(f"{title}: {time.monotonic() - began:.0f} s")

            clock = threading.Thread(target=tick, daemon=True)
            if not sys.stderr.isatty():
                clock.start()
            try:
                yield told
            finally:
                done.set()
                if clock.is_alive():
                    clock.join()


class Quiet(Console):
    """Shows nothing: of a process that works beside the one that speaks."""

    def say(self, text: str = "") -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def result(self, value: dict[str, Any]) -> None:
        """Nothing."""


class _Warnings(logging.Handler):
    def __init__(self, console: Console, program: str) -> None:
        super().__init__(logging.WARNING)
        self.console, self.program = console, program

    def emit(self, record: logging.LogRecord) -> None:
        self.console.note(f"{self.program}: warning: {record.getMessage()}")


@contextmanager
def warnings_shown(console: Console, program: str) -> Iterator[None]:
    """The package's log warnings as lines on standard error."""
    handler, log = _Warnings(console, program), logging.getLogger("fastreid_vi")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns; the first is aligned left, the others right. An empty row is a gap."""
    widths = [max(len(row[i]) for row in (header, *rows) if row) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _bar(unit: str) -> Any:
    try:
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            ProgressColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.text import Text
    except ImportError:
        return None

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:.0f} {unit}/s")

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([Rate()] if unit else []),
        TimeRemainingColumn(),
        console=RichConsole(stderr=True),
        transient=True,
    )


def _lines(title: str, unit: str) -> Progress:
    last = time.monotonic()
    before = 0

    def show(done: int, total: int) -> None:
        nonlocal last, before
        seconds = time.monotonic() - last
        if done == total or seconds >= _QUIET_SECONDS:
            rate = f", {(done - before) / max(seconds, 1e-9):.0f} {unit}/s" if unit else ""
            last, before = last + seconds, done
            print(f"{title}: {done} of {total}{rate}", file=sys.stderr, flush=True)

    return show
