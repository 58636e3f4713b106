"""MCJA: the official checkpoint, the start, the adapters' places, test features, recipes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fastreid_vi import methods
from fastreid_vi.config import DataConfig, OptimConfig, ScheduleConfig
from fastreid_vi.methods.base import OfficialKeyError
from fastreid_vi.methods.mcja import MCJAOptions
from fastreid_vi.methods.mcja.official import from_official, to_official
from fastreid_vi.methods.mcja.spectra import spectral_view
from tests.conftest import golden
from tests.methods.mcja_cases import images_batch, small, tiny

LAYOUTS = {"sysu": (395, 2, 26_402_866), "regdb": (206, 12, 26_097_764)}
FC = ["backbone.fc.weight", "backbone.fc.bias"]


def official_state(dataset: str, device: str = "meta") -> dict[str, Tensor]:
    """The released checkpoint's entries, without values."""
    arrays = golden("mcja/state_dict_layout")
    columns = (arrays[f"{dataset}__{f}"].tolist() for f in ("names", "shapes", "dtypes"))
    return {
        name: torch.empty(
            [int(n) for n in shape.split("x") if n], dtype=getattr(torch, dtype), device=device
        )
        for name, shape, dtype in zip(*columns, strict=True)
    }


# The official checkpoint.


@pytest.mark.parametrize("dataset", list(LAYOUTS))
def test_official_layout(dataset: str) -> None:
    num_ids, maps, parameters = LAYOUTS[dataset]
    official = official_state(dataset)
    assert len(official) == 391
    ours, unused = from_official(official)
    assert unused == FC
    recipe = methods.recipe("mcja", dataset)
    with torch.device("meta"):
        network = methods.from_recipe(recipe, num_ids, weights="none")
    assert network.options.mda_m == maps
    state = network.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    fc = sum(official[name].numel() for name in FC)
    assert sum(p.numel() for p in network.parameters()) + fc == parameters
    frozen = {n: p.numel() for n, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {"bn_neck.bias": 2048}
    back = to_official(ours)
    assert list(back) == list(official)  # order included
    for name, tensor in back.items():
        assert (tensor.shape, tensor.dtype) == (official[name].shape, official[name].dtype)


@pytest.mark.parametrize("options", [{}, {"mda_m": 5}, {"mda_layers": (0, 0, 0, 0)}], ids=str)
def test_official_round_trip_keeps_the_embeddings(options: dict[str, object]) -> None:
    network, batch = tiny(**options), images_batch()
    official = to_official(network.state_dict())
    assert not any(name.startswith("backbone.MDA") for name in official)
    assert official["backbone.fc.weight"].shape == (1000, 512)
    assert not official["backbone.fc.weight"].any()
    ours, unused = from_official(official)
    assert unused == FC
    other = tiny(**options)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(ours)
    one, two = (n.embed(batch.images, batch.modality) for n in (network, other))
    assert torch.equal(one, two)


def test_official_takes_the_unused_classifier_from_the_base() -> None:
    state = tiny().state_dict()
    weight, bias = torch.rand(1000, 512), torch.rand(1000)
    for prefix in ("", "backbone."):  # torchvision's file, or an official one
        base = {f"{prefix}fc.weight": weight, f"{prefix}fc.bias": bias}
        official = to_official(state, base)
        assert official["backbone.fc.weight"] is weight
        assert official["backbone.fc.bias"] is bias


def test_official_names_what_does_not_fit() -> None:
    official = official_state("sysu")
    absent = {k: v for k, v in official.items() if k != "MDA_3.1.ca_conv.weight"}
    with pytest.raises(OfficialKeyError, match=r"missing 'MDA_3\.1\.ca_conv\.weight'$"):
        from_official(absent)
    with pytest.raises(OfficialKeyError, match=r"unknown 'module\.bn1\.weight'"):
        from_official({**official, "module.bn1.weight": torch.empty(64)})
    with pytest.raises(OfficialKeyError, match=r"missing 'backbone\.conv1\.weight'.* more"):
        from_official({"net": torch.empty(1)})
    with pytest.raises(ValueError, match=r"bn_neck\.weight: expected shape \[2048\], got \[7\]"):
        from_official({**official, "bn_neck.weight": torch.empty(7)})
    with pytest.raises(OfficialKeyError, match="unknown"):
        to_official({**tiny().state_dict(), "extra": torch.empty(1)})
    without_head = {k: v for k, v in tiny().state_dict().items() if "bn_neck" not in k}
    with pytest.raises(OfficialKeyError, match=r"missing 'bn_neck\.weight'"):
        to_official(without_head)


# The start and the adapters' places.


def test_start() -> None:
    torch.manual_seed(0)
    network = methods.create("mcja", 40, depth=18, weights="none")
    weight = network.get_parameter("classifier.weight").detach()
    bound = 1 / math.sqrt(512)
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert torch.equal(network.get_parameter("bn_neck.weight"), torch.ones(512))
    adapter = network.get_submodule("backbone.MDA_3.0")
    assert float(adapter.get_parameter("sc_conv.weight").detach().abs().max()) <= 1 / 16
    for entry in ("weight", "bias"):
        assert not bool(adapter.get_parameter(f"norm_bn.{entry}").any())
        ones = torch.full((256,), float(entry == "weight"))
        assert torch.equal(adapter.get_parameter(f"ca_bn.{entry}"), ones)


def test_a_fresh_network_is_the_plain_resnet() -> None:
    torch.manual_seed(0)
    network = methods.create("mcja", 4, depth=18, weights="none")
    images = images_batch().images
    plain = methods.create("mcja", 4, depth=18, weights="none", mda_layers=(0, 0, 0, 0)).backbone
    missing = plain.load_state_dict(network.backbone.state_dict(), strict=False)
    assert not missing.missing_keys
    with torch.no_grad():
        assert torch.equal(network.backbone(images), plain(images))


@pytest.mark.parametrize(
    ("depth", "wanted", "found"),
    [
        (50, (0, 2, 3, 0), (0, 2, 3, 0)),
        (18, (0, 2, 3, 0), (0, 2, 2, 0)),
        (34, (1, 0, 9, 2), (1, 0, 6, 2)),
        (18, (0, 0, 0, 0), (0, 0, 0, 0)),
    ],
)
def test_adapters_follow_the_last_blocks(
    depth: int, wanted: tuple[int, ...], found: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        network = methods.create("mcja", 4, depth=depth, weights="none", mda_layers=wanted)
    backbone = network.backbone
    assert tuple(len(backbone.get_submodule(f"MDA_{i}")) for i in range(1, 5)) == found  # type: ignore[arg-type]
    order: list[str] = []
    for name, module in backbone.named_modules():
        if name.count(".") == 1 and name.startswith(("layer", "MDA")):
            module.register_forward_hook(lambda *_, name=name: order.append(name))
    backbone(torch.empty(2, 3, 64, 32, device="meta"))
    expected = []
    for i, count in enumerate(found, start=1):
        blocks = len(backbone.get_submodule(f"layer{i}"))  # type: ignore[arg-type]
        for j in range(blocks):
            expected.append(f"layer{i}.{j}")
            if j >= blocks - count:
                expected.append(f"MDA_{i}.{j - blocks + count}")
    assert order == expected


def test_the_last_stride_is_kept() -> None:
    for stride, size in ((2, (12, 6)), (1, (24, 12))):
        with torch.device("meta"):
            network = methods.create("mcja", 4, weights="none", last_stride=stride)
        maps = network.backbone(torch.empty(2, 3, 384, 192, device="meta"))
        assert tuple(maps.shape) == (2, 2048, *size)
    assert methods.recipe("mcja", "sysu").model.last_stride == 2


# Test features.


@pytest.mark.parametrize("normalize", [True, False])
def test_embed_is_the_neck_with_running_statistics(normalize: bool) -> None:
    network = small(normalize_test=normalize).double()
    network.bn_neck.running_mean.copy_(torch.rand(32))  # type: ignore[union-attr]
    network.bn_neck.running_var.copy_(torch.rand(32) + 0.5)  # type: ignore[union-attr]
    before = {k: v.clone() for k, v in network.state_dict().items()}
    maps, modality = torch.rand(5, 32, 4, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 0, 1])
    found = network.embed(maps, modality)
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    pooled = ((maps**3).mean((2, 3)) + 1e-12) ** (1 / 3)
    neck = network.bn_neck
    expected = (pooled - neck.running_mean) / (neck.running_var + 1e-5).sqrt()
    if normalize:
        expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, network.embed(maps, 1 - modality))


def test_embed_spectra() -> None:
    network, batch = tiny(), images_batch()
    found = network.embed_spectra(batch.images, batch.modality)
    assert found.shape == (4, 8, 512)
    assert network.spectra == ("original", "r", "g", "b")
    for features, name in zip(found, network.spectra, strict=True):
        view = spectral_view(batch.images, name)
        assert torch.equal(features, network.embed(view, batch.modality))
    assert torch.equal(found[0], network.embed(batch.images, batch.modality))
    two = network.embed_spectra(batch.images, batch.modality, ("b", "original"))
    assert torch.equal(two, found[[3, 0]])
    assert network.embed_spectra(batch.images, batch.modality, ()).shape == (0, 8, 512)
    gray = torch.full((2, 3, 32, 32), 0.3)
    gray = (gray - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    alike = network.embed_spectra(gray, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(alike, alike[:1].expand(4, -1, -1))
    with pytest.raises(ValueError, match="spectrum: expected one of 'original', 'r', 'g', 'b'"):
        network.embed_spectra(batch.images, batch.modality, ("avg",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, H, W\], got \[8, 1, 64, 32\]"):
        spectral_view(batch.images[:, :1], "r")


# Options and recipes.


def test_options_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"mda_layers: expected four numbers >= 0"):
        MCJAOptions(mda_layers=(0, 2, -1, 0))
    with pytest.raises(ValueError, match="mda_m: expected >= 1, got 0"):
        MCJAOptions(mda_m=0)
    with pytest.raises(ValueError, match="cmr_weight: expected >= 0, got -1"):
        MCJAOptions(cmr_weight=-1)
    with pytest.raises(ValueError, match="cmr_strength: expected > 0, got nan"):
        MCJAOptions(cmr_strength=float("nan"))
    with pytest.raises(ValueError, match="cmr_path: expected one of 'auto', 'pav', got 'sort'"):
        MCJAOptions(cmr_path="sort")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mcja\.mda_layers: expected 4 values, got 2"):
        methods.create("mcja", 5, mda_layers=[1, 2])
    with pytest.raises(ValueError, match="num_ids: expected >= 1, got 0"):
        methods.create("mcja", 0, depth=18, weights="none")


def test_sysu_is_the_published_recipe() -> None:
    recipe = methods.recipe("mcja", "sysu")
    assert recipe.data == DataConfig(
        height=384,
        width=192,
        identities=8,
        images=16,
        sampler="norm_triplet",
        label_order="file",
        resize="bilinear",
        flip=0.5,
        pad=10,
        pad_value=127,
        erase=0.5,
        erase_area=(0.02, 0.30),
        erase_aspect=(0.3, 3.3),
        visible_spectra=("hue", "gray", "cutmix", "jitter"),
        spectrum_probability=0.5,
        cutmix_axes="official",
        gray_rounding="trunc",
    )
    assert recipe.optim == OptimConfig(name="adam", lr=3.5e-4, weight_decay=5e-4)
    assert recipe.schedule == ScheduleConfig(epochs=140, milestones=(80, 120), gamma=0.1)
    assert (recipe.run.seed, recipe.run.eval_every, recipe.run.keep) == (8, 1, 3)
    assert recipe.model == MCJAOptions(cmr_strength=0.5, mda_m=2)


def test_the_other_recipes_differ_where_they_should() -> None:
    sysu, regdb, llcm, arxiv = (
        methods.recipe("mcja", d) for d in ("sysu", "regdb", "llcm", "arxiv")
    )
    assert regdb == dataclasses.replace(
        sysu,
        dataset="regdb",
        data=dataclasses.replace(sysu.data, identities=4, images=32, label_order="sorted"),
        schedule=ScheduleConfig(epochs=300),
        model=MCJAOptions(mda_m=12),
    )
    assert llcm == dataclasses.replace(sysu, dataset="llcm")
    assert arxiv == dataclasses.replace(sysu, model=MCJAOptions(mda_layers=(0, 0, 0, 0)))
