"""The cluster kernel of csrc/cuda/pattern_cluster.cuh: eight emulated blocks at a time, and on a
device against the kernels that take two passes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastreid_vi
from fastreid_vi import ops
from fastreid_vi._dispatch import OPS
from tests.cuda import emulator
from tests.cuda.budgets import BUDGETS
from tests.cuda.conftest import SANITIZED, Emulated
from tests.cuda.test_pattern_pool_kernels import ACTIVATIONS, exact, exact_gradients, seeded

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["ascending"] if os.environ.get(SANITIZED) else [*emulator.ORDERS])
def rooms(request: pytest.FixtureRequest, emulation: emulator.Emulator) -> Emulated:
    """Not `emulated`: its tests run once more through NVRTC launchers, which have no clusters."""
    emulation.order(request.param)
    return Emulated(emulation)


def channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return seeded(shape, dtype).contiguous(memory_format=torch.channels_last)


def weights(count: int, channels: int, dtype: torch.dtype) -> Tensor:
    return (seeded((count, channels, 1, 1), torch.float64) / channels**0.5).to(dtype)


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Maps to half an ulp; pooled features to another half of the largest, for rounded maps."""
    pooled, maps = (t.double().cpu() for t in got)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(maps, want[1].cpu(), rtol=0.51 * eps, atol=1e-6)
    atol = 0.5 * eps * want[0].abs().max().item()
    torch.testing.assert_close(pooled, want[0].cpu(), rtol=0.51 * eps, atol=atol)


def launched_clusters(launches: list[tuple[int, ...]], samples: int) -> bool:
    return len(launches) == 1 and launches[0][0] == 8 * samples and launches[0][6] > 0


# Positions that fill tiles, that do not, fewer than one; slices of 16 to 48 channels; odd batches.
CASES = [
    ((1, 128, 8, 4), 6, "sigmoid", True),
    ((3, 256, 6, 3), 8, "softmax", False),
    ((1, 384, 3, 3), 1, "softmax", True),
    ((3, 128, 12, 3), 7, "sigmoid", False),
]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(rooms: Emulated, case, dtype):
    shape, count, activation, has_bias = case
    x, w = channels_last(shape, dtype), weights(count, shape[1], dtype)
    bias = seeded((count,), dtype) if has_bias else None
    with rooms.emulation.recorded() as launches:
        got = rooms.pattern_pool(x, w, bias, activation)
    assert launched_clusters(launches, shape[0])
    assert_close(got, exact(x, w, bias, activation), dtype)


@pytest.mark.parametrize(
    ("shape", "activation"), [((1, 2048, 24, 8), "sigmoid"), ((1, 1024, 24, 12), "softmax")]
)
def test_published_sizes(emulation: emulator.Emulator, shape, activation):
    emulation.order("shuffled")
    x, w = channels_last(shape, torch.bfloat16), weights(6, shape[1], torch.bfloat16)
    with emulation.unwatched(), emulation.recorded() as launches:
        got = Emulated(emulation).pattern_pool(x, w, None, activation)
    assert launched_clusters(launches, 1)
    static, system, of_an_sm = BUDGETS["pattern_cluster_kernel"].shared, 1024, 228 * 1024
    assert 2 * (launches[0][6] + static + system) <= of_an_sm  # a second block finds room
    assert_close(got, exact(x, w, None, activation), torch.bfloat16)


def test_a_slice_of_a_larger_map(rooms: Emulated):
    """Pitches of positions and samples; NaN around."""
    room = torch.full((3, 5, 7, 264), float("nan"), dtype=torch.bfloat16)
    view = room[1:, :, :, 8:136]
    view.copy_(seeded((2, 5, 7, 128), torch.bfloat16))
    x, w = view.permute(0, 3, 1, 2), weights(5, 128, torch.bfloat16)
    with rooms.emulation.recorded() as launches:
        got = rooms.pattern_pool(x, w, None, "sigmoid")
    assert launched_clusters(launches, 2)
    assert_close(got, exact(x, w, None, "sigmoid"), torch.bfloat16)


def test_the_order_of_threads_does_not_matter(emulation: emulator.Emulator):
    x, w = channels_last((2, 128, 7, 5), torch.float16), weights(6, 128, torch.float16)
    results = []
    for order in emulator.ORDERS:
        emulation.order(order, seed=len(results))
        results.append(Emulated(emulation).pattern_pool(x, w, None, "softmax"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_stays_in_its_sample(rooms: Emulated):
    x = channels_last((2, 128, 3, 3), torch.bfloat16)
    x[1, 3, 2, 2] = float("nan")
    pooled, maps = rooms.pattern_pool(x, weights(3, 128, torch.bfloat16), None, "sigmoid")
    assert pooled[0].isfinite().all()
    assert pooled[1].isnan().all()
    assert maps.isnan().sum() == 3


@pytest.mark.parametrize(
    ("shape", "count", "dtype"),
    [
        ((1, 128, 2, 2), 9, torch.bfloat16),  # more maps than a product has columns
        ((1, 120, 2, 2), 6, torch.bfloat16),  # slices that are no multiple of 16 channels
        ((1, 128, 2, 2), 6, torch.float32),
        ((1, 3072, 18, 16), 6, torch.float16),  # more than the shared memory of a block
    ],
)
def test_takes_two_passes_otherwise(emulation: emulator.Emulator, shape, count, dtype):
    x, w = channels_last(shape, dtype), weights(count, shape[1], dtype)
    with emulation.unwatched(), emulation.recorded() as launches:
        got = Emulated(emulation).pattern_pool(x, w, None, "sigmoid")
    assert len(launches) == 2
    assert_close(got, exact(x, w, None, "sigmoid"), dtype)


def test_can_be_disabled(emulation: emulator.Emulator, monkeypatch: pytest.MonkeyPatch):
    x, w = channels_last((1, 128, 4, 4), torch.bfloat16), weights(6, 128, torch.bfloat16)
    for value, kernels in (("0", 2), ("1", 1)):
        monkeypatch.setenv("FASTREID_VI_CLUSTERS", value)
        with emulation.recorded() as launches:
            Emulated(emulation).pattern_pool(x, w, None, "sigmoid")
        assert len(launches) == kernels


def why_no_clusters() -> str | None:
    """Why the cluster kernel would not run on the present device."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability()[0] < 9:
        return "clusters need compute capability 9.0"
    room = OPS["pattern_pool"].room("cuda")
    compiled = not isinstance(room, str) and isinstance(room, torch._ops.OpOverload)
    return None if compiled else "NVRTC's launchers have no clusters"


def kernels_of(call: Callable[[], object]) -> set[str]:
    """Which of the pattern kernels a call runs on the device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    found = (re.search(r"pattern_(\w+)_kernel", event.name) for event in seen.events())
    return {match[1] for match in found if match}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", [1024, 2048])
@pytest.mark.parametrize("size", [(24, 8), (24, 12), (18, 9)], ids=str)
def test_on_a_device(size, channels, activation, dtype, monkeypatch: pytest.MonkeyPatch):
    """Against float64 on the same rounded inputs, and against the kernels of two passes."""
    if reason := why_no_clusters():
        pytest.skip(reason)
    x = channels_last((37, channels, *size), dtype).cuda().relu_()
    w, bias = weights(6, channels, dtype).cuda(), seeded((6,), dtype).cuda()

    def run() -> ops.PatternPool:
        return ops.pattern_pool(x, w, bias, activation=activation)

    with fastreid_vi.backend("cuda"):
        got = run()
        assert kernels_of(run) == {"cluster"}
        for again in (run() for _ in range(20)):
            assert torch.equal(got.pooled, again.pooled)
            assert torch.equal(got.maps, again.maps)
        monkeypatch.setenv("FASTREID_VI_CLUSTERS", "0")
        plain = run()
        assert kernels_of(run) == {"scores", "sums"} | {"softmax"} & {activation}
    want = exact(x, w, bias, activation)
    assert_close(got, want, dtype)
    assert_close(plain, want, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "budget"), [(torch.bfloat16, 1e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_on_a_device(activation, dtype, budget):
    """Backward in two passes behind a forward by clusters."""
    if reason := why_no_clusters():
        pytest.skip(reason)
    x = channels_last((37, 2048, 24, 8), dtype).cuda().relu_().requires_grad_()
    w = weights(6, 2048, dtype).cuda().requires_grad_()
    bias = seeded((6,), dtype).cuda().requires_grad_()
    with fastreid_vi.backend("cuda"):
        pooled, maps = ops.pattern_pool(x, w, bias, activation=activation)
        cotangents = seeded(pooled.shape, dtype).cuda(), seeded(maps.shape, dtype).cuda()
        got = torch.autograd.grad((pooled, maps), (x, w, bias), cotangents)
    want = exact_gradients(*cotangents, x.detach(), w.detach(), maps.detach(), activation)
    for gradient, expected in zip(got, want, strict=True):
        error = (gradient.double() - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error <= budget
