"""Losses that are not finite: the run stops and keeps the batch, or goes on without the step."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastreid_vi import ops
from fastreid_vi.config import Batch, OptimConfig
from fastreid_vi.data import SysuMM01
from fastreid_vi.methods.base import Losses
from fastreid_vi.train import NonFiniteLoss, TrainError, train
from fastreid_vi.train.nonfinite import all_finite
from fastreid_vi.train.step import SkippedStep, Stepper
from tests.train.small import Small, build, recipe, run
from tests.train.test_players import Cast
from tests.train.test_step import batch

CPU = torch.device("cpu")


class Diverging(Small):
    """Spoils the loss of some training forwards, counted from 1."""

    at: tuple[int, ...] = ()
    forwards = 0
    kind = "loss"

    def training_step(self, batch: Batch, phase: str = "main") -> Losses:
        losses = super().training_step(batch, phase)
        self.forwards += 1
        self.batches = [*getattr(self, "batches", []), batch]
        if self.forwards not in self.at:
            return losses
        if self.kind == "rank":
            ops.batch_hard_triplet_loss(torch.full((4, 3), math.nan), torch.arange(4) // 2)
        if self.kind == "gradient":  # sqrt at zero: a finite loss, an infinite slope
            return losses._replace(total=losses.total + (self.classifier.bias * 0).sqrt().sum())
        return Losses({**losses.terms, "kl": torch.tensor(math.nan)}, losses.total + math.nan)


def diverging(
    tree: Path, run_dir: Path, at: tuple[int, ...], kind: str = "loss", **more: Any
) -> Any:
    chosen = recipe(**more)
    method = build(SysuMM01(tree), chosen)
    method.__class__ = Diverging
    method.at, method.kind = at, kind
    try:
        train(method, chosen, SysuMM01(tree), run_dir, device="cpu", display="plain")
    except TrainError as error:
        return method, error
    return method, None


class TestTheBatchIsKept:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_of_the_step_that_failed(
        self, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], accumulate: int
    ) -> None:
        at = 12 if accumulate == 1 else 19  # two epochs of 9 batches are ten groups of two
        method, error = diverging(tree, tmp_path / "run", (at,), accumulate=accumulate)
        step = 12 if accumulate == 1 else 11
        assert isinstance(error, NonFiniteLoss)
        assert f"loss is not finite at step {step}: kl is nan" in str(error)
        folder = tmp_path / "run" / "nonfinite" / f"step-{step:08d}"
        assert f"{folder}: the batch of step {step}" in capsys.readouterr().err
        tensors = load_file(folder / "batch.safetensors")
        record = json.loads((folder / "batch.json").read_text())
        assert (record["step"], record["epoch"]) == (step, 2 if accumulate == 1 else 3)
        assert record["terms"]["kl"] == "nan"
        assert isinstance(record["terms"]["id"], float)
        last = method.batches[-accumulate:]
        for index, name in enumerate(("images", "labels", "modality", "cams")):
            expected = torch.cat([batch[index] for batch in last])
            assert torch.equal(tensors[name], expected), name
        assert [b["rows"] for b in record["batches"]] == [12] * accumulate
        images = SysuMM01(tree).train
        known = set(map(str, images.paths))
        paths = [path for b in record["batches"] for path in b["paths"]]
        assert set(paths) <= known
        cams = [int(path.split("/")[0].removeprefix("cam")) for path in paths]
        assert cams == tensors["cams"].tolist()

    def test_of_embeddings_that_cannot_be_ranked(self, tree: Path, tmp_path: Path) -> None:
        _, error = diverging(tree, tmp_path / "run", (5,), kind="rank")
        assert str(error).startswith("step 5: loss is not finite: embeddings: expected finite")
        assert (tmp_path / "run" / "nonfinite" / "step-00000005" / "batch.json").is_file()

    def test_a_disk_that_is_full(
        self, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "nonfinite").write_text("in the way")
        _, error = diverging(tree, tmp_path / "run", (3,))
        assert "loss is not finite at step 3" in str(error)
        assert "could not be kept: cannot create" in capsys.readouterr().err


class TestSkipping:
    @pytest.mark.parametrize("kind", ["loss", "gradient", "rank"])
    def test_goes_on_without_the_step(
        self, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
    ) -> None:
        method, error = diverging(tree, tmp_path / "run", (4, 11), kind, skip_nonfinite=True)
        assert error is None
        said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
        assert len(said) == 2
        what = "gradient" if kind == "gradient" else "loss"
        assert said[0].startswith(f"{what} is not finite at step 4")
        assert said[0].endswith("left out, 1 so far")
        assert said[1].endswith("left out, 2 so far")
        assert int(method.steps) == 25
        assert all(bool(t.isfinite().all()) for t in method.state_dict().values())
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [r["step"] for r in records if r["kind"] == "epoch"] == [9, 18, 27]
        assert not (tmp_path / "run" / "nonfinite").exists()

    @pytest.mark.parametrize("kind", ["loss", "gradient", "rank"])
    def test_leaves_everything_as_it_was(self, kind: str) -> None:
        method = Diverging(3)
        method.at, method.kind = (3,), kind
        step = Stepper(method, OptimConfig(lr=0.01), CPU, skip_nonfinite=True)
        step(batch())
        step(batch())
        before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
        moments = step.players["main"].optimizer.state
        kept = {p: {k: v.clone() for k, v in s.items()} for p, s in moments.items()}
        with pytest.raises(SkippedStep) as caught:
            step(batch())
        assert ("kl" in caught.value.terms) == (kind == "loss")
        for name, tensor in method.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        for parameter, values in kept.items():
            for name, value in values.items():
                assert torch.equal(moments[parameter][name], value)
        assert all(p.grad is None for p in method.parameters())

    def test_concerns_every_player(self) -> None:
        class Late(Cast):
            """The last phase of the iteration fails; state moves in forwards, too."""

            broken = False

            def __init__(self, num_ids: int) -> None:
                super().__init__(num_ids)
                self.counts = [0]

            def get_extra_state(self) -> Any:
                return {"counts": self.counts}

            def set_extra_state(self, state: Any) -> None:
                self.counts = state["counts"]

            def training_step(self, batch: Batch, phase: str = "main") -> Losses:
                losses = super().training_step(batch, phase)
                self.counts.append(len(self.counts))
                with torch.no_grad():
                    self.frozen += 1
                if self.broken and phase == "critic":
                    return losses._replace(total=losses.total * math.nan)
                return losses

        method = Late(3)
        method.begin_epoch(2)
        step = Stepper(method, OptimConfig(lr=0.01), CPU, skip_nonfinite=True)
        step(batch())
        before = {
            n: t.clone() if isinstance(t, Tensor) else {"counts": list(t["counts"])}
            for n, t in method.state_dict().items()
        }
        counts = [int(s["step"]) for s in step.players["network"].optimizer.state.values()]
        method.broken = True
        with pytest.raises(SkippedStep) as caught:
            step(batch())
        assert math.isnan(caught.value.terms["critic/total"])
        for name, value in method.state_dict().items():
            same = torch.equal(value, before[name]) if isinstance(value, Tensor) else None
            assert same or value == before[name], name
        states = step.players["network"].optimizer.state.values()
        assert [int(s["step"]) for s in states] == counts
        method.broken = False
        step(batch())

    def test_scaled_gradients_may_overflow(self) -> None:
        class Steep(Small):
            def training_step(self, batch: Batch, phase: str = "main") -> Losses:
                losses = super().training_step(batch, phase)
                return losses._replace(total=losses.total * 1e34)

        step = Stepper(Steep(3), OptimConfig(), CPU, precision="fp16", skip_nonfinite=True)
        scale = step.players["main"].scaler.get_scale()
        step(batch())
        assert step.players["main"].scaler.get_scale() == scale / 2

    def test_changes_nothing_in_a_finite_run_and_may_be_asked_for_later(
        self, tree: Path, tmp_path: Path
    ) -> None:
        short = recipe()
        short = replace(short, schedule=replace(short.schedule, epochs=1))
        run(tree, tmp_path / "a", short)
        run(tree, tmp_path / "a", recipe(skip_nonfinite=True), resume=True)
        run(tree, tmp_path / "b", recipe())
        final = "checkpoints/last/model.safetensors"
        assert (tmp_path / "a" / final).read_bytes() == (tmp_path / "b" / final).read_bytes()

    def test_an_epoch_without_a_finite_step(self, tree: Path, tmp_path: Path) -> None:
        _, error = diverging(tree, tmp_path / "run", tuple(range(10, 30)), skip_nonfinite=True)
        assert "epoch 2: no step was finite, 9 left out" in str(error)


def test_all_finite() -> None:
    good = [torch.ones(3), torch.full((2, 2), 3e38), torch.zeros(())]
    assert bool(all_finite(good))
    for value in (math.nan, math.inf, -math.inf):
        bad = torch.ones(5)
        bad[2] = value
        assert not bool(all_finite([*good, bad])), value
        assert not bool(all_finite([bad.bfloat16(), nn.Parameter(torch.ones(2))]))
