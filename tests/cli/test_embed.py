"""`embed` on data sets and plain folders, and `eval` of what it kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastreid_vi.evaluation import Embeddings, load_embeddings, save_embeddings
from tests.cli.runs import ENVIRONMENT, SETTINGS, SMALL, quietly

PLAIN = ("--rerank", "none")


def test_a_data_set(call, mpanet: Path, tree: Path, tmp_path: Path) -> None:
    said = call("embed", mpanet, tree, "--out", tmp_path / "new" / "set")
    assert said.code == 0, said.err
    assert "images per second" in said.out
    assert f"next: fastreid-vi eval {tmp_path}/new/set" in said.out
    sides = load_embeddings(tmp_path / "new" / "set")
    query, gallery = sides["query"], sides["gallery"]
    assert sorted(str(path) for path in query.paths) == sorted(
        path.relative_to(tree).as_posix()
        for pid in np.unique(query.ids)
        for cam in (3, 6)
        for path in tree.glob(f"cam{cam}/{pid:04d}/*.jpg")
    )
    assert (query.modality == 1).all()
    assert (gallery.modality == 0).all()
    weights = (mpanet / "checkpoints/best/model.safetensors").resolve()
    for side in (query, gallery):
        assert side.checkpoint == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert (side.method, side.dataset, side.root) == ("mpanet", "sysu", str(tree))
        assert side.normalized
        np.testing.assert_allclose(np.linalg.norm(side.features, axis=1), 1, atol=1e-5)
        assert side.details["epoch"] == 1
        assert side.spectra is None
    assert {cam for cam, _ in gallery.permutations} <= {1, 2, 4, 5}


def test_they_are_what_eval_keeps(saved: Path, mpanet: Path) -> None:
    kept = load_embeddings(mpanet / "embeddings")
    for name, side in load_embeddings(saved).items():
        np.testing.assert_array_equal(side.features, kept[name].features)
        assert side.paths == kept[name].paths
        assert side.checkpoint == kept[name].checkpoint


def test_eval_of_saved_embeddings_is_eval_of_the_run(call, saved: Path, mpanet: Path) -> None:
    expected = json.loads((mpanet / "result.json").read_text())["test"]
    said = call("eval", saved, "--json", *PLAIN)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert list(found["settings"]) == SETTINGS
    for setting in SETTINGS:
        for part in ("mean", "std", "chance", "trials"):
            assert found["settings"][setting][part] == expected["settings"][setting][part]
    assert found["checkpoint"]["path"] == expected["checkpoint"]["path"]
    assert found["checkpoint"]["epoch"] == 1
    assert not (saved / "result.json").exists()


def test_it_names_the_protocol(call, saved: Path) -> None:
    said = call("eval", saved, *PLAIN)
    assert said.code == 0
    for needle in (
        "protocol sysu-official",
        "camera rule location",
        "CMC by identity",
        "L2-normalised",
        "ties by gallery index",
        "permutation file",
        "10 trials",
    ):
        assert needle in said.out
    assert "re-ranked" not in said.out
    rules = json.loads(call("eval", saved, "--json", *PLAIN).out)["rules"]
    assert set(rules) == {"camera_rule", "cmc", "galleries", "distance"}


def test_eval_of_saved_embeddings_loads_no_torch_and_no_data_set(saved: Path, tmp_path) -> None:
    moved = shutil.copytree(saved, tmp_path / "elsewhere")
    code = f"""
import sys
from fastreid_vi.cli import main
code = main(["eval", {str(moved)!r}, "--rerank", "none"])
assert not {{"torch", "scipy", "PIL", "tyro"}} & set(sys.modules), "heavy"
sys.exit(code)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("chance") == 4


def test_eval_keeps_the_result_where_it_is_told_to(call, saved: Path, tmp_path: Path) -> None:
    said = call("eval", saved, "--out", tmp_path / "kept", *PLAIN)
    assert said.code == 0, said.err
    result = json.loads((tmp_path / "kept/result.json").read_text())["test"]
    assert result["embeddings"] == str(saved)
    assert call("eval", tmp_path / "kept/embeddings", *PLAIN).code == 0


def test_a_plain_folder(call, mpanet: Path, tree: Path, tmp_path: Path) -> None:
    said = call(
        "embed", mpanet, tree / "cam1", "--out", tmp_path / "x", "--modality", "visible", "--json"
    )
    assert said.code == 0, said.err
    made = json.loads(said.out)
    images = len(list((tree / "cam1").rglob("*.jpg")))
    assert (made["layout"], made["sides"]["images"]["images"]) == ("folder", images)
    assert made["images_per_second"] > 0
    side = load_embeddings(tmp_path / "x")["images"]
    assert (side.ids == -1).all()
    assert side.paths[0] == min(side.paths)
    assert (side.modality == 0).all()
    assert (side.dataset, side.permutations) == (None, None)
    whole = load_embeddings(mpanet / "embeddings")["gallery"]
    at = {f"cam1/{path}": row for row, path in enumerate(side.paths)}
    rows = [(row, at[path]) for row, path in enumerate(whole.paths) if path in at]
    assert rows
    for theirs, ours in rows:
        np.testing.assert_allclose(side.features[ours], whole.features[theirs], atol=1e-5)


def test_the_modality_changes_the_features(call, mpanet: Path, tree: Path, tmp_path: Path) -> None:
    for modality in ("visible", "infrared"):
        quietly(
            "embed", mpanet, tree / "cam1", "--out", tmp_path / modality, "--modality", modality
        )
    a, b = (load_embeddings(tmp_path / m)["images"] for m in ("visible", "infrared"))
    assert (a.modality == 0).all()
    assert (b.modality == 1).all()


def test_a_folder_whose_names_tell_the_modality(
    call, mpanet: Path, tree: Path, tmp_path: Path
) -> None:
    shutil.copytree(next((tree / "cam3").iterdir()), tmp_path / "Thermal" / "7")
    said = call("embed", mpanet, tmp_path / "Thermal", "--out", tmp_path / "x")
    assert said.code == 0, said.err
    assert (load_embeddings(tmp_path / "x")["images"].modality == 1).all()


def test_single_channels_for_mcja(saved_mcja: Path) -> None:
    sides = load_embeddings(saved_mcja)
    assert sides["query"].spectra is None
    spectra = sides["gallery"].spectra
    assert list(spectra) == ["r", "g", "b"]
    features = [sides["gallery"].features, *spectra.values()]
    assert len({part.tobytes() for part in features}) == 4


def test_single_channels_can_be_asked_for_and_left_out(
    call, mpanet: Path, mcja: Path, tree: Path, tmp_path: Path
) -> None:
    folder = (tree / "cam1", "--modality", "visible")
    assert call("embed", mpanet, *folder, "--out", tmp_path / "a", "--spectra").code == 0
    assert list(load_embeddings(tmp_path / "a")["images"].spectra) == ["r", "g", "b"]
    assert call("embed", mcja, *folder, "--out", tmp_path / "b", "--no-spectra").code == 0
    assert load_embeddings(tmp_path / "b")["images"].spectra is None


def test_a_folder_that_holds_something(call, mpanet: Path, tree: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", (tree / "cam1", "--modality", "visible")
    quietly("embed", mpanet, tree, "--out", out)
    said = call("embed", mpanet, *folder, "--out", out)
    assert said.code == 1
    assert "--overwrite" in said.complaint
    assert sorted(load_embeddings(out)) == ["gallery", "query"]
    (out / "notes.txt").write_text("mine")
    assert call("embed", mpanet, *folder, "--out", out, "--overwrite").code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "images.json", "images.safetensors", "notes.txt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "code", "needle"),
    [
        ("nowhere TREE --out OUT", 1, "nowhere: no such run folder or checkpoint"),
        ("RUN nowhere --out OUT", 1, "nowhere: no such folder"),
        ("RUN TREE", 2, "required: --out"),
        ("RUN TREE/cam3 --out OUT", 1, "visible or infrared?"),
        ("RUN TREE/exp --out OUT --modality visible", 1, "no image file"),
        ("RUN TREE --out OUT --modality visible", 1, "has both"),
        ("RUN TREE --out OUT --trial 2", 1, "only RegDB has trials, not 'sysu'"),
        ("RUN TREE/cam3 --out OUT --trial 2", 1, "is not RegDB"),
        ("RUN TREE --out OUT --layout regdb", 1, "which of RegDB's ten trials? --trial N"),
        ("RUN TREE --out OUT --layout llcm", 1, "folder vis is missing"),
        ("RUN TREE --out OUT --device gpu", 1, "unknown device 'gpu'"),
        ("RUN TREE --out OUT --batch-size 0", 2, "above 0"),
        ("LOOSE TREE --out OUT", 1, "--recipe"),
        ("LOOSE TREE --out OUT --recipe mpanet-sysu", 1, "weights do not fit MPANet"),
    ],
)
def test_wrong_input(
    call, mpanet: Path, tree: Path, tmp_path: Path, argv: str, code: int, needle: str
) -> None:
    names = {"RUN": mpanet, "TREE": tree, "OUT": tmp_path / "out", "LOOSE": tmp_path / "w"}
    shutil.copy(mpanet / "checkpoints/best/model.safetensors", names["LOOSE"])
    words = []
    for word in argv.split():
        first, slash, rest = word.partition("/")
        words.append(f"{names.get(first, first)}{slash}{rest}")
    said = call("embed", *words)
    assert said.code == code
    assert needle in said.err.splitlines()[-1]
    assert "Traceback" not in said.err
    assert not list((tmp_path / "out").glob("*"))


def test_an_image_that_cannot_be_read(call, mpanet: Path, tmp_path: Path) -> None:
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops/a.jpg").write_bytes(b"\xff\xd8 cut off")
    said = call(
        "embed", mpanet, tmp_path / "crops", "--out", tmp_path / "x", "--modality", "visible"
    )
    assert said.code == 1
    assert "a.jpg" in said.complaint
    assert not list((tmp_path / "x").iterdir())


class TestEvalOfWrongEmbeddings:
    def refused(self, call, path: Path, *argv: object) -> str:
        said = call("eval", path, *PLAIN, *argv)
        assert said.code == 1, said.out
        return said.complaint

    def changed(self, saved: Path, out: Path, side: str, **facts: object) -> Path:
        sides = load_embeddings(saved)
        sides[side] = sides[side]._replace(**facts)
        return save_embeddings(out, **sides)

    def test_one_side(self, call, saved: Path, tmp_path: Path) -> None:
        assert "got query alone" in self.refused(call, saved / "query")
        save_embeddings(tmp_path / "x", images=Embeddings([[1.0]], [1]))
        assert "got images alone" in self.refused(call, tmp_path / "x")

    def test_two_networks(self, call, saved: Path, tmp_path: Path) -> None:
        other = self.changed(saved, tmp_path / "x", "query", checkpoint="ab" * 32)
        assert "of two networks, abababababab... and " in self.refused(call, other)

    def test_two_data_sets(self, call, saved: Path, tmp_path: Path) -> None:
        other = self.changed(saved, tmp_path / "x", "query", dataset="llcm")
        assert "of two data sets, 'llcm' and 'sysu'" in self.refused(call, other)

    def test_swapped_sides(self, call, saved: Path, tmp_path: Path) -> None:
        sides = load_embeddings(saved)
        save_embeddings(tmp_path / "x", query=sides["gallery"], gallery=sides["query"])
        assert "query: expected infrared images only" in self.refused(call, tmp_path / "x")

    def test_no_data_set(self, call, saved: Path, tree: Path, tmp_path: Path) -> None:
        """Files of the first version know none; the folder of the data set helps."""
        sides = load_embeddings(saved)
        plain = {name: Embeddings(*side[:4]) for name, side in sides.items()}
        save_embeddings(tmp_path / "x", **plain)
        assert "--data-root" in self.refused(call, tmp_path / "x")
        found = json.loads(call("eval", tmp_path / "x", "--data-root", tree, "--json", *PLAIN).out)
        expected = json.loads(call("eval", saved, "--json", *PLAIN).out)
        assert found["settings"] == expected["settings"]
        assert "no such folder" in self.refused(call, saved, "--data-root", tmp_path / "nowhere")

    def test_a_nan(self, call, saved: Path, tmp_path: Path) -> None:
        features = load_embeddings(saved)["query"].features.copy()
        features[3, 1] = np.nan
        other = self.changed(saved, tmp_path / "x", "query", features=features)
        assert "row 3 is not finite" in self.refused(call, other)

    def test_torn_files(self, call, saved: Path, tmp_path: Path) -> None:
        torn = shutil.copytree(saved, tmp_path / "x")
        (torn / "gallery.safetensors").write_bytes(b"")
        assert "gallery.safetensors: " in self.refused(call, torn)
        (torn / "gallery.json").write_bytes(b"")
        assert "cannot read embeddings" in self.refused(call, torn)

    def test_a_trial_that_is_not_theirs(self, call, saved: Path) -> None:
        assert "cannot be evaluated on trial 2" in self.refused(call, saved, "--trial", 2)


@pytest.mark.parametrize("layout", ["regdb", "llcm"])
def test_other_layouts(call, layout: str, mpanet: Path, tmp_path: Path) -> None:
    """Also of a network that was trained on another data set."""
    root, out = tmp_path / layout, tmp_path / "saved"
    sizes = "--train-ids 2 --test-ids 4 --images 2 2 --height 32 --width 16 --workers 1"
    quietly("data", "synth", root, "--layout", layout, *sizes.split())
    trial = ("--trial", "3") if layout == "regdb" else ()
    said = call("embed", mpanet, root, "--out", out, *trial)
    assert said.code == 0, said.err
    side = load_embeddings(out)["gallery"]
    assert (side.dataset, side.trial) == (layout, 3 if layout == "regdb" else None)
    shutil.rmtree(root)
    said = call("eval", out, "--json", *PLAIN)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["protocol"] == {"regdb": "regdb-trial-3", "llcm": "llcm-paper"}[layout]
    assert {"vis_to_ir", "ir_to_vis"} <= set(found["settings"])
    if layout == "regdb":
        said = call("eval", out, "--trial", "4", *PLAIN)
        assert "embeddings of trial 3, cannot be evaluated on trial 4" in said.complaint


def test_the_trial_that_was_trained_on(call, tmp_path: Path) -> None:
    root, run = tmp_path / "regdb", tmp_path / "run"
    sizes = "--train-ids 5 --test-ids 4 --images 2 2 --height 32 --width 16 --workers 1"
    quietly("data", "synth", root, "--layout", "regdb", *sizes.split())
    flags = [*SMALL, "--data.validation", "2", "--data.trial", "2"]
    quietly("train", "baseline-regdb", "--data-root", root, "--run-dir", run, *flags)
    said = call("embed", run, root, "--out", tmp_path / "x", "--trial", "1")
    assert said.code == 1
    assert "trained on trial 2 of RegDB, cannot be embedded on trial 1" in said.complaint
    assert call("embed", run, root, "--out", tmp_path / "x").code == 0
    assert load_embeddings(tmp_path / "x")["query"].trial == 2
