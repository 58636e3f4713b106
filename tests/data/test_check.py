from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from fastreid_vi.data import DataError, check, check_sysu
from fastreid_vi.data.check import OFFICIAL_IDENTITIES, OFFICIAL_IMAGES, OFFICIAL_PIDS
from tests.conftest import golden
from tests.data.conftest import SMALL, jpeg, permutations_for, write_files, write_lists


def findings(root: Path, **options) -> list[str]:
    return [str(finding) for finding in check_sysu(root, **options).findings]


@pytest.fixture
def real(tmp_path, monkeypatch) -> tuple[Path, dict[tuple[int, int], int]]:
    """Lists and permutations of the real sizes; the 45,863 files are listed from the counts."""
    vectors = golden("eval/sysu_real_counts")
    counts = {(c + 1, p + 1): int(n) for (c, p), n in np.ndenumerate(vectors["counts"])}
    write_files(tmp_path, {}, lambda *_: b"")
    write_lists(tmp_path, {s: vectors[f"{s}_id"].tolist() for s in ("train", "val", "test")})
    permutations_for(counts).to_mat(tmp_path / "exp" / "rand_perm_cam.mat")

    def scan(root, pids, cams):
        return [
            (cam, pid, number, f"cam{cam}/{pid:04d}/{number:04d}.jpg")
            for (cam, pid), count in counts.items()
            for number in range(1, count + 1)
            if pid in pids and cam in cams
        ]

    monkeypatch.setattr(check, "scan", scan)
    return tmp_path, counts


def test_the_real_counts_pass(real):
    report = check_sysu(real[0], decode=False)
    assert report.ok
    assert report.official
    assert report.images == OFFICIAL_IMAGES
    assert report.pids == OFFICIAL_PIDS
    assert report.identities == OFFICIAL_IDENTITIES == {"train": 296, "val": 99, "test": 96}
    assert sum(map(sum, report.images.values())) == 29_033 + 15_712


def test_a_training_image_missing_from_the_real_data(real):
    root, counts = real
    counts[1, 1] -= 1
    assert findings(root, decode=False) == [
        "cam1/0001: 28 images on disk, but rand_perm_cam.mat permutes 29",
        "cam1: 4720 images of train, expected 4721",
    ]
    assert findings(root, decode=False, against="itself") == []


def test_a_person_missing_from_a_camera_of_the_real_data(real):
    root, counts = real
    images, counts[6, 6] = counts[6, 6], 0
    assert findings(root, decode=False) == [
        f"cam6/0006: 0 images on disk, but rand_perm_cam.mat permutes {images}",
        f"cam6: {1920 - images} images of test, expected 1920",
        "cam6: 95 identities of test, expected 96",
    ]


def test_another_list_in_the_real_data(real):
    path = real[0] / "exp" / "val_id.txt"
    path.write_text(path.read_text().replace("334,", ""))
    report = check_sysu(real[0], decode=False)
    assert report.official
    assert report.findings[0].where == "exp/val_id.txt"
    assert "98 identities, not the 99 of the official list" in report.findings[0].problem


def test_a_stand_in_is_held_against_itself(sysu):
    seen: list[tuple[int, int]] = []
    report = check_sysu(sysu, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert not report.official
    assert report.identities == {"train": 3, "val": 1, "test": 3}
    for split, pids in {"train": (3, 7, 12), "val": (9,), "test": (5, 21, 30)}.items():
        assert report.images[split] == tuple(
            sum(SMALL.get((cam, pid), 0) for pid in pids) for cam in range(1, 7)
        )
        assert report.pids[split] == tuple(
            sum((cam, pid) in SMALL for pid in pids) for cam in range(1, 7)
        )
    total = sum(map(sum, report.images.values()))
    assert report.decoded == total
    assert seen[-1] == (total, total)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_official_counts_on_request(sysu):
    report = check_sysu(sysu, against="official", decode=False)
    assert not report.ok
    assert report.decoded == 0
    assert "cam1: 0 images of train" not in str(report.findings[0])
    assert any("expected 4721" in f.problem for f in report.findings)


@pytest.mark.parametrize(
    ("damage", "where", "problem"),
    [
        (lambda r: shutil.rmtree(r / "cam3"), "cam3", "cam3: camera folder is missing"),
        (lambda r: (r / "exp/test_id.txt").unlink(), "exp/test_id.txt", "cannot be read"),
        (lambda r: write_lists(r, {"val": [9, 3]}), "exp", "pid 3 is in train_id.txt and val_id"),
        (lambda r: (r / "cam1/3").mkdir(), "cam1/3", "pid 3 has a second folder 0003"),
        (
            lambda r: (r / "cam4/0021/0001.jpg").unlink(),
            "cam4/0021",
            r"cam4/0021: 5 images on disk, but rand_perm_cam\.mat permutes 6",
        ),
        (
            lambda r: (r / "exp/rand_perm_cam.mat").unlink(),
            "exp/rand_perm_cam.mat",
            "official SYSU-MM01 evaluation package",
        ),
        (
            lambda r: [shutil.rmtree(r / f"cam{c}/0012") for c in (3, 6)],
            "exp/train_id.txt",
            "train identity 0012 has no infrared image",
        ),
        (
            lambda r: [shutil.rmtree(r / f"cam{c}/0009") for c in (4, 5)],
            "exp/val_id.txt",
            "val identity 0009 has no visible image",
        ),
        (
            lambda r: (r / "cam2/0003/0001.jpg").write_bytes(jpeg(0)[:200]),
            "cam2/0003/0001.jpg",
            r"cam2/0003/0001\.jpg: unreadable image: .*[Tt]runcated",
        ),
        (
            lambda r: (r / "cam6/0030/0012.jpg").write_bytes(b"hello"),
            "cam6/0030/0012.jpg",
            "cannot identify image file",
        ),
        (
            lambda r: savemat(r / "exp/test_id.mat", {"id": np.uint16([[5, 21, 31]])}),
            "exp/test_id.mat",
            r"other pids than in test_id\.txt",
        ),
    ],
)
def test_the_first_offender_is_named(sysu, damage, where, problem):
    damage(sysu)
    report = check_sysu(sysu)
    assert not report.ok
    assert report.findings[0].where == where
    assert re.search(problem, str(report.findings[0]))
    assert str(sysu) not in str(report.findings[0])
    assert all("\n" not in finding.problem for finding in report.findings)


def test_a_matching_twin_and_a_broken_one(sysu):
    savemat(sysu / "exp/test_id.mat", {"id": np.uint16([[5, 21, 30]])})
    assert check_sysu(sysu).ok
    (sysu / "exp/test_id.mat").write_bytes(b"x")
    assert "not a MATLAB 5 file" in findings(sysu)[0]


def test_all_broken_images_are_listed(sysu):
    paths = ["cam1/0003/0002.jpg", "cam4/0021/0003.jpg"]
    for path in paths:
        (sysu / path).write_bytes(b"")
    report = check_sysu(sysu, threads=3)
    assert [f.where for f in report.findings] == paths
    assert report.decoded == sum(map(sum, report.images.values())) - 2
    assert check_sysu(sysu, decode=False).ok


def test_bad_calls(tmp_path, sysu):
    with pytest.raises(DataError, match="no such folder"):
        check_sysu(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="against"):
        check_sysu(sysu, against="both")


def test_an_empty_folder_is_all_findings(tmp_path):
    report = check_sysu(tmp_path)
    assert [f.where for f in report.findings] == [
        *(f"cam{c}" for c in range(1, 7)),
        *(f"exp/{s}_id.txt" for s in ("train", "val", "test")),
        "exp/rand_perm_cam.mat",
    ]
