"""sharded_search in two processes: the bits of one search in the whole gallery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastreid_vi.evaluation import search
from fastreid_vi.evaluation.sharded import sharded_search
from tests.evaluation.test_search import METRICS, people, same
from tests.processes import run_together

WORLD = 2
SPLITS = {"even": 350, "uneven": 689, "empty": 700, "small": 4}  # where the second shard begins
QUERY, GALLERY = people(9, 700, 40)
GALLERY[400:420] = GALLERY[3]  # ties between the shards
FAULTS: dict[str, dict[str, Any]] = {
    "nan": {"shard": np.full((5, 40), np.nan, np.float32)},
    "k": {"k": 0},
    "too many": {"k": 701},
    "overlap": {"offset": 349},
    "queries": {"query": QUERY[::-1].copy()},
    "offset": {"offset": -1},
    "lengths": {"shard": np.zeros((0, 39), np.float32)},
}
ON_BOTH = {"too many"}


def shard_of(rank: int, split: int) -> tuple[np.ndarray, int]:
    return (GALLERY[:split], 0) if rank == 0 else (GALLERY[split:], split)


def work(rank: int, folder: Path) -> None:
    """What each process does: its shard in, the whole gallery's neighbours out."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    results: dict[str, Any] = {}
    for name, split in SPLITS.items():
        shard, offset = shard_of(rank, split)
        for metric in METRICS:
            found = sharded_search(QUERY, shard, 60, offset=offset, metric=metric)
            results[f"{name} {metric}"] = tuple(found)
    shard, offset = shard_of(rank, 350)
    found = sharded_search(torch.from_numpy(QUERY), torch.from_numpy(shard), 5, offset=offset)
    results["tensors"] = tuple(found)
    for name, change in FAULTS.items():
        given = {"query": QUERY, "shard": shard, "k": 5, "offset": offset}
        if rank == 1 or name in ON_BOTH:
            given.update(change)
        try:
            sharded_search(given.pop("query"), given.pop("shard"), given.pop("k"), **given)
        except Exception as error:
            results[f"fault {name}"] = f"{type(error).__name__}: {error}"
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    run_together("tests.evaluation.test_search_sharded", folder, WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("split", SPLITS)
def test_equals_one_search(results: list[dict[str, Any]], split: str, metric: Any) -> None:
    expected = search(QUERY, GALLERY, 60, metric=metric)
    for piece in results:
        assert same(piece[f"{split} {metric}"], expected)


def test_tensors_come_back_as_tensors(results: list[dict[str, Any]]) -> None:
    for piece in results:
        assert all(isinstance(part, torch.Tensor) for part in piece["tensors"])
        assert same([part.numpy() for part in piece["tensors"]], search(QUERY, GALLERY, 5))


@pytest.mark.parametrize(
    ("name", "other", "own"),
    [
        ("nan", r"RuntimeError: .* process 1 of the group: ValueError: gallery: .*NaN", "ValueErr"),
        ("k", r"RuntimeError: .*process 1 .*k: expected >= 1", "ValueError: k: expected >= 1"),
        ("offset", r"RuntimeError: .*process 1 .*offset: .*>= 0", "ValueError: offset: expected"),
        ("lengths", r"RuntimeError: .*process 1 .*gallery: .*\[1, 39\]", "ValueError: gallery"),
        ("too many", r"ValueError: k: expected at most the 700 rows of all shards, got 701", None),
        ("overlap", r"ValueError: offset: shards overlap, one begins at 349, .* at 350", None),
        ("queries", r"ValueError: query: expected the same in every process, got float32", None),
    ],
)
def test_every_process_learns_of_a_fault(
    results: list[dict[str, Any]], name: str, other: str, own: str | None
) -> None:
    import re

    assert re.match(other, results[0][f"fault {name}"])
    assert re.match(own or other, results[1][f"fault {name}"])


def test_a_process_group_is_needed() -> None:
    with pytest.raises(RuntimeError, match="init_process_group comes first"):
        sharded_search(QUERY, GALLERY, 5, offset=0)
