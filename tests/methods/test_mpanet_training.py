"""MPANet: steps, mixed precision, no waiting for the device, overfitting."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from fastreid_vi.config import Batch
from fastreid_vi.methods import base
from tests.methods.mpanet_cases import images_batch, losses_of, tiny

# Training.


def test_one_step_moves_every_trainable_parameter() -> None:
    network = tiny()
    before = {k: v.detach().clone() for k, v in network.named_parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = network(images_batch())  # the module itself is called by DistributedDataParallel
    losses.total.backward()
    optimizer.step()
    means = ("visible_classifier_.weight", "infrared_classifier_.weight")
    for name, parameter in network.named_parameters():
        still = torch.equal(parameter, before[name])
        assert still == (name == "bn_neck.bias" or name in means), name
        assert bool(parameter.isfinite().all())


def test_training_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """M14: fake tensors have no data, so reading a value or a data-dependent shape raises."""
    monkeypatch.setattr(base, "_values_are_read", lambda tensor: False)  # as on CUDA
    with FakeTensorMode():
        network = tiny()
        images = torch.empty(8, 3, 64, 32)
        labels, modality, cams = torch.empty(3, 8, dtype=torch.int64)
        network.training_step(Batch(images, labels, modality, cams)).total.backward()
        network.after_step()
        assert network.embed(images, modality).shape == (8, network.embed_dim)
        network.options = replace(network.options, cc_mode="rows")  # the released form does wait
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            network.training_step(Batch(images, labels, modality, cams))


def test_autocast_keeps_losses_in_float32() -> None:
    network = tiny()
    full = {k: float(v.detach()) for k, v in copy.deepcopy(network)(images_batch()).terms.items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = network(images_batch())
        features = network.embed(images_batch().images, images_batch().modality)
    assert features.dtype == torch.float32
    for name, value in {**losses.terms, "total": losses.total}.items():
        assert value.dtype == torch.float32
        if name not in ("total", "accuracy", "divergence"):
            assert float(value.detach()) == pytest.approx(full[name], rel=0.05)
    losses.total.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())


def test_channels_last_gives_the_same_losses() -> None:
    batch, network = images_batch(), tiny()
    twin = copy.deepcopy(network).to(memory_format=torch.channels_last)
    images = batch.images.to(memory_format=torch.channels_last)
    one, two = losses_of(network, batch), losses_of(twin, batch._replace(images=images))
    assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_overfits_eight_images() -> None:
    network = tiny()
    batch = images_batch(ids=4, height=32)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    network.begin_epoch(1)
    totals = []
    for _ in range(20):
        losses = network.training_step(batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        network.after_step()
        totals.append(float(losses.total.detach()))
    assert float(losses.terms["accuracy"]) == 1.0
    assert float(losses.terms["identity"].detach()) < 0.05
    assert totals[-1] < 0.5 * totals[0]
    features = network.embed(batch.images, batch.modality).detach()
    distance = torch.cdist(features, features) + torch.eye(8) * 1e9
    assert torch.equal(batch.labels[distance.argmin(1)], batch.labels)
