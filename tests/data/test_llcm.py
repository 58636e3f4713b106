"""The index of LLCM: reading rules, orders, and bad input that a person would meet."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data import LLCM, DataError
from tests.data.listed import LLCM_TEST, LLCM_TRAIN, llcm_name, write_lines, write_llcm

LIST = "idx/train_vis.txt"
FIRST = f"vis/0002/{llcm_name(2, 1, 90, 'vis')}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    # The released loader fails below a folder with these letters; ours must not.
    return write_llcm(tmp_path / "cam2" / "data")


def test_lists(root: Path) -> None:
    data = LLCM(root)
    assert data.num_ids == 3
    assert len(data.train) == 2 * sum(len(c) for p in LLCM_TRAIN.values() for c in p.values())
    for images, side, modality in ((data.query, "nir", INFRARED), (data.gallery, "vis", VISIBLE)):
        expected = {(pid, cam) for pid, cams in LLCM_TEST[side].items() for cam in cams}
        assert set(zip(images.pids.tolist(), images.cams.tolist(), strict=True)) == expected
        assert len(images) == 2 * len(expected)
        assert set(images.modality) == {modality}
        assert (images.labels == -1).all()
        assert set(images.numbers.tolist()) == {7, 11}
    for path, pid, cam, number, modality in zip(
        data.train.paths, data.train.pids, data.train.cams, data.train.numbers,
        data.train.modality, strict=True,
    ):  # fmt: skip
        side = {VISIBLE: "vis", INFRARED: "nir"}[modality]
        assert path == f"{side}/{pid:04d}/{llcm_name(pid, cam, number, side)}"
        assert cam in LLCM_TRAIN[side][pid]


def test_label_orders(root: Path) -> None:
    for order, expected in (("sorted", {2: 0, 5: 1, 12: 2}), ("file", {2: 1, 5: 2, 12: 0})):
        train = LLCM(root, label_order=order).train  # type: ignore[arg-type]
        assert dict(zip(train.pids.tolist(), train.labels.tolist(), strict=True)) == expected


def test_image_orders(root: Path) -> None:
    data = LLCM(root)
    for images in (data.train, data.query, data.gallery):
        assert list(images.paths) == sorted(images.paths)
    assert data.train.paths[0].startswith("nir/")
    listed = [
        line.split()[0]
        for side in ("vis", "nir")
        for line in (root / f"idx/train_{side}.txt").read_text().splitlines()
    ]
    by_file = LLCM(root, image_order="file")
    assert list(by_file.train.paths) == listed
    for order in ("file", "identity"):
        images = LLCM(root, image_order=order).query  # type: ignore[arg-type]
        keys = list(zip(images.pids, images.cams, images.numbers, strict=True))
        assert keys == sorted(keys)
    images = LLCM(root, image_order="identity").train
    keys = list(zip(images.modality, images.pids, images.cams, images.numbers, strict=True))
    assert keys == sorted(keys)


def test_infrared_camera_3_and_strays_are_ignored(root: Path) -> None:
    expected = LLCM(root)
    strays = f"""test_nir/cam3/0007/{llcm_name(7, 3, 5, "nir")}
        test_vis/cam1/0099/{llcm_name(99, 1, 5, "vis")} test_vis/cam1/0007/.x.jpg
        test_vis/cam1/0007/a.txt test_vis/cam1/x/a.jpg test_vis/a.jpg vis/0002/extra.jpg"""
    for stray in strays.split():
        (root / stray).parent.mkdir(parents=True, exist_ok=True)
        (root / stray).write_bytes(b"not an image")
    found = LLCM(root)
    for name in ("train", "query", "gallery"):
        assert getattr(found, name).paths == getattr(expected, name).paths


def test_test_lists_are_not_needed(root: Path) -> None:
    expected = LLCM(root).query.paths
    for side in ("vis", "nir"):
        (root / f"idx/test_{side}.txt").unlink()
    assert LLCM(root).query.paths == expected


def test_blank_lines_are_skipped(root: Path) -> None:
    expected = LLCM(root)
    (root / LIST).write_text("\n" + (root / LIST).read_text().replace("\n", "\n\n"))
    assert LLCM(root).train.paths == expected.train.paths


def renamed(root: Path) -> None:
    (root / FIRST).rename(root / "vis/0002/first.jpg")
    lines = [line.split() for line in (root / LIST).read_text().splitlines()]
    lines[0][0] = "vis/0002/first.jpg"
    write_lines(root / LIST, [(name, int(label)) for name, label in lines])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r), "data: no such folder"),
        (lambda r: shutil.rmtree(r / "nir"), "data: folder nir is missing"),
        (lambda r: shutil.rmtree(r / "test_vis"), "data: folder test_vis is missing"),
        (lambda r: (r / LIST).unlink(), r"train_vis\.txt: cannot be read: No such file"),
        (lambda r: (r / "idx/test_id.txt").unlink(), r"test_id\.txt: cannot be read: No such"),
        (lambda r: (r / "idx/test_id.txt").write_text("7,a8\n"), r"expected pids .* got 'a8'"),
        (lambda r: (r / "idx/test_id.txt").write_text("\n"), r"test_id\.txt: empty split"),
        (lambda r: (r / "idx/test_id.txt").write_text("77\n"), r"test_nir: empty split: no person"),
        (lambda r: (r / "idx/test_id.txt").write_text("7,5\n"), r"pid 5 is in a training list and"),
        (lambda r: (r / FIRST).unlink(), rf"train_vis\.txt: line 1: {FIRST} does not exist"),
        (renamed, r"line 1: expected a file name with its camera, .* got first\.jpg"),
        (lambda r: (r / "test_vis/cam1/7").mkdir(), "pid 7 has a second folder"),
        (lambda r: shutil.rmtree(r / "test_nir/cam1") or shutil.rmtree(r / "test_nir/cam2")
         or shutil.rmtree(r / "test_nir/cam9"), "test_nir: empty split"),
    ],
)  # fmt: skip
def test_damage_is_named(root: Path, damage, message: str) -> None:
    damage(root)
    with pytest.raises(DataError, match=message) as caught:
        LLCM(root)
    assert "\n" not in str(caught.value)


def test_root_one_level_too_high_gets_a_hint(tmp_path: Path) -> None:
    write_llcm(tmp_path / "LLCM")
    with pytest.raises(DataError, match=r"did you mean .*LLCM"):
        LLCM(tmp_path)


def test_hold_out_and_skip_broken_are_those_of_sysu(root: Path, caplog) -> None:
    data = LLCM(root)
    train, validation = data.hold_out(1, seed=0)
    assert sorted(set(train.labels.tolist())) == [0, 1]
    assert set(validation.modality.tolist()) == {VISIBLE, INFRARED}
    (root / FIRST).write_bytes(b"")
    with caplog.at_level(logging.WARNING, "fastreid_vi.data"):
        left = LLCM(root, skip_broken=True)
    assert f"left out 1 unreadable images, first {FIRST}" in caplog.text
    assert set(data.train.paths) - set(left.train.paths) == {FIRST}
    for path in data.train.paths:
        if "/0005/" in path:
            (root / path).write_bytes(b"")
    with pytest.raises(DataError, match="training identity"):
        LLCM(root, skip_broken=True)
