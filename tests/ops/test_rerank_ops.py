"""The ops under re-ranking on a device: schema, fakes, refusals; CuPy arrays by DLPack; on a GPU,
every room and the public functions on CUDA tensors and CuPy arrays.

Their kernels: tests/cuda/test_rerank_kernels.py.
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastreid_vi
from fastreid_vi._dispatch import OPS
from fastreid_vi.evaluation import device, device_rerank, k_reciprocal_rerank, positions
from tests.evaluation.reranking import CASES, Case, case
from tests.ops.test_evaluation_ops import Foreign, on_gpu, rooms

NAMES = ("rerank_neighbors", "rerank_average", "rerank_fuse")
KINDS = ("tensor", "cupy")


def calls(where: str = "cpu") -> dict[str, tuple[Any, ...]]:
    """Arguments of every op: a ring, of which everyone's neighbours are next to it."""
    items, steps = torch.arange(12)[:, None], torch.tensor([0, 1, -1, 2, -2])
    lists = ((items + steps) % 12).int()
    distances = torch.tensor([0.0, 1.0, 1.0, 2.0, torch.nan]).repeat(12, 1)
    angle = items * torch.pi / 6
    features, ones = 2 * torch.cat([angle.cos(), angle.sin()], 1), torch.ones(12)
    neighbors = (lists, distances, features, 5 * ones, ones, 3, 2, True)
    encoding = OPS["rerank_neighbors"].reference(*neighbors)
    average = (lists[:, :3].contiguous(), *encoding, 12)
    counts, columns, values = OPS["rerank_average"].reference(*average)
    ours = (counts[:4], columns[:4], values[:4])
    theirs = (counts[4:], columns[4:].t().contiguous(), values[4:].t().contiguous())
    base = torch.arange(16.0).reshape(4, 4)
    fuse = (*ours, *theirs, base, 9 * ones[:4], ones[:4], 1, 2, 12, 0.3)
    found = dict(zip(NAMES, (neighbors, average, fuse), strict=True))
    return {
        name: tuple(a.to(where) if isinstance(a, Tensor) else a for a in arguments)
        for name, arguments in found.items()
    }


@pytest.mark.parametrize("op", NAMES)
def test_opcheck(op: str) -> None:
    overload = getattr(torch.ops.fastreid_vi, op).default
    torch.library.opcheck(overload, calls()[op])


@pytest.mark.parametrize("op", NAMES)
def test_a_room_that_is_not_here(op: str) -> None:
    """Asked for on CPU tensors, the CUDA room refuses; no silent fallback."""
    message = f"{op}: backend 'cuda' was asked for but cannot run"
    with fastreid_vi.backend("cuda"), pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fastreid_vi, op)(*calls()[op])


def test_re_ranking_names_its_rooms() -> None:
    table = fastreid_vi.backends()
    for name in NAMES:
        assert table[name]["reference"] == "built"
        assert table[name]["cpu"] == f"{name} has no cpu room"


def there(found: Case, kind: Any) -> Case:
    """The same features elsewhere."""
    sides = ([kind(np.ascontiguousarray(a)) for a in s] for s in (found.queries, found.galleries))
    queries, galleries = sides
    return found._replace(queries=queries, galleries=galleries)


def on_host(found: Case) -> Any:
    with fastreid_vi.backend("reference"):
        return found.rerank()


@pytest.mark.parametrize("name", ["edges/few_queries_masked", "rerank_single/mpanet_full"])
def test_cupy_in_cupy_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By DLPack, without a copy on the host; the reference rooms compute."""
    cupy = SimpleNamespace(ndarray=Foreign, from_dlpack=lambda t: Foreign(np.from_dlpack(t)))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for module in (positions, device, device_rerank):
        monkeypatch.setattr(module, "on_device", lambda value: isinstance(value, Foreign))
    found = case(name)
    result = there(found, Foreign).rerank()
    assert isinstance(result, Foreign)
    np.testing.assert_allclose(result.array, on_host(found), rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("op", NAMES)
def test_rooms_on_a_gpu(op: str) -> None:
    expected = OPS[op].reference(*calls()[op])
    for room in rooms(op):
        with fastreid_vi.backend(room):
            found = getattr(torch.ops.fastreid_vi, op)(*calls("cuda")[op])
            again = getattr(torch.ops.fastreid_vi, op)(*calls("cuda")[op])
        pairs = [(found, expected, again)]
        if isinstance(found, tuple):
            pairs = list(zip(found, expected, again, strict=True))
        for got, want, twice in pairs:
            assert torch.equal(got, twice)
            torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n in CASES if "unit" not in n and "mcja" not in n])
def test_golden_on_a_gpu(name: str, kind: str) -> None:
    """Integer features, so that lists and sets are the host's; from the device to the device."""
    found = case(name)
    moved = there(found, lambda array: on_gpu(torch.from_numpy(array), kind))
    result = moved.rerank()
    if kind == "tensor":
        assert result.is_cuda
        values = result.cpu().numpy()
    else:
        assert isinstance(result, importlib.import_module("cupy").ndarray)
        values = result.get()
    np.testing.assert_allclose(values, on_host(found), rtol=0, atol=2e-6)
    np.testing.assert_allclose(values, found.released, rtol=0, atol=5e-3)


@pytest.mark.gpu
def test_the_same_bits_in_every_run() -> None:
    generator = torch.Generator(device="cuda").manual_seed(1)
    query, gallery = (
        torch.nn.functional.normalize(
            torch.randn((n, 256), device="cuda", generator=generator), dim=1
        )
        for n in (900, 700)
    )
    first = k_reciprocal_rerank(query, gallery)
    assert all(torch.equal(k_reciprocal_rerank(query, gallery), first) for _ in range(3))
    expected = k_reciprocal_rerank(query.cpu(), gallery.cpu())
    assert (first.cpu() - expected).abs().mean() < 1e-4  # lists differ where distances almost tie
