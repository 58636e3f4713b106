"""Gradients averaged over several batches; compiled backbones; low precision in the loop."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastreid_vi.config import Batch, OptimConfig
from fastreid_vi.data import SysuMM01
from fastreid_vi.train import Interrupted, train
from fastreid_vi.train import checkpoint as checkpoints
from fastreid_vi.train.step import Stepper
from tests.train.small import Small, SmallRecipe, build, recipe, run
from tests.train.test_step import batch

CPU = torch.device("cpu")


class Steady(Small):
    """Neither batch statistics nor random draws: rows do not know each other."""

    def __init__(self, num_ids: int, width: int = 8) -> None:
        super().__init__(num_ids, width)
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU())
        self.dropout = nn.Dropout(0.0)


def parts(whole: Batch, size: int) -> list[Batch]:
    return [whole.rows(i, i + size) for i in range(0, len(whole.labels), size)]


@pytest.mark.parametrize("size", [6, 4, 2])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_equals_one_large_batch(size: int, clip: float) -> None:
    config = OptimConfig(name="sgd", momentum=0.9, lr=0.1, clip_norm=clip)
    results = []
    for cut in (12, size):
        torch.manual_seed(0)
        method = Steady(3)
        step = Stepper(method, config, CPU)
        terms = [step(*parts(batch(12), cut)) for _ in range(4)]
        results.append((method.state_dict(), terms))
        assert int(method.steps) == 4
    (large, terms), (small, averaged) = results
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-5, atol=1e-6)
    for one, other in zip(terms, averaged, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_a_step_takes_a_group_and_the_last_one_what_is_left(tree: Path, tmp_path: Path) -> None:
    sizes = []

    class Counting(Small):
        def training_step(self, batch: Batch, phase: str = "main") -> Any:
            sizes.append(int(self.steps))
            return super().training_step(batch, phase)

    chosen = recipe(accumulate=4, eval_every=0)
    method = build(SysuMM01(tree), chosen)
    method.__class__ = Counting
    result = train(method, chosen, SysuMM01(tree), tmp_path / "run", device="cpu", display="none")
    assert result.steps == 9  # three epochs of nine batches: 4, 4 and 1
    assert [sizes.count(step) for step in range(9)] == [4, 4, 1] * 3
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records if r["kind"] == "epoch"] == [3, 6, 9]


@pytest.mark.parametrize("at", [1, 2, 5, 6])
def test_checkpoints_fall_on_the_borders_of_groups(tree: Path, tmp_path: Path, at: int) -> None:
    chosen = recipe(accumulate=4)
    method = build(SysuMM01(tree), chosen)
    hook = method.after_step

    def after_step() -> None:
        hook()
        if int(method.steps) == at:
            signal.raise_signal(signal.SIGINT)

    method.after_step = after_step  # type: ignore[method-assign]
    with pytest.raises(Interrupted) as caught:
        train(method, chosen, SysuMM01(tree), tmp_path / "parts", device="cpu", display="none")
    assert caught.value.step == at
    saved = checkpoints.load(tmp_path / "parts" / "checkpoints" / "last")
    assert saved.counters["sampler"]["batch"] == {1: 4, 2: 8, 5: 8, 6: 9}[at]
    run(tree, tmp_path / "parts", chosen, resume=True)
    run(tree, tmp_path / "whole", chosen)
    final = "checkpoints/last/model.safetensors"
    parts, whole = (tmp_path / name / final for name in ("parts", "whole"))
    assert parts.read_bytes() == whole.read_bytes()


class Trunk(nn.Sequential):
    """PyTorch captures the forward of our classes; its own it calls as they are."""

    def forward(self, images: Tensor) -> Tensor:
        convolution, norm, activation = self
        return activation(norm(convolution(images)))


class Compiled(Small):
    """Compiled without a C++ compiler: what the engine does around it is the same."""

    def compile_backbone(self) -> None:
        self.backbone.__class__ = Trunk
        self.calls = 0

        def backend(graph: Any, inputs: Any) -> Any:
            self.calls += 1
            return graph.forward

        self.backbone.compile(backend=backend)


def compiled_run(tree: Path, run_dir: Path, chosen: SmallRecipe, resume: bool = False) -> Compiled:
    dataset = SysuMM01(tree)
    method = build(dataset, chosen)
    method.__class__ = Compiled
    train(method, chosen, dataset, run_dir, device="cpu", display="none", resume=resume)
    return method


def test_a_compiled_backbone_resumes(tree: Path, tmp_path: Path) -> None:
    chosen = recipe(compile=True)
    short = replace(chosen, schedule=replace(chosen.schedule, epochs=1))
    whole = compiled_run(tree, tmp_path / "whole", chosen)
    assert whole.calls >= 1
    assert set(whole.state_dict()) == set(Small(9).state_dict())
    compiled_run(tree, tmp_path / "parts", short)
    parts = compiled_run(tree, tmp_path / "parts", chosen, resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_and_resumes(tree: Path, tmp_path: Path, precision: Any) -> None:
    chosen = recipe(precision=precision, eval_every=0)
    long = replace(chosen, schedule=replace(chosen.schedule, epochs=8, milestones=()))
    short = replace(long, schedule=replace(long.schedule, epochs=3))
    run(tree, tmp_path / "whole", long)
    run(tree, tmp_path / "parts", short)
    run(tree, tmp_path / "parts", long, resume=True)
    final = "checkpoints/last/model.safetensors"
    parts, whole = (tmp_path / name / final for name in ("parts", "whole"))
    assert parts.read_bytes() == whole.read_bytes()
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    totals = [r["terms"]["total"] for r in map(json.loads, lines) if r["kind"] == "epoch"]
    assert totals[-1] < 0.9 * totals[0]
