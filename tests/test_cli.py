"""The command line end to end on a tiny drawn data set, and bad input explained in one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fastreid_vi import cli
from fastreid_vi.version import __version__

# Small in every direction: about two seconds of training.
SMALL = [
    *("--model.depth", "18", "--weights", "none", "--data.height", "32", "--data.width", "16"),
    *("--data.identities", "3", "--data.images", "4", "--data.workers", "0", "--data.pad", "2"),
    *("--data.validation", "3", "--run.eval-every", "1", "--schedule.epochs", "1"),
    *("--optim.lr", "1e-3"),
]
SETTINGS = ["all/1", "all/10", "indoor/1", "indoor/10"]


class Said(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of an error."""
        lines = [line for line in self.err.splitlines() if line.startswith("fastreid-vi: error: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0]
        assert "Traceback" not in self.err + self.out
        return lines[0].removeprefix("fastreid-vi: error: ")


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*argv: object) -> Said:
        capfd.readouterr()
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Said(code, *capfd.readouterr())

    return run


def quietly(*argv: object) -> None:
    assert cli.main([str(word) for word in argv]) == 0


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli") / "toy"
    sizes = "--train-ids 6 --val-ids 2 --test-ids 5 --images 2 3 --height 32 --width 16 --workers 1"
    quietly("data", "synth", root, *sizes.split())
    return root


@pytest.fixture(scope="module")
def mpanet(tree: Path) -> Path:
    folder = tree.parent / "mpanet"
    quietly("train", "mpanet-sysu", "--data-root", tree, "--run-dir", folder, *SMALL)
    quietly("eval", folder)
    return folder


@pytest.fixture(scope="module")
def baseline(tree: Path) -> Path:
    folder = tree.parent / "baseline"
    quietly("train", "baseline-sysu", "--data-root", tree, "--run-dir", folder, *SMALL)
    return folder


@pytest.fixture
def damaged(tree: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(tree, tmp_path / "damaged")


def ids(root: Path, split: str) -> list[int]:
    return [int(pid) for pid in (root / f"exp/{split}_id.txt").read_text().split(",")]


# --- help, usage, doctor --------------------------------------------------------------------------


def test_help_of_every_verb_loads_nothing_heavy() -> None:
    verbs = [
        [],
        ["data"],
        ["data", "synth"],
        ["data", "check"],
        ["train"],
        ["eval"],
        ["report"],
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


@pytest.mark.parametrize(
    ("missing", "code", "needle"),
    [
        ("torch", 1, "missing: torch is not installed: pip install torch"),
        (
            "fastreid_vi._C",
            0,
            "missing: the C++ extension _C was not built: pip install -e . with a C++20",
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


# --- the road from nothing to a report ------------------------------------------------------------


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


# --- bad input: one line, exit code 1, nothing half-written ---------------------------------------


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
    assert "1 findings" in said.out
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


def test_a_data_set_that_is_not_read(call, tree: Path) -> None:
    said = call("train", "mpanet-regdb", "--data-root", tree, "--run-dir", tree.parent / "no")
    assert said.code == 1
    assert "'regdb'" in said.complaint


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
        ({"method": "osnet"}, "expected one of baseline, mpanet, got 'osnet'"),
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


def test_interrupt_leaves_a_checkpoint_and_says_how_to_go_on(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    argv = ["train", "baseline", "--data-root", tree, "--run-dir", folder, *SMALL]
    argv += ["--schedule.epochs", "2000", "--run.eval-every", "0"]
    command = [sys.executable, "-m", "fastreid_vi", *map(str, argv)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-*/state.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"resume with: fastreid-vi train --resume --run-dir {folder}" in err.splitlines()[-1]
    assert (folder / "checkpoints/last/model.safetensors").is_file()
