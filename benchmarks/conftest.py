"""The benchmark fixture: peers, the correctness gate, timing and what is recorded with it.

    pytest benchmarks --benchmark-only

A peer's result is compared with the reference in float64 before it is timed: no time without the
right answer. Groups are `<op> <mode> <shape>`; a slower row is published like a faster one.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastreid_vi
from benchmarks.device import device_times
from fastreid_vi._dispatch import OPS, native_missing

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MODES = ("forward", "training")
Function = Callable[..., Any]


class Workload(NamedTuple):
    """What is timed: one set of arguments and the ways to compute it."""

    op: str
    ours: Function  # the public op
    peers: dict[str, Function]  # other formulations: "eager", "tidy", third parties
    args: tuple[Any, ...]
    tolerance: float  # Frobenius-relative error allowed against float64
    bytes: int  # read and written at least once in the forward pass
    training_bytes: int = 0  # the same, forward and backward; 0 where not counted
    flops: tuple[int, int] = (0, 0)  # of the matrix products: forward, forward and backward


def rooms_of(op: str) -> list[str]:
    """Rooms of the op that run on this device."""
    wanted = ("cuda", "triton") if GPU else ("cpu",)
    built = [r for r in wanted if r in OPS[op].backends and not isinstance(OPS[op].room(r), str)]
    return [*built, "reference"]


def peers(op: str, *others: str) -> list[str]:
    """Our rooms, then the formulations that the workload brings, compiled PyTorch among them."""
    return [*rooms_of(op), *others]


def tuple_of(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


def floats(values: Sequence[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def relative_error(got: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    scale = exact.norm().item()
    return (got.double() - exact).norm().item() / (scale or 1.0)


def with_gradients(
    function: Function, args: Sequence[Any], grads: Sequence[Tensor]
) -> list[Tensor]:
    outputs = [o for o in tuple_of(function(*args)) if o.is_floating_point()]
    wanted = [a for a in floats(args) if a.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, list(grads))]


def widened(value: Any) -> Any:
    """The same number in float64; everything else as it is."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype).to(o.device)
        for o in outputs
        if o.is_floating_point()
    ]


@pytest.fixture
def run(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`run(workload, peer, mode, shape)`: check, warm up, time, record."""

    def timed(work: Workload, peer: str, mode: str, shape: str) -> None:
        if peer == "compiled":
            torch._dynamo.reset()
            function = torch.compile(work.peers["tidy"])
        else:
            function = work.peers.get(peer, work.ours)
        room = peer if peer in fastreid_vi._backend.BACKENDS else "reference"

        wide = [widened(a) for a in work.args]
        with fastreid_vi.backend("reference"):
            plain = tuple_of(work.ours(*work.args))
            grads = cotangents([o for o in plain if o.is_floating_point()])
            exact = with_gradients(work.ours, wide, [g.double() for g in grads])

        def forward() -> Any:
            with torch.no_grad():
                return function(*work.args)

        def training() -> Any:
            return with_gradients(function, work.args, grads)

        step = forward if mode == "forward" else training
        with fastreid_vi.backend(room):
            for got, want in zip(with_gradients(function, work.args, grads), exact, strict=True):
                error = relative_error(got, want)
                assert error <= work.tolerance, f"{peer} is wrong: relative error {error:.2g}"
            del exact, wide, plain
            benchmark.group = f"{work.op} {mode} {shape}"
            if GPU:
                torch.cuda.reset_peak_memory_stats()

                def synchronised() -> None:
                    step()
                    torch.cuda.synchronize()

                benchmark.pedantic(synchronised, rounds=50, warmup_rounds=10)
                peak = torch.cuda.max_memory_allocated()
                backward = mode == "training"
                benchmark.extra_info["device"] = device_times(
                    step,
                    ours=room == peer != "reference",
                    bytes_moved=work.training_bytes if backward else work.bytes,
                    flops=work.flops[backward],
                )
            else:
                benchmark.pedantic(step, rounds=7, warmup_rounds=2)
                peak = None
        benchmark.extra_info.update(
            op=work.op,
            peer=peer,
            mode=mode,
            shape=shape,
            bytes=work.bytes,
            peak_memory=peak,
            threads=torch.get_num_threads(),
        )

    return timed


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Device and versions beside every record."""
    machine_info["device"] = torch.cuda.get_device_name() if GPU else platform.processor() or "cpu"
    machine_info["torch"] = torch.__version__
    machine_info["fastreid_vi"] = fastreid_vi.__version__
    machine_info["native"] = native_missing or "built"
    machine_info["threads"] = torch.get_num_threads()
    if GPU:
        import triton

        machine_info["triton"] = triton.__version__
