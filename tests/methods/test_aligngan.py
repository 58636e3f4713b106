"""AlignGAN: the official checkpoint's names, the start, test features, previews."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastreid_vi import methods
from fastreid_vi.config import INFRARED, VISIBLE, DataConfig, OptimConfig, ScheduleConfig
from fastreid_vi.methods.aligngan import AlignGAN, AlignGANOptions, AlignGANRecipe
from fastreid_vi.methods.aligngan.official import from_official, official_name, to_official
from fastreid_vi.methods.base import OfficialKeyError
from tests.conftest import golden
from tests.methods.aligngan_cases import NormedConv, paired_batch, small

NUM_IDS = 395
PARAMETERS = {
    "visible_to_infrared": 6_053_504,
    "infrared_to_visible": 6_053_504,
    "visible_discriminator": 11_155_392,
    "infrared_discriminator": 11_810_816,
    "visible_warmup_discriminator": 11_155_392,
    "infrared_warmup_discriminator": 11_155_392,
    "backbone": 23_508_032,
    "embedder": 1_151_115,
}


def official() -> AlignGAN:
    with torch.device("meta"):
        network = methods.create("aligngan", NUM_IDS, weights="none")
    assert isinstance(network, AlignGAN)
    return network


# The official checkpoint and the start.


def test_state_dict_is_the_official_one() -> None:
    layout = golden("aligngan/state_dict_layout")
    expected = {}
    for i, (network, count) in enumerate(PARAMETERS.items()):
        assert int(layout[f"model-{i}__n_params"]) == count, network
        names, shapes = layout[f"model-{i}__names"], layout[f"model-{i}__shapes"]
        expected |= {f"{i}/{n}": str(s) for n, s in zip(names, shapes, strict=True)}
    network = official()
    state = network.state_dict()
    found = {official_name(n): "x".join(map(str, t.shape)) for n, t in state.items()}
    assert found == expected
    for name, count in PARAMETERS.items():
        assert sum(p.numel() for p in network.get_submodule(name).parameters()) == count
    assert network.embed_dim == 2048
    frozen = {n for n, p in network.named_parameters() if not p.requires_grad}
    # Biases in front of an instance norm: four in a plain discriminator, four in the joint one.
    assert len(frozen) == 16
    assert all("discriminator" in n and n.endswith(".bias") for n in frozen)


def test_official_files_and_back() -> None:
    network = methods.create("aligngan", 6, depth=18, weights="none", conv_dim=4, embedding=8)
    state = network.state_dict()
    theirs = to_official(state)
    assert len(theirs) == len(state)
    assert [key.partition("/")[0] for key in theirs] == sorted(k.partition("/")[0] for k in theirs)
    ours, unused = from_official(theirs)
    assert unused == []
    assert list(ours) == list(state)
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())
    assert theirs["0/module.model.0.weight"] is state["visible_to_infrared.model.0.weight"]
    assert theirs["6/module.resnet_conv.7.0.bn1.bias"] is state["backbone.layer4.0.bn1.bias"]


def test_official_keys_that_do_not_fit_are_named() -> None:
    theirs = to_official(official().state_dict())
    less = {k: v for k, v in theirs.items() if k != "3/module.conv_src.weight"}
    with pytest.raises(OfficialKeyError, match=r"missing '3/module\.conv_src\.weight'"):
        from_official(less)
    with pytest.raises(OfficialKeyError, match=r"unknown '8/module\.x'"):
        from_official({**theirs, "8/module.x": torch.zeros(1)})
    with pytest.raises(OfficialKeyError, match=r"missing '0/module\.model"):
        from_official({k: v for k, v in theirs.items() if not k.startswith("0/")})
    with pytest.raises(ValueError, match=r"0/module\.model\.3\.weight: expected shape \[128, 64"):
        from_official({**theirs, "0/module.model.3.weight": torch.zeros(1)})
    with pytest.raises(OfficialKeyError, match=r"unknown 'classifier\.weight'"):
        to_official({"classifier.weight": torch.zeros(1)})


def test_start_of_the_networks() -> None:
    torch.manual_seed(0)
    network = AlignGAN(9, AlignGANOptions(conv_dim=32), backbone=NormedConv(256))
    for name in ("visible_to_infrared.model.9.model.0", "infrared_discriminator.dis_convs.3"):
        weight = network.get_parameter(f"{name}.weight").detach()
        assert float(weight.std()) == pytest.approx(0.02, rel=0.02)
    bias = network.get_parameter("infrared_discriminator.dis_convs.3.bias").detach()
    bound = 1 / math.sqrt(256 * 16)  # PyTorch's
    assert 0.9 * bound < float(bias.abs().max()) <= bound
    assert torch.equal(network.get_parameter("visible_to_infrared.model.1.weight"), torch.ones(32))
    head = network.embedder.requires_grad_(False)
    first, norm, last = head.classifier0.bottle[0], head.classifier0.bottle[1], head.classifier0
    assert float(first.weight.std()) == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert float(norm.weight.mean()) == pytest.approx(1, abs=0.01)
    assert float(norm.weight.std()) == pytest.approx(0.02, rel=0.2)
    assert float(last.classifier[0].weight.std()) == pytest.approx(0.001, rel=0.1)
    for bias in (first.bias, norm.bias, last.classifier[0].bias):
        assert not bool(bias.any())


# Options and recipes.


def test_sysu_is_the_published_recipe() -> None:
    recipe = methods.recipe("aligngan", "sysu")
    assert isinstance(recipe, AlignGANRecipe)
    assert recipe.data == DataConfig(
        height=128,
        width=128,
        identities=18,
        images=8,
        sampler="uniform",
        pixel_identities=4,
        resize="bicubic",
        flip=0.5,
        pad=0,
        normalize="symmetric",
    )
    feature = recipe.optim_of("feature")
    assert (feature.name, feature.lr, feature.nesterov, feature.momentum) == ("sgd", 0.2, True, 0.9)
    assert feature.lr * feature.backbone_lr_scale == pytest.approx(0.02)
    assert feature.weight_decay == 5e-4
    adam = OptimConfig(name="adam", lr=2e-4, betas=(0.5, 0.999), weight_decay=0.0)
    network = small()
    players = {network.player(phase) for phase in network.phases}
    assert players == {"feature", "generators", "d_rgb", "d_ir", "d_rgb_warmup", "d_ir_warmup"}
    assert all(recipe.optim_of(player) == adam for player in players - {"feature"})
    schedule = ScheduleConfig(epochs=251, iterations=100, milestones=(200,), gamma=0.1)
    assert recipe.schedule == schedule
    for dataset in ("regdb", "llcm"):
        other = methods.recipe("aligngan", dataset)
        assert other == dataclasses.replace(recipe, dataset=dataset)


def test_the_pixel_batch_of_data_and_model_must_agree() -> None:
    recipe = methods.recipe("aligngan", "sysu")
    fewer = dataclasses.replace(recipe.data, pixel_identities=2)
    with pytest.raises(ValueError, match=r"model\.pixel_images: expected 16 .* got 32"):
        dataclasses.replace(recipe, data=fewer)
    other = dataclasses.replace(recipe.data, normalize="imagenet")
    with pytest.raises(ValueError, match=r"data\.normalize: expected 'symmetric'"):
        dataclasses.replace(recipe, data=other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gan_pairs": "all"}, r"aligngan\.gan_pairs: expected .*'official', 'own'.*, got 'all'"),
        ({"conv_dim": 0}, "conv_dim: expected >= 1, got 0"),
        ({"residual_blocks": -1}, "residual_blocks: expected >= 0, got -1"),
        ({"encoder_size": (0, 4)}, "encoder_size, soft_bh"),
        ({"soft_bh": (0, -1)}, "encoder_size, soft_bh"),
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"cycle_weight": -0.5}, "cycle_weight: expected >= 0, got -0.5"),
        ({"margin": math.nan}, "margin: expected a number"),
        ({"colour": 1}, "unknown field 'colour'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.create("aligngan", 3, weights="none", **options)


def test_stages_follow_the_epoch() -> None:
    network = small(feature_warmup_epochs=50, pixel_warmup_epochs=100)
    stages = {}
    for epoch in range(1, 252):
        network.begin_epoch(epoch)
        stages.setdefault(network.active_phases, []).append(epoch)
    assert [(e[0], e[-1], len(e)) for e in stages.values()] == [
        (1, 50, 50),
        (51, 150, 100),
        (151, 251, 101),
    ]
    assert [phase for stage in stages for phase in stage] == list(network.phases)
    network = small(feature_warmup_epochs=0, pixel_warmup_epochs=0)
    assert network.active_phases == ("feature", "generators", "d_rgb", "d_ir")


# Test features.


@pytest.mark.parametrize("in_eval", ["running", "instance"])
def test_features(in_eval: str) -> None:
    network, batch = small(in_eval=in_eval).double(), paired_batch()
    images, modality = batch.images.double(), batch.modality
    network.begin_epoch(2)
    for phase in ("generators", "feature"):  # statistics that are not the initial ones
        network(batch._replace(images=images), phase)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    found = network.embed(images, modality)
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    network.eval()

    def plain(x: Tensor) -> Tensor:
        mean = torch.tensor((0.485, 0.456, 0.406), dtype=x.dtype)[:, None, None]
        std = torch.tensor((0.229, 0.224, 0.225), dtype=x.dtype)[:, None, None]
        resized = F.interpolate(x, (48, 24), mode="bilinear", align_corners=False)
        return network.backbone(((resized + 1) / 2 - mean) / std).mean((2, 3))

    visible = modality == VISIBLE
    translated = images.clone()
    translated[visible] = network.visible_to_infrared(images[visible])
    feature = plain(translated) + plain(translated.flip(3))
    torch.testing.assert_close(found, feature / feature.norm(dim=1, keepdim=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network.embed(images[order], modality[order]), found[order])
    infrared = torch.full_like(modality, INFRARED)
    assert not torch.allclose(network.embed(images, infrared)[visible], found[visible])


def test_a_single_image_has_a_feature() -> None:
    """A10."""
    network = small()
    assert network.embed(torch.zeros(1, 3, 64, 64), torch.tensor([0])).shape == (1, 16)
    assert network.embed(torch.zeros(0, 3, 64, 64), torch.zeros(0).long()).shape == (0, 16)


def test_features_can_be_compiled_whole() -> None:
    network, batch = small(), paired_batch(ids=2, k=1)
    network.eval()
    compiled = torch.compile(network.test_features, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(batch.images, batch.modality)
        torch.testing.assert_close(found, network.test_features(batch.images, batch.modality))


def test_preview() -> None:
    network, batch = small(), paired_batch(ids=2, k=1)
    network(batch, "generators")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    found = network.preview(batch.images, batch.modality)
    assert found.shape == (4, 3, 3, 64, 64)
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert float(found.abs().max()) <= 1
    assert torch.equal(found[:, 0], batch.images)
    network.eval()
    ways = (network.visible_to_infrared, network.infrared_to_visible)
    with torch.no_grad():
        for row, (there, back) in ((0, ways), (3, ways[::-1])):
            other = there(batch.images[row : row + 1])
            torch.testing.assert_close(found[row, 1], other[0])
            torch.testing.assert_close(found[row, 2], back(other)[0])


def test_preview_as_the_official_one_moves_statistics() -> None:
    """A4."""
    network, batch = small(preview_updates_stats=True), paired_batch(ids=2, k=1)
    before = network.visible_to_infrared.model[1].running_mean.clone()
    network.preview(batch.images, batch.modality)
    assert not torch.equal(before, network.visible_to_infrared.model[1].running_mean)
    network.eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.preview(batch.images, batch.modality)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
