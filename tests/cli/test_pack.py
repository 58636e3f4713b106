"""`data pack`, and `train` and `eval` out of a pack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastreid_vi.data import Pack, SysuMM01
from tests.cli.runs import SMALL, python, quietly

SIZE = ["--data.height", "32", "--data.width", "16"]


@pytest.fixture(scope="module")
def pack(tree: Path) -> Path:
    out = tree.parent / "pack"
    quietly("data", "pack", tree, "--out", out, "--recipe", "mpanet-sysu", *SIZE)
    return out


def weights(folder: Path) -> bytes:
    return (folder / "checkpoints" / "last" / "model.safetensors").read_bytes()


def test_packing(call, tree: Path, tmp_path: Path) -> None:
    words = ["data", "pack", tree, "--out", tmp_path / "p", "--recipe", "lba-sysu", *SIZE]
    said = call(*words)
    assert said.code == 0, said.err
    assert "images of 32 x 16 (lanczos)" in said.out
    assert "recipe hash " in said.out
    assert " images/s" in said.out
    assert (
        f"next: fastreid-vi train lba-sysu --data-root {tree} --pack {tmp_path / 'p'}" in said.out
    )
    assert "packing: " in said.err
    again = call(*words, "--json")
    result = json.loads(again.out)
    assert (result["decoded"], again.code) == (0, 0)
    assert result["recipe_hash"] in said.out
    assert result["images"] == len(Pack(tmp_path / "p"))


def test_packing_needs_no_torch(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    code = f"""
import sys
from fastreid_vi import cli
assert cli.main("data pack {tree} --out {out} --recipe lba".split()) == 0
assert cli.main("data pack --check {out}".split()) == 0
sys.exit("torch" in sys.modules)
"""
    said = python(code)
    assert said.returncode == 0, said.stderr


def test_check(call, tree: Path, pack: Path, tmp_path: Path) -> None:
    said = call("data", "pack", "--check", pack)
    assert said.code == 0, said.err
    assert said.out.strip().endswith(": good")
    copy = shutil.copytree(pack, tmp_path / "pack")
    shard = copy / "pixels-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    said = call("data", "pack", "--check", copy, "--json")
    assert said.code == 1
    assert json.loads(said.out)["damaged"] == [Pack(copy).rows.paths[-1]]
    assert "1 images are damaged, first " in said.err
    assert "pack again" in said.err


def test_check_against_the_files(call, pack: Path, damaged: Path) -> None:
    first = SysuMM01(damaged).train.file(0)
    first.write_bytes(first.read_bytes() + b" ")
    said = call("data", "pack", damaged, "--check", pack)
    assert said.code == 1
    assert f"1 images are changed since, first {first.relative_to(damaged)}" in said.out


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        ([], "DIR is missing"),
        (["{tree}"], "--out is missing"),
        (["{tree}", "--out", "p"], "--recipe is missing"),
        (["{tree}", "--out", "p", "--recipe", "osnet"], "recipe: expected one of baseline-sysu"),
        (["{tree}", "--out", "p", "--recipe", "lba", "--data.hight", "3"], "data.hight"),
        (["--check", "p", "--out", "p"], "--check PACK stands alone"),
    ],
)
def test_wrong_usage(call, tree: Path, words: list[str], needle: str) -> None:
    said = call("data", "pack", *[word.format(tree=tree) for word in words])
    assert said.code == 2
    assert needle in said.complaint


def test_bad_input(call, damaged: Path, tmp_path: Path) -> None:
    words = ["--out", tmp_path / "p", "--recipe", "lba", *SIZE]
    said = call("data", "pack", tmp_path / "nowhere", *words)
    assert (said.code, said.complaint) == (1, f"{tmp_path / 'nowhere'}: no such folder")
    file = SysuMM01(damaged).train.file(3)
    file.write_bytes(file.read_bytes()[:200])
    said = call("data", "pack", damaged, *words)
    assert said.code == 1
    assert said.complaint.startswith(f"{file}: unreadable image: ")
    said = call("data", "pack", damaged, *words, "--skip-broken")
    assert said.code == 0, said.err
    assert "left out 1 unreadable images" in said.err
    said = call("data", "pack", "--check", damaged)
    assert said.complaint.startswith(f"{damaged}: no pack here (pack.json is missing): pack again")


def test_training_and_evaluation(
    call, mpanet: Path, tree: Path, pack: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    flags = ["--data-root", tree, "--run-dir", folder, *SMALL]
    said = call("train", "mpanet-sysu", *flags, "--pack", pack)
    assert said.code == 0, said.err
    assert f"images: pack {pack}, batch by batch to cpu" in said.err
    assert weights(folder) == weights(mpanet)
    record = json.loads((folder / "run.json").read_text())
    assert record["recipe"]["data"]["packed"] == str(pack)

    tables = []
    for words in ([], ["--pack", "none"], ["--pack", pack]):
        said = call("eval", folder, "--json", "--out", tmp_path / "eval", *words)
        assert said.code == 0, said.err
        tables.append(json.loads(said.out)["settings"])
    assert tables[0] == tables[1] == tables[2]

    gone = call("eval", folder, "--pack", tmp_path / "gone")
    assert gone.code == 1
    assert gone.complaint.startswith(f"{tmp_path / 'gone'}: no pack here (pack.json is missing)")
    assert "or read the files (--pack none)" in gone.complaint


def test_a_relative_pack_is_found_from_elsewhere(
    call, tree: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pack.parent)
    folder = tmp_path / "run"
    flags = ["--data-root", tree, "--run-dir", folder, *SMALL, "--pack", pack.name]
    assert call("train", "baseline-sysu", *flags).code == 1  # another filter
    flags += ["--data.resize", "bilinear", "--data.label-order", "file"]
    assert call("train", "baseline-sysu", *flags).code == 0
    monkeypatch.chdir(tmp_path)
    more = ["train", "--resume", "--run-dir", folder, "--schedule.epochs"]
    assert call(*more, "2").code == 0
    said = call(*more, "3", "--pack", "none")
    assert said.code == 0, said.err
    assert "images: " not in said.err


def test_a_foreign_pack(call, tree: Path, pack: Path, tmp_path: Path) -> None:
    flags = ["--data-root", tree, "--run-dir", tmp_path / "run", *SMALL, "--pack", pack]
    said = call("train", "mpanet-sysu", *flags, "--data.height", "48")
    assert said.code == 1
    assert "foreign pack: it was made with data.height = 32, this recipe has 48" in said.complaint
    assert "pack again (fastreid-vi data pack), or read the files (--pack none)" in said.complaint
    assert not (tmp_path / "run").exists()


def test_agw_needs_its_arrays(call, tree: Path, tmp_path: Path) -> None:
    flags = ["--data-root", tree, "--run-dir", tmp_path / "run", *SMALL, "--pack", "agw"]
    said = call("train", "lba-sysu", *flags)
    assert said.code == 1
    assert 'data.packed "agw": its arrays are 288 x 144 by lanczos' in said.complaint
