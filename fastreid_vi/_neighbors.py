"""Neighbours of queries as text, JSON, CSV and arrays: what `search` and `rerank` give out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from fastreid_vi.evaluation import Embeddings
from fastreid_vi.evaluation.tensorfile import pack, write_whole

SUFFIXES: Final = (".json", ".csv", ".safetensors")
COLUMNS: Final = ("query", "query_id", "rank", "neighbor", "id", "camera", "row", "score")
SHOWN: Final = 10  # queries printed for people


class OutputError(ValueError):
    """A file cannot be written; one line that names it."""


class Neighbors(NamedTuple):
    """The first k of every query's ranking."""

    query: Embeddings
    gallery: Embeddings
    indices: npt.NDArray[np.int64]
    """[Q, k] rows of the gallery, best first."""
    scores: npt.NDArray[Any]
    """[Q, k] similarities or distances."""


def listing(found: Neighbors, limit: int | None = None) -> list[dict[str, Any]]:
    """Every query with its neighbours, JSON-ready; `limit` keeps the first queries."""
    count = len(found.indices) if limit is None else min(limit, len(found.indices))
    return [
        {
            "query": _name(found.query, row),
            "id": _id(found.query, row),
            "neighbors": list(_of(found, row)),
        }
        for row in range(count)
    ]


def _of(found: Neighbors, row: int) -> Iterator[dict[str, Any]]:
    for rank, (at, score) in enumerate(zip(found.indices[row], found.scores[row], strict=True), 1):
        yield {
            "rank": rank,
            "neighbor": _name(found.gallery, int(at)),
            "id": _id(found.gallery, int(at)),
            "camera": _known(found.gallery.cams, int(at), 0),
            "row": int(at),
            "score": float(score),
        }


def _name(side: Embeddings, row: int) -> str:
    return str(row) if side.paths is None else str(side.paths[row])


def _id(side: Embeddings, row: int) -> int | None:
    return _known(side.ids, row, -1)


def _known(values: Any, row: int, unknown: int) -> int | None:
    """A number of a vector; None where it is unknown."""
    value = unknown if values is None else int(values[row])
    return None if value == unknown else value


def text(found: Neighbors, word: str) -> str:
    """The neighbours of the first queries for people.

    Args:
        found: the neighbours.
        word: what the scores are, such as "cosine".
    """
    lines = []
    for entry in listing(found, SHOWN):
        known = "" if entry["id"] is None else f", id {entry['id']}"
        lines.append(f"{entry['query']}{known}")
        for near in entry["neighbors"]:
            label = "" if near["id"] is None else f"  id {near['id']}"
            right = "  same person" if near["id"] is not None and near["id"] == entry["id"] else ""
            score = f"{word} {near['score']:.4f}"
            lines.append(f"  {near['rank']:>3}  {score}  {near['neighbor']}{label}{right}")
    more = len(found.indices) - SHOWN
    if more > 0:
        lines.append(f"and {more} queries more")
    return "\n".join(lines)


def check_suffix(flag: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Raise an OutputError, before the work, unless the file's name says what to write."""
    if path is None:
        return
    if path.suffix not in suffixes:
        raise OutputError(f"{flag} {path}: expected a name that ends in {', '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{flag} {path}: there is no folder {path.absolute().parent}")


def write(path: Path, found: Neighbors, about: Mapping[str, Any]) -> None:
    """Write the neighbours of all queries, as the file's name says.

    Raises:
        OutputError: it cannot be written; an earlier file stays whole.
    """
    if path.suffix == ".safetensors":
        arrays = {"indices": found.indices.astype(np.int64), "scores": found.scores}
        parts: Any = pack(arrays, {"fastreid_vi": json.dumps(dict(about))})
    elif path.suffix == ".csv":
        lines = io.StringIO()
        rows = csv.writer(lines, lineterminator="\n")
        rows.writerow(COLUMNS)
        for entry in listing(found):
            head = [entry["query"], entry["id"]]
            rows.writerows([*head, *near.values()] for near in entry["neighbors"])
        parts = [lines.getvalue().encode()]
    else:
        value = {**about, "queries": listing(found)}
        parts = [json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"]
    write_parts(path, parts)


def write_matrix(path: Path, matrix: npt.NDArray[Any], arrays: Mapping[str, Any]) -> None:
    """Write a matrix as .npy, or as .safetensors with further arrays beside it.

    Raises:
        OutputError: it cannot be written; an earlier file stays whole.
    """
    matrix = np.ascontiguousarray(matrix)
    if path.suffix == ".npy":
        head = io.BytesIO()
        facts = np.lib.format.header_data_from_array_1_0(matrix)
        np.lib.format.write_array_header_1_0(head, facts)
        write_parts(path, [head.getvalue(), matrix.data.cast("B")])
    else:
        write_parts(path, pack({"distances": matrix, **arrays}, {}))


def write_parts(path: Path, parts: Any) -> None:
    """Write a file whole or not at all."""
    try:
        write_whole(path, parts)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
