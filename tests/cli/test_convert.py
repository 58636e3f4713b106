"""`convert`: every method's official form to ours and back to the bit, and everything refused."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastreid_vi import methods
from fastreid_vi.train import RunRecord, load_weights
from fastreid_vi.train.checkpoint import Header, load_safetensors
from fastreid_vi.train.convert import read_official, read_parts, write_parts
from fastreid_vi.train.record import write_run

SMALL: dict[str, dict[str, Any]] = {
    "baseline": {"depth": 18},
    "mpanet": {"depth": 18, "parts": 2},
    "lba": {"depth": 18},
    "mcja": {"depth": 18, "mda_m": 3},
    "aligngan": {"depth": 18, "conv_dim": 4, "residual_blocks": 1},
}
IDS = 5
EVERY = pytest.mark.parametrize("method", list(SMALL))


def own(method: str) -> dict[str, Tensor]:
    """A small network's state, every entry different from a fresh network's."""
    torch.manual_seed(3)
    network = methods.create(method, IDS, weights="none", **SMALL[method])
    state = {
        key: torch.rand_like(value) - 0.4 if value.is_floating_point() else value + 11
        for key, value in network.state_dict().items()
    }
    return {k: v.abs() + 0.1 if k.endswith("running_var") else v for k, v in state.items()}


def official(method: str) -> dict[str, Tensor]:
    """The same in the official form; what nothing uses is drawn."""
    mapping = importlib.import_module(f"fastreid_vi.methods.{method}.official")
    state = mapping.to_official(own(method))
    unused = set(mapping.from_official(state)[1])
    return {
        key: torch.randn_like(value) if key in unused and value.is_floating_point() else value
        for key, value in state.items()
    }


def released(method: str, place: Path) -> Path:
    """The file or folder that the official code leaves."""
    state = official(method)
    if method == "aligngan":
        write_parts(place, state, 250)
    elif method in ("lba", "baseline"):
        metrics = {"cmc": np.zeros(20, np.float32), "mAP": np.float64(0.5), "epoch": 42}
        torch.save({"net": state, **metrics}, place)
    else:
        torch.save(state, place)
    return place


def read_back(method: str, place: Path) -> dict[str, Tensor]:
    return (read_parts(place, 8) if method == "aligngan" else read_official(place)).state


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """run.json of a small network."""

    def write(method: str, **changes: Any) -> Path:
        found: Any = methods.recipe(method, "sysu")
        model = dataclasses.replace(found.model, **{**SMALL[method], **changes})
        folder = tmp_path / f"{method}-recipe"
        folder.mkdir(exist_ok=True)
        record = RunRecord(
            recipe=dataclasses.replace(found, model=model),
            num_ids=IDS,
            root=tmp_path,
            eval_on="validation",
            versions={},
        )
        write_run(folder, record)
        return folder / "run.json"

    return write


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in wanted.items()
    )


# There and back.


@EVERY
def test_official_to_ours_and_back_to_the_bit(call, recipe, tmp_path: Path, method: str) -> None:
    source, ours = released(method, tmp_path / "official"), tmp_path / "ours.safetensors"
    said = call("convert", source, ours, "--method", method, "--recipe", recipe(method), "--json")
    assert said.code == 0, said.err
    report = json.loads(said.out)
    theirs = official(method)
    assert (report["method"], report["num_ids"], report["to"]) == (method, IDS, "ours")
    assert sorted(report["mapped"] + report["unused"]) == sorted(theirs)
    network = methods.create(method, IDS, weights="none", **SMALL[method])
    epoch = 42 if method in ("lba", "baseline") else 0
    step = 250 if method == "aligngan" else 0
    header = load_weights(network, ours, method=method, num_ids=IDS)
    assert header == Header(method, IDS, epoch, step)
    assert same(network.state_dict(), own(method))

    back = tmp_path / "back"
    base = () if method == "aligngan" else ("--base", source)
    said = call("convert", ours, back, *base, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["to"] == "official"
    found = read_back(method, back)
    assert same(found, theirs)
    if base:
        assert list(found) == list(theirs)
        plain = torch.load(back, weights_only=True)
        assert (list(plain) == ["net", "epoch"]) == (method in ("lba", "baseline"))
    else:
        assert {p.name for p in back.iterdir()} == {f"model-{i}_250.pkl" for i in range(8)}
    mapped = json.loads(said.out)["mapped"]
    third = call("convert", ours, tmp_path / "third", "--json")
    assert third.code == 0, third.err
    again = read_back(method, tmp_path / "third")
    assert again.keys() == theirs.keys()
    assert same({k: again[k] for k in mapped}, {k: theirs[k] for k in mapped})


@EVERY
def test_the_report_for_people(call, recipe, tmp_path: Path, method: str) -> None:
    source, out = released(method, tmp_path / "official"), tmp_path / "ours.safetensors"
    said = call("convert", source, out, "--method", method, "--recipe", recipe(method))
    assert said.code == 0, said.err
    assert f"{method}, {IDS} identities," in said.out.splitlines()[0]
    assert ("label order: `file`" in said.out) == (method in ("mpanet", "mcja"))
    assert f"next: fastreid-vi eval {out} --recipe" in said.out.splitlines()[-1]
    assert ("carry nothing for us:" in said.out) == (method in ("baseline", "lba", "mcja"))
    assert ("left out beside the weights: cmc, mAP\n" in said.out) == (
        method in ("baseline", "lba")
    )


@pytest.mark.parametrize("method", ["mpanet", "mcja", "aligngan"])
def test_the_keys_tell_the_method(call, recipe, tmp_path: Path, method: str) -> None:
    source = released(method, tmp_path / "official")
    said = call("convert", source, tmp_path / "o.safetensors", "--recipe", recipe(method))
    assert said.code == 0, said.err
    assert load_safetensors(tmp_path / "o.safetensors")[1] == Header(
        method, IDS, 0, 250 if method == "aligngan" else 0
    )


def test_two_methods_share_their_keys(call, tmp_path: Path) -> None:
    source = released("lba", tmp_path / "official.t")
    said = call("convert", source, tmp_path / "o.safetensors")
    assert said.code == 1
    assert "those of baseline and lba; name the method: --method M" in said.complaint


def test_the_recipe_is_chosen_by_shapes_and_identities(call, tmp_path: Path) -> None:
    with torch.device("meta"):
        network = methods.create("mcja", 206, weights="none", mda_m=12)
    mapping = importlib.import_module("fastreid_vi.methods.mcja.official")
    state = {k: torch.zeros(v.shape) for k, v in mapping.to_official(network.state_dict()).items()}
    torch.save(state, tmp_path / "a.pth")
    said = call("convert", tmp_path / "a.pth", tmp_path / "o.safetensors", "--json")
    assert said.code == 0, said.err
    report = json.loads(said.out)
    assert (report["recipe"], report["num_ids"]) == ("mcja-regdb", 206)


def test_eval_takes_a_converted_file(call, recipe, tree: Path, tmp_path: Path) -> None:
    source, ours = released("mpanet", tmp_path / "a.pth"), tmp_path / "ours.safetensors"
    run = recipe("mpanet")
    values = json.loads(run.read_text())
    values["recipe"]["data"] |= {"height": 32, "width": 16, "identities": 3, "images": 4}
    values["recipe"]["data"] |= {"workers": 0, "pad": 2, "validation": 0}
    run.write_text(json.dumps(values))
    assert call("convert", source, ours, "--recipe", run).code == 0
    said = call("eval", ours, "--recipe", run, "--data-root", tree, "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert result["method"] == "mpanet"
    assert result["checkpoint"]["path"] == str(ours)


# Refused: one line, exit code 1, nothing written.


def refused(call, *argv: object) -> str:
    said = call("convert", *argv)
    assert said.code == 1, said.out
    return said.complaint


def test_wrong_method_suggests_the_right_one(call, tmp_path: Path) -> None:
    source, out = released("mcja", tmp_path / "a.pth"), tmp_path / "o.safetensors"
    for wrong in ("mpanet", "lba", "baseline"):
        line = refused(call, source, out, "--method", wrong)
        assert f"not a checkpoint of '{wrong}'" in line
        assert line.endswith("its keys are those of 'mcja': --method mcja")
    assert "expected the folder of 8 files" in refused(call, source, out, "--method", "aligngan")
    assert "expected one of baseline" in refused(call, source, out, "--method", "resnet")
    assert not out.exists()


def test_missing_and_unknown_keys_are_listed(call, recipe, tmp_path: Path) -> None:
    state = official("mpanet")
    del state["classifier.weight"], state["backbone.layer2.1.bn1.bias"]
    state["optimizer.step"] = torch.zeros(())
    torch.save(state, tmp_path / "a.pth")
    said = call(
        *("convert", tmp_path / "a.pth", tmp_path / "o.safetensors"),
        *("--method", "mpanet", "--recipe", recipe("mpanet")),
    )
    assert said.code == 1
    for needle in ("classifier.weight", "backbone.layer2.1.bn1.bias", "optimizer.step"):
        assert needle in said.complaint
    assert "  missing classifier.weight" in said.out.splitlines()
    assert "  unmapped optimizer.step" in said.out.splitlines()
    assert not (tmp_path / "o.safetensors").exists()


def test_wrong_shapes_are_named(call, recipe, tmp_path: Path) -> None:
    source, out = released("mcja", tmp_path / "a.pth"), tmp_path / "o.safetensors"
    line = refused(call, source, out, "--method", "mcja", "--recipe", recipe("mcja", mda_m=2))
    assert "sc_conv.weight' has shape [3, " in line
    assert "expected [2, " in line
    state = official("mpanet")
    state["bn_neck.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "b.pth")
    line = refused(call, tmp_path / "b.pth", out, "--method", "mpanet")
    assert "bn_neck.bias: expected shape [1536], got [7]" in line
    assert not out.exists()


def test_class_counts(call, recipe, tmp_path: Path) -> None:
    source, out = released("mpanet", tmp_path / "a.pth"), tmp_path / "o.safetensors"
    small = ("--recipe", recipe("mpanet"))
    line = refused(call, source, out, "--num-ids", "395", *small)
    assert line.endswith("its classifier has 5 identities, expected 395")
    assert call("convert", source, out, "--num-ids", "5", *small).code == 0
    line = refused(call, out, tmp_path / "back.pth", "--num-ids", "6")
    assert line.endswith("expected class count 6, its header says 5")


@pytest.mark.parametrize("content", ["code", "truncated", "text", "empty"])
def test_bad_files(call, tmp_path: Path, content: str) -> None:
    path, out = tmp_path / "a.pth", tmp_path / "o.safetensors"
    mark = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return mark.touch, ()

    torch.save({"net": {"a": torch.zeros(3)}, "x": Trap()} if content == "code" else {}, path)
    if content != "code":
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[:-30], "text": b"<html>", "empty": b""}[content])
    needle = "refused: it wants" if content == "code" else "not a PyTorch checkpoint, or damaged"
    assert needle in refused(call, path, out, "--method", "mpanet")
    assert not mark.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth"]


def test_places(call, recipe, tmp_path: Path) -> None:
    source, out = released("mpanet", tmp_path / "a.pth"), tmp_path / "o.safetensors"
    small = ("--recipe", recipe("mpanet"))
    assert "no such file or folder" in refused(call, tmp_path / "none.pth", out)
    assert "no such folder" in refused(call, source, tmp_path / "none" / "o.safetensors")
    assert call("convert", source, out, *small).code == 0
    before = out.read_bytes()
    assert "exists; name another place or add --overwrite" in refused(call, source, out, *small)
    assert call("convert", source, out, *small, "--overwrite").code == 0
    assert out.read_bytes() == before
    assert "already in our form" in refused(call, out, tmp_path / "p", "--to", "ours")
    assert "not one of our checkpoints" in refused(call, source, tmp_path / "p", "--to", "official")
    assert "--base: only fills" in refused(call, source, tmp_path / "p", "--base", source, *small)
    assert "is a folder" in refused(call, source, tmp_path, *small, "--overwrite")
    assert not (tmp_path / "p").exists()


def test_steps_of_aligngan(call, recipe, tmp_path: Path) -> None:
    folder = released("aligngan", tmp_path / "official")
    small = ("--recipe", recipe("aligngan"))
    out = tmp_path / "o.safetensors"
    line = refused(call, folder, out, *small, "--step", "100")
    assert line.endswith("no files of step 100; there are steps 250")
    assert call("convert", folder, out, *small, "--step", "250").code == 0
    assert call("convert", out, tmp_path / "back", "--step", "300").code == 0
    assert (tmp_path / "back" / "model-7_300.pkl").is_file()
    (folder / "model-4_250.pkl").unlink()
    line = refused(call, folder, tmp_path / "p", *small)
    assert "missing model-4_250.pkl of 8 files" in line
