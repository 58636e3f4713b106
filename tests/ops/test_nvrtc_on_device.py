"""On a GPU only: the CUDA rooms as an installation without nvcc has them, compiled by NVRTC."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastreid_vi
from fastreid_vi import nvrtc, ops
from fastreid_vi._dispatch import OPS
from tests.ops.test_on_device import CASES, Official, arguments

pytestmark = pytest.mark.gpu
POOL = Official(lambda x, y, m: ops.gem_pool(x.view(64, 64, 8, 8).abs()).sum(), 64, 4096, 1, 1)
CALLS = {**CASES, "gem_pool": POOL}


@pytest.fixture(autouse=True)
def _nvrtc_rooms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for op in nvrtc.ROOMS:
        room = nvrtc.room(op)
        if isinstance(room, str):
            pytest.skip(room)
        monkeypatch.setitem(OPS[op]._found, "cuda", room)
    with fastreid_vi.backend("cuda"):
        yield


def exact(case: Official) -> tuple[Tensor, Tensor]:
    x, labels, modality = arguments(case, "cpu")
    wide = x.detach().double().requires_grad_()
    with fastreid_vi.backend("reference"):
        loss = case.call(wide, labels, modality)
        return loss, torch.autograd.grad(loss, wide)[0]


def assert_right(case: Official, loss: Tensor, grad: Tensor) -> None:
    want, want_grad = exact(case)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    error = (grad.cpu().double() - want_grad).norm() / want_grad.norm()
    assert error.item() <= 3e-5


def test_every_room_is_called_here():
    assert {name.removesuffix("_backward") for name in nvrtc.ROOMS} == CALLS.keys()


@pytest.mark.parametrize("op", CALLS)
def test_values_and_gradients(op: str) -> None:
    case = CALLS[op]
    x, labels, modality = arguments(case)
    loss = case.call(x, labels, modality)
    assert_right(case, loss, torch.autograd.grad(loss, x)[0])


@pytest.mark.parametrize("op", CALLS)
def test_captured_by_a_cuda_graph(op: str) -> None:
    case = CALLS[op]
    x, labels, modality = arguments(case)
    torch.autograd.grad(case.call(x, labels, modality), x)  # compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = case.call(x, labels, modality)
        (grad,) = torch.autograd.grad(loss, x)
    graph.replay()
    torch.cuda.synchronize()
    assert_right(case, loss, grad)


@pytest.mark.parametrize("op", CALLS)
def test_runs_on_the_stream_of_the_caller(op: str) -> None:
    case = CALLS[op]
    x, labels, modality = arguments(case)
    want = case.call(x, labels, modality).item()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # the copy below must not be overtaken
        late = (x.detach() * 2).div(2)
        got = case.call(late, labels, modality)
    side.synchronize()
    assert got.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one() -> None:
    case = CALLS["gem_pool"]
    x, labels, modality = arguments(case, "cuda:1")
    loss = case.call(x, labels, modality)
    assert torch.cuda.current_device() == 0
    assert_right(case, loss, torch.autograd.grad(loss, x)[0])


def test_the_table_says_nvrtc() -> None:
    table = fastreid_vi.backends()
    assert {table[op]["cuda"] for op in nvrtc.ROOMS} == {f"built ({nvrtc.path()})"}
