"""A method's published training step: network, optimisers, a batch in its sampler's layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from fastreid_vi import methods
from fastreid_vi.config import Batch
from fastreid_vi.data import make_sampler
from fastreid_vi.methods.base import Method
from fastreid_vi.train import seed_everything
from fastreid_vi.train.step import Stepper, move

CLASSES = 395  # training identities of SYSU-MM01
PER_MODALITY = 20  # images of each, enough for every sampler


class Training(NamedTuple):
    """What a step needs; `shape` names its size."""

    recipe: Any
    method: Method
    stepper: Stepper
    batch: Batch
    shape: str


def smaller(recipe: Any) -> Any:
    """The same step in a second on a CPU: ResNet-18, small images, two or four identities."""
    pixel = min(recipe.data.pixel_identities, 2)
    data = replace(recipe.data, height=64, width=32, identities=4, images=4, pixel_identities=pixel)
    changes = {"pixel_images": 4 * pixel} if "pixel_images" in vars(recipe.model) else {}
    return replace(recipe, data=data, model=replace(recipe.model, depth=18, **changes))


def training(name: str, device: torch.device, *, small: bool) -> Training:
    """A method's step on SYSU-MM01's recipe, weights and pixels drawn from a seed."""
    recipe = methods.recipe(name, "sysu")
    recipe = replace(recipe, model=replace(recipe.model, weights="none"))
    recipe = smaller(recipe) if small else recipe
    seed_everything(1)
    method = methods.from_recipe(recipe, CLASSES).train()
    last = max(recipe.schedule.epochs, 1)
    method.begin_epoch(last)  # all phases of the schedule
    players = {method.player(phase) for phase in method.phases}
    stepper = Stepper(
        method,
        {player: recipe.optim_of(player) for player in players},
        device,
        channels_last=recipe.run.channels_last,
    )
    batch = move(drawn(recipe), device, recipe.run.channels_last)
    rows, _, height, width = batch.images.shape
    return Training(recipe, method, stepper, batch, f"{name}_{rows}x{height}x{width}")


def drawn(recipe: Any) -> Batch:
    """Normal pixels, with labels and modalities as the recipe's sampler orders them."""
    labels = np.repeat(np.arange(CLASSES), 2 * PER_MODALITY)
    modality = np.tile(np.repeat([0, 1], PER_MODALITY), CLASSES)
    data = recipe.data
    sampler = make_sampler(
        data.sampler,
        labels,
        modality,
        identities=data.identities,
        images=data.images,
        seed=1,
        pixel_identities=data.pixel_identities,
        batches=2,
    )
    rows = sampler.plan()[0]
    pixels = torch.randn(len(rows), 3, data.height, data.width)
    columns = (torch.from_numpy(column[rows]) for column in (labels, modality))
    return Batch(pixels, *columns, torch.ones(len(rows), dtype=torch.int64), sampler.paired)
