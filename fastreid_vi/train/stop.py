"""Ctrl-C and SIGTERM end a run between two steps, not inside one."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers the first signal while it is entered; a second Ctrl-C gives up at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def explains(self, error: Exception) -> bool:
        """Whether a signal is why something failed.

        One that ends the loader's processes may reach them a moment before it reaches us.
        """
        if "DataLoader worker" in str(error):
            self.ignore_children()  # the next one would raise right here
            deadline = time.monotonic() + 1.0
            while self.signum is None and time.monotonic() < deadline:
                time.sleep(0.01)
        return self.signum is not None

    def __enter__(self) -> StopRequest:
        # Only the main thread gets signals; elsewhere the caller stays in charge of them.
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        if self.signum is not None:  # the loader is cleared away later still
            self._previous.pop(signal.SIGCHLD, None)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler or signal.SIG_DFL)

    def _remember(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.ignore_children()
        self.signum = signum

    def ignore_children(self) -> None:
        """Drop the handler that the loader sets with its first batch.

        It raises in the middle of a step when a signal to the whole process group also ends the
        loader's processes. Without it their end is noticed when the next batch is asked for.
        """
        if self._previous and signal.SIGCHLD not in self._previous:
            self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
