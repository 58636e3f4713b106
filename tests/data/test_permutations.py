from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat, savemat

from fastreid_vi.data import DataError, Permutations, SysuMM01
from tests.conftest import golden
from tests.data.conftest import permutations_for


def rows(m: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(m) + 1 for _ in range(10)])


def same(a: Permutations, b: Permutations) -> bool:
    return a.cells == b.cells and all(np.array_equal(a[k], b[k]) for k in a)


def nested(cams=6, cells=2, m=3) -> np.ndarray:
    outer = np.empty((cams, 1), dtype=object)
    for cam in range(cams):
        inner = np.empty((cells, 1), dtype=object)
        for pid in range(cells):
            inner[pid, 0] = rows(m).astype(np.uint8)
        outer[cam, 0] = inner
    return outer


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.integers(1, 6), st.integers(1, 9)), st.integers(0, 6), max_size=12
    ),
    st.integers(0, 99),
)
def test_file_round_trip(tmp_path_factory, counts, seed):
    path = tmp_path_factory.mktemp("mat") / "rand_perm_cam.mat"
    before = permutations_for(counts, seed)
    before.to_mat(path)
    assert same(Permutations.from_mat(path), before)
    assert [p.name for p in path.parent.iterdir()] == ["rand_perm_cam.mat"]


def test_equal_sized_folders_keep_the_cell_nesting(tmp_path):
    path = tmp_path / "p.mat"
    before = Permutations({(cam, pid): rows(4, pid) for cam in range(1, 7) for pid in (1, 2, 3)})
    before.to_mat(path)
    # The way every released reader indexes it.
    cell = loadmat(path)["rand_perm_cam"]
    assert cell.shape == (6, 1)
    assert cell[0, 0].shape == (3, 1)
    assert cell[2, 0][1, 0].dtype == np.uint8
    np.testing.assert_array_equal(cell[2, 0][1, 0][7, :2], before[3, 2][7, :2])
    np.testing.assert_array_equal(np.squeeze(cell[0, 0])[2], before[1, 3])


def test_absent_persons_and_the_number_of_cells(tmp_path):
    path = tmp_path / "p.mat"
    Permutations({(1, 5): rows(2)}).to_mat(path)
    cell = loadmat(path)["rand_perm_cam"]
    assert [cell[cam, 0].shape for cam in range(6)] == [(5, 1)] * 6
    assert cell[3, 0][4, 0].shape == (10, 0)
    read = Permutations.from_mat(path)
    assert read[1, 4].shape == (10, 0)
    assert (1, 6) not in read
    assert len(read) == 30
    assert Permutations({}).cells == (2,) * 6


def test_different_numbers_of_cells_survive(tmp_path):
    cells = golden("eval/sysu_protocol")["perm_cells_per_cam"].tolist()
    Permutations({(2, 7): rows(3)}, cells).to_mat(tmp_path / "p.mat")
    assert Permutations.from_mat(tmp_path / "p.mat").cells == tuple(cells)


def test_more_than_255_images(tmp_path):
    Permutations({(1, 1): rows(300), (1, 2): rows(255)}).to_mat(tmp_path / "p.mat")
    cell = loadmat(tmp_path / "p.mat")["rand_perm_cam"]
    assert cell[0, 0][0, 0].dtype == np.uint16
    assert cell[0, 0][1, 0].dtype == np.uint8
    assert Permutations.from_mat(tmp_path / "p.mat")[1, 1].max() == 300


def test_real_sizes(tmp_path):
    counts = golden("eval/sysu_real_counts")["counts"]
    folders = {(c + 1, p + 1): int(n) for (c, p), n in np.ndenumerate(counts)}
    before = permutations_for(folders)
    before.to_mat(tmp_path / "p.mat")
    assert same(Permutations.from_mat(tmp_path / "p.mat"), before)


def test_a_row_that_is_no_permutation_is_named(tmp_path):
    outer = nested()
    outer[3, 0][1, 0][6] = [1, 2, 2]
    savemat(tmp_path / "p.mat", {"rand_perm_cam": outer})
    with pytest.raises(DataError, match=r"p\.mat: cam4/0002: trial 6 is not a permutation of 1..3"):
        Permutations.from_mat(tmp_path / "p.mat")
    zero_based = rows(3) - 1
    with pytest.raises(DataError, match="cam1/0001: trial 0"):
        Permutations({(1, 1): zero_based})
    with pytest.raises(DataError, match=r"expected a numeric 10 x m matrix, got int64 \[9, 3\]"):
        Permutations({(1, 1): rows(3)[:9]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": np.zeros(3)}, r"expected the variable rand_perm_cam, got \['other'\]"),
        ({"rand_perm_cam": np.zeros((6, 1))}, "expected a 6 x 1 cell"),
        ({"rand_perm_cam": nested(cams=5)}, "expected a 6 x 1 cell"),
    ],
)
def test_another_nesting(tmp_path, content, message):
    savemat(tmp_path / "p.mat", content)
    with pytest.raises(DataError, match=message):
        Permutations.from_mat(tmp_path / "p.mat")


def test_a_camera_without_cells(tmp_path):
    outer = nested()
    outer[1, 0] = np.ones((2, 10, 3))
    savemat(tmp_path / "p.mat", {"rand_perm_cam": outer})
    with pytest.raises(DataError, match="camera 2: expected a cell"):
        Permutations.from_mat(tmp_path / "p.mat")


@pytest.mark.parametrize("damage", [b"", b"MATLAB", b"\x89PNG" * 300])
def test_not_a_matlab_file(tmp_path, damage):
    (tmp_path / "p.mat").write_bytes(damage)
    with pytest.raises(DataError, match="not a readable MATLAB 5 file"):
        Permutations.from_mat(tmp_path / "p.mat")


def test_truncated_file(tmp_path):
    path = tmp_path / "p.mat"
    permutations_for({(1, 3): 40, (6, 3): 40}).to_mat(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="not a readable MATLAB 5 file"):
        Permutations.from_mat(path)


def test_outside_the_cells():
    with pytest.raises(ValueError, match="camera 7, pid 1"):
        Permutations({(7, 1): rows(1)})
    with pytest.raises(ValueError, match="camera 1, pid 3"):
        Permutations({(1, 3): rows(1)}, (2,) * 6)
    with pytest.raises(ValueError, match="cells: expected 6"):
        Permutations({}, (2, 2))


def test_check_reports_the_first_folder_that_disagrees(sysu):
    data = SysuMM01(sysu)
    data.permutations.check(data.query)
    data.permutations.check(data.gallery)
    changed = Permutations(
        {
            k: rows(v.shape[1] + 1) if k in ((3, 21), (6, 5)) else v
            for k, v in data.permutations.items()
        },
        data.permutations.cells,
    )
    gallery_cams = data.query.select(data.query.cams == 3)
    with pytest.raises(DataError, match=r"cam3/0021: 5 images on disk, .* permutes 6"):
        changed.check(gallery_cams, pids=[21])
    with pytest.raises(DataError, match=r"^cam1/0005: 0 images on disk, but .* permutes 2"):
        data.permutations.check(data.query, pids=[5], cams=[1, 3])


def test_check_with_a_person_beyond_the_cells(sysu):
    data = SysuMM01(sysu)
    short = Permutations({(1, 5): rows(2)})
    with pytest.raises(DataError, match=r"cam3/0005: 2 images on disk, .* permutes 0"):
        short.check(data.query.select(data.query.pids == 5))


def test_draw_orders_every_folder(sysu):
    shutil.move(sysu / "cam1" / "0003" / "0002.jpg", sysu / "cam1" / "0003" / "0077.jpg")
    train = SysuMM01(sysu).train
    drawn = Permutations.draw(train, seed=3)
    assert drawn[1, 3].shape[0] == 10
    numbers = sorted(train.numbers[(train.cams == 1) & (train.pids == 3)])
    assert 77 in numbers
    for row in drawn[1, 3]:
        assert sorted(row) == numbers
    assert drawn[1, 2].shape == (10, 0)
    assert same(drawn, Permutations.draw(train, seed=3))
    assert not same(drawn, Permutations.draw(train, seed=4))
    assert len({tuple(row) for row in drawn[3, 9]}) > 1
