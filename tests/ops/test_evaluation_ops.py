"""The ops under ranking and search on a device: schema, fakes, the reference against the host's
rooms; on a GPU, every room and the public functions on CUDA tensors and CuPy arrays.

They have integers for results and no gradients, so of the contract they owe `opcheck`, refusals and
equal bits. Their kernels: tests/cuda/test_ranking_kernels.py and test_topk_kernels.py.
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
from fastreid_vi.evaluation import device, device_products, positions, rank_metrics, search
from fastreid_vi.evaluation.positions import make_labels, rank_rows

RULES = ("none", "location", "same_id_and_camera")
DTYPES = (torch.float32, torch.float64)
METRICS = ("cosine", "inner", "euclidean")
GPU = torch.cuda.is_available()


def seeded(*shape: int, dtype: torch.dtype = torch.float32, ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return ((2 * values).round() / 2 if ties else values).to(dtype)


def labelled(queries: int, images: int, identities: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(queries + images)
    return {
        "query_ids": generator.integers(0, identities + 1, queries),
        "gallery_ids": generator.integers(0, identities, images),
        "query_cams": generator.integers(1, 7, queries),
        "gallery_cams": generator.integers(1, 7, images),
    }


def calls(dtype: torch.dtype, where: str = "cpu") -> dict[str, tuple[Any, ...]]:
    """Arguments of every op; each query matches in each gallery, for a NaN equals nothing."""
    ints = torch.arange(7, dtype=torch.int32)
    query, gallery = seeded(3, 9, dtype=dtype), seeded(7, 9, dtype=dtype)
    norms = torch.ones(7, dtype=torch.float64)
    best = seeded(3, 2, dtype=dtype).sort(dim=1, descending=True)
    found = {
        "rank_rows": (
            seeded(3, 7, dtype=dtype), ints[:3], ints[:3], ints % 4, ints % 3,
            ints.flip(0), torch.tensor([0, 4, 7]), 4, 2, "none",
        ),
        "merge_top_k": (
            best.values, best.indices, seeded(3, 7, dtype=dtype), None,
            torch.ones(7, dtype=dtype), None, 5, 6,
        ),
        "pair_scores": (query, gallery, norms[:3], norms, ints.long().repeat(3, 1), "cosine"),
        "row_norms": (query,),
    }  # fmt: skip
    return {
        name: tuple(a.to(where) if isinstance(a, Tensor) else a for a in arguments)
        for name, arguments in found.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["rank_rows", "merge_top_k", "pair_scores", "row_norms"])
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    overload = getattr(torch.ops.fastreid_vi, op).default
    torch.library.opcheck(overload, calls(dtype)[op])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_gradients(dtype: torch.dtype) -> None:
    (rows,) = calls(dtype)["row_norms"]
    norms = torch.ops.fastreid_vi.row_norms(rows.requires_grad_())
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        norms.sum().backward()


def test_a_room_that_is_not_here() -> None:
    """Asked for on CPU tensors, the CUDA room refuses; no silent fallback."""
    with (
        fastreid_vi.backend("cuda"),
        pytest.raises(RuntimeError, match="row_norms: backend 'cuda' was asked for but cannot run"),
    ):
        torch.ops.fastreid_vi.row_norms(torch.ones(2, 2))
    best = torch.ones(1, 0), torch.ones(1, 0, dtype=torch.int64)
    arguments = (*best, torch.ones(1, 3), None, None, None, 0, 5000)
    assert OPS["merge_top_k"].refuses("cuda", *arguments) == "k = 5000, it keeps up to 4096"
    assert torch.ops.fastreid_vi.merge_top_k(*arguments)[1].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (30, 90, 7), (9, 300, 60)], ids=str)
def test_the_reference_ranks_as_the_host(shape: Any, rule: Any, dtype: torch.dtype) -> None:
    """Integers and average precision to the last bit."""
    distance = seeded(*shape[:2], dtype=dtype, ties=True)
    names = ("query_ids", "query_cams", "gallery_ids", "gallery_cams")
    given = labelled(*shape)
    labels = make_labels(*(given[name] for name in names), rule)
    columns = np.random.default_rng(1).permutation(shape[1])
    galleries = [np.arange(shape[1]), columns[: shape[1] // 2], columns[:0]]
    found, nan_column = device.rank_rows(distance, labels, galleries)
    expected = rank_rows(distance.numpy(), labels, galleries, np.arange(shape[0]), 1)
    assert (nan_column == -1).all()
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        assert np.array_equal(got, want, equal_nan=got.dtype == np.float64)


def test_numpy_arrays_and_cpu_tensors_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("the device's path ran")

    monkeypatch.setattr(device, "rank_rows", fail)
    monkeypatch.setattr(device, "search", fail)
    given, distance = labelled(3, 9, 2), seeded(3, 9)
    for kind in (distance, distance.numpy()):
        rank_metrics(kind, **given)
        search(kind, kind, 2)


class Foreign:
    """What an array of CuPy offers, on memory of the host; it is never fetched."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def __getitem__(self, key: Any) -> Foreign:
        return Foreign(self.array[key])

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def get(self) -> np.ndarray:
        raise AssertionError("copied to the host")


class TestForeignArrays:
    """CuPy in, CuPy out, by DLPack; the reference rooms compute."""

    @pytest.fixture(autouse=True)
    def _cupy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cupy = SimpleNamespace(ndarray=Foreign, from_dlpack=lambda t: Foreign(np.from_dlpack(t)))
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        for module in (positions, device, device_products):
            monkeypatch.setattr(module, "on_device", lambda value: isinstance(value, Foreign))

    @pytest.mark.parametrize("metric", METRICS)
    def test_search(self, metric: Any) -> None:
        query, gallery = seeded(4, 9).numpy(), seeded(60, 9).numpy()
        expected = search(query, gallery, 7, metric=metric)
        for there in (Foreign(gallery), gallery):
            found = search(Foreign(query), there, 7, metric=metric, block=25)
            assert isinstance(found.scores, Foreign)
            assert np.array_equal(found.scores.array, expected.scores)
            assert np.array_equal(found.indices.array, expected.indices)

    def test_rank_metrics(self) -> None:
        distance, given = seeded(9, 60, ties=True).numpy(), labelled(9, 60, 5)
        found, expected = (rank_metrics(d, **given) for d in (Foreign(distance), distance))
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_memory_is_shared(self) -> None:
        array = seeded(2, 3).numpy()
        tensor = device.tensor_of("x", Foreign(array), "[a, b]")
        assert tensor.data_ptr() == array.ctypes.data
        assert device.like(Foreign(array), tensor).array.ctypes.data == array.ctypes.data

    def test_the_hosts_room_where_it_is_asked_for(self) -> None:
        assert not positions.stays_on_device(np.zeros(1))
        assert positions.stays_on_device(Foreign(np.zeros(1)))
        with fastreid_vi.backend("retrieval"):
            assert not positions.stays_on_device(Foreign(np.zeros(1)))


CUDA = pytest.mark.gpu
KINDS = ("tensor", "cupy")


def on_gpu(tensor: Tensor, kind: str) -> Any:
    if kind == "tensor":
        return tensor.cuda()
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    return cupy.asarray(tensor.numpy())


def rooms(op: str) -> list[str]:
    return [room for room in ("reference", "cuda") if callable(OPS[op].room(room))]


@CUDA
@pytest.mark.parametrize("op", ["rank_rows", "merge_top_k", "pair_scores", "row_norms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rooms_on_a_gpu(op: str, dtype: torch.dtype) -> None:
    expected = OPS[op].reference(*calls(dtype)[op])
    for room in rooms(op):
        with fastreid_vi.backend(room):
            found = getattr(torch.ops.fastreid_vi, op)(*calls(dtype, "cuda")[op])
        pairs = (
            zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        )
        for got, want in pairs:
            assert torch.equal(got.cpu().nan_to_num(7.0), want.nan_to_num(7.0))


@CUDA
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", ["sysu", "regdb", "llcm", "market"])
@pytest.mark.parametrize("shape", [(60, 400, 20), (3, 5000, 2), (40, 3000, 2999)], ids=str)
def test_rank_metrics_on_a_gpu(shape: Any, protocol: Any, kind: str) -> None:
    """Whichever room: the host's integers and bits. No distance comes to the host."""
    distance, given = seeded(*shape[:2], ties=True), labelled(*shape)
    expected = rank_metrics(distance.numpy(), **given, protocol=protocol, per_query=True)
    for room in rooms("rank_rows"):
        with fastreid_vi.backend(room):
            found = rank_metrics(on_gpu(distance, kind), **given, protocol=protocol, per_query=True)
        assert found.per_query is not None
        assert expected.per_query is not None
        for got, want in zip(
            (*found, *found.per_query), (*expected, *expected.per_query), strict=True
        ):
            assert np.array_equal(got, want, equal_nan=np.asarray(want).dtype == np.float64)


@CUDA
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_search_on_a_gpu(metric: Any, kind: str) -> None:
    """The host's scores to the bit, as the kind of array that came, on its device; TF32 or not."""
    query, gallery = seeded(70, 96), seeded(5000, 96)
    gallery[100:400] = gallery[100]
    query[0], query[1] = gallery[100], 0
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        for k in (1, 50, 3000):
            expected = search(query.numpy(), gallery.numpy(), k, metric=metric)
            for where in (on_gpu(gallery, kind), gallery.numpy()):
                found = search(on_gpu(query, kind), where, k, metric=metric, block=2048)
                assert type(found.scores) is type(on_gpu(query, kind))
                assert found.indices.device == on_gpu(query, kind).device
                host = [p.cpu().numpy() if kind == "tensor" else p.get() for p in found]
                assert np.array_equal(host[1], expected.indices)
                assert np.array_equal(host[0], expected.scores)
    finally:
        matmul.fp32_precision = before


@CUDA
def test_cupy_results_share_no_host_copy() -> None:
    """Results are the memory that the kernels wrote."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    tensor = torch.arange(6.0, device="cuda").reshape(2, 3)
    array = device.like(cupy.zeros(1), tensor)
    assert array.data.ptr == tensor.data_ptr()
    assert device.tensor_of("x", array, "[a, b]").data_ptr() == tensor.data_ptr()


def test_the_device_modules_load_without_cupy() -> None:
    assert importlib.import_module("fastreid_vi.evaluation.device_ops").LONGEST_LIST == 4096
