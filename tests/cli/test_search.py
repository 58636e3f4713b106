"""`search`: saved queries, folders and single images in a saved gallery."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastreid_vi.evaluation import Embeddings, load_embeddings, save_embeddings
from tests.cli.runs import python, quietly


@pytest.fixture(scope="module")
def crops(mpanet: Path, tree: Path) -> Path:
    """Embeddings of a plain folder: nobody's identity is known."""
    out = tree.parent / "crops"
    quietly("embed", mpanet, tree / "cam6", "--out", out, "--modality", "infrared")
    return out


def expected(saved: Path, k: int, metric: str = "cosine") -> tuple[np.ndarray, np.ndarray]:
    """A plain argsort."""
    sides = load_embeddings(saved)
    query, gallery = (sides[name].features.astype(np.float64) for name in ("query", "gallery"))
    if metric == "euclidean":
        scores = np.linalg.norm(query[:, None] - gallery[None], axis=2)
        order = np.argsort(scores, axis=1, kind="stable")[:, :k]
    else:
        scores = query @ gallery.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


@pytest.mark.parametrize("metric", ["cosine", "inner", "euclidean"])
def test_neighbours(call, saved: Path, metric: str) -> None:
    said = call("search", saved, saved, "-k", 5, "--metric", metric, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    order, scores = expected(saved, 5, metric)
    sides = load_embeddings(saved)
    assert len(found["queries"]) == found["searched"] == len(order)
    for row, entry in enumerate(found["queries"]):
        assert entry["query"] == sides["query"].paths[row]
        assert entry["id"] == sides["query"].ids[row]
        near = entry["neighbors"]
        assert [one["rank"] for one in near] == [1, 2, 3, 4, 5]
        np.testing.assert_allclose([one["score"] for one in near], scores[row], atol=1e-6)
        assert [one["row"] for one in near] == order[row].tolist()
        for one in near:
            assert one["neighbor"] == sides["gallery"].paths[one["row"]]
            assert one["id"] == sides["gallery"].ids[one["row"]]
            assert one["camera"] == sides["gallery"].cams[one["row"]]
    assert found["metric"] == metric
    assert found["peak_memory_bytes"] > 0


def test_people_see_ten_queries(call, saved: Path) -> None:
    said = call("search", saved, saved, "-k", 2)
    assert said.code == 0, said.err
    sides = load_embeddings(saved)
    count = len(sides["query"].ids)
    assert said.out.count("cosine 0.") == 20
    assert f"and {count - 10} queries more" in said.out
    assert f"{count} queries in {len(sides['gallery'].ids)} images" in said.out
    assert "same person" in call("search", saved, saved, "-k", 20).out


def test_saved_embeddings_need_no_torch(saved: Path) -> None:
    ran = python(f"""
import sys
from fastreid_vi.cli import main
code = main(["search", {str(saved)!r}, {str(saved)!r}, "-k", "3"])
assert not {{"torch", "scipy", "PIL"}} & set(sys.modules), "heavy"
sys.exit(code)
""")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("suffix", [".json", ".csv", ".safetensors"])
def test_kept_files(call, saved: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"found{suffix}"
    said = call("search", saved, saved, "-k", 4, "--out", file)
    assert said.code == 0, said.err
    assert f"kept in {file}" in said.out
    order, scores = expected(saved, 4)
    gallery = load_embeddings(saved)["gallery"]
    if suffix == ".safetensors":
        kept = load_file(file)
        np.testing.assert_array_equal(kept["indices"], order)
        np.testing.assert_allclose(kept["scores"], scores, atol=1e-6)
    elif suffix == ".csv":
        rows = list(csv.DictReader(file.read_text().splitlines()))
        assert [int(row["row"]) for row in rows] == order.reshape(-1).tolist()
        assert rows[0]["neighbor"] == gallery.paths[order[0, 0]]
        assert int(rows[0]["id"]) == gallery.ids[order[0, 0]]
    else:
        kept = json.loads(file.read_text())
        assert [[n["row"] for n in q["neighbors"]] for q in kept["queries"]] == order.tolist()


def test_a_side_by_name_and_a_folder_without_identities(call, saved: Path, crops: Path) -> None:
    said = call("search", crops, saved / "query", "-k", 1, "--json")
    assert said.code == 0, said.err
    for entry in json.loads(said.out)["queries"]:
        assert entry["id"] is None
        if entry["neighbors"][0]["score"] < 0.999:  # not a test image
            continue
        assert entry["neighbors"][0]["neighbor"] == f"cam6/{entry['query']}"


def test_more_than_there_are(call, saved: Path) -> None:
    said = call("search", saved, saved, "-k", 100000, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["k"] == len(load_embeddings(saved)["gallery"].ids)


def test_latency(call, saved: Path) -> None:
    times = json.loads(call("search", saved, saved, "--latency", "--json").out)["latency_ms"]
    assert 0 < times["p50"] <= times["p95"]


def test_images_by_the_network_of_the_gallery(call, saved: Path, tree: Path, tmp_path) -> None:
    sides = load_embeddings(saved)
    path = sides["query"].paths[0]
    for query in (tree / path, (tree / path).parent):
        said = call("search", query, saved / "query", "-k", 1, "--modality", "infrared", "--json")
        assert said.code == 0, said.err
        first = next(
            entry
            for entry in json.loads(said.out)["queries"]
            if path.endswith(f"/{entry['query']}")
        )
        assert first["neighbors"][0]["neighbor"] == path
        assert first["neighbors"][0]["score"] == pytest.approx(1, abs=1e-4)
    (tmp_path / "Thermal").mkdir()
    shutil.copy(tree / path, tmp_path / "Thermal/a.jpg")
    said = call("search", tmp_path / "Thermal/a.jpg", saved / "query", "-k", 1, "--json")
    assert json.loads(said.out)["queries"][0]["neighbors"][0]["neighbor"] == path


class TestWrongInput:
    def refused(self, call, *argv: object, code: int = 1) -> str:
        said = call("search", *argv)
        assert said.code == code, said.out
        assert "Traceback" not in said.err
        return said.err.splitlines()[-1]

    def test_paths(self, call, saved: Path, tmp_path: Path) -> None:
        assert "nowhere: no such file" in self.refused(call, saved, tmp_path / "nowhere")
        assert "nowhere: no such file" in self.refused(call, tmp_path / "nowhere", saved)
        (tmp_path / "notes.txt").write_text("?")
        line = self.refused(call, tmp_path / "notes.txt", saved)
        assert "neither embeddings nor an image" in line

    def test_numbers(self, call, saved: Path) -> None:
        assert "above 0" in self.refused(call, saved, saved, "-k", 0, code=2)
        assert "invalid choice" in self.refused(call, saved, saved, "--metric", "l1", code=2)

    def test_out(self, call, saved: Path, tmp_path: Path) -> None:
        line = self.refused(call, saved, saved, "--out", tmp_path / "found.txt")
        assert "ends in .json, .csv, .safetensors" in line
        assert "no folder" in self.refused(call, saved, saved, "--out", tmp_path / "a/b.json")

    def test_two_networks(self, call, saved: Path, saved_mcja: Path) -> None:
        assert "by two networks" in self.refused(call, saved, saved_mcja)

    def test_two_sizes(self, call, saved: Path, tmp_path: Path) -> None:
        save_embeddings(tmp_path / "x", images=Embeddings(np.eye(3), [1, 2, 3]))
        assert "3 numbers for each image" in self.refused(call, tmp_path / "x", saved)

    def test_several_sides(self, call, saved: Path, tmp_path: Path) -> None:
        side = Embeddings(np.eye(3), [1, 2, 3])
        save_embeddings(tmp_path / "x", day=side, night=side)
        line = self.refused(call, saved, tmp_path / "x")
        assert f"name one: {tmp_path}/x/day, {tmp_path}/x/night" in line

    def test_no_image(self, call, saved: Path, tmp_path: Path) -> None:
        none = Embeddings(np.empty((0, 3), np.float32), [])
        save_embeddings(tmp_path / "x", images=none)
        assert "holds no image" in self.refused(call, tmp_path / "x", tmp_path / "x")

    def test_damaged_queries_are_not_taken_for_images(
        self, call, saved: Path, tmp_path: Path
    ) -> None:
        torn = shutil.copytree(saved, tmp_path / "x")
        for file in torn.iterdir():
            file.write_bytes(b"")
        assert "cannot read embeddings" in self.refused(call, torn, saved)

    def test_images_without_a_network(
        self, call, saved: Path, mcja: Path, tree: Path, tmp_path: Path
    ) -> None:
        side = load_embeddings(saved)["gallery"]
        lost = side._replace(details={"weights": str(tmp_path / "gone.safetensors")})
        save_embeddings(tmp_path / "x", images=lost)
        images = (tree / "cam3", "--modality", "infrared")
        line = self.refused(call, images[0], tmp_path / "x", *images[1:])
        assert "images need a network: --run RUN" in line
        assert "gone.safetensors" in line
        line = self.refused(call, images[0], saved, *images[1:], "--run", mcja)
        assert "not the network that embedded" in line
        assert "visible or infrared?" in self.refused(call, images[0], saved)
