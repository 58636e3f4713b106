"""MCJA's changes of the channels of visible images."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import ClassVar

import numpy as np
import pytest

from fastreid_vi.config import INFRARED, VISIBLE, DataConfig
from fastreid_vi.data import spectrum
from fastreid_vi.data.spectrum import KINDS, SpectrumDraws, draw_spectra
from fastreid_vi.data.transform import (
    augment,
    draw_augmentation,
    flip_pad_crop,
    mix_channels,
    normalize,
    place,
)
from tests.conftest import golden
from tests.data.test_transform import planar

ALL = ("hue", "gray", "cutmix", "jitter")
CONFIG = DataConfig(
    height=48, width=24, identities=2, images=4, sampler="norm_triplet", visible_spectra=ALL,
    spectrum_probability=0.5, erase=0.5,
)  # fmt: skip


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 48, 24), dtype=np.uint8)


def equal_planes(image: np.ndarray) -> np.ndarray:
    assert image.shape == (3, 48, 24)
    assert image.dtype == np.uint8
    assert (image == image[0]).all()
    return image[0]


class TestGolden:
    def test_hue(self):
        vectors = golden("mcja/augment")
        for image, shift, out in zip(
            planar(vectors["hue__img"]), vectors["hue__factor"], planar(vectors["hue__out"]),
            strict=True,
        ):  # fmt: skip
            np.testing.assert_array_equal(spectrum.shift_hue(image, float(shift)), out)

    def test_weighted_gray(self):
        vectors = golden("mcja/augment")
        images = planar(vectors["wg__img"])
        for image, raw, out in zip(images, vectors["wg__u"], vectors["wg__out"], strict=True):
            gray = spectrum.weighted_gray(image, raw / raw.sum())
            np.testing.assert_array_equal(equal_planes(gray), out)
        gray = spectrum.weighted_gray(images[0], vectors["wg_fixed__weights"])
        np.testing.assert_array_equal(equal_planes(gray), vectors["wg_fixed__out"])

    def test_cutmix(self):
        vectors = golden("mcja/augment")
        names = ("img", "box_ijhw", "bg_fg", "out")
        columns = [vectors[f"cc__{name}"] for name in names]
        for image, box, (outside, inside), out in zip(
            planar(columns[0]), *columns[1:], strict=True
        ):
            mixed = spectrum.cutmix_channels(image, box, int(outside), int(inside))
            np.testing.assert_array_equal(equal_planes(mixed), out)

    def test_sides_of_cutmix_boxes(self):
        vectors = golden("mcja/augment")
        area, log_aspect = vectors["cc__area_fraction"], vectors["cc__log_ratio"]
        sides = spectrum.box_sides(area, log_aspect, 48, 24)
        np.testing.assert_array_equal(np.stack(sides, axis=1), vectors["cc__box_ijhw"][:, 2:])

    def test_jitter(self):
        vectors = golden("mcja/augment")
        names = ("channel", "factor")
        columns = [vectors[f"sj__{name}"] for name in names]
        images, outs = planar(vectors["sj__img"]), planar(vectors["sj__out"])
        assert columns[1].dtype == np.float32
        for image, channel, factor, out in zip(images, *columns, outs, strict=True):
            moved = spectrum.jitter_spectrum(image, int(channel), factor)
            np.testing.assert_array_equal(moved, out)

    def test_views(self):
        vectors = golden("mcja/augment")
        image = np.ascontiguousarray(vectors["sel__img"].transpose(2, 0, 1))
        np.testing.assert_array_equal(spectrum.view(image, "original"), image)
        for name in ("r", "g", "b", "avg"):
            out = equal_planes(spectrum.view(image, name))
            np.testing.assert_array_equal(out, vectors[f"sel__{name}"])
        four, five = spectrum.views(image), spectrum.views(image, average=True)
        assert four.shape == (4, 3, 48, 24)
        np.testing.assert_array_equal(four, five[:4])
        for one, name in zip(five, ("original", "r", "g", "b", "avg"), strict=True):
            np.testing.assert_array_equal(one, spectrum.view(image, name))


class TestRounding:
    """Fractions are cut off as MCJA's code does, or rounded."""

    def test_gray(self):
        image, weights = picture(), np.array([0.2, 0.5, 0.3])
        exact = np.tensordot(weights, image.astype(np.float64), axes=1)
        cut = equal_planes(spectrum.weighted_gray(image, weights)).astype(int)
        near = equal_planes(spectrum.weighted_gray(image, weights, "nearest")).astype(int)
        assert (np.abs(near - exact) <= 0.5 + 1e-9).all()
        assert ((exact - cut > -1e-9) & (exact - cut < 1 + 1e-9)).all()
        assert set((near - cut).ravel().tolist()) == {0, 1}

    def test_white_stays_below_256(self):
        white = np.full((3, 48, 24), 255, dtype=np.uint8)
        raw = np.random.default_rng(0).random((500, 3))
        levels = {
            rounding: {
                int(spectrum.weighted_gray(white, w / w.sum(), rounding)[0, 0, 0]) for w in raw
            }
            for rounding in ("trunc", "nearest")
        }
        assert levels == {"trunc": {254, 255}, "nearest": {255}}

    def test_jitter(self):
        image = picture()
        exact = image[1] + 0.25 * (image.astype(np.float64) - image[1])
        cut = spectrum.jitter_spectrum(image, 1, np.float32(0.25))
        near = spectrum.jitter_spectrum(image, 1, np.float32(0.25), "nearest")
        np.testing.assert_array_equal(cut, np.floor(exact))
        np.testing.assert_array_equal(near, np.rint(exact))

    def test_average(self):
        image = picture()
        total = image.sum(axis=0, dtype=int)
        np.testing.assert_array_equal(spectrum.view(image, "avg")[0], total // 3)
        near = spectrum.view(image, "avg", "nearest")[0]
        np.testing.assert_array_equal(near, (2 * total + 3) // 6)


class TestOperations:
    def test_hue_round(self):
        image = picture()
        # No shift still passes through HSV; a whole turn of 256 steps is the same as none.
        np.testing.assert_array_equal(
            spectrum.shift_hue(image, 0.003), spectrum.shift_hue(image, 0.0)
        )
        assert (spectrum.shift_hue(image, 0.2) != spectrum.shift_hue(image, -0.2)).any()
        grey = np.broadcast_to(image[0], image.shape)
        np.testing.assert_array_equal(spectrum.shift_hue(grey, 0.17), grey)

    def test_cutmix_outside_the_image(self):
        image = picture()
        whole = equal_planes(spectrum.cutmix_channels(image, np.array([2, 24, 9, 7]), 2, 0))
        np.testing.assert_array_equal(whole, image[2])
        clipped = equal_planes(spectrum.cutmix_channels(image, np.array([40, 20, 30, 30]), 2, 0))
        expected = image[2].copy()
        expected[40:, 20:] = image[0, 40:, 20:]
        np.testing.assert_array_equal(clipped, expected)

    def test_the_image_given_is_left_alone(self):
        image = picture()
        image.setflags(write=False)  # as Pillow's arrays are: Q2
        draws = draw_spectra(40, CONFIG, seed=1, epoch=1, batch=1)
        for slot in range(40):
            spectrum.change(image, draws, slot)
        np.testing.assert_array_equal(image, picture())

    def test_unknown_view(self):
        with pytest.raises(
            ValueError, match="spectrum: expected one of original, r, g, b, avg, got 'ir'"
        ):
            spectrum.view(picture(), "ir")


class TestDraws:
    def draw(self, count=12000, *, seed=1, epoch=1, batch=0, **change) -> SpectrumDraws:
        config = dataclasses.replace(CONFIG, **change)
        draws = draw_spectra(count, config, seed=seed, epoch=epoch, batch=batch)
        assert draws is not None
        return draws

    def test_without_spectra_there_are_none(self):
        config = dataclasses.replace(CONFIG, visible_spectra=())
        assert draw_spectra(4, config, seed=1, epoch=1, batch=0) is None

    def test_a_slot_depends_on_its_coordinates_only(self):
        few, many = self.draw(5, batch=3), self.draw(50, batch=3)
        for a, b in zip(few, many, strict=True):
            np.testing.assert_array_equal(a, b[:5])
        slots = np.array([7, 2, 40])
        for a, b in zip(many.rows(slots), many, strict=True):
            np.testing.assert_array_equal(a, b[slots])

    def test_seed_epoch_and_batch_matter(self):
        draws = [
            self.draw(30, seed=s, epoch=e, batch=b) for s in (0, 1) for e in (1, 2) for b in (0, 1)
        ]
        assert len({tuple(d.hue) for d in draws}) == 8

    @pytest.mark.parametrize(
        ("listed", "probability", "shares"),
        [
            (ALL, 0.5, (0.5, 0.125, 0.125, 0.125, 0.125)),
            (("none", "gray", "cutmix", "jitter"), 1.0, (0.25, 0, 0.25, 0.25, 0.25)),
            (("gray",), 0.75, (0.25, 0, 0.75, 0, 0)),
            (ALL, 0.0, (1, 0, 0, 0, 0)),
        ],
    )
    def test_one_of_the_list_acts(self, listed, probability, shares):
        kind = self.draw(visible_spectra=listed, spectrum_probability=probability).kind
        found = np.bincount(kind, minlength=5) / len(kind)
        np.testing.assert_allclose(found, shares, atol=0.015)
        assert (found[np.array(shares) == 0] == 0).all()

    def test_ranges(self):
        draws = self.draw()
        assert -0.2 <= draws.hue.min() < -0.19
        assert 0.19 < draws.hue.max() <= 0.2
        np.testing.assert_allclose(draws.weights.sum(axis=1), 1, rtol=1e-15)
        assert draws.weights.min() >= 0
        np.testing.assert_allclose(draws.weights.mean(axis=0), 1 / 3, atol=0.01)
        pairs = np.bincount(draws.planes @ [3, 1], minlength=9) / len(draws.planes)
        np.testing.assert_allclose(pairs.reshape(3, 3), (1 - np.eye(3)) / 6, atol=0.015)
        np.testing.assert_allclose(np.bincount(draws.channel) / 12000, 1 / 3, atol=0.015)
        assert draws.factor.dtype == np.float32
        assert 0 <= draws.factor.min() < 0.01
        assert 0.99 < draws.factor.max() <= 1

    SIDES: ClassVar = {"official": (24, 48), "fixed": (48, 24)}

    @pytest.mark.parametrize("axes", ["official", "fixed"])
    def test_boxes(self, axes):
        draws = self.draw(cutmix_axes=axes)
        top, left, height, width = draws.boxes.T
        rows, columns = self.SIDES[axes]
        assert (height < rows).all()
        assert (width < columns).all()
        assert (top + height <= rows).all()
        assert (left + width <= columns).all()
        assert top.max() > 0.8 * rows
        assert left.max() > 0.8 * columns

    def test_the_published_shares_of_the_swapped_axes(self):
        # Spec mcja Q1, at 384 x 192: 26 % outside, 48 % clipped, 8.2 % of the area on average.
        boxes = self.draw(20000, height=384, width=192).boxes
        _, left, height, width = boxes.T
        inside = np.clip(192 - left, 0, width)
        assert abs((inside == 0).mean() - 0.26) < 0.01
        clipped = (inside > 0) & (inside < width)
        assert abs(clipped.mean() - 0.48) < 0.01
        assert abs((inside * height).mean() / (384 * 192) - 0.082) < 0.003
        boxes = self.draw(20000, height=384, width=192, cutmix_axes="fixed").boxes
        assert abs((boxes[:, 2] * boxes[:, 3]).mean() / (384 * 192) - 0.164) < 0.005

    def test_a_box_that_never_fits_leaves_the_image_alone(self):
        narrow = {"visible_spectra": ("cutmix",), "spectrum_probability": 1.0}
        draws = self.draw(500, height=64, width=2, **narrow)
        stuck = draws.kind == 0
        assert 0 < stuck.sum() < 500
        image = np.random.default_rng(0).integers(0, 256, (3, 64, 2), dtype=np.uint8)
        slot = int(np.flatnonzero(stuck)[0])
        np.testing.assert_array_equal(spectrum.change(image, draws, slot), image)

    def test_other_draws_stay(self):
        plain = dataclasses.replace(CONFIG, visible_spectra=(), channel_mix=0.5)
        both = dataclasses.replace(CONFIG, channel_mix=0.5)
        for a, b in zip(
            draw_augmentation(99, plain, seed=1, epoch=2, batch=3),
            draw_augmentation(99, both, seed=1, epoch=2, batch=3),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)

    def test_draws_of_before(self):
        """Batches of recipes without spectra keep their bits from release to release."""
        config = dataclasses.replace(CONFIG, visible_spectra=(), channel_mix=0.5)
        digest = hashlib.sha256()
        for column in draw_augmentation(64, config, seed=7, epoch=3, batch=11):
            digest.update(np.rint(np.asarray(column) * 1000.0).astype(np.int64).tobytes())
        assert (
            digest.hexdigest() == "f8bd1914961a1f227e2bfaf51d50d8ac33ff8f42d45dc0fd43f3b0c70d365bad"
        )


class TestPipeline:
    def test_visible_images_only_and_before_everything_else(self):
        config = dataclasses.replace(CONFIG, spectrum_probability=1.0, channel_mix=0.3)
        images = np.stack([picture(i) for i in range(24)])
        modality = np.tile([VISIBLE, INFRARED], 12)
        draws = draw_augmentation(24, config, seed=2, epoch=1, batch=5)
        spectra = draw_spectra(24, config, seed=2, epoch=1, batch=5)
        assert spectra is not None
        assert set(spectra.kind[::2].tolist()) == {1, 2, 3, 4}
        placed = place(images, draws, config, spectra=spectra, modality=modality)
        plain = place(images, draws, config)
        np.testing.assert_array_equal(placed[1::2], plain[1::2])
        assert (placed[::2] != plain[::2]).any(axis=(1, 2, 3)).sum() >= 6
        for i in range(0, 24, 2):
            shown = mix_channels(spectrum.change(images[i], spectra, i), draws.mix[i])
            out = np.empty_like(shown)
            flip_pad_crop(
                shown, out, flip=bool(draws.flip[i]), top=int(draws.top[i]),
                left=int(draws.left[i]), pad=10, value=127,
            )  # fmt: skip
            np.testing.assert_array_equal(placed[i], out)
        whole = augment(images, draws, config, spectra=spectra, modality=modality)
        for i, (top, left, height, width) in enumerate(draws.boxes.tolist()):
            expected = normalize(placed[i : i + 1])[0]
            expected[:, top : top + height, left : left + width] = 0
            np.testing.assert_array_equal(whole[i], expected)

    def test_modality_is_asked_for(self):
        draws = draw_augmentation(1, CONFIG, seed=2, epoch=1, batch=5)
        spectra = draw_spectra(1, CONFIG, seed=2, epoch=1, batch=5)
        with pytest.raises(ValueError, match="modality: expected one of every image"):
            place(picture()[None], draws, CONFIG, spectra=spectra)

    def test_the_rounding_of_the_recipe_is_used(self):
        config = dataclasses.replace(
            CONFIG, visible_spectra=("gray",), spectrum_probability=1.0, flip=0.0, pad=0
        )
        draws = draw_augmentation(1, config, seed=2, epoch=1, batch=5)
        spectra = draw_spectra(1, config, seed=2, epoch=1, batch=5)
        assert spectra is not None
        for rounding in ("trunc", "nearest"):
            config = dataclasses.replace(config, gray_rounding=rounding)
            out = place(picture()[None], draws, config, spectra=spectra, modality=np.array([0]))
            gray = spectrum.weighted_gray(picture(), spectra.weights[0], rounding)
            np.testing.assert_array_equal(out[0], gray)

    def test_every_kind_of_the_configuration_is_known(self):
        for name in KINDS:
            config = dataclasses.replace(CONFIG, visible_spectra=(name,))
            draws = draw_spectra(8, config, seed=1, epoch=1, batch=0)
            assert draws is not None
            assert set(draws.kind.tolist()) <= {0, KINDS.index(name)}


def test_symmetric_normalisation():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    out = normalize(levels, "symmetric")
    assert out.dtype == np.float32
    exact = (levels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    np.testing.assert_array_equal(out, exact)
    assert (out.min(), out.max()) == (-1, 1)
    draws = draw_augmentation(1, CONFIG, seed=1, epoch=1, batch=0)
    config = dataclasses.replace(CONFIG, normalize="symmetric", erase=0.0)
    image = picture()[None]
    np.testing.assert_array_equal(
        augment(image, draws._replace(boxes=np.zeros((1, 4), dtype=np.int64)), config),
        normalize(place(image, draws, config), "symmetric"),
    )
