"""Packs: what is in them, what is refused, what a kill or a full disk leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastreid_vi.config import DataConfig
from fastreid_vi.data import DataError, Pack, RegDB, SysuMM01, write_pack
from fastreid_vi.data.pack import open_pixels
from fastreid_vi.data.transform import read_image
from tests.data.conftest import jpeg
from tests.data.listed import write_regdb

CONFIG = DataConfig(height=40, width=20, identities=2, images=4, sampler="identity_random")
IMAGE = 40 * 20 * 3


def written(root: Path, **options) -> Path:
    return write_pack(SysuMM01(root), CONFIG, root.parent / "pack", workers=1, **options).path


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def everything(dataset):
    return [(images, i) for images in (dataset.train, dataset.query, dataset.gallery)
            for i in range(len(images))]  # fmt: skip


class TestContent:
    @pytest.mark.parametrize("resize", ["bilinear", "bicubic", "lanczos"])
    def test_every_image_as_the_folder_path_reads_it(self, sysu, resize):
        dataset = SysuMM01(sysu)
        config = dataclasses.replace(CONFIG, resize=resize)
        done = write_pack(dataset, config, sysu.parent / "p", workers=3, shard_bytes=7 * IMAGE)
        pack = Pack(done.path)
        total = len(dataset.train) + len(dataset.query) + len(dataset.gallery)
        assert (len(pack), done.images, done.decoded) == (total, total, total)
        assert done.shards == len(pack.shards) == -(-total // 7)
        for images, i in everything(dataset):
            row = int(pack.rows_of(images.select([i]))[0])
            expected = read_image(images.file(i), 40, 20, resize).transpose(1, 2, 0)
            np.testing.assert_array_equal(pack[row], expected)
        assert pack.damaged() == []
        assert leftovers(sysu.parent) == []
        assert sorted(p.name for p in done.path.iterdir())[0] == "pack.json"
        assert all(p.name.startswith("p") for p in done.path.iterdir())

    def test_gather_crosses_shards(self, sysu):
        pack = Pack(written(sysu, shard_bytes=3 * IMAGE))
        rows = np.random.default_rng(0).permutation(len(pack))[:20]
        out = np.empty((20, 40, 20, 3), np.uint8)
        pack.gather(rows, out)
        np.testing.assert_array_equal(out, np.stack([pack[int(row)] for row in rows]))

    def test_shards_are_numpy_files(self, sysu):
        path = written(sysu, shard_bytes=10 * IMAGE)
        first = np.load(path / "pixels-00000.npy")
        assert (first.dtype, first.shape) == (np.uint8, (10, 40, 20, 3))

    def test_manifest(self, sysu):
        value = json.loads((written(sysu) / "pack.json").read_text())
        assert value["format"] == 1
        assert value["recipe"] == {
            "dataset": "sysu", "height": 40, "width": 20, "resize": "bilinear",
            "splits": ["train", "val"], "label_order": "sorted", "image_order": "path",
            "ids": [3, 7, 9, 12],
        }  # fmt: skip
        assert len(value["recipe_hash"]) == 32
        columns = value["images"]
        for path, size in zip(columns["paths"], columns["sizes"], strict=True):
            assert (sysu / path).stat().st_size == size

    def test_the_hash_knows_every_field(self, sysu):
        recipe = Pack(written(sysu)).recipe
        changes = {
            "dataset": "regdb", "height": 41, "width": 21, "resize": "lanczos",
            "splits": ("train",), "label_order": "file", "image_order": "identity",
            "ids": (3, 7, 12, 9),
        }  # fmt: skip
        assert set(changes) == {field.name for field in dataclasses.fields(recipe)}
        hashes = {dataclasses.replace(recipe, **{n: v}).digest() for n, v in changes.items()}
        assert len(hashes | {recipe.digest()}) == len(changes) + 1

    def test_ten_trials_of_regdb_share_a_pack(self, tmp_path):
        root = write_regdb(tmp_path / "RegDB")
        path = write_pack(RegDB(root, trial=1), CONFIG, tmp_path / "pack").path
        for trial in range(1, 11):
            dataset = RegDB(root, trial=trial)
            assert write_pack(dataset, CONFIG, path).decoded == 0
            for images in (dataset.train, dataset.query, dataset.gallery):
                pixels, rows = open_pixels(images, dataclasses.replace(CONFIG, packed=str(path)))
                for i in (0, len(images) - 1):
                    expected = read_image(images.file(i), 40, 20).transpose(1, 2, 0)
                    np.testing.assert_array_equal(pixels[int(rows[i])], expected)

    def test_progress(self, sysu):
        calls = []
        path = written(sysu, progress=lambda *call: calls.append(call))
        total = len(Pack(path))
        assert calls == [(done, total) for done in range(1, total + 1)]


class TestImages:
    """The rule is that of the folder path: what it reads is packed, what it refuses is named."""

    @pytest.mark.parametrize("mode", ["P", "CMYK", "RGBA", "LA", "1", "L", "RGB"])
    def test_other_modes(self, sysu, mode):
        images = SysuMM01(sysu).train
        image = Image.open(images.file(4)).convert(mode)
        image.save(images.file(4), "TIFF")  # the suffix does not matter
        expected = read_image(images.file(4), 40, 20).transpose(1, 2, 0)
        pack = Pack(written(sysu))
        np.testing.assert_array_equal(pack[int(pack.rows_of(images)[4])], expected)

    @pytest.mark.parametrize("kind", ["truncated", "empty", "16 bits", "no image"])
    def test_what_cannot_be_read_is_named_and_packing_goes_on_when_it_is_mended(self, sysu, kind):
        file = SysuMM01(sysu).train.file(9)
        good = file.read_bytes()
        if kind == "16 bits":
            Image.fromarray(np.full((48, 24), 30000, np.uint16)).save(file, "TIFF")
        else:
            file.write_bytes({"truncated": good[:200], "empty": b""}.get(kind, b"nothing here"))
        with pytest.raises(DataError, match=f"^{file}: unreadable image: ") as caught:
            written(sysu)
        assert "\n" not in str(caught.value)
        assert not (sysu.parent / "pack").exists()
        file.write_bytes(good)
        done = write_pack(SysuMM01(sysu), CONFIG, sysu.parent / "pack", workers=1)
        assert done.images - done.decoded == 9
        assert Pack(done.path).damaged() == []

    def test_skip_broken_leaves_it_out(self, sysu):
        dataset = SysuMM01(sysu)
        name = dataset.train.paths[9]
        (sysu / name).write_bytes(jpeg(1)[:200])
        done = write_pack(SysuMM01(sysu, skip_broken=True), CONFIG, sysu.parent / "pack")
        assert name not in Pack(done.path).rows.paths
        with pytest.raises(DataError, match=f"{name} of .* is not in it: pack again"):
            Pack(done.path).rows_of(dataset.train)


class TestAgain:
    def test_the_same_pack_is_left_alone(self, sysu):
        path = written(sysu)
        before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
        assert write_pack(SysuMM01(sysu), CONFIG, path).decoded == 0
        assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == before

    def test_another_pack_is_replaced_only_when_asked(self, sysu):
        path = written(sysu)
        taller = dataclasses.replace(CONFIG, height=48)
        with pytest.raises(DataError, match=r"data\.height = 40.* with --overwrite"):
            write_pack(SysuMM01(sysu), taller, path)
        opened = Pack(path)
        before = opened[3].copy()
        write_pack(SysuMM01(sysu), taller, path, overwrite=True)
        assert Pack(path).recipe.height == 48
        np.testing.assert_array_equal(opened[3], before)  # whoever has it open keeps it
        assert leftovers(sysu.parent) == []

    def test_changed_images(self, sysu):
        path = written(sysu)
        SysuMM01(sysu).train.file(0).write_bytes(jpeg(12345, height=64))
        with pytest.raises(DataError, match="holds another pack: it is of other images"):
            written(sysu)
        assert Pack(written(sysu, overwrite=True)).damaged() == []
        assert path.is_dir()

    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_what_is_no_pack_is_never_replaced(self, sysu, kind):
        path = sysu.parent / "pack"
        if kind == "folder":
            path.mkdir()
            (path / "thesis.tex").write_text("years")
        else:
            path.write_text("years")
        with pytest.raises(DataError, match="exists and is no pack: choose another name"):
            written(sysu, overwrite=True)
        assert path.exists()

    def test_a_damaged_pack(self, sysu):
        path = written(sysu)
        os.truncate(path / "pixels-00000.npy", 1000)
        with pytest.raises(DataError, match="holds a damaged pack: replace it with --overwrite"):
            written(sysu)
        assert Pack(written(sysu, overwrite=True)).damaged() == []


class TestRefused:
    def fit(self, root: Path, images=None, **change) -> None:
        config = dataclasses.replace(CONFIG, packed=str(root.parent / "pack"), **change)
        open_pixels(SysuMM01(root).train if images is None else images, config)

    @pytest.mark.parametrize(
        ("change", "needle"),
        [
            ({"height": 48}, "data.height = 40, this recipe has 48"),
            ({"width": 24}, "data.width = 20, this recipe has 24"),
            ({"resize": "lanczos"}, "data.resize = 'bilinear', this recipe has 'lanczos'"),
            ({"label_order": "file"}, "data.label_order = 'sorted', this recipe has 'file'"),
            ({"splits": ("train",)}, "data.splits = "),
        ],
    )
    def test_of_another_recipe(self, sysu, change, needle):
        written(sysu)
        self.fit(sysu)
        with pytest.raises(DataError, match="foreign pack: it was made with") as caught:
            self.fit(sysu, **change)
        assert needle in str(caught.value)
        assert "pack again (fastreid-vi data pack), or read the files" in str(caught.value)

    def test_of_another_data_set(self, sysu, write_tree):
        written(sysu)
        counts = {(cam, pid): 4 for cam in range(1, 7) for pid in (3, 7, 12, 9, 5)}
        splits = {"train": (12, 3, 7), "val": (9,), "test": (5,)}
        other = write_tree(counts, splits, name="other")
        images = SysuMM01(other).train
        with pytest.raises(DataError, match=r"foreign pack: cam.* of .*other is not in it"):
            self.fit(sysu, images)

    def test_of_a_data_set_with_the_same_names(self, sysu):
        written(sysu)
        images = SysuMM01(sysu).train
        images.file(8).write_bytes(jpeg(99, height=64))
        with pytest.raises(DataError, match=f"{images.file(8)} had .* bytes when it was packed"):
            self.fit(sysu)

    def test_of_other_persons(self, sysu):
        written(sysu)
        images = SysuMM01(sysu).train
        pids = images.pids.copy()
        pids[5] = 77
        images = dataclasses.replace(images, pids=pids)
        with pytest.raises(DataError, match=f"{images.paths[5]} has pid 7 in it, 77 in"):
            self.fit(sysu, images)

    @pytest.mark.parametrize(
        ("damage", "needle"),
        [
            ("gone", "no pack here"),
            ("no manifest", "no pack here"),
            ("cut manifest", "pack.json: damaged, not JSON"),
            ("list", "a pack of format None"),
            ("newer", "a pack of format 2, this version reads format 1"),
            ("edited", "the recipe and its hash disagree"),
            ("short column", "columns of images differ in length"),
            ("no column", "damaged (TypeError"),
            ("no shard", "pixels-00001.npy: cannot be read: No such file"),
            ("cut shard", "pixels-00001.npy: torn pack"),
            ("empty shard", "pixels-00001.npy: torn pack"),
            ("other shard", "pixels-00001.npy: torn pack: expected uint8 [9, 40, 20, 3]"),
            ("text", "pixels-00001.npy: torn pack"),
        ],
    )
    def test_torn(self, sysu, damage, needle):
        path = written(sysu, shard_bytes=9 * IMAGE)
        manifest, shard = path / "pack.json", path / "pixels-00001.npy"
        value = json.loads(manifest.read_text())
        if damage == "gone":
            path.rename(sysu.parent / "elsewhere")
        elif damage == "no manifest":
            manifest.unlink()
        elif damage == "cut manifest":
            os.truncate(manifest, 500)
        elif damage == "no shard":
            shard.unlink()
        elif damage in ("cut shard", "empty shard"):
            os.truncate(shard, 0 if damage == "empty shard" else 10_000)
        elif damage == "other shard":
            np.save(shard, np.zeros((9, 40, 20, 1), np.uint8))
        elif damage == "text":
            shard.write_text("no pixels" * 100)
        else:
            if damage == "list":
                value = [value]
            elif damage == "newer":
                value["format"] = 2
            elif damage == "edited":
                value["recipe"]["height"] = 41
            elif damage == "short column":
                value["images"]["crc32"].pop()
            else:
                del value["images"]["crc32"]
            manifest.write_text(json.dumps(value))
        with pytest.raises(DataError) as caught:
            self.fit(sysu)
        assert needle in str(caught.value)
        assert "pack again (fastreid-vi data pack), or read the files" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_wrong_pixels_are_found_by_their_checksums(self, sysu):
        path = written(sysu, shard_bytes=9 * IMAGE)
        shard = path / "pixels-00001.npy"
        content = bytearray(shard.read_bytes())
        content[128 + 4 * IMAGE + 77] ^= 16
        shard.write_bytes(content)
        pack = Pack(path)
        assert pack.damaged() == [pack.rows.paths[13]]
