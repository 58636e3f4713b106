"""Both rooms of the ranking, each proven to be the one that ran; the golden SYSU-MM01 data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fastreid_vi
from fastreid_vi.evaluation import Embeddings, positions, rerank, reranked
from tests.conftest import golden

ROOMS = ("reference", "retrieval")
Data = tuple[Embeddings, Embeddings, dict[tuple[int, int], np.ndarray]]


@pytest.fixture(params=ROOMS)
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Ask for one room; the other one may not run, and this one must."""
    ran = []

    def watched(function: Any, name: str) -> Any:
        def call(*args: Any) -> Any:
            assert name == request.param, f"{name} ran, {request.param} was asked for"
            ran.append(name)
            return function(*args)

        return call

    for name in ROOMS:
        monkeypatch.setattr(positions, f"_{name}", watched(getattr(positions, f"_{name}"), name))
    with fastreid_vi.backend(request.param):
        yield request.param
    assert ran, f"{request.param} did not run"


@pytest.fixture(params=ROOMS)
def rerank_room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same for re-ranking."""
    ran = []

    def watched(function: Any, name: str) -> Any:
        def call(*args: Any) -> Any:
            assert name == request.param, f"{name} ran, {request.param} was asked for"
            ran.append(name)
            return function(*args)

        return call

    dense = watched(rerank.dense_multi_spectral, "reference")
    sparse = watched(rerank.SparseReranking, "retrieval")
    monkeypatch.setattr(rerank, "dense_multi_spectral", dense)
    for module in (rerank, reranked):
        monkeypatch.setattr(module, "SparseReranking", sparse)
    with fastreid_vi.backend(request.param):
        yield request.param
    assert ran, f"{request.param} did not run"


def reordered(images: Embeddings, order: Any) -> Embeddings:
    """The same images, other rows."""
    parts = (images.features, images.ids, images.cams, images.paths)
    return Embeddings(*(np.asarray(part)[order] for part in parts))


def cells(vectors: dict[str, np.ndarray]) -> dict[tuple[int, int], np.ndarray]:
    """The golden permutation file as a mapping."""
    values, offsets = vectors["perm_values"], vectors["perm_offsets"]
    folders = [
        (cam, pid)
        for cam, n in enumerate(vectors["perm_cells_per_cam"], 1)
        for pid in range(1, n + 1)
    ]
    return {
        folder: values[offsets[k] : offsets[k + 1]].reshape(10, -1)
        for k, folder in enumerate(folders)
    }


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    return golden("eval/sysu_protocol")


@pytest.fixture(scope="module")
def data(vectors: dict[str, np.ndarray]) -> Data:
    def side(s: str) -> Embeddings:
        ids, cams, numbers = (vectors[f"{s}_{part}"] for part in ("ids", "cams", "img"))
        paths = [f"cam{c}/{i:04d}/{n:04d}.jpg" for c, i, n in zip(cams, ids, numbers, strict=True)]
        return Embeddings(vectors[f"{s}_feat"].astype(np.float32), ids, cams, paths)

    return side("q"), side("g"), cells(vectors)
