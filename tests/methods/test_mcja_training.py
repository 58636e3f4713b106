"""MCJA: steps, mixed precision, no waiting for the device, the official size, overfitting."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastreid_vi import methods
from fastreid_vi.config import Batch
from fastreid_vi.methods import base
from fastreid_vi.methods.mcja.losses import cross_modality_retrieval
from tests.methods.mcja_cases import images_batch, losses_of, tiny

PATHS = ["auto", "pav"]


class Counted(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_one_step_moves_every_trainable_parameter() -> None:
    network = tiny()
    before = {k: v.detach().clone() for k, v in network.named_parameters()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network(images_batch()).total.backward()  # as DistributedDataParallel calls it
    optimizer.step()
    for name, parameter in network.named_parameters():
        # The softmax of an adapter cancels the bias of its logits.
        still = name == "bn_neck.bias" or name.endswith("sc_conv.bias")
        assert torch.equal(parameter, before[name]) == still, name
        assert bool(parameter.isfinite().all())


def test_first_step_of_an_adapter_moves_its_last_norm_alone() -> None:
    torch.manual_seed(0)
    network = methods.create("mcja", 4, depth=18, weights="none")
    network(images_batch()).total.backward()
    for name, parameter in network.backbone.named_parameters():
        if "MDA" in name:
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == ("norm_bn" in name), name


@pytest.mark.parametrize("path", PATHS)
def test_training_step_never_waits_for_the_device(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have no data, so reading a value or a data-dependent shape raises."""
    monkeypatch.setattr(base, "_values_are_read", lambda tensor: False)  # as on CUDA
    with FakeTensorMode():
        network = tiny(cmr_path=path)
        images = torch.empty(8, 3, 64, 32)
        labels, modality, cams = torch.empty(3, 8, dtype=torch.int64)
        network.training_step(Batch(images, labels, modality, cams)).total.backward()
        assert network.embed_spectra(images, modality).shape == (4, 8, network.embed_dim)


@pytest.mark.parametrize("path", PATHS)
def test_work_per_step_does_not_grow_with_the_batch(path: str) -> None:
    calls = []
    for count in (8, 16):
        network, batch = tiny(cmr_path=path), images_batch(count)
        with Counted() as counter:
            network.training_step(batch).total.backward()
        calls.append(counter.calls)
    assert calls[0] == calls[1] < 700


@pytest.mark.parametrize("path", PATHS)
def test_a_batch_without_queries_gives_zero_with_a_graph(path: str) -> None:
    """Q6: one modality, no common identity, one identity alone."""
    x = torch.randn(6, 4, requires_grad=True)
    one = torch.zeros(6, dtype=torch.int64)
    for labels, modality in (
        (torch.arange(6) // 2, one),
        (torch.arange(6), torch.arange(6) % 2),
        (one, torch.arange(6) % 2),
    ):
        x.grad = None
        loss = cross_modality_retrieval(x, labels, modality, path=path)  # type: ignore[arg-type]
        assert loss.item() == 0
        loss.backward()
        assert x.grad is not None
        assert not bool(x.grad.any())
    network, batch = tiny(cmr_path=path), images_batch()
    losses = network(batch._replace(modality=torch.ones_like(batch.modality)))
    losses.total.backward()
    assert losses.terms["retrieval"].item() == 0
    assert losses.total.item() == losses.terms["identity"].item()


@pytest.mark.parametrize("strength", [0.5, 0.05, 0.005])
def test_both_paths_agree(strength: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (40,), generator=generator)
    modality = torch.randint(2, (40,), generator=generator)
    found = []
    for path in PATHS:
        leaf = x.clone().requires_grad_()
        loss = cross_modality_retrieval(leaf, labels, modality, strength=strength, path=path)  # type: ignore[arg-type]
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_retrieval_weight_and_ignored_labels() -> None:
    batch = images_batch()
    terms = losses_of(tiny(cmr_weight=0.25), batch)
    assert terms["total"] == pytest.approx(terms["identity"] + 0.25 * terms["retrieval"])
    labels = batch.labels.clone()
    labels[:4] = -1
    network = tiny()
    logits = copy.deepcopy(network).classifier(network._embeddings(batch.images, batch.modality))
    expected = torch.nn.functional.cross_entropy(logits[4:], labels[4:])
    found = network(batch._replace(labels=labels)).terms["identity"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_pooling_and_losses_in_float32(dtype: torch.dtype) -> None:
    network = tiny()
    full = losses_of(copy.deepcopy(network), images_batch())
    seen = []
    network.pool.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype):
        losses = network(images_batch())
        features = network.embed(images_batch().images, images_batch().modality)
    assert features.dtype == torch.float32
    assert seen == [(torch.float32, torch.float32)] * 2
    for name, value in {**losses.terms, "total": losses.total}.items():
        assert value.dtype == torch.float32
        if name != "accuracy":
            assert float(value.detach()) == pytest.approx(full[name], rel=0.05)
    losses.total.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())


def test_channels_last_gives_the_same_losses() -> None:
    batch, network = images_batch(), tiny()
    twin = copy.deepcopy(network).to(memory_format=torch.channels_last)
    images = batch.images.to(memory_format=torch.channels_last)
    one, two = losses_of(network, batch), losses_of(twin, batch._replace(images=images))
    assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_the_backbone_compiles_in_one_piece() -> None:
    batch, network = images_batch(), tiny()
    twin = copy.deepcopy(network)
    twin.backbone.compile(backend="eager", fullgraph=True)
    assert losses_of(twin, batch) == pytest.approx(losses_of(network, batch), rel=1e-5)
    assert set(twin.state_dict()) == set(network.state_dict())


def test_one_step_at_the_official_size() -> None:
    torch.manual_seed(0)
    network = methods.create("mcja", 395, weights="none")
    batch = images_batch(4, 2, 384, 192)
    losses = network(batch)
    losses.total.backward()
    assert bool(losses.total.isfinite())
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name


def test_overfits_eight_images() -> None:
    network, batch = tiny(), images_batch(height=32)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    values = []
    for _ in range(20):
        losses = network(batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        values.append({name: value.item() for name, value in losses.terms.items()})
    assert values[-1]["accuracy"] == 1.0
    assert values[-1]["identity"] < 0.1
    # All but a little of this loss is a constant, (n - 1) / 2 for galleries of n.
    assert values[-1]["retrieval"] < values[0]["retrieval"] - 0.3
    features = network.embed(batch.images, batch.modality).detach()
    distance = torch.cdist(features, features) + torch.eye(8) * 1e9
    assert torch.equal(batch.labels[distance.argmin(1)], batch.labels)
