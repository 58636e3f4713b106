"""Checkpoints: whole or not at all, and refused where they do not belong."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastreid_vi.train import CheckpointError, TrainError, files, load_weights
from fastreid_vi.train import checkpoint as checkpoints
from tests.train.small import Small, run

HEADER = checkpoints.Header("small", 5, 1, 10)


def save(folder: Path, method: Small, step: int = 10) -> Path:
    header = HEADER._replace(step=step)
    tensors = {"numbers": (1, 2.5, None), "state": {"a": torch.arange(3)}}
    return checkpoints.save(folder, header, method.state_dict(), tensors, {"step": step})


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_everything_comes_back(tmp_path: Path) -> None:
    method = Small(5).to(memory_format=torch.channels_last)
    path = save(tmp_path, method)
    saved = checkpoints.load(path)
    assert saved.header == HEADER
    assert saved.counters == {"step": 10}
    assert saved.tensors["numbers"] == (1, 2.5, None)
    assert torch.equal(saved.tensors["state"]["a"], torch.arange(3))
    other = Small(5)
    checkpoints.fill(other, saved.weights, path)
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert checkpoints.last(tmp_path) == path


def test_same_weights_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from fastreid_vi.train import checkpoint as c\n"
        "weights = {f'w{i}': torch.full((i + 1,), float(i)) for i in range(20)}\n"
        "sys.stdout.buffer.write(c.pack_weights(weights, c.Header('small', 5, 1, 10)))\n"
    )
    weights = {f"w{i}": torch.full((i + 1,), float(i)) for i in range(20)}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert other.stdout == checkpoints.pack_weights(weights, HEADER)


def full_disk(nth: int, real: Callable[..., None]) -> Callable[..., None]:
    """`write_file` that fills the disk half-way through its n-th call."""
    calls = 0

    def write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
        nonlocal calls
        calls += 1
        if calls != nth:
            return real(path, parts)
        data = b"".join(bytes(part) for part in parts)
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return write


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_full_disk_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    save(tmp_path, Small(5), step=10)
    names, before = listing(tmp_path), contents(tmp_path)
    monkeypatch.setattr(files, "write_file", full_disk(nth, files.write_file))
    with pytest.raises(CheckpointError, match=r"cannot save .*No space left on device"):
        save(tmp_path, Small(5), step=20)
    assert listing(tmp_path) == names
    assert contents(tmp_path) == before
    assert checkpoints.load(tmp_path / "last").header.step == 10


@pytest.mark.parametrize("operation", ["rename", "symlink", "replace"])
def test_no_permission_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    save(tmp_path, Small(5), step=10)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, operation, refused)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(tmp_path, Small(5), step=20)
    monkeypatch.undo()
    assert checkpoints.load(tmp_path / "last").header.step == 10
    assert not list(files.leftovers(tmp_path))


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, Small(5))
    assert listing(tmp_path) == []


@pytest.mark.parametrize("nth", [3, 8, 12])
def test_a_run_on_a_full_disk_can_go_on_later(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    monkeypatch.setattr(files, "write_file", full_disk(nth, files.write_file))
    with pytest.raises(TrainError, match="No space left on device") as caught:
        run(tree, tmp_path / "run")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert not list((tmp_path / "run").rglob(".writing-*"))
    run(tree, tmp_path / "run", resume=True)
    run(tree, tmp_path / "whole")
    final = "checkpoints/last/model.safetensors"
    assert (tmp_path / "run" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()


def test_a_real_limit_on_file_size(tmp_path: Path) -> None:
    """The kernel, not a stand-in, refuses to write more."""
    save(tmp_path, Small(5), step=10)
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            save(tmp_path, Small(5, width=200), step=20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


def test_old_checkpoints_go_but_the_best_stays(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, Small(5), step)
        if step == 20:
            checkpoints.point_best(tmp_path, 20)
        checkpoints.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best", "last", "step-00000020", "step-00000040", "step-00000050",
    ]  # fmt: skip
    assert checkpoints.load(tmp_path / "best").header.step == 20


def test_a_best_checkpoint_that_is_gone(tmp_path: Path) -> None:
    save(tmp_path, Small(5), 10)
    with pytest.raises(CheckpointError, match="step-00000020: the best checkpoint is gone"):
        checkpoints.point_best(tmp_path, 20)


def test_unfinished_work_is_removed(tmp_path: Path) -> None:
    save(tmp_path, Small(5), 10)
    save(tmp_path, Small(5), 20)
    files.point(tmp_path / "last", "step-00000010")
    (tmp_path / ".writing-step-00000030").mkdir()
    checkpoints.discard_unfinished(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-00000010"]


def test_a_dangling_link(tmp_path: Path) -> None:
    files.point(tmp_path / "last", "step-00000010")
    with pytest.raises(CheckpointError, match="leads to step-00000010, which is gone"):
        checkpoints.last(tmp_path)
    assert checkpoints.last(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_damage_is_one_line(tmp_path: Path, name: str, damage: str) -> None:
    file = save(tmp_path, Small(5)) / name
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"\x93noise" * 20)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(tmp_path / "last")
    assert "\n" not in str(caught.value)
    assert "last" in str(caught.value)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"stepper": Harm()}, save(tmp_path, Small(5)) / "state.pt")
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        checkpoints.load(tmp_path / "last")
    assert not (tmp_path / "harm").exists()


class TestLoadWeights:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return save(tmp_path / "checkpoints", Small(5))

    def test_from_run_checkpoint_and_file(self, path: Path) -> None:
        for place in (path.parents[1], path, path / "model.safetensors"):
            method = Small(5)
            assert load_weights(method, place, method="small", num_ids=5) == HEADER
            weights, _ = checkpoints.load_safetensors(path / "model.safetensors")
            assert torch.equal(method.classifier.weight, weights["classifier.weight"])

    def test_the_best_comes_before_the_last(self, path: Path) -> None:
        save(path.parent, Small(5), step=20)
        checkpoints.point_best(path.parent, 10)
        header = load_weights(Small(5), path.parents[1], method="small", num_ids=5)
        assert header == HEADER
        assert checkpoints.find(path.parents[1], "last").parent.resolve().name == "step-00000020"

    def test_another_class_count(self, path: Path) -> None:
        message = "checkpoint of method 'small' with 5 identities, expected 'small' with 7"
        with pytest.raises(CheckpointError, match=message):
            load_weights(Small(7), path, method="small", num_ids=7)

    def test_another_method(self, path: Path) -> None:
        message = "checkpoint of method 'small' with 5 identities, expected 'mpanet' with 5"
        with pytest.raises(CheckpointError, match=message):
            load_weights(Small(5), path, method="mpanet", num_ids=5)

    def test_keys_that_do_not_fit(self, tmp_path: Path) -> None:
        state = Small(5).state_dict()
        state["extra.one"], state["extra.two"] = torch.zeros(1), torch.zeros(2)
        del state["classifier.bias"]
        save_file(state, tmp_path / "foreign.safetensors")
        message = "missing 'classifier.bias'; unexpected 'extra.one' and 1 more"
        with pytest.raises(CheckpointError, match=message):
            load_weights(Small(5), tmp_path / "foreign.safetensors", method="small", num_ids=5)

    def test_shapes_that_do_not_fit(self, tmp_path: Path) -> None:
        method = Small(5)
        before = {k: v.clone() for k, v in method.state_dict().items()}
        save_file(Small(6).state_dict(), tmp_path / "foreign.safetensors")
        message = r"'classifier.weight' has shape \[6, 8\], expected \[5, 8\]"
        with pytest.raises(CheckpointError, match=message):
            load_weights(method, tmp_path / "foreign.safetensors", method="small", num_ids=5)
        assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())

    def test_bare_weights_have_no_header(self, tmp_path: Path) -> None:
        save_file(Small(5).state_dict(), tmp_path / "bare.safetensors")
        found = load_weights(Small(5), tmp_path / "bare.safetensors", method="small", num_ids=5)
        assert found is None

    def test_a_header_from_the_future(self, tmp_path: Path) -> None:
        text = json.dumps({"format": 99, **HEADER._asdict()})
        file = tmp_path / "future.safetensors"
        save_file(Small(5).state_dict(), file, {"fastreid_vi": text})
        with pytest.raises(CheckpointError, match="unknown checkpoint header"):
            load_weights(Small(5), file, method="small", num_ids=5)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="expected a run folder, a checkpoint folder or"):
            load_weights(Small(5), tmp_path / "absent", method="small", num_ids=5)

    def test_not_safetensors(self, tmp_path: Path) -> None:
        (tmp_path / "text.safetensors").write_text("hello")
        with pytest.raises(CheckpointError, match="cannot read weights"):
            load_weights(Small(5), tmp_path / "text.safetensors", method="small", num_ids=5)
