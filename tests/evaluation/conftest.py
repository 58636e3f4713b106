"""Both rooms of the ranking, each proven to be the one that ran."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import fastreid_vi
from fastreid_vi.evaluation import positions

ROOMS = ("reference", "retrieval")


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
