"""The command line: help, usage, doctor, and the road from nothing to a report."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastreid_vi.version import __version__
from tests.cli.runs import ENVIRONMENT, SETTINGS, SMALL, ids, python


def test_help_of_every_verb_loads_nothing_heavy() -> None:
    verbs = [
        [],
        ["data"],
        ["data", "synth"],
        ["data", "check"],
        ["train"],
        ["eval"],
        ["embed"],
        ["search"],
        ["rerank"],
        ["report"],
        ["convert"],
        ["certify"],
        ["doctor"],
    ]
    code = f"""
import sys
from fastreid_vi.cli import main
for verb in {verbs}:
    try:
        main([*verb, "--help"])
    except SystemExit as stop:
        assert not stop.code, verb
print("loaded:", *sorted({{"torch", "numpy", "scipy", "PIL", "tyro", "rich"}} & set(sys.modules)))
"""
    ran = python(code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "loaded:"
    assert ran.stdout.count("usage: fastreid-vi") == len(verbs)
    assert "recipes: baseline-sysu" in ran.stdout


def test_recipe_flags_have_help(call) -> None:
    said = call("train", "mpanet-sysu", "--help")
    assert said.code == 0
    assert "--optim.lr FLOAT" in said.out
    assert "--model.parts INT" in said.out


def test_version(call) -> None:
    assert call("--version").out == f"fastreid-vi {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        ([], "required: VERB"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["data"], "required: VERB"),
        (["doctor", "--quick"], "unrecognized arguments: --quick"),
        (["data", "synth", "x", "--test-ids", "0"], "expected a whole number above 0, got '0'"),
        (["train"], "which recipe?"),
        (["train", "resnet-sysu", "--data-root", "x"], "expected one of baseline-sysu"),
        (["train", "mpanet-sysu"], "--data-root DIR"),
        (["train", "mpanet-sysu", "--recipe", "run.json"], "not both"),
        (
            ["train", "mpanet-sysu", "--data-root", "x", "--optim.lr", "fast"],
            "--optim.lr: could not convert",
        ),
        (["train", "mpanet-sysu", "--data-root", "x", "--optim.speed", "3"], "--optim.speed"),
        (
            ["train", "mpanet-sysu", "--data-root", "x", "--model.depth", "17"],
            "invalid choice '17'",
        ),
        (
            ["train", "mpanet-sysu", "--data-root", "x", "--data.images", "3"],
            "expected an even number",
        ),
        (["train", "mpanet-sysu", "--data-root", "x", "--optim.lr", "-1"], "lr: expected > 0"),
    ],
)
def test_wrong_usage(call, argv: list[str], needle: str) -> None:
    said = call(*argv)
    assert said.code == 2
    assert needle in said.err.splitlines()[-1]
    assert "Traceback" not in said.err


def test_doctor(call) -> None:
    said = call("doctor")
    for needle in (
        __version__,
        "torch 2",
        "_C: ",
        "_retrieval: ",
        "gem_pool",
        "pattern_pool",
        "reference",
    ):
        assert needle in said.out
    found = json.loads(call("doctor", "--json").out)
    assert said.code == (0 if found["ok"] else 1)
    assert found["ops"]["gem_pool"]["reference"] == "built"
    assert found["live"]["gem_pool"]["cpu"] in ("cpu", "reference")
    assert found["check"]["gem_pool on cpu"] == "right"
    assert found["versions"]["fastreid-vi"] == __version__
    ranking = found["ops"]["rank_metrics"]
    assert (ranking["reference"], ranking["retrieval"]) == ("built", found["native"]["_retrieval"])
    (line,) = (line for line in said.out.splitlines() if line.startswith("rank_metrics "))
    assert line.split()[1] == "built"
    room = "retrieval" if ranking["retrieval"] == "built" else "reference"
    assert found["live"]["rank_metrics"] == {"cpu": room}


@pytest.mark.parametrize("missing", ["fastreid_vi._retrieval", "torch"])
def test_doctor_names_the_ranking_room(missing: str) -> None:
    ran = python(f"""
import sys
sys.modules[{missing!r}] = None
from fastreid_vi import _doctor
found = _doctor.inspect()
print(found["live"]["rank_metrics"]["cpu"], found["ops"]["rank_metrics"]["retrieval"])
""")
    assert ran.returncode == 0, ran.stderr
    room, _, state = ran.stdout.strip().partition(" ")
    if missing == "torch":  # the ranking works without it
        assert (room == "retrieval") == (state == "built")
    else:
        assert (room, state) == ("reference", "the C++ extension _retrieval was not built")


@pytest.mark.parametrize(
    ("missing", "code", "needle"),
    [
        ("torch", 1, "missing: torch is not installed: pip install torch"),
        (
            "fastreid_vi._C",
            0,
            "missing: the C++ extension _C was not built: pip install --no-build-isolation -e .",
        ),
        ("fastreid_vi._retrieval", 0, "missing: the C++ extension _retrieval was not built"),
        ("triton", 0, "Triton is not installed"),
    ],
)
def test_doctor_speaks_when_a_part_is_missing(missing: str, code: int, needle: str) -> None:
    ran = python(f"""
import sys
sys.modules[{missing!r}] = None
from fastreid_vi.cli import main
sys.exit(main(["doctor"]))
""")
    assert (ran.returncode, ran.stderr) == (code, "")
    assert needle in ran.stdout


def test_synth_draws_a_tree_that_check_accepts(call, tree: Path) -> None:
    said = call("data", "check", tree)
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1].endswith("good")
    found = json.loads(call("data", "check", tree, "--json").out)
    assert found["ok"]
    assert found["identities"] == {"train": 6, "val": 2, "test": 5}
    assert found["decoded"] == sum(sum(cams) for cams in found["images"].values())


def test_synth_says_what_it_made(call, tmp_path: Path) -> None:
    argv = "--train-ids 1 --val-ids 1 --test-ids 1 --images 1 1 --height 16 --width 16 --workers 1"
    said = call("data", "synth", tmp_path / "new", *argv.split(), "--seed", "3", "--json")
    made = json.loads(said.out)
    assert made == {
        "root": str(tmp_path / "new"),
        "images": len(list((tmp_path / "new").rglob("*.jpg"))),
        "seed": 3,
    }
    assert "next: fastreid-vi data check" in said.err
    again = call("data", "synth", tmp_path / "new", *argv.split())
    assert again.code == 1
    assert "not empty" in again.complaint
    assert call("data", "synth", tmp_path / "new", *argv.split(), "--overwrite").code == 0


def test_training_leaves_a_run(call, tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = call("train", "--data-root", tree, "baseline", "--run-dir", folder, *SMALL, "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert result["epochs"] == 1
    assert Path(result["checkpoint"], "model.safetensors").is_file()
    assert f"fastreid-vi train --resume --run-dir {folder}" in said.err
    record = json.loads((folder / "run.json").read_text())
    assert record["recipe"]["optim"]["lr"] == 1e-3
    assert record["recipe"]["model"]["weights"] == "none"
    assert record["num_ids"] == 5  # eight, three of them held out

    # A longer run than the finished one, continued from it.
    said = call("train", "--resume", "--run-dir", folder, "--schedule.epochs", "2")
    assert said.code == 0, said.err
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "eval"] == [1, 2]

    said = call("train", "baseline", "--data-root", tree, "--run-dir", folder, *SMALL)
    assert said.code == 1
    assert "holds a run already" in said.complaint
    said = call("train", "mpanet", "--resume", "--data-root", tree, "--run-dir", folder, *SMALL)
    assert said.code == 1
    assert "cannot resume" in said.complaint


def test_a_recipe_file_repeats_the_run(call, mpanet: Path, tmp_path: Path) -> None:
    said = call("train", "--recipe", mpanet / "run.json", "--run-dir", tmp_path / "again", "--json")
    assert said.code == 0, said.err
    weights = [
        Path(folder, "checkpoints/last/model.safetensors").read_bytes()
        for folder in (mpanet, tmp_path / "again")
    ]
    assert weights[0] == weights[1]


def test_eval_prints_the_table_and_keeps_it(call, mpanet: Path, tree: Path) -> None:
    before = json.loads((mpanet / "result.json").read_text())
    said = call("eval", mpanet)
    assert said.code == 0, said.err
    assert "protocol sysu-official" in said.out
    assert said.out.count("chance") == 4
    for row in ("all, 1 shot", "all, 10 shots", "indoor, 1 shot", "indoor, 10 shots"):
        assert row in said.out
    result = json.loads(call("eval", mpanet, "--json").out)
    assert list(result["settings"]) == SETTINGS
    for found in result["settings"].values():
        assert len(found["trials"]) == 10
        for name in ("R1", "R5", "R10", "R20", "mAP", "mINP"):
            values = [trial[name] for trial in found["trials"]]
            assert found["mean"][name] == pytest.approx(np.mean(values), abs=1e-12)
            assert found["std"][name] == pytest.approx(np.std(values), abs=1e-12)
            assert 0 < found["chance"][name] <= 1
    assert result["queries"] == len(list(tree.glob("cam[36]/*/*.jpg"))) - sum(
        len(list(tree.glob(f"cam[36]/{int(folder.name):04d}/*.jpg")))
        for folder in {Path(p.name) for p in tree.glob("cam[36]/*")}
        if int(folder.name) not in ids(tree, "test")
    )
    kept = json.loads((mpanet / "result.json").read_text())
    assert kept["test"] == result == before["test"]  # the same network gives the same numbers
    assert kept["best"] == before["best"]
    assert (mpanet / "embeddings/query.safetensors").is_file()


def test_eval_of_one_checkpoint_and_of_loose_weights(
    call, mpanet: Path, tree: Path, tmp_path: Path
) -> None:
    best = (mpanet / "checkpoints/best").resolve()
    weights = shutil.copy(best / "model.safetensors", tmp_path / "loose.safetensors")
    expected = json.loads((mpanet / "result.json").read_text())["test"]["settings"]
    by_folder = json.loads(call("eval", best, "--json").out)
    assert by_folder["settings"] == expected
    said = call("eval", weights)
    assert said.code == 1
    assert "--recipe" in said.complaint
    said = call(
        "eval", weights, "--recipe", mpanet / "run.json", "--out", tmp_path / "kept", "--json"
    )
    assert json.loads(said.out)["settings"] == expected
    assert (tmp_path / "kept/result.json").is_file()
    said = call("eval", weights, "--recipe", "mpanet-sysu")
    assert said.code == 1
    assert "--data-root" in said.complaint
    said = call("eval", weights, "--recipe", "mpanet-sysu", "--data-root", tree)
    assert said.code == 1
    assert "weights do not fit MPANet" in said.complaint  # that recipe means ResNet-50


def test_report_of_two_runs(call, mpanet: Path, baseline: Path, tmp_path: Path) -> None:
    said = call("report", baseline)
    assert said.code == 1
    assert f"not evaluated yet; run: fastreid-vi eval {baseline}" in said.complaint
    assert call("eval", baseline).code == 0
    said = call(
        "report", baseline, mpanet, "--out", tmp_path / "page.html", "--queries", 1, "--json"
    )
    assert said.code == 0, said.err
    page = tmp_path / "page.html"
    assert json.loads(said.out) == {
        "path": str(page),
        "bytes": page.stat().st_size,
        "runs": ["baseline", "mpanet"],
    }
    text = page.read_text(encoding="utf-8")
    titles = ("Results", "Training losses", "Validation", "CMC", "Rank lists", "Pattern maps")
    for title in titles:
        assert f"<h2>{title}</h2>" in text
    assert text.count("pattern 6") > 2
    assert "held out for validation" in text
    first = json.loads((mpanet / "result.json").read_text())["test"]["settings"]["all/1"]
    assert f"{100 * first['mean']['mAP']:.1f} <small>± {100 * first['std']['mAP']:.1f}" in text


def test_report_beside_its_run(call, mpanet: Path) -> None:
    assert call("report", mpanet, "--queries", 1).code == 0
    assert (mpanet / "report.html").stat().st_size > 50_000


def test_interrupt_leaves_a_checkpoint_and_says_how_to_go_on(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    argv = ["train", "baseline", "--data-root", tree, "--run-dir", folder, *SMALL]
    argv += ["--schedule.epochs", "2000", "--run.eval-every", "0"]
    command = [sys.executable, "-m", "fastreid_vi", *map(str, argv)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-*/state.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"resume with: fastreid-vi train --resume --run-dir {folder}" in err.splitlines()[-1]
    assert (folder / "checkpoints/last/model.safetensors").is_file()
