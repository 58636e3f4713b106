"""Rows that share their tensors: one workload, one truth, all peers and both modes."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

from benchmarks.catalogue import Case, Row, rows
from benchmarks.workload import Truth, truth_of


class Group(NamedTuple):
    """Rows of one benchmark, size and type."""

    family: str
    rows: list[Row]

    def built(self) -> tuple[Case, Truth]:
        """The tensors, and what every peer is held to."""
        case = self.rows[0].case()
        return case, truth_of(case.work)


def groups(
    *,
    peers: Container[str],
    families: Container[str] = (),
    modes: Sequence[str] = ("training", "forward"),
    precisions: Sequence[str] = ("float32",),
    done: Container[str] = (),
) -> Iterator[Group]:
    """What is left to do, the most telling first: types in their order, then benchmarks.

    Args:
        peers: which ones.
        families: which ones; all where empty.
        modes, precisions: which ones, in their order.
        done: names of rows to leave out.
    """
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows(precisions):
        if row.peer not in peers or row.mode not in modes or row.name in done:
            continue
        if families and row.family not in families:
            continue
        shared = [v for k, v in row.arguments.items() if k not in ("peer", "mode")]
        key = (
            precisions.index(row.precision),
            row.family,
            row.function.__name__,
            *map(str, shared),
        )
        found.setdefault(key, []).append(row)
    # A stable sort: types first, benchmarks in the order of their files.
    for key in sorted(found, key=lambda k: int(str(k[0]))):
        members = sorted(found[key], key=lambda row: modes.index(row.mode))
        yield Group(members[0].family, members)
