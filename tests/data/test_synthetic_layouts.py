"""Stand-ins for RegDB and LLCM: what released loaders need, and that they are repeatable."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastreid_vi.data import LLCM, DataError, RegDB, check_llcm, check_regdb, synthesize
from fastreid_vi.data.layouts import LAYOUTS, plan_llcm, plan_regdb

SIZE = {"height": 32, "width": 16}
REGDB = {**SIZE, "layout": "regdb", "train_ids": 3, "test_ids": 3, "images": (2, 2)}
LLCM_SIZE = {**SIZE, "layout": "llcm", "train_ids": 3, "test_ids": 2, "images": (1, 2)}
REGDB_NAME = re.compile(r"(male|female)_(front|back)_([vt])_([0-9]{5})_([0-9]+)\.bmp")
LLCM_NAME = re.compile(r"([0-9]{4})_c([0-9]{2})_s([0-9]{6})_f([0-9]+)_(vis|nir)\.jpg")


@pytest.fixture(scope="module")
def regdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("synth") / "regdb", workers=1, **REGDB)


@pytest.fixture(scope="module")
def llcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("synth") / "llcm", workers=1, **LLCM_SIZE)


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def lists(root: Path, name: str) -> list[tuple[str, int]]:
    """As the released readers do it: no blank line, split on one space."""
    words = [line.split(" ") for line in (root / f"idx/{name}.txt").read_text().splitlines()]
    return [(path, int(label)) for path, label in words]


class TestRegDB:
    def test_names_and_pictures(self, regdb: Path) -> None:
        files = sorted(regdb.rglob("*.bmp"))
        assert len(files) == 6 * 2 * 2
        habits: dict[int, set[tuple[str, str]]] = {}
        for file in files:
            side, pid = file.parts[-3], int(file.parts[-2])
            match = REGDB_NAME.fullmatch(file.name)
            assert match, file.name
            assert match[3] == {"Visible": "v", "Thermal": "t"}[side]
            assert int(match[5]) == pid
            habits.setdefault(pid, set()).add((match[1], match[2]))
            with Image.open(file) as image:
                assert (image.format, image.size, image.mode) == ("BMP", (16, 32), "RGB")
                spread = np.asarray(image).astype(int)
            assert ((spread.max(2) - spread.min(2)).max() == 0) == (side == "Thermal")
        assert set(habits) == set(range(1, 7))
        assert all(len(habit) == 1 for habit in habits.values()), "sex and view stay"

    def test_ten_different_halvings(self, regdb: Path) -> None:
        halves = set()
        for trial in range(1, 11):
            by_split = {}
            for split in ("train", "test"):
                visible = lists(regdb, f"{split}_visible_{trial}")
                thermal = lists(regdb, f"{split}_thermal_{trial}")
                persons = [
                    {(int(path.split("/")[1]), label) for path, label in lines}
                    for lines in (visible, thermal)
                ]
                assert persons[0] == persons[1], "one label for a person in both modalities"
                assert sorted(label for _, label in persons[0]) == [0, 1, 2]
                assert len(visible) == len(thermal) == 3 * 2
                by_split[split] = {pid for pid, _ in persons[0]}
            assert by_split["train"] | by_split["test"] == set(range(1, 7))
            assert not by_split["train"] & by_split["test"]
            halves.add(frozenset(by_split["train"]))
        assert len(halves) == 10

    def test_index_and_check_agree(self, regdb: Path) -> None:
        for trial in (1, 10):
            data = RegDB(regdb, trial=trial)
            assert (data.num_ids, len(data.train), len(data.query)) == (3, 12, 6)
        report = check_regdb(regdb)
        assert report.ok
        assert not report.official
        assert report.decoded == 24
        assert report.images["all"] == (12, 12)

    @given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
    @settings(max_examples=15, deadline=None)
    def test_any_size(
        self, tmp_path_factory: pytest.TempPathFactory, train: int, test: int, seed: int
    ) -> None:
        if math.comb(train + test, train) < 10:
            return
        root = tmp_path_factory.mktemp("lists")
        counts = {"train": train, "val": 0, "test": test}
        sittings = plan_regdb(root, counts, dict.fromkeys(counts, (1, 3)), seed)
        assert [sitting.pid for sitting in sittings] == list(range(1, train + test + 1))
        halves = {frozenset(p for p, _ in lists(root, f"train_visible_{t}")) for t in range(1, 11)}
        assert len(halves) == 10


class TestLLCM:
    def test_names_and_pictures(self, llcm: Path) -> None:
        files = sorted(llcm.rglob("*.jpg"))
        for file in files:
            match = LLCM_NAME.fullmatch(file.name)
            assert match, file.name
            pid, cam, side = match[1], int(match[2]), match[5]
            assert file.parent.name == pid
            place = file.relative_to(llcm).parts[:-2]
            assert place in ((side,), (f"test_{side}", f"cam{cam}"))
            with Image.open(file) as image:
                assert (image.format, image.size, image.mode) == ("JPEG", (16, 32), "RGB")
                spread = np.asarray(image).astype(int)
            assert ((spread.max(2) - spread.min(2)).max() == 0) == (side == "nir")
        listed = [path for s in ("train", "test") for m in ("vis", "nir")
                  for path, _ in lists(llcm, f"{s}_{m}")]  # fmt: skip
        assert sorted(listed) == [file.relative_to(llcm).as_posix() for file in files]
        assert "cam" not in "".join(name for name in contents(llcm) if "test_" not in name)

    def test_index_and_check_agree(self, llcm: Path) -> None:
        data = LLCM(llcm, label_order="file")
        assert data.num_ids == 3
        assert sorted(set(data.train.labels.tolist())) == [0, 1, 2]
        tested = set(map(int, (llcm / "idx/test_id.txt").read_text().split(",")))
        assert set(data.query.pids.tolist()) == set(data.gallery.pids.tolist()) == tested
        assert not tested & set(data.train.pids.tolist())
        report = check_llcm(llcm)
        assert report.ok
        assert report.identities == {"train": 3, "test": 2}
        assert report.decoded == len(data.train) + len(data.query) + len(data.gallery)

    @given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
    @settings(max_examples=15, deadline=None)
    def test_cameras_of_any_size(
        self, tmp_path_factory: pytest.TempPathFactory, train: int, test: int, seed: int
    ) -> None:
        root = tmp_path_factory.mktemp("lists")
        counts = {"train": train, "val": 0, "test": test}
        sittings = plan_llcm(root, counts, dict.fromkeys(counts, (1, 3)), seed)
        assert len(sittings) == train + test
        assert not (root / "test_nir/cam3").exists()
        for sitting in sittings:
            cams = {
                infrared: [f.key % 100 for f in sitting.folders if f.site.infrared == infrared]
                for infrared in (False, True)
            }
            assert 3 not in cams[True]
            for seen in cams.values():
                assert 2 <= len(seen) == len(set(seen)) <= 4
            assert set(cams[False]) & set(cams[True]), "the camera rule must remove something"
        pids = [sitting.pid for sitting in sittings]
        assert pids == sorted(set(pids))
        assert pids[0] > 1
        assert pids[-1] > len(pids) + 1, "there must be gaps"

    def test_a_path_that_the_released_code_cannot_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.chdir(tmp_path)  # the path as given is what that code sees
        options = {**LLCM_SIZE, "train_ids": 1, "test_ids": 1, "images": (1, 1)}
        for name, warned in (("data", False), ("camera", True)):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "fastreid_vi.data"):
                root = synthesize(name, workers=1, **options)
            assert ("looks for 'cam'" in caplog.text) == warned
            assert len(LLCM(root).train)


@pytest.mark.parametrize("options", [REGDB, LLCM_SIZE], ids=["regdb", "llcm"])
def test_processes_do_not_matter(request, tmp_path: Path, options) -> None:
    tree = request.getfixturevalue(options["layout"])
    again = synthesize(tmp_path / "again", workers=2, **options)
    assert contents(again) == contents(tree)
    made = json.loads((again / "idx/synthetic.json").read_text())
    assert made["layout"] == options["layout"]
    assert made["train_ids"] == options["train_ids"]


def test_seeds_give_other_people(regdb: Path, tmp_path: Path) -> None:
    other = synthesize(tmp_path / "other", workers=1, seed=1, **REGDB)
    names = [{n for n in contents(root) if n.endswith(".bmp")} for root in (regdb, other)]
    assert not names[0] & names[1]


def test_default_sizes_please_the_released_evaluation() -> None:
    for layout in LAYOUTS.values():
        assert layout.ids["test"] >= 20
    assert LAYOUTS["regdb"].images == (10, 10)
    assert LAYOUTS["regdb"].ids["train"] == LAYOUTS["regdb"].ids["test"], "halves"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**REGDB, "val_ids": 2}, "val_ids: layout 'regdb' has no val list, got 2"),
        ({**LLCM_SIZE, "val_ids": 1}, "val_ids: layout 'llcm' has no val list, got 1"),
        ({**REGDB, "train_images": (1, 1)}, "train_images: RegDB trains and tests on the same"),
        ({**REGDB, "test_ids": 1}, "expected enough for 10 different splits, got 3 and 1"),
        ({**REGDB, "train_ids": 0}, "train_ids: expected >= 1, got 0"),
        ({**LLCM_SIZE, "images": (3, 2)}, "images: expected 1 <= fewest <= most"),
    ],
)
def test_arguments_are_named(tmp_path: Path, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path / "d", **options)
    assert not list(tmp_path.iterdir())


def test_one_stand_in_replaces_another_but_no_real_data(tmp_path: Path, regdb: Path) -> None:
    root = synthesize(tmp_path / "d", workers=1, **REGDB)
    assert contents(root) == contents(regdb)
    synthesize(root, workers=1, overwrite=True, **LLCM_SIZE)
    assert check_llcm(root, decode=False).ok
    (root / "idx/synthetic.json").unlink()
    with pytest.raises(DataError, match="was not made by synth"):
        synthesize(root, workers=1, overwrite=True, **REGDB)
    assert check_llcm(root, decode=False).ok
