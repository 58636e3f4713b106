"""The index of RegDB: reading rules, orders, and bad input that a person would meet."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data import DataError, RegDB
from tests.data.listed import HALVINGS, REGDB_IMAGES, regdb_files, write_regdb

LIST = "idx/train_visible_1.txt"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_regdb(tmp_path / "data")


def labels_by_pid(data: RegDB) -> dict[int, int]:
    return dict(zip(data.train.pids.tolist(), data.train.labels.tolist(), strict=True))


@pytest.mark.parametrize("trial", range(1, 11))
def test_every_trial_has_its_own_halves(root: Path, trial: int) -> None:
    data = RegDB(root, trial=trial)
    train, test = HALVINGS[trial - 1]
    assert data.trial == trial
    assert data.num_ids == 3
    assert set(data.train.pids.tolist()) == set(train)
    assert set(data.query.pids.tolist()) == set(data.gallery.pids.tolist()) == set(test)
    assert len(data.train) == 2 * 3 * REGDB_IMAGES
    assert len(data.query) == len(data.gallery) == 3 * REGDB_IMAGES
    assert (data.query.labels == -1).all()
    assert (data.gallery.labels == -1).all()


def test_modalities_cameras_and_numbers(root: Path) -> None:
    data = RegDB(root)
    assert set(data.query.modality) == {INFRARED}
    assert set(data.query.cams) == {3}
    assert set(data.gallery.modality) == {VISIBLE}
    assert set(data.gallery.cams) == {2}
    for path, pid, cam, number, modality in zip(
        data.train.paths, data.train.pids, data.train.cams, data.train.numbers,
        data.train.modality, strict=True,
    ):  # fmt: skip
        side, folder, name = path.split("/")
        assert (modality, cam) == {"Visible": (VISIBLE, 2), "Thermal": (INFRARED, 3)}[side]
        assert pid == int(folder)
        assert number == int(name.split("_")[3])
    assert all(data.train.file(i).is_file() for i in range(len(data.train)))


def test_label_orders(root: Path) -> None:
    train = HALVINGS[0][0]
    assert train != sorted(train), "the trial must tell the orders apart"
    assert labels_by_pid(RegDB(root)) == {pid: i for i, pid in enumerate(sorted(train))}
    assert labels_by_pid(RegDB(root, label_order="file")) == {p: i for i, p in enumerate(train)}


def test_image_orders(root: Path) -> None:
    train = HALVINGS[0][0]
    data = RegDB(root)
    # MPANet and MCJA sort the joined list of paths as text: thermal first, 10 before 2.
    assert list(data.train.paths) == sorted(data.train.paths)
    assert data.train.paths[0].startswith("Thermal/")
    by_file = RegDB(root, image_order="file")
    listed = [n for side in ("Visible", "Thermal") for pid in train for n in regdb_files(pid, side)]
    assert list(by_file.train.paths) == listed
    assert list(by_file.query.paths) == [
        name for pid in HALVINGS[0][1] for name in regdb_files(pid, "Thermal")
    ]
    images = RegDB(root, image_order="identity").train
    keys = list(zip(images.modality, images.pids, images.numbers, strict=True))
    assert keys == sorted(keys)
    assert list(images.paths) != list(data.train.paths)


def test_blank_lines_and_windows_ends_are_skipped(root: Path) -> None:
    expected = RegDB(root)
    text = (root / LIST).read_text()
    (root / LIST).write_text("\n" + text.replace("\n", "\r\n\r\n") + "\n \n")
    found = RegDB(root)
    assert found.train.paths == expected.train.paths
    assert np.array_equal(found.train.labels, expected.train.labels)


def test_strays_are_ignored(root: Path) -> None:
    expected = RegDB(root)
    for stray in ("Visible/1/thumbs.db", "Visible/x.bmp", "notes.txt", "idx/old.txt"):
        (root / stray).write_bytes(b"x")
    assert RegDB(root).train.paths == expected.train.paths


def edit(root: Path, old: str, new: str, name: str = LIST) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new, 1))


FIRST = regdb_files(HALVINGS[0][0][0], "Visible")
TESTED = regdb_files(HALVINGS[0][1][0], "Visible")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r), "data: no such folder"),
        (lambda r: shutil.rmtree(r / "Thermal"), "data: folder Thermal is missing"),
        (lambda r: (r / LIST).unlink(), r"train_visible_1\.txt: cannot be read: No such file"),
        (lambda r: (r / "idx/test_thermal_1.txt").unlink(), r"test_thermal_1\.txt: cannot be read"),
        (lambda r: (r / LIST).write_text("\n\n"), r"train_visible_1\.txt: empty split"),
        (lambda r: (r / FIRST[1]).unlink(), rf"line 2: {FIRST[1]} does not exist"),
        (lambda r: shutil.rmtree((r / FIRST[0]).parent), rf"line 1: {FIRST[0]} does not exist"),
        (lambda r: edit(r, " 0", ""), r"line 1: expected a path and a label, got 'Visible/"),
        (lambda r: edit(r, " 0", " x"), r"line 1: expected a path and a label, got"),
        (lambda r: edit(r, " 0", " -1"), r"line 1: expected a path and a label, got"),
        (lambda r: edit(r, "Visible/", "Thermal/"), r"line 1: expected Visible/<pid>/<image>, got"),
        (lambda r: edit(r, "Visible/", "/Visible/"), r"expected Visible/<pid>/<image>"),
        (lambda r: edit(r, "Visible/", "Visible/../Visible/"), r"expected Visible/<pid>/<image>"),
        (
            lambda r: edit(r, FIRST[1], FIRST[0]),
            rf"line 2: {FIRST[0]} was on line 1 already",
        ),
        (
            lambda r: edit(r, FIRST[0], TESTED[0]),
            rf"pid {HALVINGS[0][1][0]} is in a training and a test list of trial 1",
        ),
    ],
)
def test_damage_is_named(root: Path, damage, message: str) -> None:
    damage(root)
    with pytest.raises(DataError, match=message) as caught:
        RegDB(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"{FIRST[1]} 0", f"{FIRST[1]} 1", "line 2: label 1 for pid .*, which had 0"),
        (" 1", " 0", "line 3: label 0 for pid .*, but pid .* has it"),
    ],
)
def test_labels_matter_in_file_order_only(root: Path, old: str, new: str, message: str) -> None:
    edit(root, old, new)
    assert RegDB(root).num_ids == 3
    with pytest.raises(DataError, match=message):
        RegDB(root, label_order="file")


def test_a_gap_in_the_labels(root: Path) -> None:
    for name in (LIST, "idx/train_thermal_1.txt"):
        (root / name).write_text((root / name).read_text().replace(" 2\n", " 4\n"))
    with pytest.raises(DataError, match=r"expected labels 0\.\.2, 2 is missing"):
        RegDB(root, label_order="file")


@pytest.mark.parametrize("trial", [0, 11, -1, True, 1.0, "1"])
def test_wrong_trial(root: Path, trial) -> None:
    with pytest.raises(DataError, match=r"trial: expected 1 to 10, got"):
        RegDB(root, trial=trial)


@pytest.mark.parametrize("option", [{"label_order": "x"}, {"image_order": "x"}])
def test_unknown_orders(root: Path, option) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        RegDB(root, **option)


def test_root_one_level_too_high_gets_a_hint(tmp_path: Path) -> None:
    write_regdb(tmp_path / "RegDB")
    with pytest.raises(DataError, match=r"did you mean .*RegDB"):
        RegDB(tmp_path)


def test_hold_out_and_skip_broken_are_those_of_sysu(root: Path, caplog) -> None:
    data = RegDB(root)
    train, validation = data.hold_out(1, seed=3)
    assert sorted(set(train.labels.tolist())) == [0, 1]
    assert len(set(validation.pids.tolist())) == 1
    assert sorted((*train.paths, *validation.paths)) == sorted(data.train.paths)
    (root / FIRST[0]).write_bytes(b"BM broken")
    (root / TESTED[1]).write_bytes(b"")
    with caplog.at_level(logging.WARNING, "fastreid_vi.data"):
        left = RegDB(root, skip_broken=True)
    assert "left out 2 unreadable images, first Visible/" in caplog.text
    assert set(data.train.paths) - set(left.train.paths) == {FIRST[0]}
    assert set(data.gallery.paths) - set(left.gallery.paths) == {TESTED[1]}
