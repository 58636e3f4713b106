"""Training that cannot be what was asked for: one clear line each, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fastreid_vi.methods import RECIPES
from tests.cli.runs import ENVIRONMENT, SMALL, Said


def refused(call, root: Path, folder: Path, name: str, *flags: object) -> Said:
    said = call("train", name, "--data-root", root, "--run-dir", folder, *SMALL, *flags)
    assert said.code in (1, 2), said.err
    assert not folder.exists()
    return said


@pytest.mark.parametrize("name", ["mpanet-market", "osnet", "osnet-sysu", "mcja-", "sysu"])
def test_unknown_pair_of_method_and_data_set(call, tree: Path, tmp_path: Path, name: str) -> None:
    said = refused(call, tree, tmp_path / "run", name)
    assert said.code == 2
    assert "recipe: expected one of baseline-sysu, " in said.complaint
    assert all(known in said.complaint for known in RECIPES)


@pytest.mark.parametrize(
    ("flags", "needle"),
    [
        ("--data.identities 0", "identities: expected > 0, got 0"),
        ("--data.identities 7", "7 identities cannot be drawn from 5"),
        ("--data.images 3", "images: expected an even number"),
        ("--data.images 0", "images: expected > 0, got 0"),
        ("--data.images many", "many"),
        ("--run.accumulate 0", "accumulate: expected > 0, got 0"),
        ("--schedule.iterations -1", "iterations"),
        ("--run.bn none", "none"),
        ("--bn none", "none"),
        ("--run.precision fp12", "fp12"),
        ("--optim.lrr 1", "lrr"),
        ("--skip-nonfinit", "skip-nonfinit"),
    ],
)
def test_impossible_settings(call, tree: Path, tmp_path: Path, flags: str, needle: str) -> None:
    said = refused(call, tree, tmp_path / "run", "baseline", *flags.split())
    assert "Traceback" not in said.err
    line = said.err.splitlines()[-1]
    assert needle in line
    assert line.startswith(("fastreid-vi: error: ", "fastreid-vi train: error: "))


@pytest.fixture
def checkpoint(baseline: Path, tmp_path: Path) -> Path:
    """A run to spoil."""
    return shutil.copytree(baseline, tmp_path / "run", symlinks=True)


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ("lacks", "weights do not fit Baseline: missing 'classifier.weight'"),
        ("adds", "weights do not fit Baseline: unexpected 'extra.one' and 1 more"),
        ("both", "missing 'classifier.weight'; unexpected 'extra.one' and 1 more"),
    ],
)
def test_checkpoint_with_other_keys(call, checkpoint: Path, change: str, needle: str) -> None:
    file = checkpoint / "checkpoints" / "last" / "model.safetensors"
    tensors = load_file(file)
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    first = tensors["classifier.weight"]
    if change != "adds":
        del tensors["classifier.weight"]
    if change != "lacks":
        tensors |= {"extra.one": first[:1].clone(), "extra.two": first[:2].clone()}
    save_file(tensors, file, header)
    before = (checkpoint / "metrics.jsonl").read_bytes()
    for words in (["train", "--resume", "--run-dir", checkpoint], ["eval", checkpoint]):
        said = call(*words)
        assert said.code == 1
        assert needle in said.complaint
        assert "model.safetensors" in said.complaint or "step-" in said.complaint
    assert (checkpoint / "metrics.jsonl").read_bytes() == before


def test_short_flags_reach_the_recipe(call, tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ["--skip-nonfinite", "--bn", "sync", "--run.accumulate", "2"]
    said = call("train", "baseline", "--data-root", tree, "--run-dir", folder, *SMALL, *flags)
    assert said.code == 0, said.err
    assert "forecast: " in said.err
    settings = json.loads((folder / "run.json").read_text())["recipe"]["run"]
    assert (settings["skip_nonfinite"], settings["bn"], settings["accumulate"]) == (True, "sync", 2)


def test_torchrun_speaks_once(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "fastreid_vi", "train", "baseline", "--data-root", tree, "--run-dir", folder),
        *SMALL, "--data.identities", "4", "--bn", "sync", "--json",
    ]  # fmt: skip
    environment = {n: v for n, v in ENVIRONMENT.items() if n not in ("RANK", "WORLD_SIZE")}
    said = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=300,
        env={**environment, "OMP_NUM_THREADS": "1"}, cwd=os.getcwd(),
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["epochs"] == 1
    assert said.stderr.count("forecast: ") == 1
    hint = f"torchrun --nproc-per-node 2 -m fastreid_vi train --resume --run-dir {folder}"
    assert said.stderr.count(hint) == 1
    assert json.loads((folder / "run.json").read_text())["versions"]["processes"] == "2"
