"""Names and shapes of the official checkpoints, as our networks give them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreid_vi import methods
from fastreid_vi.certify.cases import Check, Procedure, compare, exact
from fastreid_vi.certify.vectors import Golden

_COUNTS = {  # the specifications' entries and stored parameters, for 395 identities
    "mpanet": (334, 52_517_958),
    "lba": (960, 71_337_152),
}


def procedures() -> Iterator[Procedure]:
    """One procedure for every official network."""
    runs: list[tuple[str, str, Any]] = [
        ("mcja", f"mcja/state_dict_layout {dataset}", partial(_mcja, dataset))
        for dataset in ("sysu", "regdb")
    ]
    runs += [("aligngan", "aligngan/state_dict_layout", _aligngan)]
    runs += [(name, f"{name} entries and parameters", partial(_counted, name)) for name in _COUNTS]
    for owner, name, run in runs:
        yield Procedure(owner=owner, name=name, run=run, dtypes=("float64",), devices=("cpu",))


def _official(method: str, dataset: str, num_ids: int) -> dict[str, Tensor]:
    """The official state dict of a recipe's network; no storage behind it."""
    recipe = methods.recipe(method, dataset)
    with torch.device("meta"):
        network = methods.from_recipe(recipe, num_ids, weights="none")
        mapping = importlib.import_module(f"fastreid_vi.methods.{method}.official")
        state: dict[str, Tensor] = mapping.to_official(network.state_dict())
    return state


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _same(name: str, got: Any, want: Any) -> Check:
    return compare(name, "forward", got, exact(want), torch.float64)


def _mcja(dataset: str, golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.case("mcja/state_dict_layout", dataset)
    state = _official("mcja", dataset, {"sysu": 395, "regdb": 206}[dataset])
    yield _same("names in order", list(state), v["names"])
    yield _same("shapes", [_shape(tensor) for tensor in state.values()], v["shapes"])
    dtypes = [str(tensor.dtype) for tensor in state.values()]
    stored = [name if name.startswith("torch.") else f"torch.{name}" for name in v["dtypes"]]
    yield _same("dtypes", dtypes, stored)


def _aligngan(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    state = _official("aligngan", "sysu", 395)
    for index in range(8):
        v = golden.case("aligngan/state_dict_layout", f"model-{index}")
        part = {
            key.partition("/")[2]: tensor
            for key, tensor in state.items()
            if key.startswith(f"{index}/")
        }
        yield _same(f"model-{index} names in order", list(part), v["names"])
        yield _same(f"model-{index} shapes", [_shape(t) for t in part.values()], v["shapes"])


def _counted(method: str, golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    state = _official(method, "sysu", 395)
    entries, parameters = _COUNTS[method]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    counted = sum(t.numel() for key, t in state.items() if not key.endswith(buffers))
    yield _same("entries", len(state), entries)
    yield _same("parameters", counted, parameters)
