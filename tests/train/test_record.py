"""run.json repeats a run; a foreign file is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastreid_vi.config import Recipe
from fastreid_vi.train import TrainError, read_run
from tests.train.small import SmallRecipe, recipe, run


def kind(method: str, dataset: str) -> type[Recipe]:
    if method != "small":
        raise ValueError(f"method: expected one of small, got {method!r}")
    return SmallRecipe


@pytest.fixture
def run_dir(tree: Path, tmp_path: Path) -> Path:
    run(tree, tmp_path / "run", recipe(seed=5))
    return tmp_path / "run"


def test_repeats_a_run(tree: Path, tmp_path: Path, run_dir: Path) -> None:
    record = read_run(run_dir / "run.json", kind)
    assert record == read_run(run_dir, kind)
    assert record.recipe == recipe(seed=5)
    assert isinstance(record.recipe, SmallRecipe)
    assert (record.seed, record.num_ids, record.root) == (5, 9, tree)
    assert record.versions["threads"] == "1" or int(record.versions["threads"]) > 1
    run(record.root, tmp_path / "again", record.recipe)
    final = "checkpoints/last/model.safetensors"
    assert (tmp_path / "again" / final).read_bytes() == (run_dir / final).read_bytes()


def edited(run_dir: Path, path: str, value: Any) -> Path:
    values = json.loads((run_dir / "run.json").read_text())
    *parents, name = path.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    if value is None:
        del inner[name]
    else:
        inner[name] = value
    file = run_dir / "edited.json"
    file.write_text(json.dumps(values))
    return file


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("recipe.optim.momentun", 0.9, "recipe.optim: unknown field 'momentun' for OptimConfig"),
        ("recipe.data.height", None, "recipe.data: missing field 'height' of DataConfig"),
        ("recipe.data.height", "tall", r"recipe\.data\.height: expected .*int.*, got 'tall'"),
        ("recipe.optim.lr", -1.0, "lr: expected > 0, got -1"),
        ("recipe.method", "other", "method: expected one of small, got 'other'"),
        ("recipe", None, "not a run of fastreid_vi"),
        ("recipe", [1], "not a run of fastreid_vi"),
        ("format", 2, "expected an object with format 1"),
        ("num_ids", "many", "num_ids: expected an integer > 0, got 'many'"),
        ("dataset", None, "not a run of fastreid_vi"),
    ],
)
def test_foreign_fields(run_dir: Path, path: str, value: Any, message: str) -> None:
    file = edited(run_dir, path, value)
    with pytest.raises(TrainError, match=message) as caught:
        read_run(file, kind)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not JSON"),
        ("", "not JSON"),
        ("[]", "expected an object with format 1"),
        ('{"model": "resnet"}', "expected an object with format 1"),
    ],
)
def test_foreign_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(TrainError, match=message):
        read_run(tmp_path, kind)


def test_binary_files(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(bytes(range(256)))
    with pytest.raises(TrainError, match="not JSON"):
        read_run(tmp_path / "weights.pt", kind)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"cannot read .*No such file"):
        read_run(tmp_path / "absent.json", kind)


def test_resuming_as_another_method(tree: Path, run_dir: Path) -> None:
    from dataclasses import replace

    other = replace(recipe(seed=5), method="large")
    message = "cannot resume a run of 'small' on 'sysu' as 'large' on 'sysu'"
    with pytest.raises(TrainError, match=message):
        run(tree, run_dir, other, resume=True)


def test_another_thread_count_is_said(
    tree: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((run_dir / "run.json").read_text())
    values["versions"]["threads"] = "77"
    (run_dir / "run.json").write_text(json.dumps(values))
    run(tree, run_dir, recipe(seed=5), resume=True, display="plain")
    said = capsys.readouterr().err
    assert "resumed with threads = " in said
    assert "before '77': the last bits may differ" in said
