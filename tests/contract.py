"""What every op owes its users. A test class inherits it and lists `op`, `cases`, `inputs`.

For each case x dtype x room x memory format: forward and every gradient against the reference in
float64, the error at most twice that of the reference in the same dtype plus one ulp (4 in float32,
64 in float64); `gradcheck`; `opcheck`; `torch.compile(fullgraph=True)`; forward by one room,
backward by another; run-to-run identical bits; no double backward; refusals by name; CUDA-graph
capture on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastreid_vi
from fastreid_vi import ops
from fastreid_vi._dispatch import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "sliced")
GPU = torch.cuda.is_available()


def device_of(room: str) -> str:
    """Triton runs on the GPU, or on CPU tensors in its interpreter."""
    return "cuda" if room == "cuda" or (room == "triton" and GPU) else "cpu"


def arranged(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory format; "sliced" leaves gaps in every axis."""
    if tensor.dim() != 4 or tensor.shape[2] * tensor.shape[3] == 1 or layout == "contiguous":
        return tensor.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return tensor.clone(memory_format=torch.channels_last)
    b, c, h, w = tensor.shape
    room = tensor.new_full((b, c + 1, h + 1, w + 2), float("nan"))
    view = room[:, 1:, 1:, 1 : w + 1]
    view.copy_(tensor)
    return view


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


class Captured(TorchDispatchMode):
    """Records the arguments that reach `torch.ops.fastreid_vi.<name>`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.wanted = getattr(torch.ops.fastreid_vi, name).default
        self.args: tuple[Any, ...] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.wanted and self.args is None:
            self.args = args
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(op: str, room: str) -> Iterator[list[str]]:
    """Records each time this room of the op really runs."""
    entry, ran = OPS[op], []
    inner = entry.room(room)
    assert not isinstance(inner, str), inner

    def outer(*args: Any) -> Any:
        ran.append(room)
        return inner(*args)

    entry._found[room] = outer
    try:
        yield ran
    finally:
        entry._found[room] = inner


class OpContract:
    """Inherit, set `op` and `cases`, write `inputs`."""

    op: str
    cases: Sequence[Any]
    dtypes: Sequence[torch.dtype] = DTYPES
    layouts: Sequence[str] = ("contiguous",)
    refused: Sequence[tuple[str, torch.dtype]] = ()  # rooms that say no to a dtype
    detached: Sequence[int] = ()  # floating outputs that carry no gradient

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        """Seeded CPU arguments for `call`; floating tensors get gradients."""
        raise AssertionError("a contract lists its inputs")

    def call(self, *args: Any) -> Any:
        return getattr(ops, self.op)(*args)

    # Running a room.

    def prepared(
        self,
        case: Any,
        dtype: torch.dtype,
        layout: str,
        device: str,
        kind: torch.dtype | None = None,
    ) -> list[Any]:
        """Inputs rounded to `dtype`, then held in `kind` (float64 for the exact run)."""
        ready = []
        for value in self.inputs(case, dtype):
            if is_float(value):
                value = arranged(value.to(dtype).to(kind or dtype), layout).to(device)
                value = value.detach().requires_grad_()
            elif isinstance(value, Tensor):
                value = value.to(device)
            ready.append(value)
        return ready

    def smooth(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs that carry a gradient."""
        for i in self.detached:
            assert not outputs[i].requires_grad, f"output {i} is not detached"
        return [
            o for i, o in enumerate(outputs) if o.is_floating_point() and i not in self.detached
        ]

    def cotangents(self, outputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(7)
        grads = []
        for out in outputs:
            g = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            grads.append(g.to(dtype).to(out.dtype).to(out.device))
        return grads

    def run(
        self, args: list[Any], room: str, dtype: torch.dtype, backward_room: str | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and the gradient of every floating argument."""
        with fastreid_vi.backend(room):
            outputs = as_tuple(self.call(*args))
        floats = [a for a in args if is_float(a)]
        smooth = self.smooth(outputs)
        with fastreid_vi.backend(backward_room or room):
            grads = torch.autograd.grad(smooth, floats, self.cotangents(smooth, dtype))
        return [o.detach() for o in outputs], list(grads)

    def judge(self, got: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
        assert got.dtype == plain.dtype, what
        assert got.shape == plain.shape, what
        if got.numel() == 0:
            return
        got64, plain64, exact64 = (t.cpu().double() for t in (got, plain, exact))
        if not got.is_floating_point():
            assert torch.equal(got64, exact64), what
            return
        finite = exact64.isfinite() & plain64.isfinite()
        assert torch.equal(
            got64.isfinite() | ~exact64.isfinite(), plain64.isfinite() | ~exact64.isfinite()
        ), what
        if not finite.any():
            return
        scale = exact64[finite].abs().max().item()
        error = (got64 - exact64)[finite].abs().max().item()
        allowed = 2 * (plain64 - exact64)[finite].abs().max().item()
        # Sums run in another order; float64 has no wider truth to be compared with.
        ulps = {torch.float64: 64, torch.float32: 4}.get(got.dtype, 1)
        allowed += ulps * torch.finfo(got.dtype).eps * scale
        assert error <= allowed, (
            f"{what}: error {error:.3g}, allowed {allowed:.3g}, scale {scale:.3g}"
        )

    # The contract.

    def test_matches_the_reference(self, case: Any, dtype: torch.dtype, room: str) -> None:
        device = device_of(room)
        for layout in self.layouts:
            args = self.prepared(case, dtype, layout, device)
            if (room, dtype) in self.refused:
                with (
                    fastreid_vi.backend(room),
                    pytest.raises(RuntimeError, match="was asked for but cannot run"),
                ):
                    self.call(*args)
                continue
            exact = self.run(
                self.prepared(case, dtype, "contiguous", "cpu", torch.float64), "reference", dtype
            )
            plain = self.run(self.prepared(case, dtype, "contiguous", "cpu"), "reference", dtype)
            with watched(self.op, room) as ran:
                got = self.run(args, room, dtype)
            assert ran == [room]
            for kind, ours, theirs, truth in zip(
                ("output", "gradient"), got, plain, exact, strict=True
            ):
                for i, (o, t, e) in enumerate(zip(ours, theirs, truth, strict=True)):
                    self.judge(o, t, e, f"{kind} {i}, {layout}")
            for a, g in zip((a for a in args if is_float(a)), got[1], strict=True):
                assert g.shape == a.shape
                if a.dim() == 4 and layout == "channels_last" and a.numel():
                    assert g.is_contiguous(memory_format=torch.channels_last)

    def test_gradcheck(self, case: Any) -> None:
        for room in ("reference", "cpu"):
            if room in ("reference", *OPS[self.op].backends):
                args = self.prepared(case, torch.float64, "contiguous", "cpu")

                def outputs(*a: Any) -> tuple[Tensor, ...]:
                    return tuple(self.smooth(as_tuple(self.call(*a))))

                with fastreid_vi.backend(room):
                    large = sum(a.numel() for a in args if is_float(a)) > 300
                    assert torch.autograd.gradcheck(outputs, tuple(args), fast_mode=large)

    def test_opcheck(self, case: Any) -> None:
        args = self.prepared(case, torch.float32, "contiguous", "cpu")
        capture = Captured(self.op)
        with capture, torch.no_grad():
            self.call(*args)
        assert capture.args is not None
        raw = tuple(a.detach().requires_grad_() if is_float(a) else a for a in capture.args)
        torch.library.opcheck(capture.wanted, raw)

    def test_compiles_without_graph_breaks(self) -> None:
        args = self.prepared(self.cases[0], torch.float32, self.layouts[-1], "cpu")
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: self.call(*a), fullgraph=True)
        outputs = as_tuple(compiled(*args))
        expected, expected_grads = self.run(args, "reference", torch.float32)
        floats = [a for a in args if is_float(a)]
        smooth = self.smooth(outputs)
        grads = torch.autograd.grad(smooth, floats, self.cotangents(smooth, torch.float32))
        for got, want in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_any_backward_follows_any_forward(self) -> None:
        rooms = [
            r for r in ("reference", *OPS[self.op].backends)
            if device_of(r) == "cpu" and (r, torch.float32) not in self.refused
        ]  # fmt: skip
        case, dtype = self.cases[0], torch.float32
        exact = self.run(
            self.prepared(case, dtype, "contiguous", "cpu", torch.float64), "reference", dtype
        )
        for forward in rooms:
            for backward in rooms:
                args = self.prepared(case, dtype, self.layouts[-1], "cpu")
                got = self.run(args, forward, dtype, backward)
                for g, e in zip(got[1], exact[1], strict=True):
                    scale = e.abs().max().clamp_min(1e-30)
                    assert ((g.double() - e).abs().max() / scale).item() < 1e-4, (forward, backward)

    def test_same_bits_every_run(self, room: str) -> None:
        args = self.prepared(self.cases[0], torch.float32, "contiguous", device_of(room))
        first, second = (self.run(args, room, torch.float32) for _ in range(2))
        for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
            assert torch.equal(a, b)

    def test_vmap_equals_a_loop(self) -> None:
        args = self.prepared(self.cases[0], torch.float64, "contiguous", "cpu")
        args = [a.detach() if isinstance(a, Tensor) else a for a in args]
        scales = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        looped = [
            as_tuple(self.call(args[0] * k, *args[1:])) for k in scales
        ]  # fmt: skip
        mapped = as_tuple(torch.func.vmap(lambda k: self.call(args[0] * k, *args[1:]))(scales))
        for i, got in enumerate(mapped):
            torch.testing.assert_close(got, torch.stack([call[i] for call in looped]))

    def test_no_double_backward(self) -> None:
        args = self.prepared(self.cases[0], torch.float64, "contiguous", "cpu")
        out = self.smooth(as_tuple(self.call(*args)))[0]
        floats = [a for a in args if is_float(a)]
        grads = torch.autograd.grad(out.square().sum(), floats, create_graph=True)
        with pytest.raises(RuntimeError, match="first-order gradients only"):
            torch.autograd.grad(sum(g.sum() for g in grads), floats)

    def test_inputs_are_not_changed(self) -> None:
        args = self.prepared(self.cases[0], torch.float32, self.layouts[-1], "cpu")
        before = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
        self.run(args, "cpu", torch.float32)
        for a, b in zip(args, before, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b

    @pytest.mark.gpu
    def test_captured_by_a_cuda_graph(self) -> None:
        args = self.prepared(self.cases[0], torch.float32, self.layouts[-1], "cuda")
        expected = [o.detach().clone() for o in as_tuple(self.call(*args))]  # compiles the kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            static = as_tuple(self.call(*args))
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(static, expected, strict=True):
            torch.testing.assert_close(got, want)
