from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data import DataError, ImageList, Permutations, SysuMM01, images_in
from tests.conftest import golden
from tests.data.conftest import SMALL, SMALL_SPLITS, WriteTree, jpeg, write_files, write_lists


@pytest.fixture(scope="module")
def protocol_tree(tmp_path_factory) -> Path:
    """The tree of the golden protocol vectors, with the golden permutations."""
    vectors = golden("eval/sysu_protocol")
    root = tmp_path_factory.mktemp("protocol")
    counts = {
        (cam + 1, pid + 1): int(count) for (cam, pid), count in np.ndenumerate(vectors["counts"])
    }
    image = jpeg(1)
    write_files(root, counts, lambda *_: image)
    trained = vectors["train_ids_order"].tolist()
    write_lists(
        root,
        {"train": trained[:10], "val": trained[10:], "test": vectors["test_ids"].tolist()},
    )
    values, offsets = vectors["perm_values"], vectors["perm_offsets"]
    cells = vectors["perm_cells_per_cam"].tolist()
    folders = [(cam, pid) for cam, n in enumerate(cells, 1) for pid in range(1, n + 1)]
    Permutations(
        {
            folder: values[offsets[k] : offsets[k + 1]].reshape(10, -1)
            for k, folder in enumerate(folders)
        },
        cells,
    ).to_mat(root / "exp" / "rand_perm_cam.mat")
    return root


def test_test_lists_are_the_golden_ones(protocol_tree):
    vectors, data = golden("eval/sysu_protocol"), SysuMM01(protocol_tree)
    for images, prefix in ((data.query, "q"), (data.gallery, "g")):
        np.testing.assert_array_equal(images.pids, vectors[f"{prefix}_ids"])
        np.testing.assert_array_equal(images.cams, vectors[f"{prefix}_cams"])
        np.testing.assert_array_equal(images.numbers, vectors[f"{prefix}_img"])
        assert (images.labels == -1).all()
    assert set(data.query.modality) == {INFRARED}
    assert set(data.gallery.modality) == {VISIBLE}


def test_training_list_in_file_order_is_the_golden_one(protocol_tree):
    vectors = golden("eval/sysu_protocol")
    data = SysuMM01(protocol_tree, label_order="file")
    np.testing.assert_array_equal(data.train.pids, vectors["train_pids"])
    np.testing.assert_array_equal(data.train.cams, vectors["train_cams"])
    np.testing.assert_array_equal(data.train.labels, vectors["train_labels"])
    assert data.num_ids == len(vectors["train_ids_order"])


def test_identity_order_is_the_golden_query_order(protocol_tree):
    by_path = SysuMM01(protocol_tree).query
    by_identity = SysuMM01(protocol_tree, image_order="identity").query
    order = golden("eval/sysu_protocol")["agw_query_order"]
    assert by_identity.paths == by_path.select(order).paths


def test_permutations_choose_the_golden_gallery(protocol_tree):
    vectors, data = golden("eval/sysu_protocol"), SysuMM01(protocol_tree)
    gallery, permutations = data.gallery, data.permutations
    for shots in (1, 10):
        for trial in range(10):
            chosen = [
                i
                for i in range(len(gallery))
                if gallery.numbers[i]
                in permutations[int(gallery.cams[i]), int(gallery.pids[i])][trial, :shots]
            ]
            expected = vectors[f"all_{shots}_sel"][trial]
            assert chosen == expected[expected >= 0].tolist()


def test_label_orders(sysu):
    by_rank = SysuMM01(sysu).train
    assert dict(zip(by_rank.pids.tolist(), by_rank.labels.tolist(), strict=True)) == {
        3: 0, 7: 1, 9: 2, 12: 3,
    }  # fmt: skip
    by_file = SysuMM01(sysu, label_order="file").train
    assert dict(zip(by_file.pids.tolist(), by_file.labels.tolist(), strict=True)) == {
        12: 0, 3: 1, 7: 2, 9: 3,
    }  # fmt: skip
    assert by_rank.paths == by_file.paths


def test_train_split_alone(sysu):
    data = SysuMM01(sysu, splits=("train",))
    assert data.num_ids == 3
    assert set(data.train.pids) == {3, 7, 12}
    assert sorted(set(data.train.labels)) == [0, 1, 2]


def test_image_orders(sysu):
    train = SysuMM01(sysu).train
    keys = list(zip(train.cams, train.pids, train.numbers, strict=True))
    assert keys == sorted(keys)
    assert list(train.paths) == sorted(train.paths)
    train = SysuMM01(sysu, image_order="identity").train
    keys = list(zip(train.modality, train.pids, train.cams, train.numbers, strict=True))
    assert keys == sorted(keys)


def test_every_image_once_with_its_camera_and_modality(sysu):
    data = SysuMM01(sysu)
    expected = sum(n for (_, pid), n in SMALL.items() if pid in (3, 7, 9, 12))
    assert len(data.train) == len(set(data.train.paths)) == expected
    for path, pid, cam, number, modality in zip(
        data.train.paths, data.train.pids, data.train.cams, data.train.numbers,
        data.train.modality, strict=True,
    ):  # fmt: skip
        assert path == f"cam{cam}/{pid:04d}/{number:04d}.jpg"
        assert modality == (INFRARED if cam in (3, 6) else VISIBLE)
    assert all(data.query.file(i).is_file() for i in range(len(data.query)))


def test_strays_are_ignored(sysu):
    expected = SysuMM01(sysu)
    strays = """x.jpg cam1/y.jpg cam1/0003/thumb.jpg cam1/0003/._0001.jpg cam1/0003/more/0001.jpg
        cam7/0003/0001.jpg cam1/pid3/0001.jpg cam1/0003/0001.txt cam2/0444/0001.jpg
        other/cam1/0003/0001.jpg"""
    for stray in strays.split():
        path = sysu / stray
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not an image")
    found = SysuMM01(sysu)
    for name in ("train", "query", "gallery"):
        assert getattr(found, name).paths == getattr(expected, name).paths


def test_names_need_no_padding(sysu):
    (sysu / "cam1" / "0003").rename(sysu / "cam1" / "3")
    (sysu / "cam1" / "3" / "0001.jpg").rename(sysu / "cam1" / "3" / "1.JPG")
    train = SysuMM01(sysu).train
    index = train.paths.index("cam1/3/1.JPG")
    assert (train.cams[index], train.pids[index], train.numbers[index]) == (1, 3, 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root), "no such folder"),
        (lambda root: shutil.rmtree(root / "cam4"), "camera folder cam4 is missing"),
        (lambda root: shutil.rmtree(root / "exp"), r"train_id\.txt: cannot be read: No such file"),
        (lambda root: (root / "exp" / "val_id.txt").unlink(), r"val_id\.txt: cannot be read"),
        (lambda root: write_lists(root, {"train": []}), r"train_id\.txt: empty split"),
        (lambda root: write_lists(root, {"test": []}), r"test_id\.txt: empty split"),
        (lambda root: write_lists(root, {"val": ["9", "x1"]}), r"val_id\.txt: .* got 'x1'"),
        (lambda root: write_lists(root, {"val": [9, 0]}), r"val_id\.txt: .* got '0'"),
        (lambda root: write_lists(root, {"val": [9, 9]}), "pid 9 is listed twice"),
        (lambda root: write_lists(root, {"val": [9, 21]}), "pid 21 is in val_id.txt and test_id"),
        (lambda root: write_lists(root, {"val": [9, 77]}), "training identity 0077 has no image"),
        (lambda root: write_lists(root, {"test": [90]}), "no test identity .* cameras 3 and 6"),
        (
            lambda root: (root / "exp" / "rand_perm_cam.mat").unlink(),
            r"rand_perm_cam\.mat: missing; .* evaluation/data_split, 297,740 bytes",
        ),
        (lambda root: (root / "cam5" / "0021" / "0001.jpg").unlink(), r"cam5/0021: .* on disk"),
        (lambda root: shutil.rmtree(root / "cam2" / "0005"), r"cam2/0005: 0 images on disk"),
        (
            lambda root: (root / "cam2" / "0005" / "0001.jpg").rename(
                root / "cam2" / "0005" / "0099.jpg"
            ),
            r"cam2/0005: image numbers on disk are not 1\.\.",
        ),
        (lambda root: (root / "cam1" / "3").mkdir(), "pid 3 has a second folder"),
        (
            lambda root: shutil.copy(
                root / "cam1" / "0003" / "0001.jpg", root / "cam1" / "0003" / "1.jpeg"
            ),
            "image 1 exists a second time",
        ),
    ],
)
def test_damage_is_named(sysu, damage, message):
    damage(sysu)
    with pytest.raises(DataError, match=message) as caught:
        SysuMM01(sysu)
    assert "\n" not in str(caught.value)


def test_gallery_without_visible_images(write_tree: WriteTree):
    counts = {k: n for k, n in SMALL.items() if k[1] != 5} | {(3, 5): 3}
    root = write_tree(counts, {**SMALL_SPLITS, "test": (5,)})
    with pytest.raises(DataError, match=r"no test identity .* cameras 1, 2, 4 and 5"):
        SysuMM01(root)


def test_root_one_level_too_high_gets_a_hint(write_tree: WriteTree):
    root = write_tree(name="SYSU-MM01")
    with pytest.raises(DataError, match=r"did you mean .*SYSU-MM01"):
        SysuMM01(root.parent)


@pytest.mark.parametrize(
    "option",
    [{"splits": ("test",)}, {"splits": ()}, {"splits": "train"}, {"label_order": "x"},
     {"image_order": "x"}],
)  # fmt: skip
def test_unknown_options(sysu, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        SysuMM01(sysu, **option)


def test_hold_out(sysu):
    data = SysuMM01(sysu)
    train, validation = data.hold_out(2, seed=5)
    held = set(validation.pids)
    assert len(held) == 2
    assert held.isdisjoint(train.pids)
    assert sorted((*train.paths, *validation.paths)) == sorted(data.train.paths)
    assert (validation.labels == -1).all()
    assert sorted(set(train.labels)) == [0, 1]
    # Order of labels is kept.
    pids = [train.pids[train.labels == label][0] for label in (0, 1)]
    assert pids == sorted(pids)
    for pid in held:
        assert set(validation.modality[validation.pids == pid]) == {VISIBLE, INFRARED}
    again = data.hold_out(2, seed=5)
    assert again[0].paths == train.paths
    assert len({tuple(data.hold_out(2, seed=s)[1].paths) for s in range(8)}) > 1


def test_hold_out_takes_identities_of_both_modalities_only(sysu):
    shutil.rmtree(sysu / "cam3" / "0007")
    shutil.rmtree(sysu / "cam6" / "0007")
    data = SysuMM01(sysu)
    for seed in range(10):
        assert 7 not in data.hold_out(3, seed)[1].pids
    with pytest.raises(DataError, match=r"cannot hold out 4 identities: 4 .* 3 of them"):
        data.hold_out(4, 0)
    train, validation = data.hold_out(0, 0)
    assert train.paths == data.train.paths
    assert len(validation) == 0


def test_skip_broken(sysu, caplog):
    broken = ["cam1/0003/0002.jpg", "cam3/0021/0001.jpg", "cam4/0021/0003.jpg"]
    for path in broken:
        (sysu / path).write_bytes((sysu / path).read_bytes()[:150])
    before = SysuMM01(sysu)
    with caplog.at_level(logging.WARNING, "fastreid_vi.data"):
        after = SysuMM01(sysu, skip_broken=True)
    assert "left out 3 unreadable images, first cam1/0003/0002.jpg" in caplog.text
    for name, path in zip(("train", "query", "gallery"), broken, strict=True):
        old, new = getattr(before, name), getattr(after, name)
        assert [p for p in old.paths if p != path] == list(new.paths)
    rows, old_rows = after.permutations[4, 21], before.permutations[4, 21]
    assert rows.shape == (10, old_rows.shape[1] - 1)
    np.testing.assert_array_equal(rows[4], [n for n in old_rows[4] if n != 3])
    np.testing.assert_array_equal(after.permutations[5, 21], before.permutations[5, 21])


def test_skip_broken_is_quiet_on_good_data(sysu, caplog):
    good = SysuMM01(sysu, skip_broken=True)
    assert good.train.paths == SysuMM01(sysu).train.paths
    assert not caplog.records


def test_skip_broken_refuses_to_lose_an_identity(sysu):
    for path in sysu.glob("cam*/0009/*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="training identity"):
        SysuMM01(sysu, skip_broken=True)


def test_image_list_select_and_shapes(sysu):
    train = SysuMM01(sysu).train
    some = train.select([5, 0])
    assert some.paths == (train.paths[5], train.paths[0])
    assert train.select(train.cams == 3).paths == tuple(p for p in train.paths if "cam3" in p)
    assert len(train.select([])) == 0
    with pytest.raises(ValueError, match=r"mask of shape"):
        train.select(np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match="cams: expected shape"):
        ImageList(
            train.root, train.paths, train.pids, train.cams[:1], train.numbers, train.modality,
            train.labels,
        )  # fmt: skip


def test_images_in(tmp_path):
    for name in ("b/2.JPG", "a.png", "b/1.jpeg", "c/d/x.bmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(0))
    for name in (".hidden.jpg", ".cache/1.jpg", "b/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images = images_in(tmp_path, modality=INFRARED)
    assert images.paths == ("a.png", "b/1.jpeg", "b/2.JPG", "c/d/x.bmp")
    assert set(images.modality) == {INFRARED}
    assert set(images.pids) == set(images.labels) == {-1}
    with pytest.raises(DataError, match="no image file"):
        images_in(_empty(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        images_in(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="modality"):
        images_in(tmp_path, modality=2)


def _empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_index_and_samplers_load_no_torch():
    code = (
        "import sys, fastreid_vi.data, fastreid_vi.data.check, fastreid_vi.data.transform;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
