from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from fastreid_vi.config import DataConfig
from fastreid_vi.data import DataError
from fastreid_vi.data.transform import (
    Draws,
    augment,
    draw_augmentation,
    erase,
    flip_pad_crop,
    mix_channels,
    normalize,
    place,
    read_image,
    verify_image,
)
from tests.conftest import golden
from tests.data.conftest import jpeg

CONFIG = DataConfig(
    height=48, width=24, identities=2, images=4, sampler="identity_random", erase=0.5
)


def planar(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def test_golden_tail():
    vectors = golden("mcja/augment")
    flip, top, left, erased, *box = vectors["tail__params"].astype(np.int64).T
    mix = np.zeros((len(flip), 5), dtype=np.float32)
    draws = Draws(flip > 0, top, left, np.stack(box, axis=1) * erased[:, None], mix)
    out = augment(planar(vectors["tail__img"]), draws, CONFIG)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, vectors["tail__out"], rtol=0, atol=1e-6)


def test_normalize_is_the_division_sequence_in_float32():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    out = normalize(levels)
    exact = (levels / 255 - np.reshape([0.485, 0.456, 0.406], (3, 1, 1))) / np.reshape(
        [0.229, 0.224, 0.225], (3, 1, 1)
    )
    np.testing.assert_allclose(out, exact, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 7, 40])
def test_flip_pad_crop_against_the_padded_image(flip, pad):
    random = np.random.default_rng(pad)
    image = random.integers(0, 256, (3, 9, 5), dtype=np.uint8)
    padded = np.pad(
        image[:, :, ::-1] if flip else image,
        ((0, 0), (pad, pad), (pad, pad)),
        constant_values=200,
    )
    for top in {0, pad // 2, pad, 2 * pad}:
        for left in {0, pad, min(pad + 3, 2 * pad), 2 * pad}:
            out = np.full_like(image, 7)
            flip_pad_crop(image, out, flip=flip, top=top, left=left, pad=pad, value=200)
            np.testing.assert_array_equal(out, padded[:, top : top + 9, left : left + 5])


def test_erase_touches_the_box_only():
    images = np.ones((2, 3, 6, 4), dtype=np.float32)
    erase(images, np.array([[1, 2, 3, 2], [0, 0, 0, 0]]))
    assert images[1].all()
    assert not images[0, :, 1:4, 2:4].any()
    assert images[0].sum() == 3 * (24 - 6)


class TestDraws:
    def draw(self, count=4000, *, seed=1, epoch=1, batch=0, **change):
        config = dataclasses.replace(CONFIG, **change)
        return draw_augmentation(count, config, seed=seed, epoch=epoch, batch=batch)

    def test_a_slot_depends_on_its_coordinates_only(self):
        few, many = self.draw(5, batch=3), self.draw(50, batch=3)
        for a, b in zip(few, many, strict=True):
            np.testing.assert_array_equal(a, b[:5])

    def test_seed_epoch_and_batch_matter(self):
        draws = [
            self.draw(30, seed=s, epoch=e, batch=b) for s in (0, 1) for e in (1, 2) for b in (0, 1)
        ]
        assert len({tuple(d.top) + tuple(d.left) for d in draws}) == 8
        assert len(set(zip(draws[0].top.tolist(), draws[0].left.tolist(), strict=True))) > 20

    def test_flip_and_crop_are_uniform(self):
        draws = self.draw(flip=0.25)
        assert abs(draws.flip.mean() - 0.25) < 0.04
        for offsets in (draws.top, draws.left):
            counts = np.bincount(offsets, minlength=21)
            assert len(counts) == 21
            assert counts.min() > 4000 / 21 * 0.7

    def test_boxes(self):
        low, high = 0.02, 0.33
        boxes = self.draw(erase_area=(low, high), erase_aspect=(0.3, 3.3)).boxes
        drawn = boxes[boxes[:, 2] > 0]
        assert abs(len(drawn) / len(boxes) - 0.5) < 0.05
        top, left, height, width = drawn.T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + height <= 48).all()
        assert (left + width <= 24).all()
        # Rounding a side to pixels moves the area by at most about half a row and column.
        area = height * width / (48 * 24)
        slack = (height + width) / (48 * 24)
        assert (area >= low - slack).all()
        assert (area <= high + slack).all()
        assert area.max() > 0.28
        assert area.min() < 0.04
        ratio = height / width
        assert (height - 0.5 <= 3.3 * (width + 0.5)).all()
        assert (width - 0.5 <= (height + 0.5) / 0.3).all()
        assert 0.8 < np.exp(np.log(ratio).mean()) < 1.4

    def test_probability_zero_and_one(self):
        assert not self.draw(erase=0.0, flip=0.0).boxes.any()
        assert not self.draw(flip=0.0).flip.any()
        always = self.draw(erase=1.0, flip=1.0)
        assert always.flip.all()
        assert (always.boxes[:, 2] > 0).all()

    def test_a_box_that_never_fits_erases_nothing(self):
        draws = self.draw(erase=1.0, erase_area=(0.9, 1.0), erase_aspect=(3.0, 3.3))
        assert not draws.boxes.any()

    def test_without_padding_there_is_no_crop(self):
        draws = self.draw(pad=0)
        assert not draws.top.any()
        assert not draws.left.any()
        images = np.random.default_rng(0).integers(0, 256, (4, 3, 48, 24), dtype=np.uint8)
        config = dataclasses.replace(CONFIG, pad=0, flip=0.0)
        draws = draw_augmentation(4, config, seed=1, epoch=1, batch=1)
        np.testing.assert_array_equal(place(images, draws, config), images)


class TestReading:
    def test_same_size_is_not_resampled(self, tmp_path):
        path = tmp_path / "a.jpg"
        path.write_bytes(jpeg(1))
        expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(read_image(path, 48, 24), expected)

    @pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
    @pytest.mark.parametrize("grey", [False, True])
    def test_resize_is_pillows_on_rgb(self, tmp_path, name, grey):
        path = tmp_path / "a.jpg"
        path.write_bytes(jpeg(1, height=61, width=37, grey=grey))
        image = Image.open(path)
        assert image.mode == ("L" if grey else "RGB")
        resized = image.convert("RGB").resize((24, 48), Image.Resampling[name.upper()])
        out = read_image(path, 48, 24, name)
        assert out.shape == (3, 48, 24)
        np.testing.assert_array_equal(out, np.asarray(resized).transpose(2, 0, 1))

    @pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK", "I;16"])
    def test_every_mode_becomes_rgb(self, tmp_path, mode):
        path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
        if mode == "I;16":
            Image.fromarray(np.full((48, 24), 9, dtype=np.uint16)).save(path)
        else:
            Image.new(mode, (24, 48)).save(path)
        expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(read_image(path, 48, 24), expected)

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
    def test_values_that_would_be_clipped_are_refused(self, tmp_path, dtype):
        path = tmp_path / "thermal.tif"
        values = np.full((48, 24), 9, dtype=dtype)
        values[3, 5] = 30000
        Image.fromarray(values).save(path)
        with pytest.raises(DataError, match="values from 9 to 30000") as caught:
            read_image(path, 48, 24)
        assert verify_image(path) == str(caught.value)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (None, "No such file or directory"),
            (b"", "cannot identify image file"),
            (b"no image at all", "cannot identify image file"),
            (jpeg(1)[:150], "runcated"),
            (jpeg(1)[:-250], "truncated"),
        ],
    )
    def test_unreadable_files_are_named(self, tmp_path, content, reason):
        path = tmp_path / "0001.jpg"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=rf"0001\.jpg: unreadable image: .*{reason}") as caught:
            read_image(path, 48, 24)
        assert str(caught.value).count(str(tmp_path)) == 1
        assert "\n" not in str(caught.value)
        assert str(caught.value) == verify_image(path)

    def test_a_good_file_is_verified(self, tmp_path):
        for i, size in enumerate([(48, 24), (5, 3), (400, 300)]):
            path = tmp_path / f"{i}.jpg"
            path.write_bytes(jpeg(i, height=size[0], width=size[1]))
            assert verify_image(path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_value": 256}, "pad_value: expected 0 to 255, got 256"),
        ({"erase_area": (0.3, 0.1)}, "erase_area"),
        ({"erase_area": (0.1, 1.5)}, "erase_area"),
        ({"erase_aspect": (0.0, 3.0)}, "erase_aspect"),
        ({"visible_spectra": ("hue", "red")}, "visible_spectra: expected of 'hue', .* got 'red'"),
        ({"spectrum_probability": 1.5}, "spectrum_probability: expected a probability, got 1.5"),
        ({"normalize": "unit"}, "normalize: expected one of 'imagenet', 'symmetric', got 'unit'"),
        ({"sampler": "triplet"}, "sampler: expected one of 'paired_identity', .* got 'triplet'"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_mixing_leaves_grey_planes_of_the_drawn_tone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 48, 24), dtype=np.uint8)
    mix = np.array([0.7, -0.2, 0.4, 120.0, 40.0], dtype=np.float32)
    mixed = mix_channels(image, mix)
    assert (mixed == mixed[0]).all()
    assert abs(mixed.mean() - 120) < 1
    assert abs(mixed.std() - 40) < 1
    inverted = mix_channels(image, mix * np.array([-1, -1, -1, 1, 1], dtype=np.float32))
    assert np.corrcoef(mixed[0].ravel(), inverted[0].ravel())[0, 1] < -0.99
    assert mix_channels(image, np.zeros(5, dtype=np.float32)) is image
    flat = mix_channels(np.full_like(image, 9), mix)
    assert (flat == 120).all()


def test_mixing_is_drawn_apart_so_that_other_draws_stay() -> None:
    plain = draw_augmentation(200, CONFIG, seed=1, epoch=2, batch=3)
    config = dataclasses.replace(CONFIG, channel_mix=0.7)
    mixed = draw_augmentation(200, config, seed=1, epoch=2, batch=3)
    for name in ("flip", "top", "left", "boxes"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(mixed, name))
    assert not plain.mix.any()
    assert 0.55 < (mixed.mix[:, 4] > 0).mean() < 0.85
