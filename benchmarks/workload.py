"""What is timed, and the gate before it: no time without the right answer.

A row is a workload, a peer (one way to compute it) and a mode. `prepared` compares the peer's
results and gradients with the reference room in float64 and hands out the step to time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastreid_vi
from fastreid_vi._dispatch import OPS

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MODES = ("forward", "training")
COMPILED = {"compiled": "default", "autotuned": "max-autotune"}  # peer -> mode of torch.compile
LOW_PRECISION = 2e-2  # error allowed in bfloat16, where float32 would be held to less
Function = Callable[..., Any]
Step = Callable[[], Any]


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

    def floor_of(self, mode: str) -> tuple[int, int]:
        """Bytes and products of a mode; what was not counted is 0."""
        backward = mode == "training"
        return (self.training_bytes if backward else self.bytes), self.flops[backward]


class Prepared(NamedTuple):
    """A checked step; it must run inside the context that handed it out."""

    step: Step
    error: float  # the largest relative error of results and gradients


class Wrong(AssertionError):
    """A peer whose result is not the reference's: it is not timed."""


def rooms_of(op: str) -> list[str]:
    """Rooms of the op that run on this device, the fastest kind first.

    The reference is timed where it is all that there is: it is written to be read.
    """
    wanted = ("cuda", "triton") if GPU else ("cpu",)
    built = [r for r in wanted if r in OPS[op].backends and not isinstance(OPS[op].room(r), str)]
    return built or ["reference"]


def peers(op: str, *others: str) -> list[str]:
    """Our rooms, then the formulations that the workload brings, compiled PyTorch among them.

    On a GPU a compiled peer is joined by the one that `max-autotune` finds.
    """
    more = ["autotuned"] if GPU and "compiled" in others else []
    return [*rooms_of(op), *others, *more]


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


def results(function: Function, args: Sequence[Any], grads: Sequence[Tensor]) -> list[Tensor]:
    """`with_gradients`, or the outputs alone where nothing asks for a gradient."""
    if any(a.requires_grad for a in floats(args)):
        return with_gradients(function, args, grads)
    return [o for o in tuple_of(function(*args)) if o.is_floating_point()]


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The same numbers in another type, a leaf again; everything else as it is."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def lowered(work: Workload) -> Workload:
    """The same in bfloat16: half the bytes, and the tolerance of that type."""
    args = tuple(cast(a, torch.bfloat16) for a in work.args)
    return work._replace(
        args=args,
        tolerance=max(work.tolerance, LOW_PRECISION),
        bytes=work.bytes // 2,
        training_bytes=work.training_bytes // 2,
    )


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype).to(o.device)
        for o in outputs
        if o.is_floating_point()
    ]


def function_of(work: Workload, peer: str) -> tuple[Function, str]:
    """What a peer calls, and the room that our ops use meanwhile."""
    room = peer if peer in fastreid_vi._backend.BACKENDS else "reference"
    if peer in COMPILED:
        torch._dynamo.reset()
        return torch.compile(work.peers["tidy"], mode=COMPILED[peer]), room
    return work.peers.get(peer, work.ours), room


def is_ours(peer: str) -> bool:
    """A room of ours beside the reference."""
    return peer in fastreid_vi._backend.BACKENDS and peer != "reference"


def worst_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(relative_error(g, e) for g, e in zip(got, exact, strict=True))


class Truth(NamedTuple):
    """What every peer of a workload is held to."""

    grads: list[Tensor]  # of the results, in the type of the arguments
    exact: list[Tensor]  # results and gradients of the reference in float64
    errors: dict[str, float]  # of the peers that were held to it already


def truth_of(work: Workload) -> Truth:
    """The reference room, in float64."""
    with fastreid_vi.backend("reference"), torch.no_grad():
        grads = cotangents(tuple_of(work.ours(*work.args)))
    wide = [cast(a, torch.float64) for a in work.args]
    with fastreid_vi.backend("reference"):
        return Truth(grads, results(work.ours, wide, [g.double() for g in grads]), {})


@contextmanager
def prepared(
    work: Workload, peer: str, mode: str, truth: Truth | None = None
) -> Iterator[Prepared]:
    """Check a peer, then hand out its step, in the room that it needs.

    In bfloat16 only our rooms are held to the tolerance: what plain PyTorch loses there is part of
    the record.

    Args:
        work, peer, mode: the row.
        truth: `truth_of(work)`, where several peers and modes share it; a peer that it has seen
            is not computed again.
    Raises:
        Wrong: a result or gradient is further from float64 than the workload allows.
    """
    grads, exact, errors = truth or truth_of(work)
    function, room = function_of(work, peer)

    def begin() -> None:
        if peer in COMPILED:  # results of the last round may be overwritten
            torch.compiler.cudagraph_mark_step_begin()

    def forward() -> Any:
        begin()
        with torch.no_grad():
            return function(*work.args)

    def training() -> Any:
        begin()
        return with_gradients(function, work.args, grads)

    half = any(a.dtype == torch.bfloat16 for a in floats(work.args))
    with fastreid_vi.backend(room):
        if peer not in errors:
            begin()
            errors[peer] = worst_error(results(function, work.args, grads), exact)
        if not errors[peer] <= work.tolerance and (is_ours(peer) or not half):
            raise Wrong(f"{peer} is wrong: relative error {errors[peer]:.2g}")
        del exact
        yield Prepared(forward if mode == "forward" else training, errors[peer])
