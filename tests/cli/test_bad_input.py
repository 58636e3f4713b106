"""Bad input: one clear line, exit code 1, nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.runs import SMALL, Said, ids


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        ("data check nowhere", "nowhere: no such folder"),
        ("eval nowhere", "nowhere: no such run folder or checkpoint"),
        ("report nowhere", "nowhere: no such run folder or checkpoint"),
        ("train mpanet-sysu --data-root nowhere", "nowhere: no such folder"),
        ("train --recipe nowhere.json", "cannot read nowhere.json: No such file or directory"),
        ("train --resume --run-dir nowhere", "cannot read nowhere: No such file or directory"),
    ],
)
def test_missing_folder(call, tmp_path: Path, monkeypatch, argv: str, needle: str) -> None:
    monkeypatch.chdir(tmp_path)
    said = call(*argv.split())
    assert said.code == 1
    assert needle in said.complaint
    assert not list(tmp_path.iterdir())


def training(call, root: Path, *flags: object) -> Said:
    """A run that must not start, and must leave no folder with weights."""
    folder = root.parent / "refused"
    said = call("train", "baseline", "--data-root", root, "--run-dir", folder, *SMALL, *flags)
    assert said.code == 1, said.err
    assert not list(folder.glob("checkpoints/*"))
    return said


def test_empty_split(call, damaged: Path) -> None:
    (damaged / "exp/test_id.txt").write_text("\n")
    assert "test_id.txt: empty split" in training(call, damaged).complaint
    said = call("data", "check", damaged)
    assert said.code == 1
    assert "test_id.txt" in said.out


def test_missing_camera(call, damaged: Path) -> None:
    shutil.rmtree(damaged / "cam4")
    assert "cam4 is missing" in training(call, damaged).complaint
    found = json.loads(call("data", "check", damaged, "--json").out)
    assert not found["ok"]
    assert found["findings"][0]["where"] == "cam4"


def test_unreadable_image(call, damaged: Path) -> None:
    broken = next(damaged.glob(f"cam3/{ids(damaged, 'train')[0]:04d}/*.jpg"), None)
    broken = broken or next(damaged.glob(f"cam6/{ids(damaged, 'train')[0]:04d}/*.jpg"))
    broken.write_bytes(b"\xff\xd8 cut off")
    name = broken.relative_to(damaged).as_posix()
    said = call("data", "check", damaged)
    assert said.code == 1
    assert name in said.out
    assert "1 finding\n" in said.out
    # With this many epochs some batch needs it.
    assert name in training(call, damaged, "--schedule.epochs", "200").complaint
    folder = damaged.parent / "skipped"
    said = call(
        "train", "baseline", "--data-root", damaged, "--run-dir", folder, *SMALL, "--skip-broken"
    )
    assert said.code == 0, said.err
    assert "left out 1 unreadable images" in said.err
    assert json.loads((folder / "run.json").read_text())["recipe"]["data"]["skip_broken"]


def test_identity_without_a_modality(call, damaged: Path) -> None:
    pid = ids(damaged, "train")[2]
    for cam in (3, 6):
        shutil.rmtree(damaged / f"cam{cam}/{pid:04d}", ignore_errors=True)
    complaint = training(call, damaged, "--data.validation", "0").complaint
    assert str(pid) in complaint
    assert "infrared" in complaint


def test_more_identities_in_a_batch_than_there_are(call, tree: Path) -> None:
    complaint = training(call, tree, "--data.identities", "50").complaint
    assert "50" in complaint
    assert "identities" in complaint


def test_more_held_out_than_there_are(call, tree: Path) -> None:
    assert (
        "cannot hold out 8 identities" in training(call, tree, "--data.validation", "8").complaint
    )


def test_a_data_set_of_another_layout(call, tree: Path) -> None:
    for dataset, folder in (("regdb", "Visible"), ("llcm", "vis")):
        recipe = f"mpanet-{dataset}"
        said = call("train", recipe, "--data-root", tree, "--run-dir", tree.parent / "no")
        assert said.code == 1
        assert said.complaint == f"{tree}: folder {folder} is missing"


def test_weights_that_are_not_there(call, tree: Path) -> None:
    assert "nowhere.pth" in training(call, tree, "--weights", "nowhere.pth").complaint


def test_checkpoint_of_another_method(call, mpanet: Path, baseline: Path) -> None:
    said = call("eval", mpanet, "--recipe", baseline / "run.json", "--out", mpanet.parent / "no")
    assert said.code == 1
    assert (
        "checkpoint of method 'mpanet' with 5 identities, expected 'baseline' with 5"
        in said.complaint
    )
    assert not (mpanet.parent / "no").exists()


def test_checkpoint_of_another_class_count(call, mpanet: Path, tmp_path: Path) -> None:
    record = json.loads((mpanet / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "num_ids": 7}))
    said = call("eval", mpanet, "--recipe", tmp_path / "run.json", "--out", tmp_path)
    assert said.code == 1
    assert "with 5 identities, expected 'mpanet' with 7" in said.complaint


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ("not json", "not JSON"),
        ({"name": "a config of something else"}, "not a run of fastreid_vi"),
        ({"method": "osnet"}, "expected one of baseline, aligngan, lba, mpanet, mcja, got 'osnet'"),
        ({"gamma": 3}, "unknown field 'gamma'"),
        ({"optim": {"lr": "high"}}, "recipe.optim.lr: expected"),
        (
            {"data": {"height": -1, "width": 8, "identities": 2, "images": 2, "sampler": "x"}},
            "recipe.data.sampler",
        ),
    ],
)
def test_foreign_recipe(call, mpanet: Path, tmp_path: Path, change, needle: str) -> None:
    record = json.loads((mpanet / "run.json").read_text())
    if isinstance(change, str):
        text = change
    elif "name" in change:
        text = json.dumps(change)
    else:
        text = json.dumps({**record, "recipe": {**record["recipe"], **change}})
    (tmp_path / "foreign.json").write_text(text)
    said = call("train", "--recipe", tmp_path / "foreign.json", "--run-dir", tmp_path / "run")
    assert said.code == 1
    assert needle in said.complaint
    assert not (tmp_path / "run").exists()


def test_no_place_to_write(call, tree: Path, mpanet: Path, tmp_path: Path) -> None:
    # A folder below a file: refused for everybody, root included.
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "inside"
    for argv in (
        ["train", "baseline", "--data-root", tree, "--run-dir", target, *SMALL],
        ["eval", mpanet, "--out", target],
        ["report", mpanet, "--queries", 1, "--out", target / "page.html"],
        ["data", "synth", target, "--train-ids", 1, "--val-ids", 1, "--test-ids", 1],
    ):
        said = call(*argv)
        assert said.code == 1
        assert str(tmp_path / "file") in said.complaint


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files cannot grow beyond `limit` bytes: writing fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_while_saving(call, tree: Path, mpanet: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with full_disk(200_000):
        said = call("train", "baseline", "--data-root", tree, "--run-dir", folder, *SMALL)
    assert said.code == 1
    assert "cannot save checkpoint" in said.complaint
    assert "File too large" in said.complaint
    assert not [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt")]

    page = mpanet / "report.html"
    page.write_text("earlier")
    with full_disk(50_000):
        said = call("report", mpanet, "--queries", 1)
    assert said.code == 1
    assert "File too large" in said.complaint
    assert page.read_text() == "earlier"
    assert not list(mpanet.glob("*.part"))

    with full_disk(1_000):
        said = call("eval", mpanet)
    assert said.code == 1
    assert "File too large" in said.complaint
    assert "test" in json.loads((mpanet / "result.json").read_text())


def test_machine_output_of_an_error(call) -> None:
    said = call("eval", "nowhere", "--json")
    assert said.code == 1
    assert json.loads(said.out) == {"error": said.complaint}


def test_debug_shows_where(call) -> None:
    said = call("eval", "nowhere", "--debug")
    assert said.code == 1
    assert "Traceback" in said.err
    assert (
        said.err.splitlines()[-1] == "fastreid-vi: error: nowhere: no such run folder or checkpoint"
    )


def test_a_fault_of_ours_is_named_as_one(call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("x")

    monkeypatch.setattr("fastreid_vi._doctor.inspect", broken)
    said = call("doctor")
    assert said.code == 1
    assert said.complaint == "KeyError: 'x' (--debug shows where)"
