"""Embedding files: round trips, what other tools read, damage, foreign files, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fastreid_vi.evaluation import (
    Embeddings,
    EmbeddingsError,
    load_embeddings,
    save_embeddings,
)
from fastreid_vi.evaluation.embeddings import find_sides
from fastreid_vi.evaluation.tensorfile import TensorFileError, map_arrays, pack
from tests.cli.runs import python

GALLERY = Embeddings(
    np.random.default_rng(0).standard_normal((6, 5), dtype=np.float32),
    np.array([4, 4, 4, 9, 9, -1]),
    np.array([1, 1, 2, 2, 5, 5]),
    (*(f"cam1/0004/{n:04d}.jpg" for n in range(5)), "überall/ein Bild.png"),
    np.zeros(6, np.int64),
    normalized=False,
    method="mcja",
    checkpoint="ab" * 32,
    dataset="sysu",
    root="/data",
    permutations={
        (1, 4): np.array([[1, 2], [2, 1]]),
        (2, 4): np.array([[1], [1]]),
        (6, 4): np.array([[1], [1]]),  # not of this side
    },
    spectra={"r": np.ones((6, 5), np.float32), "b": np.zeros((6, 5), np.float32)},
    details={"epoch": 3, "weights": "model.safetensors"},
)
QUERY = Embeddings(np.eye(5, dtype=np.float32)[:2], [4, 9], [3, 6], ["a", "b"], [1, 1])
ARRAYS = ("features", "ids", "cams", "modality")
FACTS = ("normalized", "method", "checkpoint", "dataset", "trial", "root", "details", "paths")


def test_round_trip(tmp_path: Path) -> None:
    assert save_embeddings(tmp_path / "new" / "set", query=QUERY, gallery=GALLERY).is_dir()
    found = load_embeddings(tmp_path / "new" / "set")
    assert sorted(found) == ["gallery", "query"]
    for side, kept in (("query", QUERY), ("gallery", GALLERY)):
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(found[side], name), getattr(kept, name))
    assert found["query"].features.dtype == np.float32
    gallery = found["gallery"]
    assert {name: getattr(gallery, name) for name in FACTS} == {
        name: getattr(GALLERY, name) for name in FACTS
    }
    assert list(gallery.spectra or ()) == ["r", "b"]
    for name, kept in (GALLERY.spectra or {}).items():
        np.testing.assert_array_equal((gallery.spectra or {})[name], kept)
    assert sorted(gallery.permutations) == [(1, 4), (2, 4)]
    for folder, table in gallery.permutations.items():
        np.testing.assert_array_equal(table, GALLERY.permutations[folder])
    assert found["query"].permutations is None
    assert found["query"].spectra is None


@pytest.mark.parametrize("name", ["set/query", "set/query.safetensors", "set/query.json"])
def test_one_side(tmp_path: Path, name: str) -> None:
    save_embeddings(tmp_path / "set", query=QUERY, gallery=GALLERY)
    assert list(load_embeddings(tmp_path / name)) == ["query"]


def test_equal_embeddings_give_equal_bytes_and_inputs_stay(tmp_path: Path) -> None:
    before = [np.copy(getattr(GALLERY, name)) for name in ARRAYS]
    for name in ("a", "b"):
        save_embeddings(tmp_path / name, gallery=GALLERY)
    for suffix in (".json", ".safetensors"):
        a, b = ((tmp_path / n / f"gallery{suffix}").read_bytes() for n in ("a", "b"))
        assert a == b
    for name, kept in zip(ARRAYS, before, strict=True):
        np.testing.assert_array_equal(getattr(GALLERY, name), kept)


def test_other_tools_read_them(tmp_path: Path) -> None:
    save_embeddings(tmp_path, gallery=GALLERY)
    found = load_file(tmp_path / "gallery.safetensors")
    np.testing.assert_array_equal(found["features"], GALLERY.features)
    np.testing.assert_array_equal(found["ids"], GALLERY.ids)
    np.testing.assert_array_equal(found["spectra.r"], 1)
    with safe_open(tmp_path / "gallery.safetensors", framework="np") as file:
        assert "record" in json.loads(file.metadata()["fastreid_vi"])
    record = json.loads((tmp_path / "gallery.json").read_text(encoding="utf-8"))
    assert (record["version"], record["images"], record["dimensions"]) == (2, 6, 5)
    assert record["paths"][-1] == "überall/ein Bild.png"


def test_memory_that_is_not_plain(tmp_path: Path) -> None:
    wide = np.asfortranarray(GALLERY.features.astype(np.float64))[::2]
    save_embeddings(tmp_path, images=Embeddings(wide, np.array([1, 2, 3], np.int32)[::-1]))
    found = load_embeddings(tmp_path)["images"]
    np.testing.assert_array_equal(found.features, GALLERY.features[::2])
    np.testing.assert_array_equal(found.ids, [3, 2, 1])
    assert (found.cams, found.paths, found.modality) == (None, None, None)
    half = GALLERY.features.astype(np.float16)
    save_embeddings(tmp_path, images=Embeddings(half, GALLERY.ids))
    assert load_embeddings(tmp_path)["images"].features.dtype == np.float16


def test_an_empty_side(tmp_path: Path) -> None:
    save_embeddings(tmp_path, images=Embeddings(np.empty((0, 3), np.float32), [], paths=()))
    found = load_embeddings(tmp_path)["images"]
    assert found.features.shape == (0, 3)
    assert found.paths == ()


def test_writing_into_what_was_read_changes_no_file(tmp_path: Path) -> None:
    save_embeddings(tmp_path, gallery=GALLERY)
    found = load_embeddings(tmp_path)["gallery"]
    found.features[:] = 0
    again = load_embeddings(tmp_path)["gallery"]
    np.testing.assert_array_equal(again.features, GALLERY.features)


def test_an_open_side_survives_a_second_write(tmp_path: Path) -> None:
    save_embeddings(tmp_path, gallery=GALLERY)
    found = load_embeddings(tmp_path)["gallery"]
    save_embeddings(tmp_path, gallery=QUERY)
    np.testing.assert_array_equal(found.features, GALLERY.features)


def test_no_torch(tmp_path: Path) -> None:
    save_embeddings(tmp_path, query=QUERY, gallery=GALLERY)
    ran = python(f"""
import sys
from fastreid_vi.evaluation import load_embeddings
print(load_embeddings({str(tmp_path)!r})["gallery"].features.sum())
assert "torch" not in sys.modules
""")
    assert ran.returncode == 0, ran.stderr


def test_files_of_the_first_version(tmp_path: Path) -> None:
    """As `eval` wrote them into run folders: three arrays, and the paths alone."""
    arrays = {name: np.asarray(getattr(GALLERY, name)) for name in ("features", "ids", "cams")}
    save_file(arrays, tmp_path / "gallery.safetensors")
    (tmp_path / "gallery.json").write_text(json.dumps({"paths": list(GALLERY.paths)}))
    found = load_embeddings(tmp_path)["gallery"]
    np.testing.assert_array_equal(found.features, GALLERY.features)
    assert found.paths == GALLERY.paths
    assert (found.dataset, found.modality, found.permutations) == (None, None, None)


class TestDamage:
    @pytest.fixture
    def kept(self, tmp_path: Path) -> Path:
        return save_embeddings(tmp_path / "set", query=QUERY, gallery=GALLERY)

    def refused(self, kept: Path) -> str:
        with pytest.raises(EmbeddingsError) as caught:
            load_embeddings(kept)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("cut", [0, 5, 100, -1, -200])
    def test_cut_off_tensors(self, kept: Path, cut: int) -> None:
        file = kept / "gallery.safetensors"
        file.write_bytes(file.read_bytes()[:cut])
        assert "gallery.safetensors: " in self.refused(kept)

    def test_too_long(self, kept: Path) -> None:
        with open(kept / "gallery.safetensors", "ab") as file:
            file.write(b"more")
        assert "bytes of arrays, got" in self.refused(kept)

    @pytest.mark.parametrize("text", ["", "{", "[]", "noise", '{"paths": 3}', '{"other": 1}'])
    def test_damaged_record(self, kept: Path, text: str) -> None:
        (kept / "gallery.json").write_text(text)
        assert "gallery.json" in self.refused(kept)

    def test_missing_record(self, kept: Path) -> None:
        (kept / "gallery.json").unlink()
        assert "gallery.json: No such file" in self.refused(kept)

    def test_parts_of_two_writes(self, kept: Path, tmp_path: Path) -> None:
        other = GALLERY._replace(features=GALLERY.features + 1, checkpoint="cd" * 32)
        save_embeddings(tmp_path / "other", gallery=other)
        (tmp_path / "other" / "gallery.json").rename(kept / "gallery.json")
        assert "of two writes" in self.refused(kept)

    def test_a_changed_record(self, kept: Path) -> None:
        file = kept / "query.json"
        file.write_text(file.read_text().replace('"b"', '"c"'))
        assert "one was changed" in self.refused(kept)

    def test_a_later_version(self, kept: Path) -> None:
        file = kept / "query.json"
        file.write_text(file.read_text().replace('"version": 2', '"version": 3'))
        assert "version 3, this release reads up to 2" in self.refused(kept)

    def test_a_record_of_something_else(self, kept: Path) -> None:
        (kept / "query.json").write_text(json.dumps({"format": "osnet", "paths": None}))
        assert "another format, 'osnet'" in self.refused(kept)

    def test_foreign_tensors_beside_the_record(self, kept: Path) -> None:
        save_file({"features": np.eye(2), "ids": np.arange(2)}, kept / "query.safetensors")
        assert "query.safetensors does not belong to query.json" in self.refused(kept)

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert "no such file or folder" in self.refused(tmp_path / "nowhere")
        assert "holds no embeddings" in self.refused(tmp_path)

    def test_weights_are_not_embeddings(self, tmp_path: Path) -> None:
        save_file({"conv.weight": np.eye(2)}, tmp_path / "model.safetensors")
        assert find_sides(tmp_path) == {}
        assert find_sides(tmp_path / "model.safetensors") == {}
        assert "holds no embeddings" in self.refused(tmp_path)


def sized(**changes: Any) -> Embeddings:
    return GALLERY._replace(**changes)


@pytest.mark.parametrize(
    ("side", "needle"),
    [
        (sized(ids=[1, 2]), r"disagree: lengths \[2, 6\]"),
        (sized(cams=np.zeros(7, np.int64)), "disagree"),
        (sized(paths=["a"]), "disagree"),
        (sized(ids=np.zeros(6)), "ids: expected integers, got float64"),
        (sized(modality=np.full(6, 2)), "modality: expected 0"),
        (sized(features=np.zeros(6, np.float32)), r"features: expected real numbers \[n, D\]"),
        (sized(spectra={"r": np.zeros((6, 4))}), r"spectra.r: expected \[6, 5\], got \[6, 4\]"),
        (sized(permutations={(1, 4): [1, 2]}), "permutations of camera 1, pid 4"),
        (
            sized(permutations={(1, 4): [[1], [1]], (2, 4): [[1]]}),
            r"as many trials everywhere, got \[1, 2\]",
        ),
    ],
)
def test_what_does_not_fit_is_not_written(tmp_path: Path, side: Embeddings, needle: str) -> None:
    with pytest.raises(EmbeddingsError, match=needle):
        save_embeddings(tmp_path / "set", gallery=side)
    assert not (tmp_path / "set").exists()


def test_no_side(tmp_path: Path) -> None:
    with pytest.raises(EmbeddingsError, match="one side at least"):
        save_embeddings(tmp_path)


def test_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddingsError, match="cannot write embeddings"):
        save_embeddings(tmp_path / "file", gallery=GALLERY)


def test_details_that_are_not_json(tmp_path: Path) -> None:
    with pytest.raises(EmbeddingsError, match="cannot write embeddings"):
        save_embeddings(tmp_path, gallery=sized(details={"when": object()}))


class TestTensorFile:
    def test_dtypes_and_alignment(self, tmp_path: Path) -> None:
        arrays = {
            "odd": np.arange(3, dtype=np.uint8),
            "wide": np.arange(4.0),
            "big": np.arange(4, dtype=">i4"),
            "none": np.empty((0, 7), np.float16),
            "one": np.array(5, np.int16),
        }
        (tmp_path / "t").write_bytes(b"".join(pack(arrays, {"a": "b"})))
        found, metadata = map_arrays(tmp_path / "t")
        assert metadata == {"a": "b"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].shape == array.shape
            assert found[name].flags.aligned
        assert load_file(tmp_path / "t").keys() == arrays.keys()

    def test_a_dtype_that_is_not_of_the_format(self) -> None:
        with pytest.raises(ValueError, match="text: expected one of F64"):
            list(pack({"text": np.array(["a"])}, {}))

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]},
            {"dtype": "F32"},
            [],
        ],
    )
    def test_headers_that_lie(self, tmp_path: Path, entry: Any) -> None:
        text = json.dumps({"x": entry}).encode()
        (tmp_path / "t").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
        with pytest.raises(TensorFileError):
            map_arrays(tmp_path / "t")
