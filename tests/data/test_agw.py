"""AGW's preprocessed arrays: read in its order, refused where they are of something else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastreid_vi.config import INFRARED, VISIBLE, DataConfig
from fastreid_vi.data import DataError, SysuMM01, eval_loader
from fastreid_vi.data.agw import AgwArrays
from fastreid_vi.data.transform import read_image
from tests.data.test_loader import same
from tests.data.test_packed_loader import loader

SPLITS = {"train": (12, 3), "val": (9,), "test": (5,)}
COUNTS = {(cam, pid): 2 for cam in range(1, 7) for pid in (3, 9, 12, 5)}
CONFIG = DataConfig(
    height=288, width=144, identities=2, images=4, sampler="paired_identity", resize="lanczos",
    erase=0.5, workers=0,
)  # fmt: skip


@pytest.fixture
def root(write_tree) -> Path:
    """A tree with the arrays that AGW's script makes of it: by person, camera and image."""
    root = write_tree(COUNTS, SPLITS)
    for side, cameras in (("rgb", (1, 2, 4, 5)), ("ir", (3, 6))):
        pixels, labels = [], []
        for label, pid in enumerate((3, 9, 12)):
            for cam in cameras:
                for number in (1, 2):
                    file = root / f"cam{cam}" / f"{pid:04d}" / f"{number:04d}.jpg"
                    image = Image.open(file).convert("RGB")
                    pixels.append(np.asarray(image.resize((144, 288), Image.Resampling.LANCZOS)))
                    labels.append(label)
        np.save(root / f"train_{side}_resized_img.npy", np.stack(pixels))
        np.save(root / f"train_{side}_resized_label.npy", np.array(labels))
    return root


def agw(**change) -> DataConfig:
    return dataclasses.replace(CONFIG, packed="agw", **change)


def test_every_image(root):
    dataset = SysuMM01(root, label_order="file")
    for image_order in ("path", "identity"):
        images = SysuMM01(root, image_order=image_order).train
        arrays = AgwArrays(root, CONFIG)
        rows = arrays.rows_of(images)
        assert sorted(rows) == list(range(len(images)))
        for position, row in enumerate(rows.tolist()):
            expected = read_image(images.file(position), 288, 144, "lanczos")
            np.testing.assert_array_equal(arrays[row], expected.transpose(1, 2, 0))
    assert not AgwArrays(root, CONFIG).holds(dataset.query)
    with pytest.raises(DataError, match="is no training image of"):
        AgwArrays(root, CONFIG).rows_of(dataset.query)


def test_the_batches(root):
    train = SysuMM01(root, label_order="file").train
    expected = list(loader(train, CONFIG))
    assert same(list(loader(train, agw())), expected)
    assert same(list(loader(train, agw(resident="always", workers=1))), expected)


def test_test_images_are_read_from_their_files(root):
    dataset = SysuMM01(root)
    _, validation = dataset.hold_out(1, 3)
    for images, place in (
        (dataset.query, f"files in {root}"),
        (validation, f"AGW's arrays in {root}, batch by batch to cpu"),
    ):
        found = eval_loader(images, agw(), batch_size=3)
        assert found._source.place == place
        assert same(list(found), list(eval_loader(images, CONFIG, batch_size=3)))


@pytest.mark.parametrize(
    "change", [{"height": 384}, {"width": 128}, {"resize": "bilinear"}, {"resize": "bicubic"}]
)
def test_a_recipe_that_does_not_fit(root, change):
    with pytest.raises(DataError, match="its arrays are 288 x 144 by lanczos, this recipe needs"):
        loader(SysuMM01(root).train, agw(**change))


@pytest.mark.parametrize("splits", [("train",), ("val",)])
def test_arrays_of_other_splits(root, splits):
    train = SysuMM01(root, splits=splits).train
    config = agw(splits=splits, identities=1)
    with pytest.raises(DataError, match=r"train_rgb_resized_img.npy: expected uint8 \[\d+, 288"):
        loader(train, config)


@pytest.mark.parametrize(
    ("damage", "needle"),
    [
        ("no pixels", "train_ir_resized_img.npy: missing"),
        ("no labels", "train_ir_resized_label.npy: missing"),
        ("cut", "train_ir_resized_img.npy: damaged"),
        ("objects", "train_ir_resized_label.npy: damaged or not an array of numbers"),
        ("size", "train_ir_resized_img.npy: expected uint8 [12, 288, 144, 3]"),
        ("floats", "train_ir_resized_img.npy: expected uint8"),
        ("labels", "train_ir_resized_label.npy: the labels are those of other images, first at"),
        ("few labels", "first at row 11"),
        ("many labels", "first at row 12"),
    ],
)
def test_damaged_or_foreign_arrays(root, damage, needle):
    pixels, labels = (root / f"train_ir_resized_{name}.npy" for name in ("img", "label"))
    values, ranks = np.load(pixels), np.load(labels)
    if damage == "no pixels":
        pixels.unlink()
    elif damage == "no labels":
        labels.unlink()
    elif damage == "cut":
        pixels.write_bytes(pixels.read_bytes()[:5000])
    elif damage == "objects":
        np.save(labels, ranks.astype(object), allow_pickle=True)
    elif damage == "size":
        np.save(pixels, values[:, :256])
    elif damage == "floats":
        np.save(pixels, values[:2].astype(np.float32))
    elif damage == "labels":
        np.save(labels, ranks[::-1])
    elif damage == "few labels":
        np.save(labels, ranks[:-1])
    else:
        np.save(labels, np.append(ranks, 2))
    with pytest.raises(DataError) as caught:
        loader(SysuMM01(root).train, agw())
    assert needle in str(caught.value)
    assert "make them again from these images, or use a pack of ours" in str(caught.value)


def test_modalities(root):
    train = SysuMM01(root).train
    arrays = AgwArrays(root, CONFIG)
    rows = arrays.rows_of(train)
    assert rows[train.modality == VISIBLE].max() < rows[train.modality == INFRARED].min()
