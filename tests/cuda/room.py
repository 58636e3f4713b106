"""Puts the emulated kernels where the dispatcher looks for the CUDA room, so that the contract in
an op's own tests (tests/ops) holds them to the same account as every other room.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from fastreid_vi import _dispatch
from tests.cuda.conftest import Emulated


def takes_cpu_tensors(contract: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CUDA room of a contract be asked with CPU tensors."""
    monkeypatch.delitem(_dispatch._KEY, "cuda")
    for module in {sys.modules[c.__module__] for c in contract.__mro__}:
        if hasattr(module, "device_of"):
            monkeypatch.setattr(module, "device_of", lambda room: "cpu")


class EmulatedRoom:
    """Mix in before a contract class; of its tests those remain that take a room."""

    emulated = True

    @pytest.fixture(autouse=True)
    def _cuda_room(
        self, emulated: Emulated, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        for name, op in _dispatch.OPS.items():
            if "cuda" in op.backends and hasattr(torch.ops.fastreid_vi_emulated, name):
                monkeypatch.setitem(op._found, "cuda", getattr(emulated, name))
        takes_cpu_tensors(type(self), monkeypatch)
        before = emulated.emulation.launches
        yield
        case = request.node.callspec.params.get("case", ())
        assert emulated.emulation.launches > before or 0 in case
