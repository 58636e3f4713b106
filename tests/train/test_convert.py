"""Files of strangers: what is read, what is refused, and that what is written comes back."""

from __future__ import annotations

import builtins
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastreid_vi.train import CheckpointError
from fastreid_vi.train.checkpoint import Header, load_safetensors
from fastreid_vi.train.convert import (
    is_parts,
    read_official,
    read_parts,
    unfit,
    write_official,
    write_parts,
    write_weights,
)


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(3, 2, 1, 1, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.randn(4, generator=generator).half(),
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return list(found) == list(wanted) and all(
        torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in wanted.items()
    )


def released(**beside: Any) -> dict[str, Any]:
    """What LbA's training writes, metrics and all."""
    metrics = {"cmc": np.linspace(0, 1, 20, dtype=np.float32), "mAP": np.float64(0.5)}
    return {"net": weights(), **metrics, "mINP": np.float32(0.25), "epoch": 39, **beside}


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.plan = function, args

    def __reduce__(self) -> Any:
        return self.plan


# What is read.


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".t", ".pth", ".pt", ".pkl", ".tar"])
def test_every_wrapper_and_suffix(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"file{suffix}"
    for content in (
        weights(),
        {"net": weights()},
        {"state_dict": weights(), "optimizer": {"lr": 0.1}},
        {"model": weights(), "epoch": 3},
        {"net": {f"module.{k}": v for k, v in weights().items()}},
        {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in weights().items()},
    ):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        found = read_official(path)
        assert same(found.state, weights())
        assert not any(tensor.requires_grad for tensor in found.state.values())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("epoch", [39, np.int64(39), np.int32(39)])
def test_metrics_beside_the_weights(tmp_path: Path, epoch: Any, zipped: bool) -> None:
    torch.save(released(epoch=epoch), tmp_path / "a.t", _use_new_zipfile_serialization=zipped)
    found = read_official(tmp_path / "a.t")
    assert same(found.state, weights())
    assert found.beside == ("cmc", "mAP", "mINP")
    assert found.epoch == 39


def test_the_names_numpy_had_before(tmp_path: Path) -> None:
    """Files of NumPy 1 say numpy.core where NumPy 2 says numpy._core."""
    path = tmp_path / "a.t"
    torch.save(released(epoch=np.int64(5)), path, _use_new_zipfile_serialization=False)
    old = path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"numpy.core" in old
    path.write_bytes(old)
    assert read_official(path).epoch == 5


def test_nothing_of_numpy_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(released(), tmp_path / "a.t")

    def built(*args: Any) -> None:
        raise AssertionError("the file built an array")

    makes_scalars, makes_arrays = np.float64(1).__reduce__()[0], np.zeros(1).__reduce__()[0]
    for function in (makes_scalars, makes_arrays):
        monkeypatch.setattr(f"{function.__module__}.{function.__name__}", built)
    assert same(read_official(tmp_path / "a.t").state, weights())


def test_safetensors_without_our_header(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.safetensors")
    assert dict(read_official(tmp_path / "a.safetensors").state).keys() == weights().keys()


# What is refused, with one line and without running anything.


@pytest.mark.parametrize(
    ("how", "protocol"),
    [
        *(("pickled", protocol) for protocol in range(6)),
        *((how, protocol) for how in ("saved", "older") for protocol in range(2, 6)),
    ],
)
@pytest.mark.parametrize(
    "function",
    [os.system, builtins.eval, builtins.exec, os.remove, np.load],
    ids=lambda function: function.__name__,
)
def test_code_is_refused(
    tmp_path: Path, how: str, protocol: int, function: Callable[..., Any]
) -> None:
    mark = tmp_path / "ran"
    content = released(mAP=Trap(function, f"open({str(mark)!r}, 'w')"))
    path = tmp_path / "a.pth"
    if how == "pickled":
        path.write_bytes(pickle.dumps(content["mAP"], protocol=protocol))
    else:
        torch.save(
            content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=how == "saved"
        )
    with pytest.raises(CheckpointError, match=r"refused: it wants to load or run") as caught:
        read_official(path)
    assert function.__name__ in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_a_whole_module_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"'torch\.nn\.modules\.linear\.Linear'"):
        read_official(tmp_path / "a.pth")


def test_crafted_stand_ins_are_harmless(tmp_path: Path) -> None:
    """Arguments that the real dtype and scalar would trip over."""
    scalar = np.float64(1).__reduce__()[0]
    for arguments in ((), (None, None, None), ("f8", b"xx"), (np.dtype("f8"), b"x")):
        torch.save(released(epoch=Trap(scalar, *arguments)), tmp_path / "a.t")
        assert read_official(tmp_path / "a.t").epoch == 0


def test_newer_pickles_are_explained(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "a.pth", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"pickle protocol 4.*pickle_protocol=2"):
        read_official(tmp_path / "a.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_truncated(tmp_path: Path, share: float, zipped: bool) -> None:
    path = tmp_path / "a.pth"
    torch.save(released(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        CheckpointError, match=r"not a PyTorch checkpoint, or damaged: .+"
    ) as caught:
        read_official(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a state dict or one of net, .* got list"),
        ({"epoch": 3, "loss": 0.5}, "got entries epoch, loss"),
        ({}, "expected a state dict"),
        ({"net": {}}, "expected a state dict"),
        ({"net": [weights()]}, "got entries net"),
        ({"a": torch.zeros(1), "b": 3}, "expected tensors only, got others: b"),
        ({"a": torch.zeros(1), 5: torch.zeros(1)}, "expected tensors only, got others: 5"),
    ],
)
def test_no_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        read_official(tmp_path / "a.pth")


def test_other_files(tmp_path: Path) -> None:
    page = tmp_path / "page.pth"
    page.write_text("<html>Sign in to download</html>")
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint"):
        read_official(page)
    with pytest.raises(CheckpointError, match="no such file"):
        read_official(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"a folder without files model-<index>_<step>\.pkl"):
        read_official(tmp_path)
    part = tmp_path / "model-3_250.pkl"
    torch.save(weights(), part)
    with pytest.raises(
        CheckpointError, match=f"one of several files; name their folder: {tmp_path}"
    ):
        read_official(part)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot read weights"):
        read_official(tmp_path / "bad.safetensors")


# Folders of numbered files.


def parts(count: int = 3) -> dict[str, Tensor]:
    return {f"{i}/module.{k}": v + i for i in range(count) for k, v in weights().items()}


def test_parts_come_back_to_the_bit(tmp_path: Path) -> None:
    folder = tmp_path / "gan"
    for step in (0, 50, 250):
        write_parts(tmp_path / f"s{step}", {k: v + step for k, v in parts().items()}, step)
    folder.mkdir()
    for step in (0, 50, 250):
        for path in (tmp_path / f"s{step}").iterdir():
            path.rename(folder / path.name)
    assert is_parts(folder)
    assert not is_parts(tmp_path)
    newest = read_parts(folder, 3)
    assert newest.step == 250
    assert same(newest.state, {k: v + 250 for k, v in parts().items()})
    assert same(read_parts(folder, 3, 0).state, parts())
    with pytest.raises(CheckpointError, match="no files of step 100; there are steps 0, 50, 250"):
        read_parts(folder, 3, 100)
    (folder / "model-1_250.pkl").unlink()
    with pytest.raises(CheckpointError, match=r"missing model-1_250\.pkl of 3 files"):
        read_parts(folder, 3)


def test_parts_without_the_wrapper_s_prefix(tmp_path: Path) -> None:
    bare = {key.replace("module.", ""): value for key, value in parts().items()}
    write_parts(tmp_path / "gan", bare, 7)
    assert same(read_parts(tmp_path / "gan", 3).state, parts())


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="holds other files"):
        write_parts(tmp_path, parts(), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# What is written.


@pytest.mark.parametrize("wrapper", [None, "net"])
def test_official_files_come_back_to_the_bit(tmp_path: Path, wrapper: str | None) -> None:
    write_official(tmp_path / "a.t", weights(), wrapper=wrapper, epoch=12)
    assert same(read_official(tmp_path / "a.t").state, weights())
    plain = torch.load(tmp_path / "a.t", weights_only=True)
    assert list(plain) == (list(weights()) if wrapper is None else ["net", "epoch"])
    assert read_official(tmp_path / "a.t").epoch == (12 if wrapper else 0)


def test_failed_writes_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_weights(path, weights(), Header("lba", 3, 0, 0))
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: write_weights(path, {"a": torch.zeros(9)}, Header("lba", 3, 0, 0)),
        lambda: write_official(path, weights()),
    ):
        with pytest.raises(Exception, match="No space left"):
            write()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert load_safetensors(path)[1] == Header("lba", 3, 0, 0)


def test_unfit() -> None:
    shapes = {"a": torch.Size([2]), "b": torch.Size([3, 1]), "c": torch.Size([])}
    given = {"a": torch.zeros(2), "b": torch.zeros(1, 3), "d": torch.zeros(1)}
    assert unfit({k: torch.zeros(v) for k, v in shapes.items()}, shapes) == []
    assert unfit(given, shapes) == [
        "missing 'c'",
        "unexpected 'd'",
        "'b' has shape [1, 3], expected [3, 1]",
    ]
