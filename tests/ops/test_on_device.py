"""On a GPU only: launches, synchronisations and CUDA graphs of every loss at its official size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastreid_vi
from fastreid_vi import ops
from fastreid_vi._dispatch import OPS

pytestmark = pytest.mark.gpu


class Official(NamedTuple):
    """A call at the size of a published recipe, and what it may launch."""

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    rows: int
    size: int
    forward: int  # kernel launches
    backward: int


def triplet_of_maps(x: Tensor, labels: Tensor, modality: Tensor) -> Tensor:
    """The first, second and last third of the rows are maps of layer 4."""
    anchor, positive, negative = x.view(3, -1, 2048, 18, 9)
    weight = torch.ones_like(anchor[:, :1].detach())
    return ops.dense_triplet_loss(anchor, positive, negative, weight, weighting="batch")


def block_of_maps(x: Tensor, labels: Tensor, modality: Tensor) -> Tensor:
    """Each row is a map of layer 3; partners are the next sample, and the one after it."""
    maps, order = x.view(-1, 1024, 18, 9), torch.arange(len(x), device=x.device)
    return ops.dense_alignment(maps, order.roll(1), order.roll(2), weighting="batch").loss


CASES = {
    "batch_hard_triplet_loss": Official(
        lambda x, y, m: ops.batch_hard_triplet_loss(x, y).loss, 128, 14336, 2, 2
    ),
    "weighted_triplet_loss": Official(
        lambda x, y, m: ops.weighted_triplet_loss(x, y, stable=True).loss, 128, 2048, 2, 2
    ),
    "center_cluster_loss": Official(
        lambda x, y, m: ops.center_cluster_loss(x, y).loss, 128, 14336, 2, 2
    ),
    "soft_rank": Official(
        lambda x, y, m: ops.soft_rank(x, strength=0.01).square().sum(), 64, 64, 1, 1
    ),
    "cross_modality_retrieval_loss": Official(
        lambda x, y, m: ops.cross_modality_retrieval_loss(x, y, m), 128, 2048, 5, 5
    ),
    "dense_triplet_loss": Official(triplet_of_maps, 48, 2048 * 162, 3, 1),
    "dense_alignment": Official(block_of_maps, 16, 1024 * 162, 20, 40),
}
ROOMS = [(op, room) for op in CASES for room in OPS[op].backends if room in ("cuda", "triton")]


def arguments(case: Official, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.rows + case.size)
    x = torch.randn(case.rows, case.size, generator=generator)
    labels = torch.arange(case.rows) // 8
    modality = torch.arange(case.rows) % 8 // 4
    return x.to(device).requires_grad_(), labels.to(device), modality.to(device)


@contextmanager
def recorded(name: str, room: str) -> Iterator[list[tuple[Any, ...]]]:
    """Arguments of every call that this room of the op computes."""
    inner = OPS[name].room(room)
    if isinstance(inner, str):
        pytest.skip(inner)
    calls: list[tuple[Any, ...]] = []

    def outer(*args: Any) -> Any:
        calls.append(args)
        return inner(*args)

    OPS[name]._found[room] = outer
    try:
        yield calls
    finally:
        OPS[name]._found[room] = inner


def launches(function: Callable[[], Any]) -> list[str]:
    """Names of the kernels that a warm call starts, fills and copies included."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return [e.name for e in profile.events() if e.device_type == device]


@pytest.mark.parametrize(("op", "room"), ROOMS)
def test_launches(op: str, room: str) -> None:
    case = CASES[op]
    args = arguments(case)
    with (
        fastreid_vi.backend(room),
        recorded(op, room) as forward,
        recorded(f"{op}_backward", room) as backward,
    ):
        case.call(*args).backward()
    (forward_args,), (backward_args,) = forward, backward
    started = launches(lambda: OPS[op].room(room)(*forward_args))
    assert len(started) <= case.forward, started
    started = launches(lambda: OPS[f"{op}_backward"].room(room)(*backward_args))
    assert len(started) <= case.backward, started


@pytest.mark.parametrize(("op", "room"), ROOMS)
def test_nothing_waits_for_the_device(op: str, room: str) -> None:
    case = CASES[op]
    args = arguments(case)
    with fastreid_vi.backend(room):
        case.call(*args).backward()  # compiles and loads
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.call(*args).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("op", "room"), ROOMS)
def test_a_graph_holds_forward_and_backward(op: str, room: str) -> None:
    case = CASES[op]
    x, labels, modality = arguments(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with fastreid_vi.backend(room), torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(case.call(x, labels, modality), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with fastreid_vi.backend(room), torch.cuda.graph(graph):
        loss = case.call(x, labels, modality)
        (grad,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))  # other numbers, same graph
    graph.replay()
    torch.cuda.synchronize()
    exact = x.detach().double().cpu().requires_grad_()
    with fastreid_vi.backend("reference"):
        want = case.call(exact, labels.cpu(), modality.cpu())
    (want_grad,) = torch.autograd.grad(want, exact)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    error = (grad.cpu().double() - want_grad).norm() / want_grad.norm()
    assert error.item() <= 3e-5


@pytest.mark.parametrize(("op", "room"), ROOMS)
def test_runs_on_the_stream_of_the_caller(op: str, room: str) -> None:
    case = CASES[op]
    x, labels, modality = arguments(case)
    with fastreid_vi.backend(room):
        want = case.call(x, labels, modality).item()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # the copy below must not be overtaken
            late = (x.detach() * 2).div(2)
            got = case.call(late, labels, modality)
        side.synchronize()
    assert got.item() == pytest.approx(want, rel=1e-6)
