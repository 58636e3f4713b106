"""AlignGAN: precision, no waiting for the device, steps, resuming, overfitting."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastreid_vi import methods
from fastreid_vi.config import VISIBLE, Batch, OptimConfig
from fastreid_vi.methods import base
from fastreid_vi.methods.aligngan import AlignGAN
from fastreid_vi.train.step import Stepper
from tests.methods.aligngan_cases import (
    JOINT,
    OWN,
    STAGES,
    backward,
    names_of,
    paired_batch,
    small,
    untrained,
    values,
)

JOINT_ONLY = {"feature_warmup_epochs": 0, "pixel_warmup_epochs": 0}

# Precision, speed, training.


def test_no_phase_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no data, so reading a value or a data-dependent shape raises."""
    monkeypatch.setattr(base, "_values_are_read", lambda tensor: False)  # as on CUDA
    with FakeTensorMode():
        network = small()
        images = torch.empty(16, 3, 64, 64)
        labels, modality, cams = torch.empty(3, 16, dtype=torch.int64)
        batch = Batch(images, labels, modality, cams, 2)
        for stage in STAGES:
            for phase in stage:
                backward(network, batch, phase)


class Counted(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_no_loop_over_samples() -> None:
    network, counts = small(num_ids=16), {}
    for ids in (2, 8):
        batch = paired_batch(ids=ids)
        for stage in STAGES:
            for phase in stage:
                with Counted() as counted:
                    backward(network, batch, phase)
                counts[ids, phase] = counted.count
    for phase in network.phases:
        assert counts[2, phase] == counts[8, phase]
        assert counts[2, phase] < (1600 if phase.startswith("gen") else 400), counts


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s[0])
def test_autocast_keeps_losses_in_float32(stage: tuple[str, ...]) -> None:
    network, batch = small(dropout=0.0), paired_batch()
    full = {phase: values(copy.deepcopy(network), batch, phase) for phase in stage[:1]}
    for phase in stage:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = network(batch, phase)
        for name, value in {**losses.terms, "total": losses.total}.items():
            assert value.dtype == torch.float32
            if phase in full and not name.startswith("accuracy"):
                assert float(value.detach()) == pytest.approx(full[phase][name], rel=0.05), name
        losses.total.backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert network.embed(batch.images, batch.modality).dtype == torch.float32


def test_channels_last_gives_the_same_losses() -> None:
    batch, network = paired_batch(), small(dropout=0.0)
    twin = copy.deepcopy(network).to(memory_format=torch.channels_last)
    images = batch.images.to(memory_format=torch.channels_last)
    other = batch._replace(images=images)
    for stage in STAGES:
        for phase in stage:
            one, two = values(network, batch, phase), values(twin, other, phase)
            assert one == pytest.approx(two, rel=1e-3, abs=1e-5), phase


def stepper(network: AlignGAN) -> Stepper:
    pixel = OptimConfig(lr=2e-3, betas=(0.5, 0.999), weight_decay=0.0)
    config = {network.player(phase): pixel for phase in network.phases}
    config["feature"] = OptimConfig(lr=5e-3, weight_decay=0.0)
    return Stepper(network, config, torch.device("cpu"), precision="fp32", channels_last=False)


def test_the_stepper_plays_all_stages() -> None:
    network, batch = small(feature_warmup_epochs=1, pixel_warmup_epochs=1), paired_batch()
    engine = stepper(network)
    for epoch, stage in enumerate(STAGES, 1):
        network.begin_epoch(epoch)
        before = {n: p.detach().clone() for n, p in network.named_parameters()}
        terms = engine(batch)
        assert {name.partition("/")[0] for name in terms} == set(stage)
        changed = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
        assert {n.partition(".")[0] for n in changed} == set().union(*(OWN[p] for p in stage))


def test_a_saved_state_goes_on_alike() -> None:
    one, batches = (
        small(**JOINT_ONLY),
        [paired_batch(seed=s) for s in (1, 2)],
    )
    first = stepper(one)
    one.begin_epoch(1)
    first(batches[0])
    two = small(**JOINT_ONLY)
    second = stepper(two)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    two.begin_epoch(1)
    results = []
    for engine in (first, second):
        torch.manual_seed(5)
        results.append(engine(batches[1]))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    states = one.state_dict(), two.state_dict()
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_overfits_eight_images() -> None:
    torch.manual_seed(0)
    network = small(dropout=0.0, conv_dim=8, **JOINT_ONLY)
    batch, engine = paired_batch(ids=4, k=1, size=(2, 4)), stepper(network)
    # Smooth images: what a generator with a bottleneck can repeat.
    batch = batch._replace(images=F.interpolate(batch.images, (32, 64), mode="bilinear"))
    network.begin_epoch(1)
    rows = [{k: float(v) for k, v in engine(batch).items()} for _ in range(33)]
    assert rows[-1]["feature/accuracy_real"] == rows[-1]["feature/accuracy_fake"] == 1.0
    assert rows[-1]["feature/identity_real"] < 0.8 * rows[0]["feature/identity_real"]
    assert rows[-1]["generators/cycle"] < 0.85 * rows[0]["generators/cycle"]
    assert rows[-1]["generators/mapping"] < 0.85 * rows[0]["generators/mapping"]


def test_one_iteration_at_the_official_size() -> None:
    torch.manual_seed(0)
    network = methods.create("aligngan", 395, weights="none", pixel_images=0)
    assert isinstance(network, AlignGAN)
    batch = paired_batch(ids=2, k=1, size=(128, 128))
    for phase in JOINT:
        losses = backward(network, batch, phase)
        assert bool(losses.total.isfinite())
        for name in names_of(network, phase) - untrained(network):
            gradient = network.get_parameter(name).grad
            assert gradient is not None, name
            assert bool(gradient.isfinite().all()), name
    shapes = {tuple(m.shape) for m in (network.infrared_discriminator(*pair(network, batch)),)}
    assert shapes == {(2, 1, 4, 4)}


def pair(network: AlignGAN, batch: Batch) -> tuple[Tensor, Tensor]:
    images = batch.images[batch.modality == VISIBLE]
    with torch.no_grad():
        features = network.encode(images)
    assert tuple(features.shape) == (2, 2048, 24, 12)
    return images, features
