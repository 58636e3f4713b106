"""Training out of a pack: the bits of a run on files, and either continues the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastreid_vi.data import DataError, SysuMM01, write_pack
from fastreid_vi.train import Interrupted, TrainError, forecast
from fastreid_vi.train import loop as loops
from fastreid_vi.train.forecast import spare_memory
from tests.train.small import SmallRecipe, build, recipe, run
from tests.train.test_resume import saved


@pytest.fixture(scope="module")
def pack(tree: Path) -> str:
    out = tree.parent / "pack"
    return str(write_pack(SysuMM01(tree), recipe().data, out, shard_bytes=24 * 12 * 3 * 50).path)


def of(**data: Any) -> SmallRecipe:
    chosen = recipe(checkpoint_steps=2)
    return replace(chosen, data=replace(chosen.data, **data))


def state(run_dir: Path) -> dict[str, Any]:
    found = saved(run_dir)
    return {name: value for name, value in found.items() if name != "best"}


@pytest.mark.parametrize("data", [{}, {"workers": 2}, {"resident": "always", "workers": 1}])
def test_the_same_run(tree: Path, pack: str, tmp_path: Path, data: dict[str, Any]) -> None:
    run(tree, tmp_path / "folder", of())
    run(tree, tmp_path / "pack", of(packed=pack, **data))
    assert saved(tmp_path / "pack") == saved(tmp_path / "folder")


class _StopAt:
    """Interrupts a run after some steps, as Ctrl-C does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        real = loops._Run._step

        def step_and_stop(self: Any, group: Any) -> None:
            real(self, group)
            if self.progress.step == step:
                self.stop.signum = 2

        monkeypatch.setattr(loops._Run, "_step", step_and_stop)


@pytest.mark.parametrize("first", ["folder", "pack"])
def test_either_continues_the_other(
    tree: Path, pack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    run(tree, tmp_path / "whole", of())
    recipes = {"folder": of(workers=1), "pack": of(packed=pack, workers=1)}
    second = recipes["pack" if first == "folder" else "folder"]
    with monkeypatch.context() as patch:
        _StopAt(patch, 13)
        with pytest.raises(Interrupted):
            run(tree, tmp_path / "run", recipes[first])
    run(tree, tmp_path / "run", second, resume=True)
    assert state(tmp_path / "run") == state(tmp_path / "whole")


def test_a_foreign_pack_stops_before_anything_is_written(
    tree: Path, pack: str, tmp_path: Path
) -> None:
    for change in ({"height": 32}, {"label_order": "file"}, {"packed": str(tmp_path)}):
        with pytest.raises(DataError, match=r"pack again \(fastreid-vi data pack\)"):
            run(tree, tmp_path / "run", of(**{"packed": pack, **change}))
        assert not (tmp_path / "run").exists()


def test_a_run_says_where_its_images_come_from(
    tree: Path, pack: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tree, tmp_path / "run", of(packed=pack, resident="always"), display="plain")
    assert f"images: pack {pack}, 0.00 GiB of it on cpu" in capfd.readouterr().err


def test_what_a_device_can_spare(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe()
    method = build(SysuMM01(tree), chosen)
    sizes = {"rows": 12, "paired": 0}
    assert spare_memory(method, chosen, torch.device("cpu"), **sizes) == 0
    free = 100 << 30
    monkeypatch.setattr(forecast, "free_memory", lambda device: (free, "a device"))
    monkeypatch.setattr(forecast, "undisturbed", lambda device: torch.no_grad())
    monkeypatch.setattr(forecast, "compute_dtype", lambda precision, device: torch.float32)
    spare = spare_memory(method, chosen, torch.device("cuda", 0), **sizes)
    assert free - (4 << 30) < spare < free - (2 << 30)
    free = 1 << 30
    assert spare_memory(method, chosen, torch.device("cuda", 0), **sizes) == 0

    def fails(*_: Any, **__: Any) -> None:
        raise TrainError("looks at values")

    monkeypatch.setattr(forecast, "forecast", fails)
    free = 100 << 30
    assert spare_memory(method, chosen, torch.device("cuda", 0), **sizes) == 0
