"""Precision, clipping, memory format and embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastreid_vi.config import INFRARED, VISIBLE, Batch, OptimConfig
from fastreid_vi.data import SysuMM01, eval_loader
from fastreid_vi.evaluation import Embeddings
from fastreid_vi.methods.base import Losses
from fastreid_vi.train import TrainError, embed_all, load_embeddings, save_embeddings
from fastreid_vi.train.step import Stepper, compute_dtype, deterministic
from tests.train.small import Small, recipe

CPU = torch.device("cpu")


def batch(n: int = 6) -> Batch:
    images = torch.randn(n, 3, 24, 12, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(n) % 3, torch.arange(n) % 2, torch.ones(n, dtype=torch.int64))


def stepper(method: Small, **options: Any) -> Stepper:
    config = options.pop("config", OptimConfig(lr=0.01))
    return Stepper(method, config, CPU, **options)


class Watching(Small):
    """Notes what the step gives it."""

    def training_step(self, batch: Batch, phase: str = "main") -> Losses:
        self.dtype = self.backbone[0](batch.images).dtype
        self.format = batch.images.is_contiguous(memory_format=torch.channels_last)
        return super().training_step(batch, phase)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("auto", torch.float32),
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    ],
)
def test_precision_on_the_cpu(precision: Any, dtype: torch.dtype) -> None:
    method = Watching(3)
    step = stepper(method, precision=precision)
    terms = step(batch())
    assert compute_dtype(precision, CPU) == method.dtype == dtype
    assert terms["total"].dtype == torch.float32
    assert step.players["main"].scaler.is_enabled() == (precision == "fp16")
    assert not any(term.requires_grad for term in terms.values())


@pytest.mark.gpu
def test_auto_is_bf16_on_a_gpu_that_has_it() -> None:
    device = torch.device("cuda")
    wanted = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    assert compute_dtype("auto", device) == wanted


def test_bf16_asked_of_a_device_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    with pytest.raises(TrainError, match="precision: bf16 is not supported by Old Card"):
        compute_dtype("bf16", torch.device("cuda"))
    assert compute_dtype("auto", torch.device("cuda")) == torch.float32


def test_an_overflow_skips_the_step_and_its_hook() -> None:
    class Overflowing(Small):
        def training_step(self, batch: Batch, phase: str = "main") -> Losses:
            losses = super().training_step(batch, phase)
            return losses._replace(total=losses.total * self.factor)

    method = Overflowing(3)
    step = stepper(method, precision="fp16")
    scale = step.players["main"].scaler.get_scale()
    before = method.classifier.weight.detach().clone()
    method.factor = 1e36  # times the loss scale, beyond float32
    step(batch())
    assert step.players["main"].scaler.get_scale() == scale / 2
    assert torch.equal(method.classifier.weight, before)
    assert int(method.steps) == 0
    method.factor = 1.0
    step(batch())
    assert not torch.equal(method.classifier.weight, before)
    assert int(method.steps) == 1
    copy = stepper(Overflowing(3), precision="fp16")
    copy.load_state_dict(step.state_dict())
    assert copy.players["main"].scaler.get_scale() == scale / 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped(precision: Any) -> None:
    norms = []
    for clip in (0.0, 1e-3):
        torch.manual_seed(0)
        method = Small(3)
        method.dropout = nn.Dropout(0.0)
        config = OptimConfig(name="sgd", momentum=0.0, weight_decay=0.0, lr=1.0, clip_norm=clip)
        before = [p.detach().clone() for p in method.parameters()]
        stepper(method, config=config, precision=precision)(batch())
        moved = [b - p.detach() for b, p in zip(before, method.parameters(), strict=True)]
        norms.append(torch.cat([m.flatten() for m in moved]).norm().item())
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format(channels_last: bool) -> None:
    method = Watching(3)
    stepper(method, channels_last=channels_last)(batch())
    weight = method.backbone[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert method.format == channels_last


def test_deterministic_does_not_fill_memory() -> None:
    before = torch.utils.deterministic.fill_uninitialized_memory
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert not torch.backends.cudnn.benchmark
    assert torch.utils.deterministic.fill_uninitialized_memory == before


class TestEmbedAll:
    @pytest.fixture
    def data(self, tree: Path) -> SysuMM01:
        return SysuMM01(tree)

    @pytest.mark.parametrize("size", [1, 7, 1000])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_rows_follow_the_list(self, data: SysuMM01, size: int, workers: int) -> None:
        from dataclasses import replace

        config = replace(recipe().data, workers=workers)
        method = Small(3).train()
        images = data.query.select(np.arange(len(data.query))[::-1])
        loader = eval_loader(images, config, batch_size=size)
        found = embed_all(method, loader, images, device=CPU)
        assert method.training
        assert found.features.dtype == np.float32
        assert found.features.shape == (len(images), 8)
        assert found.paths == images.paths
        np.testing.assert_array_equal(found.ids, images.pids)
        np.testing.assert_array_equal(found.cams, images.cams)
        whole = next(iter(eval_loader(images, config, batch_size=len(images))))
        with torch.no_grad():
            alone = method.embed(whole.images, whole.modality)
        np.testing.assert_allclose(found.features, alone.numpy(), rtol=1e-4, atol=1e-6)
        assert not method.embed(whole.images, whole.modality).is_inference()

    def test_the_modality_is_told(self, data: SysuMM01) -> None:
        class Telling(Small):
            def test_features(self, images: Tensor, modality: Tensor) -> Tensor:
                return modality[:, None].float().expand(-1, self.embed_dim)

        for images, value in ((data.query, INFRARED), (data.gallery, VISIBLE)):
            loader = eval_loader(images, recipe().data, batch_size=5)
            found = embed_all(Telling(3), loader, images, device=CPU)
            assert (found.features == value).all()

    def test_half_precision_gives_float32(self, data: SysuMM01) -> None:
        loader = eval_loader(data.query, recipe().data, batch_size=50)
        found = embed_all(Small(3), loader, data.query, device=CPU, precision="bf16")
        assert found.features.dtype == np.float32

    def test_a_loader_of_other_images(self, data: SysuMM01) -> None:
        loader = eval_loader(data.query, recipe().data, batch_size=50)
        with pytest.raises(TrainError, match=r"loader: expected \d+ images, got \d+"):
            embed_all(Small(3), loader, data.gallery, device=CPU)

    def test_an_empty_list(self, data: SysuMM01) -> None:
        images = data.query.select([])
        found = embed_all(Small(3), [], images, device=CPU)
        assert found.features.shape == (0, 8)


class TestEmbeddingFiles:
    embeddings = Embeddings(
        np.arange(12, dtype=np.float32).reshape(4, 3),
        np.array([3, 3, 5, 7]),
        np.array([1, 2, 1, 6]),
        tuple(f"cam1/0003/{n:04d}.jpg" for n in range(4)),
    )

    def test_round_trip(self, tmp_path: Path) -> None:
        save_embeddings(tmp_path / "new" / "query", self.embeddings)
        assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
            "query.json", "query.safetensors",
        ]  # fmt: skip
        found = load_embeddings(tmp_path / "new" / "query")
        for name in ("features", "ids", "cams"):
            np.testing.assert_array_equal(getattr(found, name), getattr(self.embeddings, name))
        assert found.paths == self.embeddings.paths

    def test_without_paths_and_out_of_order_memory(self, tmp_path: Path) -> None:
        features = np.asfortranarray(self.embeddings.features.astype(np.float64))
        save_embeddings(tmp_path / "q", self.embeddings._replace(features=features, paths=None))
        found = load_embeddings(tmp_path / "q")
        np.testing.assert_array_equal(found.features, self.embeddings.features)
        assert found.paths is None

    @pytest.mark.parametrize("name", ["query.safetensors", "query.json"])
    @pytest.mark.parametrize("content", [b"", b"noise", None])
    def test_damage_is_one_line(self, tmp_path: Path, name: str, content: bytes | None) -> None:
        save_embeddings(tmp_path / "query", self.embeddings)
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(TrainError, match="cannot read embeddings") as caught:
            load_embeddings(tmp_path / "query")
        assert "\n" not in str(caught.value)

    def test_lengths_that_disagree(self, tmp_path: Path) -> None:
        save_embeddings(tmp_path / "query", self.embeddings._replace(ids=np.array([1, 2])))
        with pytest.raises(TrainError, match=r"disagree: lengths \[2, 4\]"):
            load_embeddings(tmp_path / "query")
