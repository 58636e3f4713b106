"""Which room computes an op, and why: the only file that knows backends.

torch.ops.fastreid_vi.<op>   schema, fake, autograd, autocast
  CPU or CUDA key -> Op      asks `why_not` of one backend after another
    reference                Python, in ops/<family>.py
    cpu, cuda                torch.ops.fastreid_vi_native.<op>, from the compiled library _C
    cuda without nvcc        fastreid_vi.nvrtc.<family>.<op>
    triton                   fastreid_vi.kernels.<family>.<op>
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from fastreid_vi import _backend, _checks, nvrtc

NAMESPACE: Final = "fastreid_vi"
NATIVE: Final = "fastreid_vi_native"
ORDER: Final = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_KEY: Final = {"cpu": "CPU", "cuda": "CUDA"}


def _load_native() -> str | None:
    """Load the compiled rooms; the reason when that is not possible."""
    if importlib.util.find_spec("fastreid_vi._C") is None:
        return "the C++ extension _C was not built"
    try:
        importlib.import_module("fastreid_vi._C")
    except ImportError as error:
        return f"the C++ extension _C does not load: {error}"
    return None


native_missing: Final = _load_native()


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _has_native(name: str, key: str) -> bool:
    """Whether the compiled library computes the op; an older build may not even know its name."""
    qualified = f"{NATIVE}::{name}"
    return hasattr(getattr(torch.ops, NATIVE), name) and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key)
    )


@dataclass
class Op:
    """One op and its rooms."""

    name: str
    family: str
    reference: Callable[..., Any]
    backends: tuple[str, ...]
    refuses: Callable[..., str | None]
    verify: Callable[..., None] | None = None
    _found: dict[str, Callable[..., Any] | str] = field(default_factory=dict)

    def _find(self, backend: str) -> Callable[..., Any] | str:
        """The room's function, or the reason why this build has none."""
        if backend == "reference":
            return self.reference
        if backend not in self.backends:
            return f"{self.name} has no {backend} room"
        if backend == "triton":
            if importlib.util.find_spec("triton") is None:
                return "Triton is not installed"
            try:
                module = importlib.import_module(f"fastreid_vi.kernels.{self.family}")
            except ImportError as error:
                return f"Triton's kernels do not load: {error}"
            found: Callable[..., Any] = getattr(module, self.name)
            return found
        missing = native_missing
        if missing is None and not _has_native(self.name, _KEY[backend]):
            missing = f"the C++ extension was built without {backend} code for {self.name}"
        if missing is None:
            native: Callable[..., Any] = getattr(getattr(torch.ops, NATIVE), self.name).default
            return native
        if backend != "cuda":
            return missing
        compiled = nvrtc.room(self.name)  # on first use, without nvcc
        return f"{missing}; {compiled}" if isinstance(compiled, str) else compiled

    def room(self, backend: str) -> Callable[..., Any] | str:
        """`_find`, remembered."""
        if backend not in self._found:
            self._found[backend] = self._find(backend)
        return self._found[backend]

    def why_not(self, backend: str, *args: Any) -> str | None:
        """Why this backend cannot compute these arguments; None when it can."""
        device = _device(args)
        if backend in _KEY and backend != device:
            return f"{backend} rooms do not take {device} tensors"
        if backend == "triton" and device == "cpu" and not interpreting():
            return "Triton takes CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
        found = self.room(backend)
        if isinstance(found, str):
            return found
        return None if backend == "reference" else self.refuses(backend, *args)

    def choose(self, *args: Any) -> str:
        """The backend that computes these arguments."""
        forced = _backend.forced()
        if forced is not None and (forced == "reference" or forced in self.backends):
            if reason := self.why_not(forced, *args):
                raise RuntimeError(
                    f"{self.name}: backend {forced!r} was asked for but cannot run: {reason}"
                )
            return forced
        return next(b for b in ORDER[_device(args)] if self.why_not(b, *args) is None)

    def __call__(self, *args: Any) -> Any:
        """Compute by the chosen room."""
        found = self.room(self.choose(*args))
        assert not isinstance(found, str)  # `choose` never returns a room that is missing
        result = found(*args)
        if self.verify is not None and _checks.values_wanted(_device(args)):
            self.verify(result, *args)
        return result


OPS: Final[dict[str, Op]] = {}


def _device(args: Sequence[Any]) -> str:
    return next(a.device.type for a in args if isinstance(a, torch.Tensor))


def _runs_everywhere(backend: str, *args: Any) -> str | None:
    return None


def _vmap_rule(name: str, rows: tuple[int, ...]) -> Callable[..., Any]:
    """Fold the mapped axis into the batch where only `rows` are mapped, else map call by call."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        # A list of numbers comes with a list of dimensions, all None.
        in_dims = tuple(dim if isinstance(dim, int) else None for dim in in_dims)
        mapped = {i for i, dim in enumerate(in_dims) if dim is not None}
        size = info.batch_size
        if mapped <= set(rows):
            folded = list(args)
            for i in rows:
                dim = in_dims[i]
                front = args[i].unsqueeze(0) if dim is None else args[i].movedim(dim, 0)
                folded[i] = front.expand(size, *front.shape[1:]).flatten(0, 1)
            result = overload(*folded)
            results = result if isinstance(result, tuple) else (result,)
            results = tuple(r.unflatten(0, (size, r.shape[0] // size)) for r in results)
        else:
            calls = []
            for k in range(size):
                picked = (
                    a if d is None else a.select(d, k) for a, d in zip(args, in_dims, strict=True)
                )
                result = overload(*picked)
                calls.append(result if isinstance(result, tuple) else (result,))
            results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        if isinstance(result, tuple):
            return results, (0,) * len(results)
        return results[0], 0

    return rule


def _once_only(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("fastreid_vi ops have first-order gradients only; no double backward")


def register(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backends: tuple[str, ...] = (),
    refuses: Callable[..., str | None] = _runs_everywhere,
    verify: Callable[..., None] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: torch.dtype | None = None,
    rows: tuple[int, ...] = (),
    family: str | None = None,
) -> Callable[..., Any]:
    """Register an op with `torch.library` and this table.

    Args:
        name: op name, the same in every room.
        schema: arguments and results in the language of `torch.library.define`.
        reference: plain PyTorch; the definition.
        fake: shapes, dtypes and strides of the results.
        backends: rooms beside `reference`.
        refuses: `refuses(backend, *args)` gives the reason why a room cannot take these arguments.
        verify: `verify(result, *args)` raises where the values of the arguments left no answer, on
            CPU tensors always, on CUDA tensors with FASTREID_VI_CHECK_VALUES=1. It runs after the
            room: a look at the result costs less than one at the input.
        setup_context, backward: gradient, as for `torch.library.register_autograd`. Without
            `backward` the op refuses to be differentiated.
        autocast: floating-point arguments are cast to this dtype under autocast.
        rows: positions of the arguments whose first axis is the batch of every result, so that
            `torch.func.vmap` may fold its axis into it. Other mappings run call by call.
        family: stem of the files of its other rooms; by default that of `reference`'s file.
    Returns:
        The overload, to call from the public function.
    """
    family = family or reference.__module__.rsplit(".", 1)[-1]
    op = OPS[name] = Op(name, family, reference, backends, refuses, verify)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    for device in ORDER:
        torch.library.impl(qualified, device, op)
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(
        qualified, backward or _once_only, setup_context=setup_context if backward else None
    )
    if autocast is not None:
        for device in ORDER:
            torch.library.register_autocast(qualified, device, autocast)
    torch.library.register_vmap(qualified, _vmap_rule(name, rows))
    overload: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload


def _built(room: Callable[..., Any]) -> str:
    return f"built ({nvrtc.path()})" if nvrtc.owns(room) else "built"


def backends() -> dict[str, dict[str, str]]:
    """What is built: op -> backend -> "built", or the reason why this process does not have it.

    CUDA rooms that are compiled on first use say "built (NVRTC through CuPy 14.2)".

    >>> import fastreid_vi
    >>> fastreid_vi.backends()["gem_pool"]["reference"]
    'built'
    """
    evaluation = ("evaluation.device_ops", "evaluation.device_rerank_ops")
    for families in ("ops", "augment.fused", "augment.erase", *evaluation):
        importlib.import_module(f"fastreid_vi.{families}")  # fills the table
    table = {}
    for name, op in OPS.items():
        rooms = {b: op.room(b) for b in ("reference", "cpu", "triton", "cuda")}
        table[name] = {b: r if isinstance(r, str) else _built(r) for b, r in rooms.items()}
    return table
