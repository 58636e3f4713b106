"""`data check` for RegDB and LLCM: official counts, and the first offender by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from fastreid_vi.data import DataError, check_llcm, check_regdb
from fastreid_vi.data.check import check, layout_of
from tests.data.listed import (
    HALVINGS,
    REGDB_PIDS,
    llcm_name,
    regdb_files,
    write_lines,
    write_llcm,
    write_regdb,
)


@pytest.fixture
def regdb(tmp_path: Path) -> Path:
    return write_regdb(tmp_path / "regdb")


@pytest.fixture
def llcm(tmp_path: Path) -> Path:
    return write_llcm(tmp_path / "llcm")


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_good_regdb(regdb: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = check_regdb(regdb, progress=lambda *call: seen.append(call))
    assert report.ok
    assert not report.official
    assert report.columns == ("visible", "thermal")
    assert report.images["all"] == (12, 12)
    assert report.images["train 7"] == report.images["test 7"] == (6, 6)
    assert report.identities["all"] == 6
    assert report.identities["test 10"] == 3
    assert report.decoded == 24
    assert seen[-1] == (24, 24)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["ok"] is True
    assert values["layout"] == "regdb"


def test_good_llcm(llcm: Path) -> None:
    report = check_llcm(llcm)
    assert report.ok
    assert report.columns == ("vis", "nir")
    assert report.images == {"train": (10, 8), "test": (8, 8)}
    assert report.identities == {"train": 3, "test": 2}
    assert report.decoded == 34
    assert json.loads(json.dumps(report.to_dict()))["layout"] == "llcm"


VISIBLE = regdb_files(2, "Visible")
TRIAL_2 = [pid for half in HALVINGS[1] for pid in half]


def copy_trial(root: Path) -> None:
    for name in ("train_visible", "train_thermal", "test_visible", "test_thermal"):
        shutil.copy(root / f"idx/{name}_4.txt", root / f"idx/{name}_6.txt")


@pytest.mark.parametrize(
    ("damage", "where", "problem"),
    [
        (lambda r: shutil.rmtree(r / "Thermal"), "Thermal", "folder is missing"),
        (lambda r: (r / "idx/test_visible_9.txt").unlink(), "idx/test_visible_9.txt", "cannot be"),
        (lambda r: (r / VISIBLE[0]).unlink(), "idx/train_visible_1.txt|idx/test_visible_1.txt",
         rf"line \d: {VISIBLE[0]} does not exist"),
        (lambda r: shutil.copy(r / VISIBLE[0], r / "Visible/2/extra.bmp"), "Visible/2",
         "1 of 3 images are in no list of trial 1"),
        (lambda r: edit(r / "idx/test_thermal_5.txt", " 2", " 1"), "idx/test_thermal_5.txt",
         "line 5: label 1 for pid"),
        (copy_trial, "idx/train_visible_6.txt", "the persons of trial 4 once more"),
        (lambda r: (r / VISIBLE[1]).write_bytes(b"BM"), VISIBLE[1], "unreadable image"),
        (lambda r: shutil.copytree(r / "Visible/2", r / "Visible/77") and
         (r / "Visible/77" / VISIBLE[0].split("/")[2]).unlink(),
         "Thermal/77", "no image of a person with 1 in Visible"),
    ],
)  # fmt: skip
def test_first_offender_of_regdb(regdb: Path, damage, where: str, problem: str) -> None:
    damage(regdb)
    report = check_regdb(regdb)
    assert not report.ok
    assert re.fullmatch(where, report.findings[0].where)
    assert re.search(problem, report.findings[0].problem)
    assert str(regdb) not in str(report.findings[0])
    assert all("\n" not in str(finding) for finding in report.findings)


FIRST = f"vis/0002/{llcm_name(2, 1, 90, 'vis')}"
TESTED = f"test_nir/cam2/0008/{llcm_name(8, 2, 7, 'nir')}"


def moved(root: Path) -> None:
    """A file in another camera's folder, and the list with it."""
    target = TESTED.replace("cam2", "cam5")
    (root / target).parent.mkdir(parents=True)
    (root / TESTED).rename(root / target)
    edit(root / "idx/test_nir.txt", TESTED, target)


def other_camera(root: Path) -> None:
    name = f"test_nir/cam3/0007/{llcm_name(7, 3, 1, 'nir')}"
    (root / name).parent.mkdir(parents=True)
    shutil.copy(root / TESTED, root / name)


@pytest.mark.parametrize(
    ("damage", "where", "problem"),
    [
        (lambda r: shutil.rmtree(r / "test_vis"), "test_vis", "folder is missing"),
        (lambda r: (r / "idx/train_nir.txt").unlink(), "idx/train_nir.txt", "cannot be read"),
        (lambda r: (r / "idx/test_id.txt").write_text("7,8,2"), "idx", "pid 2 is in a training"),
        (lambda r: (r / "idx/test_id.txt").write_text("7,8,9"), "test_vis",
         "test identity 0009 has no image in any camera"),
        (lambda r: (r / FIRST).unlink(), "idx/train_vis.txt", f"line 1: {FIRST} does not exist"),
        (lambda r: (r / TESTED).unlink(), "idx/test_nir.txt", f"{TESTED} does not exist"),
        (lambda r: edit(r / "idx/train_nir.txt", " 0", " 2"), "idx/train_nir.txt",
         "label 2 for pid 12, which had 0"),
        (lambda r: shutil.copy(r / FIRST, r / FIRST.replace("f90", "f95")),
         FIRST.replace("f90", "f95"), r"is not in idx/train_vis\.txt"),
        (moved, TESTED.replace("cam2", "cam5"), "the name says camera 2, the folder cam5"),
        (other_camera, "test_nir/cam3", "no infrared test image comes from camera 3"),
        (lambda r: (r / FIRST).write_bytes(b""), FIRST, "unreadable image"),
        (lambda r: write_lines(r / "idx/test_vis.txt", [("test_vis/0007/a.jpg", 0)]),
         "idx/test_vis.txt", "line 1: expected test_vis/cam<k>/<pid>/<image>, got"),
    ],
)  # fmt: skip
def test_first_offender_of_llcm(llcm: Path, damage, where: str, problem: str) -> None:
    damage(llcm)
    report = check_llcm(llcm)
    assert not report.ok
    assert report.findings[0].where == where
    assert re.search(problem, report.findings[0].problem)
    assert str(llcm) not in str(report.findings[0])
    assert all("\n" not in str(finding) for finding in report.findings)


def test_official_counts(regdb: Path, llcm: Path) -> None:
    report = check_regdb(regdb, against="official", decode=False)
    assert str(report.findings[0]) == f"Visible: {len(REGDB_PIDS)} persons, expected 412"
    assert any("expected 2060 of 206" in f.problem for f in report.findings)
    found = [str(f) for f in check_llcm(llcm, against="official", decode=False).findings]
    assert found == [
        "idx: 3 identities of train, expected 713",
        "idx/test_id.txt: 2 identities of test, expected 351",
        "vis: 10 images, expected 16946",
        "nir: 8 images, expected 13975",
        "test_vis: 8 images, expected 8680",
        "test_nir: 8 images, expected 7166",
    ]


def test_a_data_set_of_the_official_size_is_held_against_it(llcm: Path) -> None:
    (llcm / "idx/test_id.txt").write_text(",".join(str(7 + i) for i in range(351)))
    report = check_llcm(llcm, decode=False)
    assert report.official
    assert "expected 713" in str(report.findings[-5])


def test_layout_is_seen(regdb: Path, llcm: Path, tmp_path: Path) -> None:
    assert layout_of(regdb) == "regdb"
    assert layout_of(llcm) == "llcm"
    assert layout_of(tmp_path) == "sysu"
    shutil.rmtree(llcm / "vis")
    assert check(llcm, decode=False).findings[0].where == "vis"
    assert check(regdb, decode=False).ok
    assert check(regdb, layout="llcm", decode=False).findings[0].where == "vis"
    with pytest.raises(ValueError, match="layout"):
        check(regdb, layout="market")  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [check_regdb, check_llcm, check])
def test_bad_calls(tmp_path: Path, call) -> None:
    with pytest.raises(DataError, match="no such folder"):
        call(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="against"):
        call(tmp_path, against="both")


@pytest.mark.parametrize("call", [check_regdb, check_llcm])
def test_an_empty_folder_is_all_findings(tmp_path: Path, call) -> None:
    report = call(tmp_path)
    assert not report.ok
    assert report.decoded == 0
    assert "folder is missing" in str(report.findings[0])
