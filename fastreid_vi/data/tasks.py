"""What the sources of batches share: the task of reading one, and threads that work ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from fastreid_vi.data.images import Int64

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastreid_vi.config import Batch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Task(NamedTuple):
    """A batch, or the share of it that one process reads."""

    epoch: int
    number: int
    positions: Int64  # [B] of the images
    slots: Int64  # [B] rows of the global batch
    rows: int  # of the global batch


class Source(Protocol):
    """Where the images of batches come from: files or a pack."""

    place: str
    """In words."""

    def batches(self, tasks: Sequence[Task], paired: int) -> Iterator[Batch]:
        """The batches of some tasks, in their order.

        Raises:
            DataError: an image that cannot be read, named.
        """

    def batch(self, task: Task, paired: int) -> Batch:
        """One batch, read in this thread."""


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, count: int
) -> Generator[Result, None, None]:
    """`map` in order by `threads`, at most `count` results ahead of the one that is taken.

    What is not yet begun when the caller leaves, or something fails, is not done.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fastreid-vi-data")
    try:
        left = iter(items)
        window: deque[Future[Result]] = deque()
        window.extend(pool.submit(function, item) for item in islice(left, count))
        while window:
            result = window.popleft().result()
            window.extend(pool.submit(function, item) for item in islice(left, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
