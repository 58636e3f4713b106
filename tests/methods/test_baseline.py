"""The baseline: names, start, losses, test features, training."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from fastreid_vi import methods
from fastreid_vi.config import Batch
from fastreid_vi.methods import base
from fastreid_vi.methods.baseline import Baseline, BaselineOptions
from fastreid_vi.methods.baseline.losses import baseline_losses
from tests.conftest import golden
from tests.methods.test_backbone import torchvision_shapes


def build(**options: object) -> Baseline:
    torch.manual_seed(0)
    network = methods.create("baseline", 4, depth=18, weights="none", **options)
    assert isinstance(network, Baseline)
    return network


def batch_of(count: int = 8) -> Batch:
    """Visible rows, then infrared, as `paired_identity` gives them; two images of each identity."""
    generator = torch.Generator().manual_seed(5)
    half = torch.arange(count // 2)
    labels, modality = torch.cat((half, half)), torch.tensor([0, 1]).repeat_interleave(count // 2)
    images = torch.randn(count, 3, 64, 32, generator=generator)
    return Batch(images, labels, modality, modality + 2)


def test_names_and_shapes() -> None:
    with torch.device("meta"):
        network = methods.create("baseline", 395, weights="none")
    expected = {}
    for name, shape in torchvision_shapes(50).items():
        if name.startswith(("conv1", "bn1")):
            for stem in ("visible_stem", "infrared_stem"):
                expected[f"backbone.{stem}.{name}"] = shape
        else:
            expected[f"backbone.{name}"] = shape
    for entry in ("weight", "bias", "running_mean", "running_var"):
        expected[f"bottleneck.{entry}"] = (2048,)
    expected["bottleneck.num_batches_tracked"] = ()
    expected["classifier.weight"] = (395, 2048)
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert state == expected
    used = sum(p.numel() for p in network.parameters())
    assert used == 24_330_624  # LbA's figure for the same network with 395 identities


def test_start() -> None:
    network = build()
    assert float(network.classifier.weight.detach().std()) == pytest.approx(0.001, rel=0.1)
    assert float(network.bottleneck.weight.detach().std()) == pytest.approx(0.01, rel=0.15)
    assert not network.bottleneck.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses(dtype: torch.dtype) -> None:
    """Triplet golden of the LbA code; cross entropy from its definition."""
    arrays = golden("mpanet/center_cluster")
    x = torch.from_numpy(arrays["k8/x"]).to(dtype)
    labels = torch.from_numpy(arrays["k8/labels"])
    logits = torch.randn(32, int(labels.max()) + 1, dtype=dtype)
    options = BaselineOptions(margin=float(arrays["margin"]), triplet_weight=0.3)
    labels_cut = labels.clone()
    losses = baseline_losses(x, logits, labels_cut, options)
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(float(losses.terms["triplet"]), arrays["k8/triplet_loss"], rtol=rtol)
    picked = logits.log_softmax(1)[torch.arange(32), labels]
    torch.testing.assert_close(losses.terms["identity"], -picked.mean())
    total = losses.terms["identity"] + 0.3 * losses.terms["triplet"]
    torch.testing.assert_close(losses.total, total)
    labels_cut[::3] = -1
    ignoring = baseline_losses(x, logits, labels_cut, options).terms["identity"]
    torch.testing.assert_close(ignoring, -picked[labels_cut >= 0].mean())


@pytest.mark.parametrize("feature", ["neck", "pooled"])
@pytest.mark.parametrize("pooling", ["gem", "average"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embed(feature: str, pooling: str, normalize: bool) -> None:
    network = build(test_feature=feature, pooling=pooling, normalize_test=normalize)
    batch = batch_of()
    network.bottleneck.running_mean.fill_(0.25)
    found = network.embed(batch.images, batch.modality)
    assert network.training
    with torch.no_grad():
        maps = network.eval().backbone(batch.images, batch.modality)
        cubes = (maps**3).mean((2, 3)).add(1e-12) ** (1 / 3)
        expected = cubes if pooling == "gem" else maps.mean((2, 3))
        if feature == "neck":
            scale = network.bottleneck.weight / (1 + 1e-5) ** 0.5
            expected = (expected - 0.25) * scale
    if normalize:
        expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_embed_depends_on_the_modality() -> None:
    network, batch = build(), batch_of()
    one = network.embed(batch.images, batch.modality)
    assert not torch.allclose(one, network.embed(batch.images, 1 - batch.modality), rtol=1e-2)
    shared = build(stems="shared")
    one = shared.embed(batch.images, batch.modality)
    assert torch.equal(one, shared.embed(batch.images, 1 - batch.modality))


def test_a_batch_of_one_modality_is_fine() -> None:
    network, batch = build(), batch_of()
    losses = network.training_step(batch._replace(modality=torch.zeros_like(batch.modality)))
    assert bool(losses.total.isfinite())


def test_a_paired_batch_is_split_without_waiting_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, network = batch_of(), build()
    found = [copy.deepcopy(network)(b).total for b in (batch, batch._replace(paired=1))]
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    monkeypatch.setattr(base, "_values_are_read", lambda tensor: False)  # as on CUDA
    with FakeTensorMode():
        network = build()
        labels, modality, cams = torch.empty(3, 8, dtype=torch.int64)
        fake = Batch(torch.empty(8, 3, 64, 32), labels, modality, cams, paired=1)
        network(fake).total.backward()
        with pytest.raises(DataDependentOutputException):  # rows in any order have to be looked at
            network(fake._replace(paired=0))


def test_one_step_moves_every_trainable_parameter() -> None:
    network = build()
    before = {k: v.detach().clone() for k, v in network.named_parameters()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network(batch_of()).total.backward()
    optimizer.step()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) == (name == "bottleneck.bias"), name
        assert bool(parameter.isfinite().all())


def test_autocast_keeps_losses_in_float32() -> None:
    network, batch = build(), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        losses = network(batch)
        features = network.embed(batch.images, batch.modality)
    assert features.dtype == losses.total.dtype == torch.float32
    losses.total.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())


def test_overfits_eight_images() -> None:
    network, batch = build(), batch_of()
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(20):
        losses = network.training_step(batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert float(losses.terms["accuracy"]) == 1.0
    assert float(losses.total.detach()) < 0.1
    logits = network.classifier(F.normalize(network.embed(batch.images, batch.modality)))
    assert logits.shape == (8, 4)


def test_bad_input_is_named() -> None:
    network, batch = build(), batch_of()
    with pytest.raises(ValueError, match="labels: expected values from -1 to 3, got 4"):
        network.training_step(batch._replace(labels=batch.labels + 1))
    with pytest.raises(ValueError, match="phase: expected one of main"):
        network.training_step(batch, "other")
    with pytest.raises(ValueError, match="pooling: expected one of 'gem', 'average', got 'max'"):
        BaselineOptions(pooling="max")
    with pytest.raises(ValueError, match="margin: expected >= 0, got -1"):
        BaselineOptions(margin=-1)
    with pytest.raises(ValueError, match="num_ids: expected >= 1, got 0"):
        Baseline(0)
