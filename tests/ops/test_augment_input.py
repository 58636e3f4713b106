"""What augment refuses, by name, and what it may not read when it was not asked in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreid_vi
from fastreid_vi import augment as ops
from fastreid_vi.augment import level_table, plain_plan
from tests.ops.augment_cases import any_plan, pictures, run

IMAGES = pictures(3, 6, 5)


def boxes(*first: int) -> Tensor:
    return torch.tensor([list(first), [0, 0, 1, 1]])


def two(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, value]).to(dtype)


@pytest.mark.parametrize("room", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": two(3)}, r"plan.source: expected 0 to 2, got 3 in row 1"),
        ({"source": two(-1)}, r"plan.source: expected 0 to 2, got -1 in row 1"),
        ({"source": two(2**62)}, r"plan.source: expected 0 to 2, got 46"),
        ({"top": two(7)}, r"plan.top: expected -6 to 6, got 7 in row 1"),
        ({"top": two(-(2**62))}, r"plan.top: expected -6 to 6"),
        ({"left": two(-6)}, r"plan.left: expected -5 to 5, got -6 in row 1"),
        ({"kind": two(7)}, r"plan.kind: expected 0 to 6, got 7"),
        ({"kind": two(-1)}, r"plan.kind: expected 0 to 6, got -1"),
        ({"hue": two(256)}, r"plan.hue: expected 0 to 255, got 256"),
        ({"channel": two(3)}, r"plan.channel: expected 0 to 2, got 3"),
        ({"planes": torch.tensor([[0, 1], [0, 3]])}, r"plan.planes: expected 0 to 2, got \[0, 3\]"),
        ({"boxes": boxes(0, 0, -1, 2)}, r"plan.boxes: expected heights and widths >= 0, got \[0,"),
        ({"erase": boxes(0, 0, 1, -(2**60))}, r"plan.erase: expected heights and widths >= 0"),
        ({"weights": torch.tensor([[0.5, 0.5, 0.1]] * 2).double(), "kind": two(2)},
         r"plan.weights: expected three weights in 0 to 1 that sum to one"),
        ({"weights": torch.tensor([[1.5, -0.5, 0.0]] * 2).double(), "kind": two(2)},
         r"plan.weights: expected three weights"),
        ({"weights": torch.full((2, 3), float("nan")).double(), "kind": two(2)},
         r"plan.weights: expected three weights"),
        ({"factor": two(1.5, torch.float32)}, r"plan.factor: expected 0 to 1, got 1.5 in row 1"),
        ({"factor": torch.tensor([float("nan"), 0])}, r"plan.factor: expected 0 to 1, got nan"),
        ({"values": torch.tensor([[0, 0, float("inf")], [0, 0, 0]])},
         r"plan.values: expected finite numbers"),
        ({"levels": torch.full((3, 256), float("nan"))}, r"plan.levels: expected finite numbers"),
        ({"channel_mix": torch.full((2, 5), float("nan"))}, r"plan.channel_mix: expected finite"),
    ],
)  # fmt: skip
def test_values_are_refused_and_read_nothing_outside(
    room: str, change: dict[str, Tensor], message: str
) -> None:
    plan = plain_plan(torch.tensor([0, 2]))._replace(**change)
    with pytest.raises(ValueError, match=message):
        run(room, IMAGES, plan)


def test_weights_of_other_slots_do_not_matter() -> None:
    plan = plain_plan(torch.tensor([0, 2]))
    plan = plan._replace(weights=torch.full((2, 3), 9.0, dtype=torch.float64))
    assert ops.augment(IMAGES, plan).shape == (2, 3, 6, 5)


PLAN = any_plan(4, IMAGES)


@pytest.mark.parametrize(
    ("images", "change", "options", "error", "message"),
    [
        (IMAGES.numpy(), {}, {}, TypeError, r"images: expected uint8 \[N, H, W, 3\], got ndarray"),
        (IMAGES.float(), {}, {}, TypeError, r"images: expected uint8 .* got float32 \[3, 6, 5, 3"),
        (IMAGES.short(), {}, {}, TypeError, r"images: expected uint8 .* got int16"),
        (IMAGES[0], {}, {}, ValueError, r"images: expected uint8 \[N, H, W, 3\], got uint8 \[6, 5"),
        (IMAGES[..., :1], {}, {}, ValueError, r"images: expected .* got uint8 \[3, 6, 5, 1\]"),
        (IMAGES.permute(0, 3, 1, 2), {}, {}, ValueError, r"got uint8 \[3, 3, 6, 5\]"),
        (IMAGES[:, :0], {}, {}, ValueError, r"images: expected at least one pixel"),
        (IMAGES[:0], {}, {}, ValueError, r"images: expected images for the 4 slots .* got none"),
        (IMAGES, {"source": PLAN.source.int()}, {}, TypeError, r"plan.source: expected int64 \[4"),
        (IMAGES, {"source": PLAN.source[None]}, {}, ValueError, r"plan.source: expected int64 \[B"),
        (IMAGES, {"flip": PLAN.flip.long()}, {}, TypeError, r"plan.flip: expected bool \[4\]"),
        (IMAGES, {"flip": [True] * 4}, {}, TypeError, r"plan.flip: expected bool \[4\], got list"),
        (IMAGES, {"boxes": PLAN.boxes[:, :3]}, {}, ValueError,
         r"plan.boxes: expected int64 \[4, 4\], got int64 \[4, 3\]"),
        (IMAGES, {"weights": PLAN.weights.float()}, {}, TypeError, r"plan.weights: expected flo"),
        (IMAGES, {"top": PLAN.top[:3]}, {}, ValueError, r"plan.top: expected int64 \[4\]"),
        (IMAGES, {"kind": PLAN.kind.to("meta")}, {}, ValueError, r"plan.kind: expected device cpu"),
        (IMAGES, {"levels": PLAN.levels.t()}, {}, ValueError, r"plan.levels: expected float32 \[3"),
        (IMAGES, {"channel_mix": PLAN.values}, {}, ValueError, r"plan.channel_mix: .* \[4, 5\]"),
        (IMAGES, {}, {"dtype": torch.float64}, TypeError, r"dtype: expected one of float32"),
        (IMAGES, {}, {"dtype": torch.int8}, TypeError, r"got torch.int8"),
        (IMAGES, {}, {"memory_format": torch.preserve_format}, ValueError,
         r"memory_format: expected channels_last or contiguous_format"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    images: Any, change: dict[str, Any], options: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.augment(images, PLAN._replace(**change), **options)


def test_a_plan_is_a_plan() -> None:
    with pytest.raises(TypeError, match="plan: expected a Plan, got tuple"):
        ops.augment(IMAGES, tuple(PLAN))  # type: ignore[arg-type]


THREE = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.weighted_grayscale(IMAGES, torch.full((3, 3), 0.4)), ValueError,
         r"^weights: expected three weights in 0 to 1 that sum to one, got \[0.4"),
        (lambda: ops.weighted_grayscale(IMAGES, torch.ones(3, 2)), ValueError,
         r"weights: expected float32 \[3, 3\], got float32 \[3, 2\]"),
        (lambda: ops.weighted_grayscale(IMAGES, torch.ones(3, 3).long()), TypeError,
         r"weights: expected float32 \[3, 3\], got int64"),
        (lambda: ops.weighted_grayscale(IMAGES, torch.full((3, 3), 1 / 3), rounding="up"),
         ValueError, r"rounding: expected 'trunc' or 'nearest', got 'up'"),
        (lambda: ops.channel_cutmix(IMAGES, THREE.repeat(4, 1).t() - 1, THREE.repeat(2, 1).t()),
         ValueError, r"boxes: expected heights and widths >= 0, got \[-1, -1, -1, -1\]"),
        (lambda: ops.channel_cutmix(IMAGES, THREE.repeat(4, 1).t(), THREE.repeat(2, 1).t() + 3),
         ValueError, r"^channels: expected 0 to 2, got \[3, 3\]"),
        (lambda: ops.channel_cutmix(IMAGES, torch.zeros(3, 4), THREE.repeat(2, 1).t()),
         TypeError, r"boxes: expected int64 \[3, 4\], got float32"),
        (lambda: ops.spectrum_jitter(IMAGES, THREE, torch.tensor([0.0, 0.5, 1.1])), ValueError,
         r"^factor: expected 0 to 1, got 1.1"),
        (lambda: ops.spectrum_jitter(IMAGES, THREE[:2], torch.zeros(3)), ValueError,
         r"channel: expected int64 \[3\], got int64 \[2\]"),
        (lambda: ops.hue_jitter(IMAGES, torch.full((3,), float("nan"))), ValueError,
         r"shift: expected finite numbers, got nan"),
        (lambda: ops.hue_jitter(IMAGES, THREE), TypeError, r"shift: expected float32 \[3\]"),
        (lambda: ops.horizontal_flip(IMAGES, THREE), TypeError, r"flip: expected bool \[3\]"),
        (lambda: ops.channel_selection(IMAGES, "red"), ValueError, r"view: expected one of"),
        (lambda: ops.pad_crop(IMAGES, THREE + 5, THREE, pad=2), ValueError,
         r"^top: expected 0 to 4, got 5 in row 0"),
        (lambda: ops.pad_crop(IMAGES, THREE, THREE - 1, pad=2), ValueError,
         r"left: expected 0 to 4, got -1 in row 0"),
        (lambda: ops.pad_crop(IMAGES, THREE, THREE, pad=-1), ValueError, r"pad: expected >= 0"),
        (lambda: ops.pad_crop(IMAGES, THREE, THREE, value=256), ValueError,
         r"value: expected 0 to 255, got 256"),
        (lambda: ops.normalize(IMAGES, std=(1.0, 0.0, 1.0)), ValueError, r"std: expected > 0"),
        (lambda: ops.normalize(IMAGES, mean=(1.0, 0.0)), ValueError, r"mean: expected three numb"),
        (lambda: ops.normalize(IMAGES.float()), TypeError, r"images: expected uint8"),
        (lambda: ops.random_erase(IMAGES, THREE, THREE), TypeError, r"images: expected a floating"),
        (lambda: ops.random_erase(torch.ones(3, 1, 2, 2), THREE, THREE), ValueError,
         r"images: expected shape \[B, 3, H, W\], got float32 \[3, 1, 2, 2\]"),
        (lambda: ops.random_erase(torch.ones(3, 3, 2, 2), THREE.repeat(4, 1).t(), torch.ones(2)),
         ValueError, r"values: expected float32 \[3\]"),
        (lambda: ops.random_erase(torch.ones(3, 3, 2, 2), THREE.repeat(4, 1).t() - 1,
                                  torch.ones(3)), ValueError, r"boxes: expected heights"),
        (lambda: ops.random_erase(torch.ones(3, 3, 2, 2), THREE.repeat(4, 1).t(),
                                  torch.full((3,), float("nan"))), ValueError, r"values: expec"),
    ],
)  # fmt: skip
def test_steps_name_their_arguments(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_levels_are_those_of_the_loaders() -> None:
    for rounded in (level_table(), level_table((0.5,) * 3, (0.5,) * 3)):
        assert rounded.shape == (3, 256)
        assert (rounded.diff(dim=1) > 0).all()


def test_nothing_is_differentiated() -> None:
    weights = torch.full((3, 3), 1 / 3, dtype=torch.float64, requires_grad=True)
    assert not ops.weighted_grayscale(IMAGES, weights).requires_grad
    images = torch.ones(3, 3, 4, 4, requires_grad=True)
    erased = ops.random_erase(images, THREE.repeat(4, 1).t(), torch.zeros(3))
    with pytest.raises(RuntimeError, match="augment is not differentiable"):
        erased.sum().backward()


def test_a_room_that_was_asked_for_is_used_or_named() -> None:
    with (
        fastreid_vi.backend("cuda"),  # never had this op: its own order holds
    ):
        assert ops.augment(IMAGES, PLAN).shape == (4, 3, 6, 5)
