"""How far two records of one machine are apart, in what is published: multiples of our time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.records import Key, Multiple, Record, grouped
from benchmarks.tables import markdown, ours_of


class Move(NamedTuple):
    """One published number in two records."""

    key: Key
    peer: str
    first: Multiple
    second: Multiple

    @property
    def change(self) -> float:
        """Of the middle; twice and half are as far."""
        return math.expm1(abs(math.log(self.second.middle / self.first.middle)))

    @property
    def meets(self) -> bool:
        """Whether the ranges have a point in common."""
        return max(self.first.low, self.second.low) <= min(self.first.high, self.second.high)


def multiples(record: Record) -> dict[tuple[Key, str], Multiple]:
    """Of every op and whole step that has a row of ours, each of its peers."""
    found = {}
    for key, peers in grouped(record).items():
        room, ours = ours_of(peers) or ("ours", peers.get("ours"))
        for peer, row in peers.items():
            if ours is not None and peer != room:
                found[key, peer] = Multiple.of(row, ours)
    return found


def moves(first: Record, second: Record) -> list[Move]:
    """What stands in both records."""
    before, after = multiples(first), multiples(second)
    return [Move(*name, before[name], after[name]) for name in before if name in after]


def summary(found: Sequence[Move]) -> str:
    """The spread between two runs, in one sentence.

    Raises:
        ValueError: the records have nothing in common.
    """
    if not found:
        raise ValueError("the records have no multiple of our time in common")
    changes = [move.change for move in found] * 2  # quantiles need two
    half, most = statistics.median(changes), statistics.quantiles(changes, n=10)[-1]
    return (
        f"of {len(found)} multiples of our time, half moved by less than {_percent(half)} and "
        f"nine in ten by less than {_percent(most)}; the quartile ranges of "
        f"{sum(move.meets for move in found)} meet"
    )


def _percent(share: float) -> str:
    return f"{math.ceil(100 * share)} %"


def text(first: Record, second: Record) -> str:
    """The multiples whose ranges do not meet, what moved most first, and the spread of all."""
    found = moves(first, second)
    apart = sorted((m for m in found if not m.meets), key=lambda m: -m.change)
    rows = [
        [
            f"`{m.key[0]}`",
            *m.key[1:3],
            m.peer,
            str(m.first),
            str(m.second),
            f"{100 * m.change:.0f} %",
        ]
        for m in apart
    ]
    heads = ["op", "shape", "mode", "peer", "first (quartiles)", "second (quartiles)", "moved"]
    return "\n\n".join([*([markdown(heads, rows)] if rows else []), summary(found)])
