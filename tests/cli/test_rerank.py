"""Re-ranked tables of `eval`, and the distances and rankings of `rerank`."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastreid_vi import _console
from fastreid_vi._rerank import choose
from fastreid_vi.evaluation import (
    Embeddings,
    KReciprocal,
    MultiSpectral,
    k_reciprocal_rerank,
    load_embeddings,
    multi_spectral_rerank,
    save_embeddings,
    sysu_galleries,
    sysu_table,
)
from tests.cli.runs import SETTINGS, python, quietly


def parts(folder: Path) -> tuple[Embeddings, Embeddings]:
    sides = load_embeddings(folder)
    return sides["query"], sides["gallery"]


def unit(features: Any) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


class TestTable:
    def test_mpanet_is_masked_on_sysu(self, call, saved: Path) -> None:
        said = call("eval", saved, "--json")
        assert said.code == 0, said.err
        found = json.loads(said.out)
        how = found["rerank"]
        assert (how["method"], how["k1"], how["k2"], how["weight"]) == ("k-reciprocal", 20, 6, 0.3)
        assert (how["neighbors"], how["expand"]) == ("queries", True)
        assert "other queries" in how["note"]
        query, gallery = parts(saved)
        rerank = KReciprocal(k1=20, k2=6, weight=0.3, neighbors="queries")
        table = sysu_table(query, gallery, gallery.permutations, rerank=rerank)
        assert list(found["settings"]) == SETTINGS
        for name, setting in found["settings"].items():
            again = setting["reranked"]
            assert len(again["trials"]) == 10
            assert again["mean"]["mAP"] == table[name].mean.mAP
            assert again["mean"]["cmc"] == table[name].mean.cmc.tolist()
            assert again["std"]["mINP"] == table[name].std.mINP
            assert again["mean"]["mAP"] != setting["mean"]["mAP"]
        assert "memory" in said.err

    def test_side_by_side(self, call, saved: Path) -> None:
        said = call("eval", saved)
        assert said.code == 0, said.err
        assert said.out.count("chance") == 4
        assert said.out.count(", plain") == 4
        assert said.out.count("  re-ranked ") == 4
        for needle in ("k-reciprocal", "k1 20, k2 6, weight 0.3", "masked", "other queries"):
            assert needle in said.out
        # The plain table is there before the work starts.
        assert said.out.index("chance") < said.out.index("re-ranked by")
        assert "re-ranking takes at most" in said.err

    def test_mcja_has_four_spectra(self, call, saved_mcja: Path) -> None:
        found = json.loads(call("eval", saved_mcja, "--json").out)
        how = found["rerank"]
        assert (how["method"], how["k1"], how["k2"]) == ("mser", 40, 20)
        assert how["spectra"] == ["original", "r", "g", "b"]
        assert (how["neighbors"], how["expand"]) == ("queries", False)
        query, gallery = parts(saved_mcja)
        rerank = MultiSpectral(spectra=list(gallery.spectra.values()))
        table = sysu_table(query, gallery, gallery.permutations, rerank=rerank)
        for name, setting in found["settings"].items():
            assert setting["reranked"]["mean"]["mAP"] == table[name].mean.mAP

    def test_a_run_of_mcja(self, call, mcja: Path, saved_mcja: Path, tmp_path: Path) -> None:
        said = call("eval", mcja, "--json", "--out", tmp_path / "kept")
        assert said.code == 0, said.err
        found = json.loads(said.out)
        expected = json.loads(call("eval", saved_mcja, "--json").out)
        assert found["settings"] == expected["settings"]
        kept = json.loads((tmp_path / "kept/result.json").read_text())["test"]
        assert kept == found
        assert list(parts(tmp_path / "kept/embeddings")[1].spectra) == ["r", "g", "b"]

    def test_mcja_without_spectra(self, call, saved_mcja: Path, tmp_path: Path) -> None:
        query, gallery = parts(saved_mcja)
        save_embeddings(tmp_path / "x", query=query, gallery=gallery._replace(spectra=None))
        found = json.loads(call("eval", tmp_path / "x", "--json").out)
        assert found["rerank"]["method"] == "k-reciprocal"
        assert "mser needs embed --spectra" in found["rerank"]["source"]
        said = call("eval", tmp_path / "x", "--rerank", "mser")
        assert said.code == 1
        assert "needs further spectra" in said.complaint
        assert said.out == ""

    def test_flags(self, call, saved: Path) -> None:
        flags = "--rerank k-reciprocal --k1 4 --k2 2 --weight 0.5 --neighbors all"
        found = json.loads(call("eval", saved, "--json", *flags.split()).out)
        how = found["rerank"]
        values = (how["k1"], how["k2"], how["weight"], how["neighbors"])
        assert values == (4, 2, 0.5, "all")
        assert how["source"] == "as asked for"
        query, gallery = parts(saved)
        rerank = KReciprocal(k1=4, k2=2, weight=0.5, neighbors="all")
        table = sysu_table(query, gallery, gallery.permutations, rerank=rerank)
        for name, setting in found["settings"].items():
            assert setting["reranked"]["mean"]["mAP"] == table[name].mean.mAP

    @pytest.mark.parametrize("flag", ["--weight 2", "--weight much", "--k1 0", "--rerank best"])
    def test_wrong_flags(self, call, saved: Path, flag: str) -> None:
        assert call("eval", saved, *flag.split()).code == 2

    def test_parameters_of_nothing(self, call, saved: Path) -> None:
        said = call("eval", saved, "--rerank", "none", "--k1", 3)
        assert said.complaint == "--rerank none: there is no k1 to set"

    def test_no_torch(self, saved: Path) -> None:
        ran = python(f"""
import sys
from fastreid_vi.cli import main
code = main(["eval", {str(saved)!r}])
assert "torch" not in sys.modules
sys.exit(code)
""")
        assert ran.returncode == 0, ran.stderr


def one(method: str | None, dataset: str | None, spectra: bool = False) -> tuple[Any, Any]:
    features = np.eye(4, dtype=np.float32)
    side = Embeddings(features, [0, 1, 2, 3], method=method, dataset=dataset)
    return side, side._replace(spectra={"r": features} if spectra else None)


@pytest.mark.parametrize(
    ("method", "dataset", "spectra", "expected"),
    [
        ("mpanet", "sysu", False, ("k-reciprocal", 20, 6, 0.3, "queries")),
        ("mpanet", "regdb", False, ("k-reciprocal", 20, 6, 0.3, "all")),
        ("mcja", "sysu", True, ("mser", 40, 20, 0.3, "queries")),
        ("mcja", "regdb", True, ("mser", 50, 10, 0.2, "all")),
        ("mcja", "llcm", True, ("mser", 40, 20, 0.3, "queries")),
        ("mcja", "sysu", False, ("k-reciprocal", 20, 6, 0.3, "all")),
        ("lba", "sysu", False, ("k-reciprocal", 20, 6, 0.3, "all")),
        ("baseline", "llcm", True, ("k-reciprocal", 20, 6, 0.3, "all")),
        (None, None, False, ("k-reciprocal", 20, 6, 0.3, "all")),
    ],
)
def test_what_auto_means(method: str, dataset: str, spectra: bool, expected: Any) -> None:
    chosen = choose("auto", *one(method, dataset, spectra))
    assert chosen is not None
    p = chosen.parameters
    assert (chosen.name, p["k1"], p["k2"], p["weight"], p["neighbors"]) == expected
    made = chosen.procedure
    assert isinstance(made, MultiSpectral if expected[0] == "mser" else KReciprocal)
    assert (made.k1, made.k2, made.weight, made.neighbors) == expected[1:]
    assert chosen.memory > 0
    assert choose("none", *one(method, dataset, spectra)) is None


class TestDistances:
    def test_whole_gallery(self, call, saved: Path, tmp_path: Path) -> None:
        file = tmp_path / "d.npy"
        said = call("rerank", saved, "--out", file, "--json")
        assert said.code == 0, said.err
        query, gallery = parts(saved)
        expected = k_reciprocal_rerank(
            unit(query.features), unit(gallery.features), neighbors="queries"
        )
        np.testing.assert_allclose(np.load(file, mmap_mode="r"), expected, atol=2e-6)
        about = json.loads(said.out)
        assert (about["query_images"], about["gallery_images"]) == expected.shape
        assert about["neighbors"] == "queries"
        assert "takes at most" in said.err

    def test_one_trial_with_identities(self, call, saved: Path, tmp_path: Path) -> None:
        file = tmp_path / "d.safetensors"
        flags = "--setting indoor/1 --gallery-trial 3 --rerank k-reciprocal --neighbors all"
        said = call("rerank", saved, "--out", file, *flags.split())
        assert said.code == 0, said.err
        kept = load_file(file)
        query, gallery = parts(saved)
        rows = sysu_galleries(gallery, gallery.permutations, mode="indoor", shots=1)[2]
        np.testing.assert_array_equal(kept["gallery_rows"], rows)
        np.testing.assert_array_equal(kept["gallery_ids"], gallery.ids[rows])
        np.testing.assert_array_equal(kept["query_ids"], query.ids)
        expected = k_reciprocal_rerank(unit(query.features), unit(gallery.features[rows]))
        np.testing.assert_allclose(kept["distances"], expected, atol=2e-6)

    @pytest.mark.parametrize("direction", ["ir_to_vis", "vis_to_ir"])
    def test_spectra(self, call, saved_mcja: Path, tmp_path: Path, direction: str) -> None:
        file = tmp_path / "d.npy"
        said = call("rerank", saved_mcja, "--out", file, "--direction", direction)
        assert said.code == 0, said.err
        query, gallery = parts(saved_mcja)
        infrared = unit(query.features)
        visible = [unit(f) for f in (gallery.features, *gallery.spectra.values())]
        if direction == "ir_to_vis":
            expected = multi_spectral_rerank(infrared, visible, direction="i2v")
        else:
            expected = multi_spectral_rerank(visible, infrared, direction="v2i")
        np.testing.assert_allclose(np.load(file), expected, atol=2e-6)

    def test_ranking(self, call, saved: Path, tmp_path: Path) -> None:
        names = {"--out": tmp_path / "d.npy", "--ranking": tmp_path / "r.json"}
        argv = [word for pair in names.items() for word in pair]
        said = call("rerank", saved, *argv, "-k", 3, "--setting", "all/1")
        assert said.code == 0, said.err
        kept = json.loads(names["--ranking"].read_text())
        distances = np.load(names["--out"])
        _, gallery = parts(saved)
        rows = sysu_galleries(gallery, gallery.permutations)[0]
        order = rows[np.argsort(distances, axis=1, kind="stable")[:, :3]]
        found = [[near["row"] for near in entry["neighbors"]] for entry in kept["queries"]]
        assert found == order.tolist()
        first = kept["queries"][0]["neighbors"][0]
        assert first["neighbor"] == gallery.paths[first["row"]]
        assert first["score"] == pytest.approx(distances[0].min())
        assert (kept["setting"], kept["trial"]) == ("all/1", 1)
        assert "other queries" in kept["note"]


@pytest.mark.parametrize(
    ("argv", "code", "needle"),
    [
        ("SAVED", 1, "nothing to write"),
        ("SAVED --out OUT/d.txt", 1, "ends in .npy, .safetensors"),
        ("SAVED --ranking OUT/r.npy", 1, "ends in .json, .csv, .safetensors"),
        ("SAVED --out OUT/a/d.npy", 1, "no folder"),
        ("nowhere --out OUT/d.npy", 1, "nowhere: no such file"),
        ("SAVED/query --out OUT/d.npy", 1, "got query alone"),
        ("SAVED --out OUT/d.npy --rerank mser", 1, "needs further spectra"),
        ("SAVED --out OUT/d.npy --rerank none", 2, "invalid choice"),
        ("SAVED --out OUT/d.npy --setting all/5", 1, "--setting all/5: expected all/1"),
        ("SAVED --out OUT/d.npy --setting drawn", 1, "--setting drawn: expected all/1"),
        ("SAVED --out OUT/d.npy --setting all/1 --gallery-trial 11", 1, "trials"),
        ("SAVED --out OUT/d.npy --setting all/1 --direction vis_to_ir", 1, "--setting all/1"),
    ],
)
def test_wrong_input(call, saved: Path, tmp_path: Path, argv: str, code: int, needle: str) -> None:
    words = argv.replace("SAVED", str(saved)).replace("OUT", str(tmp_path)).split()
    said = call("rerank", *words)
    assert said.code == code, said.err
    assert needle in said.err.splitlines()[-1]
    assert "Traceback" not in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["regdb", "llcm"])
def test_other_protocols(call, layout: str, mcja: Path, tmp_path: Path) -> None:
    """Both directions, each with its own side of spectra."""
    root, out = tmp_path / layout, tmp_path / "saved"
    sizes = "--train-ids 2 --test-ids 4 --images 2 2 --height 32 --width 16 --workers 1"
    quietly("data", "synth", root, "--layout", layout, *sizes.split())
    trial = ("--trial", "1") if layout == "regdb" else ()
    quietly("embed", mcja, root, "--out", out, *trial)
    shutil.rmtree(root)
    said = call("eval", out, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["rerank"]["method"] == "mser"
    assert found["rerank"]["k1"] == (50 if layout == "regdb" else 40)
    for setting in found["settings"].values():
        assert len(setting["reranked"]["trials"]) == found["trials"]
        assert 0 < setting["reranked"]["mean"]["mAP"] <= 1
    if layout == "llcm":
        said = call("rerank", out, "--out", tmp_path / "d.npy", "--setting", "drawn")
        assert said.code == 0, said.err


def test_the_report_shows_both(call, saved: Path, mpanet: Path, tmp_path: Path) -> None:
    run = shutil.copytree(mpanet, tmp_path / "both", symlinks=True)
    assert call("eval", run).code == 0
    said = call("report", run, "--queries", 1)
    assert said.code == 0, said.err
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count(">both, re-ranked<") == 4
    assert "both: re-ranked by k-reciprocal" in page
    assert "other queries" in page
    assert call("eval", run, "--rerank", "none").code == 0
    assert call("report", run, "--queries", 1).code == 0
    assert "re-ranked" not in (run / "report.html").read_text(encoding="utf-8")


def test_long_work_is_heard_of(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal: the time while nothing is known, then how much is done."""
    monkeypatch.setattr(_console, "_QUIET_SECONDS", 0.02)
    with _console.Console(False).waiting("thinking"):
        time.sleep(0.2)
    said = capsys.readouterr().err.splitlines()
    assert said
    assert set(said) == {"thinking: 0 s"}
    with _console.Console(False).waiting("counting") as show:
        show(2, 2)
        time.sleep(0.1)
    assert capsys.readouterr().err.splitlines() == ["counting: 2 of 2"]


def test_full_mode_counts_its_galleries(call, saved: Path) -> None:
    said = call("eval", saved, "--neighbors", "all")
    assert said.code == 0, said.err
    assert "re-ranking galleries: 40 of 40" in said.err
    assert "queries and gallery together are searched for neighbours" in said.out
