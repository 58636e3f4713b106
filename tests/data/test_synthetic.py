"""The stand-in data set: what released loaders need, what pictures may tell, what may go wrong."""

from __future__ import annotations

import errno
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import loadmat

from fastreid_vi.data import DataError, Permutations, SysuMM01, check_sysu, synthesize
from fastreid_vi.data.drawing.camera import INFRARED_CAMERAS
from fastreid_vi.data.drawing.roster import TEST_PATTERNS, Entry, draw_roster

TINY = {"train_ids": 4, "val_ids": 2, "test_ids": 7, "height": 32, "width": 16, "images": (1, 3)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("synth") / "tiny", workers=1, **TINY)


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def pictures(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(root).items() if name.endswith(".jpg")}


def roster(train: int = 60, val: int = 12, test: int = 30, seed: int = 0) -> tuple[Entry, ...]:
    counts = {"train": train, "val": val, "test": test}
    ranges = dict.fromkeys(counts, (2, 14))
    return draw_roster(counts, ranges, np.random.default_rng(seed))


def cameras_of(entries: tuple[Entry, ...], split: str) -> list[tuple[int, ...]]:
    return [tuple(sorted(entry.images)) for entry in entries if entry.split == split]


class TestReleasedLoaders:
    """The reading habits of the released code, spelled out."""

    def test_mpanet_turns_every_parent_folder_into_a_number(self, tree: Path) -> None:
        found = sorted(tree.glob("**/*.jpg"))
        assert len(found) == len(pictures(tree))
        for path in found:
            assert 1 <= int(path.parent.parent.name.removeprefix("cam")) <= 6
            assert int(path.parent.name) > 1

    def test_agw_counts_characters_from_the_end(self, tree: Path) -> None:
        for name in pictures(tree):
            cam, pid = int(name[-15]), int(name[-13:-9])
            assert name == f"cam{cam}/{pid:04d}/{int(name[-8:-4]):04d}.jpg"

    def test_agw_stacks_all_images_without_converting_them(self, tree: Path) -> None:
        for cams in ((1, 2, 4, 5), INFRARED_CAMERAS):
            files = [p for cam in cams for p in (tree / f"cam{cam}").glob("*/*.jpg")]
            stack = np.array([np.array(Image.open(p)) for p in files])
            assert stack.shape[1:] == (32, 16, 3)
            assert stack.dtype == np.uint8

    @pytest.mark.parametrize("name", ["train_id", "val_id", "test_id", "available_id"])
    def test_lists_are_one_line_of_numbers(self, tree: Path, name: str) -> None:
        lines = (tree / "exp" / f"{name}.txt").read_text().splitlines()
        ids = [int(word) for word in lines[0].split(",")]
        assert len(lines) == 1
        assert len(ids) == {"train_id": 4, "val_id": 2, "test_id": 7, "available_id": 13}[name]
        if name != "available_id":
            stored = loadmat(tree / "exp" / f"{name}.mat")["id"]
            assert stored.dtype == np.uint16
            np.testing.assert_array_equal(stored, [ids])

    def test_permutations_have_the_official_nesting(self, tree: Path) -> None:
        cells = loadmat(tree / "exp" / "rand_perm_cam.mat")["rand_perm_cam"]
        test_ids = [int(w) for w in (tree / "exp/test_id.txt").read_text().split(",")]
        assert cells.shape == (6, 1)
        for cam in range(1, 7):
            inner = cells[cam - 1, 0]
            assert inner.shape[0] >= max(test_ids)
            assert inner.shape[1] == 1
            for pid in test_ids:
                files = sorted((tree / f"cam{cam}" / f"{pid:04d}").glob("*.jpg"))
                orders = inner[pid - 1, 0]
                assert orders.dtype == np.uint8
                assert orders.shape == (10, len(files))
                # MPANet and MCJA squeeze before they index.
                assert np.squeeze(inner)[pid - 1].shape == orders.shape
                for t in range(10):
                    names = [f"{number:04d}.jpg" for number in sorted(orders[t])]
                    assert names == [p.name for p in files]

    def test_our_own_loader_and_check_agree(self, tree: Path) -> None:
        data = SysuMM01(tree)
        assert data.num_ids == 6
        assert set(data.train.labels.tolist()) == set(range(6))
        assert check_sysu(tree).ok
        data.permutations.check(data.gallery, set(data.gallery.pids.tolist()))

    def test_infrared_files_are_grey_and_visible_ones_are_not(self, tree: Path) -> None:
        for name in pictures(tree):
            pixels = np.asarray(Image.open(tree / name)).astype(int)
            spread = (pixels.max(2) - pixels.min(2)).max()
            assert (spread == 0) == (int(name[3]) in INFRARED_CAMERAS), name


class TestRoster:
    @pytest.mark.parametrize("test", [24, 30, 96])
    def test_every_presence_pattern_and_a_large_indoor_gallery(self, test: int) -> None:
        seen = cameras_of(roster(test=test), "test")
        assert len(seen) == test
        assert set(seen) == set(TEST_PATTERNS)
        assert sum(bool({1, 2} & set(cams)) for cams in seen) >= 20

    def test_real_size_has_the_real_proportions(self) -> None:
        seen = cameras_of(roster(test=96), "test")
        assert {cams: seen.count(cams) for cams in TEST_PATTERNS} == dict(TEST_PATTERNS)

    @given(st.integers(1, 60), st.integers(1, 10), st.integers(1, 60), st.integers(0, 9))
    @settings(max_examples=60, deadline=None)
    def test_any_size(self, train: int, val: int, test: int, seed: int) -> None:
        entries = roster(train, val, test, seed)
        pids = [entry.pid for entry in entries]
        assert pids == sorted(set(pids))
        assert pids[0] > 1
        assert pids[-1] > len(pids) + 1, "there must be gaps"
        splits = [entry.split for entry in entries]
        assert (splits.count("train"), splits.count("val"), splits.count("test")) == (
            train,
            val,
            test,
        )
        assert splits.count("outside") >= 1
        for entry in entries:
            assert set(entry.images) & {3, 6}, "infrared"
            assert set(entry.images) & {1, 4, 5} or entry.split == "outside"
            assert all(2 <= count <= 14 for count in entry.images.values())

    def test_some_train_and_test_persons_lack_camera_3(self) -> None:
        for seed in range(5):
            for split in ("train", "test"):
                assert any(3 not in cams for cams in cameras_of(roster(seed=seed), split))

    def test_file_order_differs_from_sorted_order(self) -> None:
        entries = roster()
        val = [e.pid for e in entries if e.split == "val"]
        train = [e.pid for e in entries if e.split == "train"]
        assert min(train) < min(val) < max(val) < max(train)

    def test_gallery_folders_on_both_sides_of_ten_shots(self) -> None:
        for seed in range(20):
            entries = roster(test=2, seed=seed)
            sizes = [
                count
                for entry in entries
                if entry.split == "test"
                for cam, count in entry.images.items()
                if cam in (1, 2, 4, 5)
            ]
            assert min(sizes) < 10 <= max(sizes)

    def test_train_images_are_set_apart(self, tmp_path: Path) -> None:
        options = TINY | {"images": (2, 2)}
        root = synthesize(tmp_path / "d", workers=1, train_images=(1, 1), **options)
        data = SysuMM01(root)
        assert set(data.train.numbers.tolist()) == {1}
        assert set(data.query.numbers.tolist()) == {1, 2}


class TestRepeatable:
    def test_processes_do_not_matter(self, tree: Path, tmp_path: Path) -> None:
        again = synthesize(tmp_path / "again", workers=2, **TINY)
        assert contents(again) == contents(tree)

    def test_seeds_give_other_people(self, tree: Path, tmp_path: Path) -> None:
        other = synthesize(tmp_path / "other", workers=1, seed=1, **TINY)
        assert not set(pictures(other).values()) & set(pictures(tree).values())

    def test_record(self, tree: Path) -> None:
        made = json.loads((tree / "exp" / "synthetic.json").read_text())
        assert made["layout"] == "sysu"
        assert {name: made[name] for name in TINY} == {**TINY, "images": [1, 3]}

    def test_progress_counts_every_picture(self, tmp_path: Path) -> None:
        calls: list[tuple[int, int]] = []
        root = synthesize(
            tmp_path / "d", workers=1, progress=lambda *call: calls.append(call), **TINY
        )
        total = len(pictures(root))
        assert calls[0] == (0, total)
        assert calls[-1] == (total, total)
        assert [done for done, _ in calls] == sorted({done for done, _ in calls})


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("train_ids", 0),
            ("val_ids", 0),
            ("test_ids", -1),
            ("train_ids", 8000),
            ("images", (0, 3)),
            ("images", (5, 3)),
            ("train_images", (3, 10000)),
            ("height", 8),
            ("width", 0),
            ("seed", -1),
            ("workers", 0),
            ("layout", "market"),
        ],
    )
    def test_arguments_are_named(self, tmp_path: Path, name: str, value: object) -> None:
        with pytest.raises(ValueError, match=r"identities|" + name):
            synthesize(tmp_path / "d", **{**TINY, name: value})
        assert not list(tmp_path.iterdir())

    def test_a_filled_folder_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "thesis.txt").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(DataError, match=r"d: (is not empty|was not made by synth)"):
                synthesize(tmp_path / "d", workers=1, overwrite=overwrite, **TINY)
            assert contents(tmp_path) == {"d/thesis.txt": b"mine"}

    def test_an_earlier_stand_in_is_replaced_when_asked(self, tmp_path: Path) -> None:
        root = synthesize(tmp_path / "d", workers=1, seed=1, **TINY)
        before = contents(root)
        with pytest.raises(DataError, match="is not empty"):
            synthesize(root, workers=1, **TINY)
        assert contents(root) == before
        (root / "cam1" / "leftover.jpg").write_bytes(b"")
        synthesize(root, workers=1, overwrite=True, **TINY)
        assert not (root / "cam1" / "leftover.jpg").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["d"]

    def test_an_empty_folder_may_be_filled(self, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        assert pictures(synthesize(tmp_path / "d", workers=1, **TINY))

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "d").write_text("a file")
        for place in (tmp_path / "d", tmp_path / "d" / "deeper"):
            with pytest.raises(DataError, match=r"d.*(file or a link|cannot be written)"):
                synthesize(place, workers=1, **TINY)
        assert contents(tmp_path) == {"d": b"a file"}

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
    @pytest.mark.parametrize("call", ["Image.save", "Path.mkdir", "Permutations.to_mat"])
    def test_nothing_is_half_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
    ) -> None:
        root = synthesize(tmp_path / "d", workers=1, seed=1, **TINY)
        before = contents(tmp_path)
        owner = {"Image": Image.Image, "Path": Path, "Permutations": Permutations}
        cls, name = call.split(".")
        real, calls = getattr(owner[cls], name), []

        def fail(*args: object, **options: object) -> object:
            calls.append(args)
            if len(calls) > (3 if name != "to_mat" else 0):
                raise OSError(code, "no luck")
            return real(*args, **options)

        monkeypatch.setattr(owner[cls], name, fail)
        with pytest.raises(DataError, match=r"d: cannot be written: no luck") as caught:
            synthesize(root, workers=1, overwrite=True, **TINY)
        assert "\n" not in str(caught.value)
        monkeypatch.undo()
        assert contents(tmp_path) == before

    def test_the_earlier_folder_survives_a_failed_exchange(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = synthesize(tmp_path / "d", workers=1, seed=1, **TINY)
        before = contents(tmp_path)
        real = Path.rename

        def fail(self: Path, target: Path) -> Path:
            if self.suffix == ".partial":
                raise OSError(errno.EBUSY, "busy")
            return real(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(DataError, match=r"d: cannot be written: busy"):
            synthesize(root, workers=1, overwrite=True, **TINY)
        assert contents(tmp_path) == before

    def test_a_killed_process_is_one_line(self, tmp_path: Path) -> None:
        def kill(done: int, total: int) -> None:
            for process in multiprocessing.active_children() if done else []:
                process.kill()

        with pytest.raises(DataError, match=r"d: a drawing process was killed"):
            synthesize(tmp_path / "d", workers=2, progress=kill, **TINY)
        assert not list(tmp_path.iterdir())

    def test_an_interrupt_leaves_nothing(self, tmp_path: Path) -> None:
        def interrupt(done: int, total: int) -> None:
            if done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            synthesize(tmp_path / "d", workers=1, progress=interrupt, **TINY)
        assert not list(tmp_path.iterdir())

    def test_a_failure_in_another_process_is_one_line(self, tmp_path: Path) -> None:
        """A worker cannot write: its folder is taken away under its feet."""

        def sabotage(done: int, total: int) -> None:
            (partial,) = tmp_path.glob(".d.*.partial")
            for cam in range(1, 7):
                (partial / f"cam{cam}").unlink(missing_ok=True)
                (partial / f"cam{cam}").write_text("a file where a folder must be")

        with pytest.raises(DataError, match=r"d: cannot be written"):
            synthesize(tmp_path / "d", workers=2, progress=lambda d, t: d or sabotage(d, t), **TINY)
        assert not list(tmp_path.iterdir())
