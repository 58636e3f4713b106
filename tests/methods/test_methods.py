"""The public tables: create, recipe, what importing them loads, published numbers."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import subprocess
import sys

import pytest
import torch

from fastreid_vi import methods
from fastreid_vi.config import DataConfig, OptimConfig, ScheduleConfig, from_dict, to_dict

VARIANTS = {"mcja-arxiv": "sysu"}  # recipes that are not named after their data set


def test_importing_methods_and_recipes_loads_no_torch() -> None:
    code = (
        "import sys, fastreid_vi.methods as m\n"
        "for key in m.RECIPES:\n"
        "    m.recipe(*key.split('-')); m.recipe_type(key.split('-')[0])\n"
        "import fastreid_vi.methods.mpanet, fastreid_vi.methods.baseline\n"
        "assert not any(n.split('.')[0] in ('torch', 'triton') for n in sys.modules)\n"
        "assert m.Method.__name__ == 'Method' and m.mpanet.MPANet.__name__ == 'MPANet'\n"
        "assert 'torch' in sys.modules and 'torchvision' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_create(name: str) -> None:
    network = methods.create(name, 7, depth=18, weights="none")
    assert isinstance(network, methods.Method)
    assert network.training
    assert set(network.active_phases) <= set(network.phases)
    assert (network.phases == ("main",)) == (name != "aligngan")
    assert network.num_ids == 7
    images, modality = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    features = network.embed(images, modality)
    assert features.shape == (2, network.embed_dim)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_create_names_what_is_wrong() -> None:
    listed = ", ".join(methods.METHODS)
    with pytest.raises(ValueError, match=f"method: expected one of {listed}, got 'lba2'"):
        methods.create("lba2", 5)
    with pytest.raises(ValueError, match="mpanet: unknown field 'color' for MPANetOptions"):
        methods.create("mpanet", 5, color="red")
    with pytest.raises(ValueError, match=r"mpanet\.cc_mode"):
        methods.create("mpanet", 5, cc_mode="columns")
    with pytest.raises(ValueError, match=r"baseline\.depth"):
        methods.create("baseline", 5, depth="18")
    with pytest.raises(ValueError, match=r"weights: no file 'absent\.pth'"):
        methods.create("mpanet", 5, depth=18, weights="absent.pth")


@pytest.mark.parametrize("key", list(methods.RECIPES))
def test_recipes_travel_through_json(key: str) -> None:
    name, dataset = key.split("-")
    recipe = methods.recipe(name, dataset)
    assert (recipe.method, recipe.dataset) == (name, VARIANTS.get(key, dataset))
    values = json.loads(json.dumps(to_dict(recipe)))
    assert from_dict(methods.recipe_type(name), values) == recipe
    small = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, depth=18, weights="imagenet")
    )
    network = methods.from_recipe(small, 3, weights="none")
    assert network.options == dataclasses.replace(small.model, weights="none")


def test_unknown_recipes_list_what_exists() -> None:
    listed = ", ".join(methods.RECIPES)
    for pair in (("mpanet", "market"), ("agw", "sysu")):
        with pytest.raises(ValueError, match=f"one of {listed}, got '{'-'.join(pair)}'"):
            methods.recipe(*pair)
    listed = ", ".join(methods.METHODS)
    with pytest.raises(ValueError, match=f"method: expected one of {listed}, got 'agw'"):
        methods.recipe_type("agw")


def test_recipe_of_another_class_is_refused() -> None:
    foreign = dataclasses.replace(methods.recipe("baseline", "sysu"), method="mpanet")
    with pytest.raises(ValueError, match="recipe: expected MPANetRecipe, got BaselineRecipe"):
        methods.from_recipe(foreign, 5)


def test_mpanet_sysu_is_the_published_recipe() -> None:
    recipe = methods.recipe("mpanet", "sysu")
    assert recipe.data == DataConfig(
        height=384,
        width=128,
        identities=16,
        images=8,
        sampler="identity_random",
        label_order="file",
        resize="bilinear",
        flip=0.5,
        pad=10,
        pad_value=127,
        erase=0.5,
        erase_area=(0.02, 0.33),
        erase_aspect=(0.3, 3.3),
    )
    assert recipe.optim == OptimConfig(
        name="adam", lr=3.5e-4, weight_decay=5e-4, betas=(0.9, 0.999), backbone_lr_scale=1.0
    )
    assert recipe.schedule == ScheduleConfig(epochs=140, milestones=(80, 120), gamma=0.1)
    assert recipe.run.seed == 1
    assert recipe.model.normalize_test


def test_mpanet_regdb_is_the_published_recipe() -> None:
    sysu, regdb = (methods.recipe("mpanet", d) for d in ("sysu", "regdb"))
    changed = dataclasses.replace(
        sysu.data, height=256, identities=12, images=10, label_order="sorted"
    )
    assert regdb.data == changed
    assert regdb.schedule == dataclasses.replace(sysu.schedule, milestones=(110,))
    assert regdb.optim == sysu.optim
    assert regdb.model == dataclasses.replace(sysu.model, normalize_test=False)


def test_llcm_recipes_are_of_our_making() -> None:
    mpanet, baseline = (methods.recipe(name, "llcm") for name in ("mpanet", "baseline"))
    sysu = methods.recipe("mpanet", "sysu")
    data = dataclasses.replace(sysu.data, width=144)
    assert mpanet == dataclasses.replace(sysu, dataset="llcm", data=data)
    sysu = methods.recipe("baseline", "sysu")
    data = dataclasses.replace(sysu.data, height=384, width=144, identities=6)
    assert baseline == dataclasses.replace(sysu, dataset="llcm", data=data)
    for module, function in (methods.RECIPES[key] for key in methods.RECIPES if "llcm" in key):
        text = getattr(importlib.import_module(module), function).__doc__ or ""
        assert "official" in text or "published" in text, module


def test_baseline_sysu_is_the_published_recipe() -> None:
    recipe = methods.recipe("baseline", "sysu")
    data = recipe.data
    assert (data.height, data.width, data.identities, data.images) == (288, 144, 8, 8)
    assert (data.sampler, data.resize, data.erase) == ("paired_identity", "lanczos", 0.0)
    optim = recipe.optim
    assert (optim.name, optim.lr, optim.momentum, optim.nesterov) == ("sgd", 0.1, 0.9, True)
    assert (optim.weight_decay, optim.backbone_lr_scale) == (5e-4, 0.1)
    assert recipe.schedule == ScheduleConfig(
        epochs=81, milestones=(20, 50), gamma=0.1, warmup_epochs=10, warmup_start=0.1
    )


def test_every_option_says_what_paper_and_code_do() -> None:
    for name in methods.METHODS:
        kind = type(getattr(methods.recipe(name, "sysu"), "model"))  # noqa: B009
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            after = source.split(f"    {field.name}: ", 1)[1].split("\n", 1)[1].lstrip()
            assert after.startswith('"""'), f"{kind.__name__}.{field.name} has no docstring"
