"""MPANet: the official checkpoint's names, the start, test features."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fastreid_vi import methods
from tests.methods.mpanet_cases import images_batch, small, small_batch, tiny
from tests.methods.test_backbone import torchvision_shapes

NUM_IDS = 395
D = 14336


def official_shapes() -> dict[str, tuple[int, ...]]:
    """The released checkpoint, from the table of the specification."""
    shapes = {f"backbone.{k}": v for k, v in torchvision_shapes(50).items()}
    for name, channels in (("MAM3", 1024), ("MAM4", 2048)):
        prefix, hidden = f"backbone.{name}.channel_attention", channels // 16
        shapes[f"{prefix}.0.weight"] = (hidden, channels, 1, 1)
        shapes[f"{prefix}.2.weight"] = (channels, hidden, 1, 1)
    shapes["spatial_attention.weight"] = (6, 2048, 1, 1)
    shapes["spatial_attention.bias"] = (6,)
    for entry in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"bn_neck.{entry}"] = (D,)
    shapes["bn_neck.num_batches_tracked"] = ()
    for name in ("", "visible_", "infrared_"):
        shapes[f"{name}classifier.weight"] = (NUM_IDS, D)
    for name in ("visible_", "infrared_"):
        shapes[f"{name}classifier_.weight"] = (NUM_IDS, D)
    return shapes


# The official checkpoint and the start.


def test_state_dict_is_the_official_one() -> None:
    with torch.device("meta"):
        network = methods.create("mpanet", NUM_IDS, weights="none")
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert len(state) == 334
    assert state == official_shapes()
    parameters = list(network.parameters())
    assert sum(p.numel() for p in parameters) == 52_517_958
    assert sum(p.numel() for p in parameters if p.requires_grad) == 41_178_182
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    means = {"visible_classifier_.weight", "infrared_classifier_.weight"}
    assert frozen == {*means, "bn_neck.bias"}
    assert network.embed_dim == D


def test_start_of_head() -> None:
    network = tiny()
    width = network.embed_dim
    assert width == 7 * 512
    for name in ("classifier", "visible_classifier", "infrared_classifier"):
        weight = network.get_parameter(f"{name}.weight").detach()
        bound = 1 / math.sqrt(width)
        assert float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert torch.equal(network.bn_neck.weight, torch.ones(width))
    assert torch.equal(network.spatial_attention.bias, torch.zeros(6))
    assert not torch.equal(network.classifier.weight, network.visible_classifier.weight)


def test_means_start_as_copies_of_their_students() -> None:
    network = tiny()
    for side in ("visible", "infrared"):
        student = network.get_parameter(f"{side}_classifier.weight")
        mean = network.get_parameter(f"{side}_classifier_.weight")
        assert torch.equal(student, mean)
        assert student.data_ptr() != mean.data_ptr()  # M7: loading must not overwrite students
    state = {k: v.clone() for k, v in network.state_dict().items()}
    state["visible_classifier_.weight"].zero_()
    network.load_state_dict(state)
    assert torch.equal(network.visible_classifier.weight, state["visible_classifier.weight"])
    assert float(network.visible_classifier.weight.detach().abs().sum()) > 0


@pytest.mark.parametrize(("attention", "names"), [(0, []), (1, ["MAM4"]), (2, ["MAM3", "MAM4"])])
def test_modality_attention_places(attention: int, names: list[str]) -> None:
    network = tiny(modality_attention=attention)
    found = {k.split(".")[1] for k in network.state_dict() if ".MAM" in k}
    assert sorted(found) == names


def test_alleviation_comes_after_layers_3_and_4() -> None:
    network = tiny().eval()
    images = torch.randn(2, 3, 64, 32)
    backbone = network.backbone
    x = backbone.stem(images, None)
    for i in (1, 2, 3, 4):
        x = backbone.get_submodule(f"layer{i}")(x)
        if i >= 3:
            weights = [p.detach() for p in backbone.get_submodule(f"MAM{i}").parameters()]
            mean = x.mean((2, 3), keepdim=True)
            gate = torch.sigmoid(F.conv2d(F.relu(F.conv2d(mean, weights[0])), weights[1]))
            x = gate * x + (1 - gate) * F.instance_norm(x)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), x, rtol=1e-4, atol=1e-4)
    assert bool((x < 0).any())


@pytest.mark.parametrize(
    ("depth", "width", "stride", "size"),
    [(18, 512, 1, (4, 2)), (34, 512, 2, (2, 1)), (50, 2048, 1, (4, 2))],
)
def test_depth_and_stride(depth: int, width: int, stride: int, size: tuple[int, int]) -> None:
    network = methods.create("mpanet", 3, depth=depth, weights="none", last_stride=stride)
    with torch.no_grad():
        maps = network.backbone(torch.zeros(2, 3, 64, 32))
    assert tuple(maps.shape) == (2, width, *size)
    assert network.embed_dim == 7 * width


# Test features.


@pytest.mark.parametrize("normalize", [True, False])
def test_embed_uses_running_statistics(normalize: bool) -> None:
    network = small(parts=3, normalize_test=normalize).double()
    batch = small_batch()
    network.train()
    network.bn_neck.train(False)  # a submodule that was frozen stays frozen
    network.bn_neck.running_mean.copy_(torch.rand(32))
    network.bn_neck.running_var.copy_(torch.rand(32) + 0.5)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    features = network.embed(batch.images, batch.modality)
    assert network.training
    assert not network.bn_neck.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    weight, bias = (network.spatial_attention.weight, network.spatial_attention.bias)
    maps = torch.sigmoid(F.conv2d(batch.images, weight, bias))
    parts = [(maps[:, p : p + 1] * batch.images).mean((2, 3)) for p in range(3)]
    stacked = torch.cat([*parts, batch.images.mean((2, 3))], dim=1)
    neck = network.bn_neck
    expected = (stacked - neck.running_mean) / (neck.running_var + 1e-5).sqrt()
    if normalize:
        expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(features, expected)


def test_embed_ignores_the_modality_but_checks_it() -> None:
    network = tiny()
    batch = images_batch()
    features = network.embed(batch.images, batch.modality)
    assert features.shape == (8, network.embed_dim)
    assert torch.equal(features, network.embed(batch.images, 1 - batch.modality))
    with pytest.raises(ValueError, match="modality: expected values from 0 to 1, got 3"):
        network.embed(batch.images, batch.modality * 3)
    with pytest.raises(TypeError, match=r"modality: expected int64 of shape \[8\], got int32"):
        network.embed(batch.images, batch.modality.int())
    with pytest.raises(ValueError, match=r"modality: expected int64 of shape \[8\], got int64"):
        network.embed(batch.images, batch.modality[:3])


def test_pattern_maps() -> None:
    network = tiny()
    images = images_batch().images
    maps = network.pattern_maps(images)
    assert maps.shape == (8, 6, 4, 2)
    assert network.training
    with torch.no_grad():
        expected = network.eval().align(network.backbone(images)).maps
    torch.testing.assert_close(maps, expected)
    assert 0 <= float(maps.detach().min()) <= float(maps.detach().max()) <= 1
