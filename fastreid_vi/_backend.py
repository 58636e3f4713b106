"""Which backend the user asked for. No torch here, so that evaluation stays light.

The override is process-wide, not thread-local: autograd runs CUDA backward on threads of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

BACKENDS: Final = ("reference", "cpu", "triton", "cuda", "retrieval")


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced: str | None = os.environ.get("FASTREID_VI_BACKEND") or None
if _forced is not None:
    _known(_forced, "FASTREID_VI_BACKEND")


def forced() -> str | None:
    """Name of the backend asked for by `backend` or FASTREID_VI_BACKEND, or None."""
    return _forced


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for every op that has it, in the whole process.

    An op that has the backend uses it or raises with the reason why it cannot; an op that never had
    it keeps its own order. The environment variable FASTREID_VI_BACKEND does the same from outside.

    Args:
        name: "reference", "cpu", "triton", "cuda" or "retrieval".
    Raises:
        ValueError: an unknown name.

    >>> import fastreid_vi
    >>> with fastreid_vi.backend("reference"):
    ...     pass
    """
    global _forced
    before, _forced = _forced, _known(name, "backend")
    try:
        yield
    finally:
        _forced = before
