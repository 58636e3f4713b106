"""`fastreid-vi doctor --bench`: every op is checked, a wrong one is named, the table is honest."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fastreid_vi import _selfcheck, ops
from fastreid_vi._dispatch import OPS
from tests.cli.runs import Said


def test_every_public_op_is_there() -> None:
    public = OPS.keys() & set(ops.__all__)
    assert {case.op for case in _selfcheck.cases("cpu")} == public


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return _selfcheck.run("cpu", budget=0.01)


def test_all_are_right_and_timed(found: dict[str, Any]) -> None:
    assert found["ok"], [row for row in found["rows"] if row["verdict"] != "right"]
    for row in found["rows"]:
        assert row["error"] <= _selfcheck.TOLERANCE
        assert row["ratio"] == pytest.approx(row["plain_seconds"] / row["seconds"])
        assert row["room"] in ("cpu", "reference")
    json.dumps(found)


def test_gradients_are_not_all_zero() -> None:
    """A check on zeros would pass whatever a room does."""
    for case in _selfcheck.cases("cpu"):
        for result in _selfcheck.results(case, case.args):
            assert result.abs().max() > 0, case.op


def test_the_table_shows_slower_rows() -> None:
    rows = [
        {"op": "a", "room": "cpu", "verdict": "right", "error": 1e-7, "seconds": 2e-3,
         "plain_seconds": 1e-3, "ratio": 0.5},
        {"op": "b", "room": "cpu", "verdict": "WRONG", "error": 0.5},
        {"op": "c", "room": "cuda", "verdict": "fails: no device"},
    ]  # fmt: skip
    text = _selfcheck.text({"device": "cpu", "threads": 1, "seconds": 0.1, "rows": rows})
    assert "2.00" in text
    assert "0.5x" in text
    assert "WRONG" in text
    assert "fails: no device" in text


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_room_is_named(monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    name = "gem_pool_backward" if backward else "gem_pool"
    room = _selfcheck.live_room("gem_pool", "cpu")
    if room == "reference":
        pytest.skip("no room of our own to break")
    inner = OPS[name].room(room)

    def broken(*args: Any) -> Any:
        result = inner(*args)
        return tuple(r * 1.01 for r in result) if isinstance(result, tuple) else result * 1.01

    monkeypatch.setitem(OPS[name]._found, room, broken)
    case = next(c for c in _selfcheck.cases("cpu") if c.op == "gem_pool")
    row = _selfcheck.checked(case, "cpu", 0.01)
    assert row["verdict"] == "WRONG"
    assert "ratio" not in row


def test_a_room_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> Any:
        raise RuntimeError("no such instruction\nsecond line")

    room = _selfcheck.live_room("gem_pool", "cpu")
    if room == "reference":
        pytest.skip("no room of our own to break")
    monkeypatch.setitem(OPS["gem_pool"]._found, room, refuses)
    case = next(c for c in _selfcheck.cases("cpu") if c.op == "gem_pool")
    assert _selfcheck.checked(case, "cpu", 0.01)["verdict"] == "fails: no such instruction"


def test_not_a_number_is_wrong() -> None:
    exact = [torch.ones(2, dtype=torch.float64)]
    error = _selfcheck.worst_error([torch.tensor([1.0, float("nan")])], exact)
    assert not error <= _selfcheck.TOLERANCE


def test_the_command(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selfcheck, "BUDGET", 0.01)
    said: Said = call("doctor", "--bench", "--json")
    bench = json.loads(said.out)["bench"]
    assert said.code == 0
    assert bench["ok"]
    assert "plain PyTorch, ms" in said.err
    assert len(bench["rows"]) == len(list(_selfcheck.cases("cpu")))
