"""Augment: golden vectors in every room, one truth for all rooms, the folder path's bits."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastreid_vi
from fastreid_vi import augment as ops
from fastreid_vi._dispatch import OPS
from fastreid_vi.augment import (
    KINDS,
    VIEWS,
    Plan,
    batch_plan,
    plain_plan,
    random_erase,
    view_plan,
)
from fastreid_vi.augment.draws import draw_augmentation, draw_spectra
from fastreid_vi.config import DataConfig
from fastreid_vi.data import spectrum, transform
from tests.conftest import golden
from tests.contract import arranged, device_of, watched
from tests.ops.augment_cases import any_plan, pictures, run

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.channels_last, torch.contiguous_format)
CONFIG = DataConfig(
    height=24, width=12, identities=2, images=4, sampler="norm_triplet",
    visible_spectra=("hue", "gray", "cutmix", "jitter"), spectrum_probability=0.9, erase=0.5, pad=4,
)  # fmt: skip


def tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def same(got: Tensor, want: Any) -> None:
    np.testing.assert_array_equal(got.cpu().numpy(), want)


class InEveryRoom:
    """`room` runs through the rooms of the op."""

    op: str = "augment"
    cases: tuple[Any, ...] = ()
    dtypes: tuple[Any, ...] = FLOATS

    @pytest.fixture
    def arrays(self, room: str) -> dict[str, Any]:
        """Golden arrays where the room takes them."""
        device = device_of(room)
        return {k: tensor(v).to(device) for k, v in golden("mcja/augment").items()}


class TestGolden(InEveryRoom):
    """Explicit functions and the fused op give the stored bytes."""

    def test_weighted_grayscale(self, room: str, arrays: dict[str, Tensor]) -> None:
        raw, images = arrays["wg__u"], arrays["wg__img"]
        weights = tensor([row / row.sum() for row in raw.cpu().numpy()]).to(raw.device)
        with fastreid_vi.backend(room), watched("augment", room) as ran:
            out = ops.weighted_grayscale(images, weights)
            fixed = ops.weighted_grayscale(images[:1], arrays["wg_fixed__weights"][None])
        assert ran == [room, room]
        want = np.repeat(golden("mcja/augment")["wg__out"][..., None], 3, axis=3)
        same(out, want)
        same(fixed[0, :, :, 1], golden("mcja/augment")["wg_fixed__out"])
        assert out.is_contiguous()

    def test_channel_cutmix(self, room: str, arrays: dict[str, Tensor]) -> None:
        with fastreid_vi.backend(room):
            out = ops.channel_cutmix(arrays["cc__img"], arrays["cc__box_ijhw"], arrays["cc__bg_fg"])
        for c in range(3):
            same(out[..., c], golden("mcja/augment")["cc__out"])

    def test_spectrum_jitter(self, room: str, arrays: dict[str, Tensor]) -> None:
        with fastreid_vi.backend(room):
            out = ops.spectrum_jitter(
                arrays["sj__img"], arrays["sj__channel"], arrays["sj__factor"]
            )
        same(out, golden("mcja/augment")["sj__out"])

    def test_hue(self, room: str, arrays: dict[str, Tensor]) -> None:
        with fastreid_vi.backend(room):
            out = ops.hue_jitter(arrays["hue__img"], arrays["hue__factor"])
        same(out, golden("mcja/augment")["hue__out"])

    def test_channel_selection(self, room: str, arrays: dict[str, Tensor]) -> None:
        image = arrays["sel__img"][None]
        with fastreid_vi.backend(room):
            same(ops.channel_selection(image, "original"), image.cpu().numpy())
            for name in VIEWS[1:]:
                want = np.repeat(golden("mcja/augment")[f"sel__{name}"][..., None], 3, axis=2)
                same(ops.channel_selection(image, name)[0], want)  # type: ignore[arg-type]

    def test_tail(self, room: str, arrays: dict[str, Tensor]) -> None:
        """Flip, pad, crop, normalise, erase: to the bit, step by step and in one pass."""
        images, params = arrays["tail__img"], arrays["tail__params"].long()
        flip, top, left, erased, *box = params.T
        boxes = torch.stack(box, dim=1) * erased[:, None]
        with fastreid_vi.backend(room):
            steps = ops.pad_crop(ops.horizontal_flip(images, flip > 0), top, left)
            zeros = torch.zeros(3, device=images.device)
            steps = random_erase(ops.normalize(steps), boxes, zeros)
            plan = plain_plan(torch.arange(4, device=images.device))
            plan = plan._replace(flip=flip > 0, top=top - 10, left=left - 10, erase=boxes)
            fused = ops.augment(images, plan)
        same(steps, golden("mcja/augment")["tail__out"])
        same(fused, golden("mcja/augment")["tail__out"])

    def test_all_changes_in_one_plan(self, room: str, arrays: dict[str, Tensor]) -> None:
        v = golden("mcja/augment")
        names = ("wg", "cc", "sj", "hue")
        images = torch.cat([arrays[f"{name}__img"] for name in names])
        starts = np.cumsum([0, *(len(v[f"{name}__img"]) for name in names)])
        parts = [slice(a, b) for a, b in itertools.pairwise(starts)]
        plan = plain_plan(torch.arange(len(images)))
        for part, kind in zip(parts, ("gray", "cutmix", "jitter", "hue"), strict=True):
            plan.kind[part] = KINDS.index(kind)
        plan.weights[parts[0]] = tensor([row / row.sum() for row in v["wg__u"]])
        plan.boxes[parts[1]] = tensor(v["cc__box_ijhw"]).long()
        plan.planes[parts[1]] = tensor(v["cc__bg_fg"]).long()
        plan.channel[parts[2]] = tensor(v["sj__channel"]).long()
        plan.factor[parts[2]] = tensor(v["sj__factor"])
        plan.hue[parts[3]] = tensor(np.trunc(255 * v["hue__factor"]).astype(np.int64) % 256)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        out = run(room, images.cpu(), plan.rows(order), dtype=torch.uint8)
        shown = torch.empty_like(out)
        shown[order] = out
        for part, name in zip(parts, names, strict=True):
            want = v[f"{name}__out"]
            want = np.moveaxis(want, 3, 1) if want.ndim == 4 else want[:, None].repeat(3, axis=1)
            same(shown[part], want)


class TestOneTruth(InEveryRoom):
    """Every room gives the bytes of the reference before normalisation, its bits after."""

    SIZES = ((5, 7), (1, 1), (9, 16), (33, 67), (2, 130))

    def test_bytes_and_bits(self, room: str, dtype: torch.dtype) -> None:
        slow = room == "triton" and device_of(room) == "cpu"  # its interpreter
        for number, (height, width) in enumerate(self.SIZES[: 3 if slow else None]):
            images = pictures(6, height, width, number)
            plan = any_plan(8 if slow else 21, images, number, mix=True)
            for layout in LAYOUTS:
                for kind in (torch.uint8, dtype):
                    with watched("augment", room) as ran:
                        got = run(room, images, plan, dtype=kind, memory_format=layout)
                    assert ran == [room]
                    want = run("reference", images, plan, dtype=kind, memory_format=layout)
                    assert got.dtype == kind
                    assert got.is_contiguous(memory_format=layout)
                    assert torch.equal(got, want), (height, width, layout, kind)

    @pytest.mark.parametrize(
        "box", [(-15, -12, 20, 14), (-(2**40), 0, 2**40 + 3, 4), (5, 5, 2**62, 2**62), (3, 9, 4, 0)]
    )
    def test_boxes_may_begin_and_end_anywhere(self, room: str, box: tuple[int, ...]) -> None:
        images = pictures(1, 10, 8)
        plan = plain_plan(torch.zeros(2, dtype=torch.int64))._replace(
            kind=torch.tensor([0, KINDS.index("cutmix")]), values=torch.full((2, 3), 9.0),
            erase=torch.tensor([box, (0, 0, 0, 0)]), boxes=torch.tensor([box, box]),
        )  # fmt: skip
        top, left, height, width = box
        rows, columns = range(10), range(8)
        held = torch.tensor(
            [[top <= y < top + height and left <= x < left + width for x in columns] for y in rows]
        )
        erased, mixed = run(room, images, plan)
        assert torch.equal(erased[0] == 9.0, held)
        shown = run(room, images, plan, dtype=torch.uint8)[1, 2]
        assert torch.equal(shown, torch.where(held, images[0, ..., 1], images[0, ..., 0]))
        assert mixed.isfinite().all()

    @pytest.mark.parametrize("how", ["sliced", "planar", "reversed", "expanded"])
    def test_images_of_any_strides(self, room: str, how: str) -> None:
        images = pictures(4, 6, 9)
        if how == "expanded":
            images = images[:1].expand(4, -1, -1, -1)
        plan = any_plan(14, images, 3)
        strided = images
        if how == "planar":
            strided = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        elif how == "reversed":
            strided = images.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
        elif how == "sliced":
            strided = torch.zeros(9, 8, 12, 5, dtype=torch.uint8)[::2, 1:7, 2:11, 1:4]
            strided = strided[:4].copy_(images)
        assert how == "expanded" or not strided.is_contiguous()
        got = run(room, strided, plan, dtype=torch.uint8)
        assert torch.equal(got, run("reference", images.contiguous(), plan, dtype=torch.uint8))

    @pytest.mark.parametrize("change", [{}, {"gray_rounding": "nearest", "cutmix_axes": "fixed"},
        {"normalize": "symmetric", "pad": 0, "flip": 1.0}, {"pad": 30, "pad_value": 3},
        {"visible_spectra": ("gray", "none", "hue"), "erase": 1.0}])  # fmt: skip
    def test_the_bits_of_the_folder_path(self, room: str, change: dict[str, Any]) -> None:
        config = dataclasses.replace(CONFIG, channel_mix=0.3, **change)
        images = pictures(30, 24, 12, 8)
        modality = np.arange(20) % 2
        source = np.random.default_rng(4).permutation(30)[:20]
        at = {"seed": 5, "epoch": 3, "batch": 7}
        planar = images[source].permute(0, 3, 1, 2).contiguous().numpy()
        draws, spectra = draw_augmentation(20, config, **at), draw_spectra(20, config, **at)
        given = {"spectra": spectra, "modality": modality}
        plan = batch_plan(source, modality, config, rows=20, **at)
        assert set(plan.kind[1::2].tolist()) == {0}
        same(run(room, images, plan, dtype=torch.uint8),
             transform.place(planar, draws, config, **given))  # fmt: skip
        same(run(room, images, plan), transform.augment(planar, draws, config, **given))

    def test_every_colour_is_turned_as_pillow_turns_it(self, room: str) -> None:
        """All triples of 18 values that meet every case; the shifts of the recipe."""
        values = np.array([0, 1, 2, 3, 31, 63, 64, 85, 86, 127, 128, 170, 171, 200, 253, 254, 255])
        cube = np.stack(np.meshgrid(values, values, values), axis=-1).astype(np.uint8)
        image = cube.reshape(1, 17, 289, 3)
        shifts = np.linspace(-0.2, 0.2, 3 if room == "triton" else 23)
        plan = plain_plan(torch.zeros(len(shifts), dtype=torch.int64))
        steps = np.trunc(255 * shifts).astype(np.int64) % 256
        plan = plan._replace(kind=torch.full_like(plan.kind, 1), hue=tensor(steps))
        got = run(room, tensor(image), plan, dtype=torch.uint8)
        for shift, out in zip(shifts, got, strict=True):
            same(out, spectrum.shift_hue(np.ascontiguousarray(image[0].transpose(2, 0, 1)), shift))

    @pytest.mark.parametrize("dtype_of_levels", FLOATS)
    def test_an_empty_batch(self, room: str, dtype_of_levels: torch.dtype) -> None:
        for images in (pictures(3, 4, 5), pictures(0, 4, 5)):
            plan = any_plan(0, pictures(1, 4, 5))
            out = run(room, images, plan, dtype=dtype_of_levels)
            assert out.shape == (0, 3, 4, 5)
            assert out.dtype == dtype_of_levels

    def test_threads_and_runs_give_the_same_bits(self, room: str) -> None:
        images = pictures(8, 70, 40)
        plan = any_plan(28, images, 1, mix=True)
        if room == "triton" and device_of(room) == "cpu":
            images, plan = images[:, :9, :11], plan.rows(torch.arange(7))
            plan = plan._replace(top=plan.top.clamp(-9, 9), left=plan.left.clamp(-11, 11))
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 1):
                torch.set_num_threads(threads)
                results.append(run(room, images, plan, dtype=torch.bfloat16))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(results[0], other) for other in results[1:])


class TestRegistered(InEveryRoom):
    def test_opcheck(self) -> None:
        images = pictures(3, 5, 4)
        for mix, dtype in ((False, torch.bfloat16), (True, torch.uint8)):
            arguments = (images, *any_plan(7, images, 2, mix=mix), dtype, dtype == torch.uint8)
            torch.library.opcheck(torch.ops.fastreid_vi.augment.default, arguments)

    def test_compiles_without_graph_breaks(self, room: str) -> None:
        device = device_of(room)
        images = pictures(3, 5, 4).to(device)
        plan = any_plan(7, images.cpu(), 2).to(device)
        torch._dynamo.reset()

        def chain(x: Tensor, plan: Plan, weights: Tensor) -> tuple[Tensor, Tensor]:
            gray = ops.normalize(ops.weighted_grayscale(x, weights), dtype=torch.float16)
            return ops.augment(x, plan, dtype=torch.bfloat16), gray

        weights = torch.full((3, 3), 1 / 3, device=device)
        with fastreid_vi.backend(room):
            want = chain(images, plan, weights)
            got = torch.compile(chain, fullgraph=True)(images, plan, weights)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert [g.stride() for g in got] == [w.stride() for w in want]

    def test_nothing_is_changed_in_place(self, room: str) -> None:
        images = pictures(3, 5, 4)
        plan = any_plan(14, images, 2)
        before = [images.clone(), *(c.clone() for c in plan if c is not None)]
        run(room, images, plan)
        after = [images, *(c for c in plan if c is not None)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_the_family_is_listed(self) -> None:
        table = fastreid_vi.backends()
        assert {"augment", "random_erase"} <= set(table)
        assert table["augment"]["reference"] == "built"
        assert OPS["augment"].family == "augment"


class TestErase:
    op, cases = "random_erase", ()
    dtypes = (*FLOATS, torch.float64)

    def test_sets_the_box_and_nothing_else(self, room: str, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(0)
        boxes = torch.tensor([[1, 2, 3, 2], [-2, 1, 4, 99], [0, 0, 0, 5], [5, 3, 1, 1]])
        values = torch.randn(4, 3, generator=random)
        plain = torch.randn(4, 3, 6, 5, generator=random).to(dtype)
        want = plain.clone()
        want[0, :, 1:4, 2:4] = values[0].to(dtype)[:, None, None]
        want[1, :, :2, 1:] = values[1].to(dtype)[:, None, None]
        want[3, :, 5:6, 3:4] = values[3].to(dtype)[:, None, None]
        device = device_of(room)
        for layout in ("contiguous", "channels_last", "sliced"):
            images = arranged(plain, layout).to(device)
            with fastreid_vi.backend(room), watched("random_erase", room) as ran:
                out = random_erase(images, boxes.to(device), values.to(device))
            assert ran == [room]
            assert torch.equal(out.cpu(), want)
            assert torch.equal(images.cpu(), plain)
            last = layout == "channels_last"
            assert out.is_contiguous(memory_format=LAYOUTS[0] if last else LAYOUTS[1])

    def test_opcheck_and_one_value_for_all(self) -> None:
        images, boxes = torch.rand(2, 3, 4, 4), torch.tensor([[0, 0, 2, 2]] * 2, dtype=torch.int32)
        out = random_erase(images, boxes, torch.tensor([1.0, 2.0, 3.0]))
        assert out[1, :, 1, 1].tolist() == [1.0, 2.0, 3.0]
        arguments = (images, boxes.long(), torch.zeros(2, 3))
        torch.library.opcheck(torch.ops.fastreid_vi.random_erase.default, arguments)
        assert random_erase(images[:0], boxes[:0], torch.zeros(3)).shape == (0, 3, 4, 4)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), top=st.integers(-9, 9),
    left=st.integers(-9, 9), flip=st.booleans(),
)  # fmt: skip
def test_flip_and_crop_are_a_slice_of_the_padded_image(
    height: int, width: int, top: int, left: int, flip: bool
) -> None:
    top, left = max(min(top, height), -height), max(min(left, width), -width)
    images = pictures(1, height, width)
    plan = plain_plan(torch.zeros(1, dtype=torch.int64), border=9)
    plan = plan._replace(
        flip=torch.tensor([flip]), top=torch.tensor([top]), left=torch.tensor([left])
    )
    shown = images[0].flip(1) if flip else images[0]
    padded = torch.nn.functional.pad(shown, (0, 0, 9, 9, 9, 9), value=9)
    want = padded[9 + top :, 9 + left :][:height, :width].permute(2, 0, 1)
    for room in ("reference", "cpu"):
        assert torch.equal(run(room, images, plan, dtype=torch.uint8)[0], want)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("flip", [False, True])
def test_views_of_a_test_are_those_of_the_loader(view: Any, flip: bool) -> None:
    images = pictures(6, 7, 5)
    visible = torch.tensor([True, False, True, True, False, True])
    source = torch.tensor([5, 4, 3, 2, 1, 0])
    plan = view_plan(source, view, flip=flip, visible=visible[source])
    got = ops.augment(images, plan).numpy()
    for out, row in zip(got, source.tolist(), strict=True):
        planar = images[row].permute(2, 0, 1).contiguous().numpy()
        shown = spectrum.view(planar, view if visible[row] else "original")
        want = transform.normalize(np.ascontiguousarray(shown)[None])[0]
        np.testing.assert_array_equal(out, want[:, :, ::-1] if flip else want)
