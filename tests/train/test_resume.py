"""Killed at any moment and resumed, a run ends in the same bits as one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastreid_vi.data import SysuMM01
from fastreid_vi.train import Interrupted, TrainError, train
from fastreid_vi.train import checkpoint as checkpoints
from tests.train.small import Small, build, chosen_by, recipe, run

ROOT = Path(__file__).parents[2]


def start(command: str, tree: Path, run_dir: Path, *flags: str) -> subprocess.Popen[str]:
    """A training process in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.train.small", command, str(tree), str(run_dir), *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def history(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    timed = ("images_per_second", "seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def saved(run_dir: Path) -> dict[str, Any]:
    """Everything that must agree to the last bit."""
    found = sorted((run_dir / "checkpoints").glob("step-*"))
    states = [torch.load(p / "state.pt", weights_only=True) for p in found]
    return {
        "weights": {p.name: (p / "model.safetensors").read_bytes() for p in found},
        "optimisers": [_bytes(state["stepper"]["optimizers"]) for state in states],
        "random": [_bytes(state["random"]) for state in states],
        "links": {n: str((run_dir / "checkpoints" / n).readlink()) for n in ("last", "best")},
        "history": history(run_dir),
        "best": json.loads((run_dir / "best.json").read_text()),
        "result": json.loads((run_dir / "result.json").read_text()),
    }


def _bytes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, list(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {k: _bytes(v) for k, v in value.items()}
    return [_bytes(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture(scope="module")
def whole(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves that nobody disturbed, in a process of its own."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(start("run", tree, run_dir))
    state = saved(run_dir)
    assert [e["step"] for e in state["history"] if e["kind"] == "epoch"] == [9, 18, 27]
    return state


@pytest.mark.parametrize(
    ("flags", "least"), [((), 30), (("moments", "workers"), 5)], ids=["operations", "moments"]
)
def test_chain_of_sigkills(
    tree: Path, tmp_path: Path, whole: dict[str, Any], flags: tuple[str, ...], least: int
) -> None:
    kills = int(finish(start("chain", tree, tmp_path / "run", *flags)).split()[0])
    assert kills >= least
    assert saved(tmp_path / "run") == whole
    assert not [p.name for p in (tmp_path / "run").rglob(".*")]


def test_sigkill_while_a_checkpoint_is_written(
    tree: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    process = start("run", tree, tmp_path / "run", "workers")
    folder = tmp_path / "run" / "checkpoints"
    wait_for(lambda: any(folder.glob(".writing-*")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(start("run", tree, tmp_path / "run", "resume"))
    assert saved(tmp_path / "run") == whole


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signals_leave_a_good_checkpoint(
    tree: Path, tmp_path: Path, signum: signal.Signals, group: bool
) -> None:
    run_dir = tmp_path / "run"
    process = start("run", tree, run_dir, "workers", "endless")
    wait_for(lambda: _size(run_dir / "metrics.jsonl") > 0, process)
    with pytest.raises(TrainError, match="another process is training this run"):
        run(tree, run_dir, chosen_by(("workers", "endless")), resume=True)
    (os.killpg if group else os.kill)(process.pid, signum)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signum, error
    line = error.splitlines()[-1]
    assert f"stopped by {signum.name} after step" in line
    assert line.endswith("resume with: --resume")
    last = checkpoints.last(run_dir / "checkpoints")
    assert last is not None
    assert str(last) in line
    assert checkpoints.load(last).counters["progress"]["step"] == int(last.name[5:])


class Signalled(Small):
    """Sends its own process a signal after some steps."""

    at: int = -1
    signum = signal.SIGINT

    def after_step(self) -> None:
        super().after_step()
        if int(self.steps) == self.at:
            signal.raise_signal(self.signum)


def _interrupted(tree: Path, run_dir: Path, at: int, **options: Any) -> Interrupted:
    method = build(SysuMM01(tree), recipe())
    method.__class__ = Signalled
    method.at = at
    with pytest.raises(Interrupted) as caught:
        train(method, recipe(), SysuMM01(tree), run_dir, device="cpu", display="none", **options)
    return caught.value


# In the first step, inside an epoch, in its last step, in the last but one of the run.
@pytest.mark.parametrize("at", [1, 5, 9, 26, 27])
def test_interrupted_after_any_step(tree: Path, tmp_path: Path, at: int) -> None:
    error = _interrupted(tree, tmp_path / "stopped", at)
    assert (error.step, error.exit_code) == (at, 130)
    run(tree, tmp_path / "stopped", resume=True)
    run(tree, tmp_path / "whole")
    stopped, whole = saved(tmp_path / "stopped"), saved(tmp_path / "whole")
    assert stopped["history"] == whole["history"]
    final = "step-00000027"
    assert stopped["weights"][final] == whole["weights"][final]
    assert stopped["best"] == whole["best"]


def test_a_second_interrupt_gives_up_at_once(tree: Path, tmp_path: Path) -> None:
    class Twice(Small):
        def after_step(self) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    method = build(SysuMM01(tree), recipe())
    method.__class__ = Twice
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(method, recipe(), SysuMM01(tree), tmp_path / "run", device="cpu", display="none")
    assert signal.getsignal(signal.SIGINT) is before
    run(tree, tmp_path / "run", resume=True)


def test_two_and_one_epochs_are_three(tree: Path, tmp_path: Path) -> None:
    chosen = recipe()
    short = replace(chosen, schedule=replace(chosen.schedule, epochs=2))
    run(tree, tmp_path / "parts", short)
    run(tree, tmp_path / "parts", chosen, resume=True)
    run(tree, tmp_path / "whole", chosen)
    final = "step-00000027"
    parts, whole = saved(tmp_path / "parts"), saved(tmp_path / "whole")
    assert parts["weights"][final] == whole["weights"][final]
    assert parts["history"] == whole["history"]


def test_resuming_a_finished_run_changes_nothing(tree: Path, tmp_path: Path) -> None:
    first = run(tree, tmp_path / "run")
    before = saved(tmp_path / "run")
    assert run(tree, tmp_path / "run", resume=True) == first
    assert saved(tmp_path / "run") == before


def test_evaluation_and_logging_do_not_touch_the_weights(tree: Path, tmp_path: Path) -> None:
    run(tree, tmp_path / "often", recipe(eval_every=1, log_every=1))
    run(tree, tmp_path / "never", recipe(eval_every=0, log_every=100, checkpoint_every=3))
    final = "checkpoints/last/model.safetensors"
    assert (tmp_path / "often" / final).read_bytes() == (tmp_path / "never" / final).read_bytes()


def test_different_seeds_differ(tree: Path, tmp_path: Path) -> None:
    run(tree, tmp_path / "a", recipe(seed=1))
    run(tree, tmp_path / "b", recipe(seed=2))
    final = "checkpoints/last/model.safetensors"
    assert (tmp_path / "a" / final).read_bytes() != (tmp_path / "b" / final).read_bytes()


def test_resume_refuses_another_recipe(tree: Path, tmp_path: Path) -> None:
    run(tree, tmp_path / "run")
    chosen = recipe()
    other = replace(chosen, optim=replace(chosen.optim, lr=0.5))
    with pytest.raises(TrainError, match=r"another optim\.lr: the run has 0\.01, this recipe 0\.5"):
        run(tree, tmp_path / "run", other, resume=True)


def test_resume_may_move_work_around(tree: Path, tmp_path: Path) -> None:
    _interrupted(tree, tmp_path / "run", 5)
    chosen = recipe(keep=1)
    run(tree, tmp_path / "run", replace(chosen, data=replace(chosen.data, workers=1)), resume=True)
    run(tree, tmp_path / "whole")
    assert history(tmp_path / "run") == history(tmp_path / "whole")


def test_nothing_to_resume(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="nothing to resume, no such folder"):
        run(tree, tmp_path / "absent", resume=True)


def test_a_run_is_not_overwritten(tree: Path, tmp_path: Path) -> None:
    run(tree, tmp_path / "run")
    before = saved(tmp_path / "run")
    with pytest.raises(TrainError, match=r"holds a run already \(run\.json\)"):
        run(tree, tmp_path / "run")
    assert saved(tmp_path / "run") == before


def test_a_shortened_history_is_noticed(tree: Path, tmp_path: Path) -> None:
    run(tree, tmp_path / "run")
    os.truncate(tmp_path / "run" / "metrics.jsonl", 100)
    with pytest.raises(TrainError, match=r"metrics\.jsonl: the checkpoint needs its first"):
        run(tree, tmp_path / "run", resume=True)


def test_another_data_set_is_noticed(tree: Path, tmp_path: Path) -> None:
    from tests.train.small import write_tree

    _interrupted(tree, tmp_path / "run", 5)
    other = write_tree(tmp_path / "other", train=12, test=5)
    (other / "cam1" / "0003" / "0001.jpg").unlink()
    with pytest.raises(TrainError, match="does not fit this run: sampler state: data"):
        run(other, tmp_path / "run", resume=True)
