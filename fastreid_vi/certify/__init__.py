"""Every op and every method against the golden vectors, on this machine.

A case lives in one place: `op_<family>.py` lists calls of ops (inputs, call, expected arrays, how
far off), `method_<name>.py`, `samplers.py`, `layouts.py`, `ranking.py` and
`reranking.py` list longer procedures.
`runner` runs them in every room and on every device that is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fastreid_vi.certify import (
    aligngan_networks,
    augment,
    layouts,
    method_aligngan,
    method_lba,
    method_mcja,
    method_mpanet,
    op_augment,
    op_matching,
    op_norm,
    op_pool,
    op_softrank,
    op_triplet,
    ranking,
    reranking,
    samplers,
)
from fastreid_vi.certify.cases import Cases, Check, OpCase, Procedure, Want
from fastreid_vi.certify.runner import Row, Selection, Task, op_tasks, procedure_tasks
from fastreid_vi.certify.vectors import Golden, GoldenError, find

FAMILIES: tuple[Cases, ...] = tuple(
    family.cases for family in (op_pool, op_norm, op_matching, op_triplet, op_softrank, op_augment)
)
PROCEDURES: tuple[Callable[[], Iterable[Procedure]], ...] = tuple(
    part.procedures
    for part in (
        ranking,
        reranking,
        method_mpanet,
        method_lba,
        method_mcja,
        aligngan_networks,
        method_aligngan,
        augment,
        samplers,
        layouts,
    )
)

__all__ = [
    "FAMILIES",
    "PROCEDURES",
    "Check",
    "Golden",
    "GoldenError",
    "OpCase",
    "Procedure",
    "Row",
    "Selection",
    "Task",
    "Want",
    "find",
    "tasks",
]


def tasks(golden: Golden, selection: Selection) -> list[Task]:
    """Every case that `selection` takes, ready to run.

    Args:
        golden: the vectors.
        selection: names, backends and devices.
    Raises:
        GoldenError: a file is missing or damaged.
    """
    found = list(op_tasks(FAMILIES, golden, selection))
    for part in PROCEDURES:
        found += procedure_tasks(part(), golden, selection)
    return found
