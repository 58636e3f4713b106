"""The loop against one written out by hand, its hooks, its evaluations and its refusals."""

from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastreid_vi import ops
from fastreid_vi.config import Batch
from fastreid_vi.data import DataError, SysuMM01, make_sampler, train_loader
from fastreid_vi.methods.base import Losses
from fastreid_vi.train import TrainError, seed_everything, train, training_split
from fastreid_vi.train.checkpoint import load_safetensors
from tests.train.small import Small, SmallRecipe, build, recipe, run, write_tree


def train_as(
    kind: type[Small], tree: Path, run_dir: Path, chosen: SmallRecipe | None = None, **options: Any
) -> Small:
    chosen = chosen or recipe()
    dataset = SysuMM01(tree)
    method = build(dataset, chosen)
    method.__class__ = kind
    train(method, chosen, dataset, run_dir, device="cpu", display="none", **options)
    return method


def with_validation(chosen: SmallRecipe, identities: int) -> SmallRecipe:
    return replace(chosen, data=replace(chosen.data, validation=identities))


def test_equals_a_loop_by_hand(tree: Path, tmp_path: Path) -> None:
    chosen = recipe(precision="fp32")
    run(tree, tmp_path / "run", chosen)

    dataset, data = SysuMM01(tree), chosen.data
    method = build(dataset, chosen).to(memory_format=torch.channels_last)
    images = training_split(dataset, chosen).train
    sampler = make_sampler(
        data.sampler, images.labels, images.modality, identities=3, images=4, seed=1
    )
    loader = train_loader(images, sampler, data, seed=1)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01, weight_decay=5e-4, fused=True)
    seed_everything(1)
    totals: list[float] = []
    for epoch in (1, 2, 3):
        optimizer.param_groups[0]["lr"] = 0.01 if epoch <= 2 else 0.01 * 0.1
        sampler.set_epoch(epoch)
        for batch in loader:
            pixels = batch.images.contiguous(memory_format=torch.channels_last)
            total = method.training_step(batch._replace(images=pixels)).total
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(method.parameters(), 5.0)
            optimizer.step()
            method.after_step()
            totals.append(total.item())

    weights, _ = load_safetensors(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors")
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    records = read(tmp_path / "run")
    steps = [r["terms"]["total"] for r in records if r["kind"] == "step"]
    assert steps == [(a + b) / 2 for a, b in zip(totals[0::2], totals[1::2], strict=False)]
    epochs = [r["terms"]["total"] for r in records if r["kind"] == "epoch"]
    assert epochs == pytest.approx([sum(totals[9 * e : 9 * e + 9]) / 9 for e in range(3)])
    assert [r["lr"] for r in records if r["kind"] == "epoch"] == [0.01, 0.01, 0.001]


def read(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_run_folder(tree: Path, tmp_path: Path) -> None:
    result = run(tree, tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").iterdir()} - {"tensorboard"}
    assert names == {"run.json", "metrics.jsonl", "checkpoints", "best.json", "result.json"}
    assert (result.epochs, result.steps) == (3, 27)
    records = read(tmp_path / "run")
    assert {r["kind"] for r in records} == {"step", "epoch", "eval"}
    for record in records:
        if record["kind"] == "eval":
            assert set(record["metrics"]) == {"R1", "R5", "R10", "R20", "mAP", "mINP"}
            assert all(0 <= value <= 1 for value in record["metrics"].values())
        else:
            assert set(record["terms"]) == {"id", "size", "total"}
            assert record["images_per_second"] > 0
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best == result.best
    evaluated = [(e["epoch"], e["metrics"]) for e in records if e["kind"] == "eval"]
    assert evaluated == [(e["epoch"], e["metrics"]) for e in best["evaluations"]]
    assert max(m["R1"] for _, m in evaluated) == best["metrics"]["R1"]
    assert result.checkpoint.name == f"step-{best['step']:08d}"
    final = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (tmp_path / "run" / final["checkpoint"] / "model.safetensors").is_file()


def test_the_loss_falls(tree: Path, tmp_path: Path) -> None:
    chosen = recipe(eval_every=0)
    chosen = replace(
        chosen,
        data=replace(chosen.data, erase=0.0, flip=0.0, pad=0),
        schedule=replace(chosen.schedule, epochs=12, milestones=()),
    )
    run(tree, tmp_path / "run", chosen)
    totals = [r["terms"]["total"] for r in read(tmp_path / "run") if r["kind"] == "epoch"]
    assert totals[-1] < 0.7 * totals[0]


class TestEvaluation:
    def test_never_touches_the_test_split(self, tree: Path, tmp_path: Path) -> None:
        class Guarded(SysuMM01):
            guarded = False

            def __getattribute__(self, name: str) -> Any:
                if name in ("query", "gallery", "permutations") and type(self).guarded:
                    raise AssertionError(f"{name} was read")
                return super().__getattribute__(name)

        dataset = Guarded(tree)
        Guarded.guarded = True
        method = build(dataset, recipe())
        train(method, recipe(), dataset, tmp_path / "run", device="cpu", display="none")
        best = json.loads((tmp_path / "run" / "best.json").read_text())
        assert "3 training identities held out for validation" in best["chosen"]
        assert "later epoch, of 3 evaluated" in best["chosen"]

    def test_on_the_test_split_when_asked(self, tree: Path, tmp_path: Path) -> None:
        run(tree, tmp_path / "run", with_validation(recipe(), 0), eval_on="test")
        best = json.loads((tmp_path / "run" / "best.json").read_text())
        assert "on the TEST split, as asked" in best["chosen"]
        assert {r["split"] for r in read(tmp_path / "run") if r["kind"] == "eval"} == {"test"}
        assert json.loads((tmp_path / "run" / "run.json").read_text())["eval_on"] == "test"

    def test_without_validation_the_last_epoch_is_the_result(
        self, tree: Path, tmp_path: Path
    ) -> None:
        result = run(tree, tmp_path / "run", with_validation(recipe(), 0))
        best = json.loads((tmp_path / "run" / "best.json").read_text())
        assert (best["epoch"], best["metrics"]) == (3, None)
        assert best["chosen"].startswith("the last epoch: no validation split")
        assert result.checkpoint.name == f"step-{result.steps:08d}"
        assert not [r for r in read(tmp_path / "run") if r["kind"] == "eval"]

    @pytest.mark.parametrize(("every", "epochs"), [(0, [3]), (2, [2, 3]), (5, [3])])
    def test_when(self, tree: Path, tmp_path: Path, every: int, epochs: list[int]) -> None:
        run(tree, tmp_path / "run", recipe(eval_every=every, checkpoint_every=3))
        found = [r["epoch"] for r in read(tmp_path / "run") if r["kind"] == "eval"]
        assert found == epochs

    def test_the_best_keeps_its_weights(self, tree: Path, tmp_path: Path) -> None:
        class Forgetful(Small):
            def begin_epoch(self, epoch: int) -> None:
                super().begin_epoch(epoch)
                self.spoilt = epoch > 1

            def test_features(self, images: Tensor, modality: Tensor) -> Tensor:
                features = super().test_features(images, modality)
                return torch.ones_like(features) if self.spoilt else features

        train_as(Forgetful, tree, tmp_path / "run", recipe(keep=1))
        best = json.loads((tmp_path / "run" / "best.json").read_text())
        assert best["epoch"] == 1
        found = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
        assert found == ["best", "last", "step-00000009", "step-00000027"]

    def test_equal_scores_prefer_the_later_epoch(self, tree: Path, tmp_path: Path) -> None:
        class Blind(Small):
            def test_features(self, images: Tensor, modality: Tensor) -> Tensor:
                return torch.ones(len(images), self.embed_dim)

        train_as(Blind, tree, tmp_path / "run")
        assert json.loads((tmp_path / "run" / "best.json").read_text())["epoch"] == 3

    def test_embeddings_that_are_not_finite(self, tree: Path, tmp_path: Path) -> None:
        class Broken(Small):
            def test_features(self, images: Tensor, modality: Tensor) -> Tensor:
                return torch.full((len(images), self.embed_dim), math.nan)

        with pytest.raises(TrainError, match=r"embeddings are not finite, first cam3/\d{4}/0001"):
            train_as(Broken, tree, tmp_path / "run")

    def test_an_unknown_split(self, tree: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="eval_on: expected"):
            run(tree, tmp_path / "run", eval_on="gallery")


class TestHooks:
    def test_epochs_are_announced_again_after_a_resume(self, tree: Path, tmp_path: Path) -> None:
        method = train_as(Small, tree, tmp_path / "run")
        assert method.epochs == [1, 2, 3]
        assert int(method.steps) == 27

    def test_phases_have_their_own_optimisers(self, tree: Path, tmp_path: Path) -> None:
        class Players(Small):
            phases = ("encoder", "head")

            def phase_parameters(self, phase: str) -> list[torch.nn.Parameter]:
                part = self.backbone if phase == "encoder" else self.classifier
                return list(part.parameters())

            def training_step(self, batch: Batch, phase: str = "main") -> Losses:
                moved = {
                    "encoder": self.backbone[0].weight.detach().clone(),
                    "head": self.classifier.weight.detach().clone(),
                }
                self.seen.append((phase, moved))
                return super().training_step(batch, phase)

        chosen = recipe(eval_every=0)
        method = build(SysuMM01(tree), chosen)
        method.__class__ = Players
        method.seen = []
        train(method, chosen, SysuMM01(tree), tmp_path / "run", device="cpu", display="none")
        assert [phase for phase, _ in method.seen[:4]] == ["encoder", "head"] * 2
        (_, start), (_, between), (_, after) = method.seen[:3]
        assert not torch.equal(start["encoder"], between["encoder"])
        assert torch.equal(start["head"], between["head"])
        assert torch.equal(between["encoder"], after["encoder"])
        assert not torch.equal(between["head"], after["head"])
        names = set(read(tmp_path / "run")[0]["terms"])
        assert names == {f"{p}/{t}" for p in Players.phases for t in ("id", "size", "total")}
        assert int(method.steps) == 54  # after every phase

    def test_phases_resume_too(self, tree: Path, tmp_path: Path) -> None:
        class Players(Small):
            phases = ("one", "two")

        short = recipe()
        short = replace(short, schedule=replace(short.schedule, epochs=1))
        train_as(Players, tree, tmp_path / "parts", short)
        train_as(Players, tree, tmp_path / "parts", recipe(), resume=True)
        train_as(Players, tree, tmp_path / "whole", recipe())
        final = "checkpoints/last/model.safetensors"
        parts, whole = (tmp_path / name / final for name in ("parts", "whole"))
        assert parts.read_bytes() == whole.read_bytes()


class TestRefusals:
    @pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (-math.inf, "-inf")])
    def test_a_loss_that_is_not_finite(
        self, tree: Path, tmp_path: Path, value: float, shown: str
    ) -> None:
        class Diverging(Small):
            def training_step(self, batch: Batch, phase: str = "main") -> Losses:
                losses = super().training_step(batch, phase)
                if int(self.steps) < 11:
                    return losses
                return Losses({**losses.terms, "kl": torch.tensor(value)}, losses.total + value)

        message = (
            rf"loss is not finite at step 12: kl is {shown}, total is {shown}; "
            r"other terms: id [\d.]+, size [\d.]+$"
        )
        with pytest.raises(TrainError, match=message):
            train_as(Diverging, tree, tmp_path / "run")
        last = tmp_path / "run" / "checkpoints" / "last"
        assert last.resolve().name == "step-00000009"
        assert read(tmp_path / "run")[-1]["step"] == 10

    def test_embeddings_that_a_loss_cannot_rank(self, tree: Path, tmp_path: Path) -> None:
        class Diverging(Small):
            def training_step(self, batch: Batch, phase: str = "main") -> Losses:
                broken = torch.full((4, 3), math.nan)
                ops.batch_hard_triplet_loss(broken, torch.arange(4) // 2)
                return super().training_step(batch, phase)

        with pytest.raises(TrainError, match=r"loss is not finite: embeddings: .* nan in row 0"):
            train_as(Diverging, tree, tmp_path / "run")

    def test_a_method_for_other_identities(self, tree: Path, tmp_path: Path) -> None:
        message = "method: made for 5 identities, the training split has 9"
        with pytest.raises(TrainError, match=message):
            train(Small(5), recipe(), SysuMM01(tree), tmp_path / "run", display="none")
        assert not (tmp_path / "run").exists()

    def test_too_many_identities_in_a_batch(self, tree: Path, tmp_path: Path) -> None:
        chosen = recipe()
        chosen = replace(chosen, data=replace(chosen.data, identities=10))
        with pytest.raises(DataError, match="batch of 10 identities cannot be drawn from 9"):
            run(tree, tmp_path / "run", chosen)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_unreadable_image(self, tmp_path: Path, workers: int) -> None:
        tree = write_tree(tmp_path / "data")
        image = tree / "cam1" / "0003" / "0001.jpg"
        image.write_bytes(image.read_bytes()[:100])
        chosen = with_validation(recipe(), 0)
        chosen = replace(chosen, data=replace(chosen.data, workers=workers))
        with pytest.raises(DataError, match=r"cam1/0003/0001\.jpg"):
            run(tree, tmp_path / "run", chosen)

    def test_a_run_folder_that_cannot_be_made(self, tree: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(TrainError, match=r"cannot create run folder .*: Not a directory"):
            run(tree, tmp_path / "file" / "run")

    def test_a_folder_with_a_foreign_history(self, tree: Path, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text("precious")
        with pytest.raises(TrainError, match=r"holds a run already \(metrics.jsonl\)"):
            run(tree, tmp_path / "run")
        with pytest.raises(TrainError, match=r"cannot resume, run\.json is missing"):
            run(tree, tmp_path / "run", resume=True)
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == "precious"

    def test_a_device_that_is_too_small(self, tree: Path, tmp_path: Path) -> None:
        class Large(Small):
            def training_step(self, batch: Batch, phase: str = "main") -> Losses:
                if int(self.steps) == 10:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried ...\nSee ...")
                return super().training_step(batch, phase)

        message = (
            "cpu is out of memory in step 11 with 3 x 4 images of 24 x 12: lower "
            r"data\.identities.* last checkpoint: .*step-00000009$"
        )
        with pytest.raises(TrainError, match=message):
            train_as(Large, tree, tmp_path / "run")

    def test_an_unknown_device(self, tree: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainError, match="device: unknown device 'gpu'"):
            run(tree, tmp_path / "run", device="gpu")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
    def test_a_device_that_is_not_there(self, tree: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainError, match="device: no cuda"):
            run(tree, tmp_path / "run", device="cuda")


@pytest.mark.parametrize("enabled", [False, True])
def test_global_switches_are_put_back(tree: Path, tmp_path: Path, enabled: bool) -> None:
    seen = []

    class Looking(Small):
        def begin_epoch(self, epoch: int) -> None:
            seen.append(torch.are_deterministic_algorithms_enabled())

    torch.use_deterministic_algorithms(enabled)
    train_as(Looking, tree, tmp_path / "run")
    assert seen == [True] * 3
    assert torch.are_deterministic_algorithms_enabled() is enabled


def test_tensorboard_is_optional(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(tree, tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert len(read(tmp_path / "run")) == 19


def test_tensorboard_gets_every_record(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, dict[int, float]] = {}

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            assert (folder, purge_step) == (str(tmp_path / "run" / "tensorboard"), None)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            drawn.setdefault(name, {})[step] = value

        def close(self) -> None:
            drawn["closed"] = {}

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(tree, tmp_path / "run")
    records = read(tmp_path / "run")
    totals = {r["step"]: r["terms"]["total"] for r in records if r["kind"] == "step"}
    assert drawn["step/total"] == totals
    assert drawn["epoch/lr"] == {9: 0.01, 18: 0.01, 27: 0.001}
    scores = {r["step"]: r["metrics"]["R1"] for r in records if r["kind"] == "eval"}
    assert drawn["validation/R1"] == scores
    assert "closed" in drawn
