"""`fastreid-vi doctor --bench`: every op on this machine, ten seconds in all.

Each op at a size between a toy and a training batch, forward and backward: first its results and
gradients against the reference in float64, then its time beside plain eager PyTorch, which is our
reference room, in turns so that both see the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreid_vi import ops
from fastreid_vi._backend import backend
from fastreid_vi._console import table
from fastreid_vi._dispatch import OPS, ORDER

BUDGET = 9.0  # seconds of timing, shared by all ops
FEWEST, MOST = 3, 60  # rounds of each side
TOLERANCE = 1e-4  # Frobenius-relative, of float32 against float64
Function = Callable[..., Any]


class Case(NamedTuple):
    """A call: the op is differentiated by the arguments that ask for it."""

    op: str
    call: Function
    args: tuple[Tensor, ...]


def cases(device: str) -> Iterator[Case]:
    """Every public op with drawn arguments."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=draw)).to(device)

    def leaf(value: Tensor) -> Tensor:
        if value.ndim == 4 and value.shape[2] > 1:
            value = value.contiguous(memory_format=torch.channels_last)
        return value.detach().requires_grad_()

    strength = 0.25 + torch.rand(4, 1, 18, 9, generator=draw).to(device)
    maps = [leaf(normal(4, 512, 18, 9).relu() * strength) for _ in range(3)]
    x, other, third = maps
    mask = ops.feature_mask(x.detach())
    nearer, farther = (torch.arange(4, device=device).roll(k) for k in (1, 3))
    centres = normal(8, 1, 2048, scale=0.1).expand(8, 8, 2048)  # near, so that hinges are open
    rows = leaf(centres.flatten(0, 1) + normal(64, 2048))
    labels = torch.arange(64, device=device) // 8
    modality = torch.arange(64, device=device) % 2
    ones = torch.ones(512, device=device)
    weight = leaf(normal(6, 512, 1, 1, scale=0.05))
    gates = leaf(normal(32, 512, 1, 1, scale=0.1)), leaf(normal(512, 32, 1, 1, scale=0.1))
    adapter = leaf(normal(2, 512, 1, 1, scale=0.05)), leaf(normal(512, 1, 2))
    pictures = leaf(normal(8, 3, 64, 64))

    def adapted(x: Tensor, w: Tensor, mix: Tensor) -> Tensor:
        zero = torch.zeros(2, dtype=w.dtype, device=w.device)
        one = ones.to(x.dtype)
        return ops.distribution_adapter(x, w, zero, mix, one, one, one, one)

    def dense(x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.dense_alignment(x, nearer, farther)[:2]

    def triplet_of_maps(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return ops.dense_triplet_loss(a, p, n, mask.to(a.dtype))

    yield Case("gem_pool", ops.gem_pool, (x,))
    yield Case("pattern_pool", ops.pattern_pool, (x, weight))
    yield Case("map_separation_loss", ops.map_separation_loss, (leaf(normal(8, 6, 18, 9).abs()),))
    yield Case("modality_alleviation", ops.modality_alleviation, (x, *gates))
    yield Case("distribution_adapter", adapted, (x, *adapter))
    yield Case("instance_norm_act", ops.instance_norm_act, (leaf(normal(8, 64, 32, 32)),))
    yield Case(
        "resize_normalize",
        lambda x: ops.resize_normalize(x, (192, 96), mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]),
        (pictures,),
    )
    yield Case("pairwise_distance", lambda x, y: ops.pairwise_distance(x, y), (rows, leaf(-rows)))
    yield Case(
        "batch_hard_triplet_loss", lambda x: ops.batch_hard_triplet_loss(x, labels).loss, (rows,)
    )
    yield Case(
        "weighted_triplet_loss",
        lambda x: ops.weighted_triplet_loss(x, labels, stable=True).loss,
        (rows,),
    )
    yield Case("center_cluster_loss", lambda x: ops.center_cluster_loss(x, labels).loss, (rows,))
    yield Case("soft_rank", ops.soft_rank, (leaf(normal(256, 256)),))
    yield Case(
        "cross_modality_retrieval_loss",
        lambda x: ops.cross_modality_retrieval_loss(x, labels, modality),
        (rows,),
    )
    yield Case("feature_mask", ops.feature_mask, (x.detach(),))
    yield Case("correspondence_probability", ops.correspondence_probability, (x, other))
    yield Case("correspondence_warp", lambda a, b: ops.correspondence_warp(a, b).warped, (x, other))
    yield Case(
        "align_features",
        lambda x: ops.align_features(x, nearer, mask=mask.to(x.dtype)).aligned,
        (x,),
    )
    yield Case("dense_alignment", dense, (x,))
    yield Case("dense_triplet_loss", triplet_of_maps, (x, other, third))


def results(case: Case, args: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of their sum of squares where an argument asks for them."""
    found = case.call(*args)
    outputs = list(found) if isinstance(found, tuple) else [found]
    wanted = [a for a in args if a.requires_grad]
    if not wanted:
        return outputs
    total = torch.stack([o.double().square().mean() for o in outputs]).sum()
    return [*outputs, *torch.autograd.grad(total, wanted)]


def worst_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest Frobenius-relative error of all; NaN where one is not finite."""
    errors = []
    for one, truth in zip(got, exact, strict=True):
        scale = truth.norm().item() or 1.0
        errors.append((one.double() - truth).norm().item() / scale)
    return float("nan") if any(e != e for e in errors) else max(errors)


def _seconds(step: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(
    ours: Callable[[], Any], plain: Callable[[], Any], device: str, budget: float
) -> tuple[float, float]:
    """Median seconds of both."""
    once = sum(min(_seconds(step, device) for _ in range(2)) for step in (ours, plain))
    rounds = max(FEWEST, min(MOST, int(budget / max(once, 1e-9))))
    pairs = [(_seconds(ours, device), _seconds(plain, device)) for _ in range(rounds)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b)


def live_room(op: str, device: str) -> str:
    """The room that this device's tensors use."""
    return next(
        room
        for room in ORDER[device]
        if room == "reference" or (room in OPS[op].backends and callable(OPS[op].room(room)))
    )


def checked(case: Case, device: str, budget: float) -> dict[str, Any]:
    """One op: right first, then timed."""
    room = live_room(case.op, device)
    row: dict[str, Any] = {"op": case.op, "room": room}

    def ours() -> Any:
        return results(case, case.args)

    def plain() -> Any:
        with backend("reference"):
            return results(case, case.args)

    wide = [a.detach().double().requires_grad_(a.requires_grad) for a in case.args]
    try:
        with backend("reference"):
            exact = results(case, wide)
        row["error"] = worst_error(ours(), exact)
        row["verdict"] = "right" if row["error"] <= TOLERANCE else "WRONG"
        if row["verdict"] == "right":
            row["seconds"], row["plain_seconds"] = in_turns(ours, plain, device, budget)
            row["ratio"] = row["plain_seconds"] / row["seconds"]
    except (RuntimeError, ImportError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        row["verdict"] = f"fails: {lines[0]}"
    return row


def run(device: str | None = None, budget: float | None = None) -> dict[str, Any]:
    """Check and time every op.

    Args:
        device: "cpu" or "cuda"; by default CUDA where there is one.
        budget: seconds of timing, shared by all ops (9).
    Returns:
        JSON-ready: `device`, `threads`, `seconds`, `rows` (op, room, verdict, error, seconds,
        plain_seconds, ratio), `ok`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    share = (BUDGET if budget is None else budget) / sum(not n.endswith("_backward") for n in OPS)
    rows = [checked(case, device, share) for case in cases(device)]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - began, 2),
        "rows": rows,
        "ok": all(row["verdict"] == "right" for row in rows),
    }


def text(found: dict[str, Any]) -> str:
    """`run`'s findings for people; what is slower than plain PyTorch is shown as it is."""
    cells = []
    for row in found["rows"]:
        times = ["-", "-", "-"]
        if "ratio" in row:
            times = [f"{1e3 * row['seconds']:.2f}", f"{1e3 * row['plain_seconds']:.2f}"]
            times.append(f"{row['ratio']:.1f}x")
        error = f"{row['error']:.0e}" if "error" in row else "-"
        cells.append([row["op"], row["room"], *times, error, row["verdict"]])
    head = ["op, forward and backward", "room", "ms", "plain PyTorch, ms", "speed-up", "error", ""]
    where = f"{found['device']}, {found['threads']} threads, {found['seconds']:.1f} s"
    return f"{table(head, cells)}\n{where}"
