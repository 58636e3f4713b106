"""LbA: the official checkpoint's names, the start, options, test features, recipes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastreid_vi import methods
from fastreid_vi.backbone import WeightsError
from fastreid_vi.config import OptimConfig
from fastreid_vi.methods.base import OfficialKeyError
from fastreid_vi.methods.lba import LbA, LbAOptions
from fastreid_vi.methods.lba.official import from_official, to_official
from tests.methods.lba_cases import miniature, paired_batch, tiny
from tests.methods.test_backbone import torchvision_shapes

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
UNUSED = (
    ("visible_module.visible.", ("layer",)),
    ("thermal_module.thermal.", ("layer",)),
    ("base_resnet.base.", ("conv1.", "bn1.")),
)


def official_shapes(depth: int = 50, num_ids: int = 395) -> dict[str, tuple[int, ...]]:
    """The released checkpoint, from the table of the specification."""
    width = 2048 if depth == 50 else 512
    resnet = torchvision_shapes(depth)
    shapes = {prefix + name: shape for prefix, _ in UNUSED for name, shape in resnet.items()}
    shapes.update({f"bottleneck.{entry}": (width,) for entry in BN[:4]})
    shapes["bottleneck.num_batches_tracked"] = ()
    shapes["classifier.weight"] = (num_ids, width)
    return shapes


def unused(names: Any) -> set[str]:
    return {
        name
        for prefix, parts in UNUSED
        for name in names
        if name.startswith(tuple(prefix + part for part in parts))
    }


def official_state(depth: int = 18, num_ids: int = 7) -> dict[str, Tensor]:
    """An official checkpoint of random numbers."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(shape, generator=generator) if shape else torch.tensor(17)
        for name, shape in official_shapes(depth, num_ids).items()
    }


# The official checkpoint.


def test_state_dict_holds_what_the_official_one_uses() -> None:
    with torch.device("meta"):
        network = methods.create("lba", 395, weights="none")
    shapes = official_shapes()
    assert len(shapes) == 960
    official = to_official(network.state_dict())
    assert {name: tuple(value.shape) for name, value in official.items()} == shapes
    ours, dropped = from_official(official)
    assert list(ours) == list(network.state_dict())
    assert set(dropped) == unused(shapes)
    parameters = [k for k in official if not k.endswith(BN[2:])]
    assert sum(official[k].numel() for k in parameters) == 71_337_152
    assert sum(p.numel() for p in network.parameters()) == 24_330_624
    assert [n for n, p in network.named_parameters() if not p.requires_grad] == ["bottleneck.bias"]
    assert network.embed_dim == 2048


@pytest.mark.parametrize("depth", [18, 34])
def test_official_state_goes_in_and_comes_back(depth: int) -> None:
    official = official_state(depth)
    ours, dropped = from_official(official)
    network = LbA(7, LbAOptions(depth=depth, weights="none"))
    network.load_state_dict(ours)
    state = network.state_dict()
    stem = official["thermal_module.thermal.bn1.running_var"]
    assert torch.equal(state["backbone.infrared_stem.bn1.running_var"], stem)
    stem = official["visible_module.visible.conv1.weight"]
    assert torch.equal(state["backbone.visible_stem.conv1.weight"], stem)
    trunk = official["base_resnet.base.layer4.1.bn2.bias"]
    assert torch.equal(state["backbone.layer4.1.bn2.bias"], trunk)
    back = to_official(state, official)
    assert set(back) == set(official)
    assert all(torch.equal(back[name], official[name]) for name in official)
    lean = {name: tensor for name, tensor in official.items() if name not in dropped}
    assert from_official(lean)[1] == []


def test_unused_entries_come_from_imagenet_or_the_network() -> None:
    state = from_official(official_state())[0]
    imagenet = {
        name: torch.full(shape, 0.5)
        for name, shape in torchvision_shapes(18).items()
        if not name.endswith("num_batches_tracked")
    }
    imagenet["fc.weight"] = torch.zeros(1000, 512)
    official = to_official(state, imagenet)
    assert {float(official[n].float().mean()) for n in unused(official)} == {0.5, 0.0}
    assert all(float(official[n].float().mean()) != 0.5 for n in set(official) - unused(official))
    own = to_official(state)
    assert set(own) == set(official)
    name = "layer3.0.conv1.weight"
    assert torch.equal(own[f"visible_module.visible.{name}"], state[f"backbone.{name}"])
    assert torch.equal(
        own["base_resnet.base.conv1.weight"], state["backbone.visible_stem.conv1.weight"]
    )
    del imagenet["layer2.0.conv1.weight"]
    with pytest.raises(OfficialKeyError, match=r"base: missing 'visible_module\.visible\.layer2"):
        to_official(state, imagenet)
    imagenet["layer2.0.conv1.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"base: visible_module.*expected shape .* got \[3\]"):
        to_official(state, imagenet)


def test_other_checkpoints_are_refused() -> None:
    official = official_state()
    for name in ("classifier.weight", "base_resnet.base.layer2.0.conv1.weight"):
        with pytest.raises(OfficialKeyError, match=f"LbA checkpoint: missing '{name}'"):
            from_official({k: v for k, v in official.items() if k != name})
    with pytest.raises(OfficialKeyError, match=r"unknown 'module\.fc'"):
        from_official({**official, "module.fc": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"classifier\.weight: expected shape \[7, 512\]"):
        from_official({**official, "classifier.weight": torch.zeros(7, 3)})
    with pytest.raises(OfficialKeyError, match="missing"):
        from_official({})
    state = from_official(official)[0]
    for name in (
        "bottleneck.bias",
        "backbone.visible_stem.conv1.weight",
        "backbone.layer1.0.bn1.bias",
    ):
        with pytest.raises(OfficialKeyError, match="missing"):
            to_official({k: v for k, v in state.items() if k != name})
    with pytest.raises(OfficialKeyError, match=r"unknown 'bn_neck\.bias'"):
        to_official({**state, "bn_neck.bias": torch.zeros(512)})


# Start and options.


def test_start_of_head_and_stems() -> None:
    network = tiny(num_ids=400)
    assert float(network.classifier.weight.detach().std()) == pytest.approx(0.001, rel=0.02)
    weight = network.bottleneck.weight.detach()
    assert float(weight.mean()) == pytest.approx(1.0, abs=2e-3)
    assert float(weight.std()) == pytest.approx(0.01, rel=0.15)
    assert torch.equal(network.bottleneck.bias, torch.zeros(512))
    stems = (
        network.backbone.visible_stem.conv1.weight,
        network.backbone.infrared_stem.conv1.weight,
    )
    assert not torch.equal(*stems)


@pytest.mark.parametrize(
    ("depth", "stride", "size"), [(18, 1, (4, 2)), (34, 2, (2, 1)), (50, 1, (4, 2))]
)
def test_depth_and_stride(depth: int, stride: int, size: tuple[int, int]) -> None:
    network = methods.create("lba", 3, depth=depth, weights="none", last_stride=stride)
    with torch.no_grad():
        maps = network.backbone(torch.zeros(2, 3, 64, 32), torch.tensor([0, 1]))
    assert tuple(maps.shape) == (2, network.embed_dim, *size)
    assert network.embed_dim == (2048 if depth == 50 else 512)


def test_weights_start_both_stems(tmp_path: Any) -> None:
    torch.manual_seed(3)
    state = {n: torch.rand(s) if s else torch.tensor(0) for n, s in torchvision_shapes(18).items()}
    torch.save(state, tmp_path / "resnet18.pth")
    network = methods.create("lba", 3, depth=18, weights=str(tmp_path / "resnet18.pth"))
    for stem in ("visible_stem", "infrared_stem"):
        assert torch.equal(
            network.get_parameter(f"backbone.{stem}.conv1.weight"), state["conv1.weight"]
        )
    with pytest.raises(WeightsError, match="no file 'nowhere'"):
        methods.create("lba", 3, depth=18, weights="nowhere")


def test_options_are_checked() -> None:
    for options, message in (
        ({"weighting": "map"}, "weighting: expected one of 'sample', 'batch', got 'map'"),
        ({"align": "layer2"}, "align: expected one of 'both', 'layer3', 'layer4', 'none'"),
        ({"pairing": "any"}, "pairing: expected one of 'cross', 'same', got 'any'"),
        ({"pairing_rng": "numpy"}, "pairing_rng: expected one of 'own', 'python'"),
        ({"dt_reduction": "none"}, "dt_reduction: expected one of 'mean', 'sum'"),
        ({"test_feature": "neck"}, "test_feature: expected one of 'pooled', 'bn'"),
        ({"temperature": 0.0}, "temperature: expected > 0, got 0"),
        ({"dist_eps": -1e-6}, "dist_eps: expected >= 0, got -1e-06"),
        ({"dt_weight": float("nan")}, "dt_weight: expected >= 0, got nan"),
        ({"gem_clamp": -1.0}, "gem_clamp: expected >= 0 or None, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(LbAOptions(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_ids: expected >= 1, got 0"):
        LbA(0)
    with pytest.raises(ValueError, match=r"lba\.gem_clamp"):
        methods.create("lba", 3, gem_clamp="no")


# Test features.


@pytest.mark.parametrize("kind", ["pooled", "bn"])
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_embed_gives_unit_features_of_the_right_stem(kind: str, clamp: float | None) -> None:
    network = miniature(test_feature=kind, gem_clamp=clamp).double()
    network.bottleneck.running_mean.copy_(torch.rand(24))
    batch = paired_batch(dtype=torch.float64)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    features = network.embed(batch.images[order], batch.modality[order])
    assert network.training
    network.eval()
    halves = []
    for stem, half in zip(("visible", "infrared"), batch.images.split(8), strict=True):
        x = network.get_submodule(f"backbone.{stem}_stem")(half)
        for i in (1, 2, 3, 4):
            x = network.get_submodule(f"backbone.layer{i}")(x)
        halves.append(x if clamp is None else x.clamp(min=clamp))
    pooled = (torch.cat(halves).pow(3).mean((2, 3)) + 1e-12).pow(1 / 3)
    expected = F.normalize(pooled if kind == "pooled" else network.bottleneck(pooled))
    torch.testing.assert_close(features, expected[order])
    with pytest.raises(ValueError, match="modality: expected values from 0 to 1, got 2"):
        network.embed(batch.images, batch.modality * 2)


# Recipes.


def test_published_numbers() -> None:
    sysu, regdb, llcm = (methods.recipe("lba", name) for name in ("sysu", "regdb", "llcm"))
    data = sysu.data
    assert (data.height, data.width, data.identities, data.images) == (288, 144, 8, 8)
    assert (data.sampler, data.resize, data.pad) == ("paired_identity", "lanczos", 0)
    assert (data.flip, data.erase, data.normalize) == (0.5, 0.0, "imagenet")
    assert sysu.optim == OptimConfig(
        name="sgd", lr=0.1, weight_decay=5e-4, momentum=0.9, nesterov=True, backbone_lr_scale=0.1
    )
    assert sysu.schedule.epochs == 81
    assert sysu.model == LbAOptions(weighting="batch")
    assert (sysu.model.dt_weight, sysu.model.temperature, sysu.model.margin) == (0.5, 50.0, 0.3)
    assert replace(regdb, dataset="sysu", data=data) == sysu
    assert regdb.data == replace(data, label_order="file")
    assert (llcm.data.height, llcm.data.width, llcm.data.identities) == (384, 144, 6)
    assert replace(llcm, dataset="sysu", data=data) == sysu


def test_recipe_needs_an_identity_more_than_images() -> None:
    recipe = methods.recipe("lba", "sysu")
    small = replace(recipe.data, identities=4)
    with pytest.raises(ValueError, match=r"data\.identities: expected at least 5, for 4 images"):
        replace(recipe, data=small)
    assert replace(recipe, data=replace(small, images=6)).data.images == 6
    assert replace(recipe, data=small, model=LbAOptions(align="none")).data.identities == 4
