"""What a golden case is: inputs, a call, what must come out, how far off it may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastreid_vi.certify.vectors import Array, Golden

Kind = Literal["forward", "gradient"]
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Want(NamedTuple):
    """An expected array and the largest error, relative to its largest entry, per precision."""

    value: Any
    single: float
    double: float
    scale: float | None = None
    """What errors are relative to instead."""


def forward(value: Any, single: float = 1e-5) -> Want:
    """A result, stored in float64."""
    return Want(value, single, 1e-9)


def gradient(value: Any, single: float = 1e-4) -> Want:
    """A gradient, stored in float64."""
    return Want(value, single, 1e-9)


def narrow(value: Any, bound: float) -> Want:
    """A truth that was computed or stored in float32: as wide a bound for float64."""
    return Want(value, bound, bound)


def exact(value: Any) -> Want:
    """Integers, or values that must agree to the bit."""
    return Want(value, 0.0, 0.0)


class Check(NamedTuple):
    """One quantity that was compared."""

    quantity: str
    kind: Kind
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Within its tolerance; NaN is not."""
        return self.error <= self.tolerance


Call = Callable[..., Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """One call of an op.

    `call` gets every leaf and every given value by name, tensors on the device in the precision
    under test, and returns named results. Gradients are those of the sum of cotangent times result.
    """

    op: str
    name: str
    leaves: Mapping[str, Array]
    """Floating inputs that get gradients."""
    call: Call
    given: Mapping[str, Any] = field(default_factory=dict)
    """Other arguments: arrays become tensors, anything else is handed on."""
    results: Mapping[str, Want] = field(default_factory=dict)
    cotangents: Mapping[str, Array | float] = field(default_factory=dict)
    """Result -> its cotangent; empty: no gradients are asked for."""
    gradients: Mapping[str, Want] = field(default_factory=dict)
    """Leaf, or a name in `parts`, -> its gradient."""
    parts: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    """Name -> leaf and what of its gradient is compared."""


Cases = Callable[[Golden], Iterator[OpCase]]


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """Anything longer than one call: training steps, samplers, layouts, metrics."""

    owner: str
    """Method, or op, that the table lists it under."""
    name: str
    run: Callable[[Golden, torch.dtype, str], Iterator[Check]]
    """Of (vectors, precision, device)."""
    dtypes: tuple[str, ...] = ("float32", "float64")
    devices: tuple[str, ...] = ("cpu", "cuda")
    rooms: tuple[str, ...] = ()
    """Backends to ask for one after the other; none: whatever each op chooses."""


def compare(quantity: str, kind: Kind, got: Any, want: Want, dtype: torch.dtype) -> Check:
    """Largest error of `got`, relative to the largest expected entry; infinite where shapes or the
    places of NaN differ."""
    found = got.detach().cpu().numpy() if isinstance(got, Tensor) else np.asarray(got)
    value = np.asarray(want.value)
    bound = want.single if dtype == torch.float32 else want.double
    return Check(quantity, kind, _error(found, value, want.scale), bound)


def _error(got: Array, want: Array, scale: float | None) -> float:
    if got.shape != want.shape:
        return float("inf")
    if got.size == 0:
        return 0.0
    if want.dtype.kind in "US" or got.dtype.kind in "US":
        return 0.0 if np.array_equal(got, want) else 1.0
    found, wanted = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(wanted)
    if not np.array_equal(np.isnan(found), np.isnan(wanted)):
        return float("inf")
    if not np.array_equal(found[np.isinf(wanted)], wanted[np.isinf(wanted)]):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = np.abs(wanted[finite]).max() if scale is None else scale
    return float(np.abs(found[finite] - wanted[finite]).max() / (largest or 1.0))


def tensor(value: Any, dtype: torch.dtype, device: str) -> Any:
    """Arrays as tensors, floating ones in `dtype`; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    made = torch.from_numpy(np.array(value)).to(device)
    return made.to(dtype) if made.is_floating_point() else made


def run(case: OpCase, dtype: torch.dtype, device: str) -> Iterator[Check]:
    """Call the op once, forward and backward, and compare everything the case names."""
    leaves = {
        name: tensor(value, dtype, device).requires_grad_(bool(case.cotangents))
        for name, value in case.leaves.items()
    }
    given = {name: tensor(value, dtype, device) for name, value in case.given.items()}
    results = case.call(**leaves, **given)
    for name, want in case.results.items():
        yield compare(name, "forward", results[name], want, dtype)
    if not case.cotangents:
        return
    seeds = {
        name: tensor(value, dtype, device)
        if isinstance(value, np.ndarray)
        else torch.full_like(results[name], value)
        for name, value in case.cotangents.items()
    }
    grads = torch.autograd.grad(
        [results[name] for name in seeds],
        list(leaves.values()),
        [seeds[name].reshape(results[name].shape).to(results[name].dtype) for name in seeds],
        allow_unused=True,
    )
    by_leaf = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    for name, want in case.gradients.items():
        leaf, part = case.parts.get(name, (name, _whole))
        yield compare(name, "gradient", part(by_leaf[leaf]), want, dtype)


def _whole(gradient: Tensor) -> Tensor:
    return gradient
