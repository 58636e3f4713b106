"""RegDB and LLCM through the command line: draw, check, train, evaluate, report; wrong trials."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.runs import SMALL, quietly

SIZE = "--train-ids 5 --test-ids 4 --images 2 2 --height 32 --width 16 --workers 1"
TRAINING = [*SMALL, "--data.validation", "2"]


@pytest.fixture(scope="module", params=["regdb", "llcm"])
def layout(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def drawn(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / layout
    quietly("data", "synth", root, "--layout", layout, *SIZE.split())
    return root


@pytest.fixture(scope="module")
def run(layout: str, drawn: Path) -> Path:
    """A run on the third trial of RegDB, or on LLCM."""
    folder = drawn.parent / f"run-{layout}"
    trial = ("--data.trial", "3") if layout == "regdb" else ()
    recipe = f"baseline-{layout}"
    quietly("train", recipe, "--data-root", drawn, "--run-dir", folder, *TRAINING, *trial)
    return folder


def test_check_knows_the_layout(call, layout: str, drawn: Path) -> None:
    said = call("data", "check", drawn, "--json")
    assert said.code == 0
    found = json.loads(said.out)
    assert (found["layout"], found["ok"], found["official"]) == (layout, True, False)
    said = call("data", "check", drawn)
    assert {"regdb": "visible  thermal", "llcm": "vis  nir"}[layout] in said.out
    assert said.out.splitlines()[-1].endswith("images read: good")


def test_check_names_the_first_offender(call, layout: str, drawn: Path, tmp_path: Path) -> None:
    root = shutil.copytree(drawn, tmp_path / "damaged")
    name = {"regdb": "train_thermal_4", "llcm": "train_nir"}[layout]
    first = (root / f"idx/{name}.txt").read_text().split()[0]
    (root / first).unlink()
    said = call("data", "check", root)
    assert said.code == 1
    assert f"{first} does not exist" in said.out


def test_held_out_persons_choose_the_epoch(layout: str, run: Path) -> None:
    best = json.loads((run / "best.json").read_text())
    assert 0 < best["metrics"]["R1"] <= 1
    words = {
        "regdb": "mean of both directions, all images of the gallery",
        "llcm": "one image of each person and camera",
    }
    assert words[layout] in best["chosen"]
    assert "2 training identities held out" in best["chosen"]


def test_table(call, layout: str, drawn: Path, run: Path) -> None:
    said = call("eval", run)
    assert said.code == 0, said.err
    protocol = {"regdb": "regdb-trial-3", "llcm": "llcm-paper"}[layout]
    assert f"protocol {protocol}: " in said.out
    assert "infrared to visible" in said.out
    assert "visible to infrared" in said.out
    assert ("as released" in said.out) == (layout == "llcm")
    result = json.loads((run / "result.json").read_text())["test"]
    names = ["vis_to_ir", "ir_to_vis"]
    if layout == "llcm":
        names = ["ir_to_vis", "vis_to_ir", "vis_to_ir/released"]
    assert list(result["settings"]) == names
    for found in result["settings"].values():
        assert len(found["trials"]) == result["trials"] == (1 if layout == "regdb" else 10)
        assert 0 < found["chance"]["R1"] <= 1
        assert 0 < found["mean"]["mAP"] <= 1
        assert found["mean"]["R20"] == 1.0  # four persons
    if layout == "regdb":
        assert (result["queries"], result["gallery"], result["identities"]) == (8, 8, 4)


def test_the_test_split_may_choose(call, layout: str, drawn: Path, tmp_path: Path) -> None:
    said = call(
        "train", f"baseline-{layout}", "--data-root", drawn, "--run-dir", tmp_path / "run",
        *TRAINING, "--eval-on", "test",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "the TEST split" in json.loads((tmp_path / "run/best.json").read_text())["chosen"]


def test_report(call, layout: str, run: Path) -> None:
    assert call("eval", run).code == 0
    said = call("report", run, "--queries", 1)
    assert said.code == 0, said.err
    page = (run / "report.html").read_text()
    assert "visible to infrared" in page
    assert "no real persons" in page
    assert ("<small>±" in page) == (layout == "llcm"), "one trial has no deviation"
    assert {"regdb": "the visible images of trial 3", "llcm": "of each person and camera, trial 1"}[
        layout
    ] in page


def test_trial_of_the_run_and_of_the_command(call, layout: str, run: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    said = call("eval", run, "--trial", 2, *out)
    assert said.code == 1
    if layout == "llcm":
        assert said.complaint == "--trial 2: only RegDB has trials, not 'llcm'"
    else:
        assert "trained on trial 3 of RegDB, cannot be evaluated on trial 2" in said.complaint
        assert call("eval", run, "--trial", 3, *out).code == 0
        said = call("eval", run, "--trial", 11)
        assert said.code == 1
        assert "trial: expected 1 to 10, got 11" in said.complaint
        said = call("eval", run, "--trial", "three")
        assert said.code == 2


def test_weights_alone_may_name_their_trial(call, layout, drawn: Path, run: Path, tmp_path) -> None:
    if layout != "regdb":
        pytest.skip("only RegDB has trials")
    weights = tmp_path / "model.safetensors"
    shutil.copy(run / "checkpoints/best/model.safetensors", weights)
    small = json.loads((run / "run.json").read_text())
    small["recipe"]["data"]["trial"] = 2
    (tmp_path / "other.json").write_text(json.dumps(small))
    said = call("eval", weights, "--recipe", tmp_path / "other.json", "--trial", 3,
                "--out", tmp_path / "out")  # fmt: skip
    assert said.code == 1
    assert "trained on trial 2 of RegDB" in said.complaint


def test_synth_refuses_what_a_layout_lacks(call, layout: str, tmp_path: Path) -> None:
    said = call("data", "synth", tmp_path / "d", "--layout", layout, "--val-ids", 3)
    assert said.code == 1
    assert said.complaint == f"val_ids: layout {layout!r} has no val list, got 3"
    said = call("data", "synth", tmp_path / "d", "--layout", "market")
    assert said.code == 2
    assert not (tmp_path / "d").exists()
