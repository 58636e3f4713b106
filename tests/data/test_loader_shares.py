"""What a batch promises, how processes share it, how one is read again, what tests are shown."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fastreid_vi.config import INFRARED, VISIBLE, Batch, DataConfig
from fastreid_vi.data import DataError, SysuMM01, eval_loader, make_sampler, train_loader
from fastreid_vi.data.sampler import SAMPLERS
from fastreid_vi.data.spectrum import draw_spectra, view
from fastreid_vi.data.transform import augment, draw_augmentation, normalize, read_image
from tests.data.test_loader import same

CONFIG = DataConfig(
    height=40, width=20, identities=2, images=4, sampler="norm_triplet", erase=0.5, workers=0,
    channel_mix=0.3, visible_spectra=("hue", "gray", "cutmix", "jitter"), spectrum_probability=0.9,
)  # fmt: skip


@pytest.fixture
def train(sysu):
    return SysuMM01(sysu).train


def loader(train, *, rank=0, world=1, batches=3, epoch=1, **change):
    config = dataclasses.replace(CONFIG, **change)
    sampler = make_sampler(
        config.sampler, train.labels, train.modality, identities=config.identities,
        images=config.images, seed=3, pids=train.pids, batches=batches,
        pixel_identities=config.pixel_identities,
    )  # fmt: skip
    sampler.shard(rank, world)
    sampler.set_epoch(epoch)
    return train_loader(train, sampler, config, seed=3)


def rows(batch: Batch, indices) -> Batch:
    return Batch(*(column[indices] for column in batch[:4]), batch.paired)


@pytest.mark.parametrize("workers", [0, 2])
def test_spectra_change_visible_images_only(train, workers):
    batches = loader(train, epoch=2, workers=workers)
    touched = 0
    for number, batch in enumerate(batches):
        positions = batches.sampler.plan()[number]
        pixels = np.stack([read_image(train.file(i), 40, 20) for i in positions])
        at = {"seed": 3, "epoch": 2, "batch": number}
        draws, spectra = draw_augmentation(8, CONFIG, **at), draw_spectra(8, CONFIG, **at)
        modality = train.modality[positions]
        expected = augment(pixels, draws, CONFIG, spectra=spectra, modality=modality)
        np.testing.assert_array_equal(batch.images.numpy(), expected)
        plain = augment(pixels, draws, CONFIG)
        np.testing.assert_array_equal(expected[modality == INFRARED], plain[modality == INFRARED])
        touched += (expected != plain).any(axis=(1, 2, 3))[modality == VISIBLE].sum()
    assert touched > 0


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_the_promise(train, name):
    pixels = 1 if name == "uniform" else 0
    for batch in loader(train, sampler=name, pixel_identities=pixels):
        if name in ("identity_random", "norm_triplet", "random"):
            assert batch.paired == 0
            continue
        assert batch.paired == 2
        parts = [(0, 8), (8, 12)] if pixels else [(0, 8)]
        assert len(batch.labels) == parts[-1][1]
        for start, stop in parts:
            part = batch.rows(start, stop, batch.paired)
            labels, modality = part.labels.reshape(2, -1, 2), part.modality.reshape(2, -1)
            assert (labels == labels[:1, :, :1]).all()
            assert (modality == torch.tensor([[VISIBLE], [INFRARED]])).all()


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("workers", [0, 1])
def test_the_shares_together_are_the_batch(train, name, workers):
    pixels = 2 if name == "uniform" else 0
    change = {"sampler": name, "pixel_identities": pixels, "workers": workers, "epoch": 2}
    whole = list(loader(train, **change))
    assert len(whole) == 3
    for rank in (0, 1):
        share = loader(train, rank=rank, world=2, **change)
        slots = torch.from_numpy(share.sampler.slots)
        assert len(share) == 3
        assert same(list(share), [rows(batch, slots) for batch in whole])


def test_workers_change_nothing_with_spectra_and_streams(train):
    for name in ("norm_triplet", "uniform"):
        reference = list(loader(train, sampler=name))
        for workers, cache in ((1, False), (2, True)):
            found = list(loader(train, sampler=name, workers=workers, cache=cache))
            assert same(reference, found)


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_read_again(train, world):
    first = loader(train, rank=world - 1, world=world, workers=2, cache=True, epoch=2)
    for number, batch in enumerate(first):
        assert first.sampler.cursor == number + 1
        again = first.batch(2, number)
        assert same([batch], [again])
        assert (first.sampler.epoch, first.sampler.cursor) == (2, number + 1)
    other = list(loader(train, rank=world - 1, world=world, epoch=5))
    assert same([first.batch(5, n) for n in range(3)], other)
    assert (first.sampler.epoch, first.sampler.cursor) == (2, 3)


def test_a_batch_that_is_not_there(train):
    batches = loader(train)
    for number in (-1, 3):
        with pytest.raises(ValueError, match=f"number: expected 0 to 2 in epoch 1, got {number}"):
            batches.batch(1, number)
    with pytest.raises(ValueError, match="epoch: expected 1 or more, got 0"):
        batches.batch(0, 0)
    path = train.file(batches.sampler.plan()[1, 2])
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"{path}: unreadable image"):
        batches.batch(1, 1)


def test_iterations_of_the_schedule(train):
    for name in sorted(SAMPLERS):
        batches = loader(train, sampler=name, batches=17)
        assert len(batches) == 17
        assert len(list(batches)) == 17


class TestEvalSpectrum:
    @pytest.mark.parametrize("spectrum", ["original", "r", "g", "b", "avg"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_visible_images_only(self, train, spectrum, workers):
        config = dataclasses.replace(CONFIG, workers=workers, cache=workers == 2)
        batches = list(eval_loader(train, config, batch_size=16, spectrum=spectrum))
        found = torch.cat([batch.images for batch in batches]).numpy()
        assert {batch.paired for batch in batches} == {0}
        assert set(train.modality.tolist()) == {VISIBLE, INFRARED}
        pixels = [read_image(train.file(i), 40, 20) for i in range(len(train))]
        shown = [
            view(image, spectrum if modality == VISIBLE else "original")
            for image, modality in zip(pixels, train.modality, strict=True)
        ]
        np.testing.assert_array_equal(found, normalize(np.stack(shown)))

    def test_an_unknown_one(self, train):
        with pytest.raises(ValueError, match="spectrum: expected one of original"):
            eval_loader(train, CONFIG, batch_size=16, spectrum="ir")


def test_the_pixels_of_aligngan(train):
    """128 x 128, bicubic, -1 to 1, in training and in testing."""
    change = {
        "height": 128, "width": 128, "resize": "bicubic", "normalize": "symmetric", "pad": 0,
        "erase": 0.0, "channel_mix": 0.0, "visible_spectra": (), "sampler": "uniform",
    }  # fmt: skip
    config = dataclasses.replace(CONFIG, **change)
    pixels = np.stack([read_image(train.file(i), 128, 128, "bicubic") for i in range(len(train))])
    expected = (pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    shown = torch.cat([b.images for b in eval_loader(train, config, batch_size=50)]).numpy()
    np.testing.assert_array_equal(shown, expected)
    batches = loader(train, **change, flip=1.0)
    for number, batch in enumerate(batches):
        positions = batches.sampler.plan()[number]
        np.testing.assert_array_equal(batch.images.numpy(), expected[positions][..., ::-1])
