"""`scripts/demo.py`, the road of `make demo`, at a size that takes seconds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastreid_vi import cli

SETTINGS = ["all/1", "all/10", "indoor/1", "indoor/10"]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with tiny settings, its commands run in this process."""
    path = Path(__file__).parents[2] / "scripts" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tiny = {
        "train_ids": 6,
        "val_ids": 2,
        "test_ids": 5,
        "height": 32,
        "width": 16,
        "images": [2, 3],
    }
    monkeypatch.setattr(script, "SYNTH", {**script.SYNTH, **tiny})
    flags = ["--data.height", 32, "--data.width", 16, "--data.identities", 3, "--data.images", 4]
    flags += ["--data.validation", 2, "--schedule.epochs", 1, "--schedule.milestones"]
    flags += ["--run.eval-every", 1]
    small = {method: [*more, *flags] for method, more in script.SPECIAL.items()}
    monkeypatch.setattr(script, "SPECIAL", small)  # the last flag counts
    script.typed = []

    def command(*words: Any) -> None:
        script.typed.append([str(word) for word in words])
        assert cli.main(script.typed[-1]) == 0

    monkeypatch.setattr(script, "command", command)
    return script


def test_the_demo_ends_with_a_table_results_and_a_report(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.demo(tmp_path) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == ["chance", "baseline", "mpanet"]
    assert list(found["chance"]) == SETTINGS
    for method in ("baseline", "mpanet"):
        test = json.loads((tmp_path / method / "result.json").read_text())["test"]["settings"]
        assert list(found[method]) == SETTINGS
        for setting in SETTINGS:
            assert list(found[method][setting]) == ["R1", "mAP", "mINP"]
            for metric, value in found[method][setting].items():
                assert value == test[setting]["mean"][metric]
                assert 0 <= value <= 1
            assert found["chance"][setting] == test[setting]["chance"]["R1"]
    row = next(line for line in said.splitlines() if line.startswith("all-search, 1 shot, R1"))
    assert f"{100 * found['mpanet']['all/1']['R1']:.1f} ±" in row
    assert row.endswith(f"{100 * found['chance']['all/1']:.1f}")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>baseline</h2>" in page
    assert "<h2>mpanet</h2>" in page
    assert "<h2>Pattern maps</h2>" in page

    # Again: the data set is kept, both runs go and are made anew.
    first, again = demo.typed, []
    kept = {m: (tmp_path / m / "result.json").read_text() for m in ("baseline", "mpanet")}

    def remember(*words: Any) -> None:
        again.append([str(word) for word in words])
        if words[0] == "train":
            assert not Path(words[5]).exists()
            Path(words[5]).mkdir()
        elif words[0] == "eval":
            Path(words[1], "result.json").write_text(kept[Path(words[1]).name])

    demo.command = remember
    assert demo.demo(tmp_path) == 0
    assert [words[0] for words in first] == ["data", "train", "eval", "train", "eval", "report"]
    assert again == first[1:]


def test_another_method_adds_its_row_and_a_new_data_set_drops_them(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.demo(tmp_path, ("baseline",)) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    assert list(first) == ["chance", "baseline"]
    assert demo.demo(tmp_path, ("mpanet",)) == 0
    both = json.loads((tmp_path / "results.json").read_text())
    assert list(both) == ["chance", "baseline", "mpanet"]
    assert both["baseline"] == first["baseline"]
    assert "<h2>baseline</h2>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    demo.SYNTH["seed"] += 1
    assert demo.demo(tmp_path, ("mpanet",)) == 0
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["chance", "mpanet"]


def test_an_unknown_method_is_refused(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.sys, "argv", ["demo.py", "resnet"])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert "got 'resnet'" in capsys.readouterr().err


def test_a_failed_step_ends_the_demo(demo: ModuleType, tmp_path: Path) -> None:
    def broken(*words: Any) -> None:
        raise demo.subprocess.CalledProcessError(3, words)

    demo.command = broken
    assert demo.demo(tmp_path) == 3
    assert not (tmp_path / "results.json").exists()


def test_another_data_set_is_drawn_again(demo: ModuleType, tmp_path: Path) -> None:
    demo.draw(tmp_path / "data")
    demo.draw(tmp_path / "data")
    assert len(demo.typed) == 1
    demo.SYNTH["seed"] += 1
    demo.draw(tmp_path / "data")
    assert len(demo.typed) == 2
