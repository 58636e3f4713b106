"""Augment's Triton room: every hue, what a launch cannot hold, and what only a GPU can show."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import fastreid_vi
from fastreid_vi import augment as ops
from fastreid_vi._dispatch import OPS
from fastreid_vi.augment import KINDS, plain_plan
from tests.contract import device_of, watched
from tests.ops.augment_cases import any_plan, pictures, run

pytest.importorskip("triton", reason="no triton")


def every_ratio() -> torch.Tensor:
    """Six orders of the channels x every distance of the smallest and the middle from the largest.

    That is all that a hue and a saturation of 255 depend on; values below 255 are taken at random.
    """
    middle, spread = np.meshgrid(np.arange(256), np.arange(256))
    middle, spread = middle[middle <= spread], spread[middle <= spread]
    images = []
    for value in (np.full_like(spread, 255), np.random.default_rng(0).integers(spread, 256)):
        channels = (value, value - middle, value - spread)
        images += [np.stack(order, axis=1) for order in itertools.permutations(channels)]
    return torch.from_numpy(np.stack(images).astype(np.uint8).reshape(1, -1, 257, 3))


def test_integers_turn_every_hue_as_float64_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid_vi.kernels import augment

    if device_of("triton") == "cpu":  # few large tiles for the interpreter
        for name in ("ELEMENTS", "PART"):
            monkeypatch.setattr(augment, name, 1 << 17)
    images = every_ratio()
    plan = plain_plan(torch.zeros(3, dtype=torch.int64))
    plan = plan._replace(kind=torch.full_like(plan.kind, 1), hue=torch.tensor([0, 37, 211]))
    got = run("triton", images, plan, dtype=torch.uint8)
    assert torch.equal(got, run("reference", images, plan, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("sizes", "slots", "message"),
    [
        ((1, 1 << 15, 1 << 15, 3), 1, "images of 32768 x 32768 pixels are too large"),
        ((1, 384, 192, 3), 400_000, "400000 slots of 384 x 192 pixels are too many"),
    ],
)
def test_what_one_launch_cannot_hold_is_refused(
    sizes: tuple[int, ...], slots: int, message: str
) -> None:
    """And left to the next room."""
    images = torch.zeros(1, dtype=torch.uint8).expand(sizes)
    plan = plain_plan(torch.zeros(slots, dtype=torch.int64))
    with fastreid_vi.backend("triton"), pytest.raises(RuntimeError, match=message):
        ops.augment(images, plan)
    assert OPS["augment"].why_not("cpu", images, *plan, torch.uint8, True) is None


@pytest.mark.gpu
class TestOnDevice:
    """No value is looked at: the call can be captured, and bad plans read nothing outside."""

    @pytest.mark.parametrize("mix", [False, True])
    def test_captured_by_a_cuda_graph(self, mix: bool) -> None:
        images = pictures(6, 24, 16)
        plan = any_plan(14, images, 1, mix=mix)
        there = images.cuda(), plan.to("cuda")
        with watched("augment", "triton") as ran:
            expected = ops.augment(*there, dtype=torch.bfloat16)
        assert ran == ["triton"]
        assert torch.equal(expected.cpu(), run("reference", images, plan, dtype=torch.bfloat16))
        out = torch.empty_like(expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static = ops.augment(*there, dtype=torch.bfloat16)
            ops.augment(*there, dtype=torch.bfloat16, out=out)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(static, expected)
        assert torch.equal(out, expected)

    def test_nothing_outside_is_read(self) -> None:
        images = pictures(3, 9, 8).cuda()
        far = torch.tensor([-(2**62), 2**62, -1, 3, 77], device="cuda")
        plan = plain_plan(far)._replace(
            top=far, left=far, kind=far, hue=far, channel=far, planes=far[:, None].repeat(1, 2),
            boxes=far[:, None].repeat(1, 4), erase=far[:, None].repeat(1, 4),
            weights=torch.full((5, 3), float("nan"), dtype=torch.float64, device="cuda"),
            factor=torch.full((5,), 1e30, device="cuda"),
        )  # fmt: skip
        for kind in range(-1, len(KINDS) + 1):
            given = plan._replace(kind=torch.full_like(far, kind))
            ops.augment(images, given, dtype=torch.float16)
        torch.cuda.synchronize()
