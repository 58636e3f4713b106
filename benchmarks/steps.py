"""A method's published training step: network, optimisers, a batch in its sampler's layout.

A step begins with bytes in the host's memory, as a loader hands them over, and ends with the last
parameter moved. Beside it stand the step with the published formulations, the one on our reference
ops, and the bare backbone: the same images through the network, a mean, backward, the optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

import fastreid_vi
from benchmarks.published import published
from fastreid_vi import methods, ops
from fastreid_vi.config import Batch
from fastreid_vi.data import make_sampler
from fastreid_vi.methods.base import Method
from fastreid_vi.train import seed_everything
from fastreid_vi.train.optim import build_optimizer
from fastreid_vi.train.step import Stepper, autocast, move

CLASSES = 395  # training identities of SYSU-MM01
PER_MODALITY = 20  # images of each, enough for every sampler
FORMS = ("ours", "published", "reference", "backbone")


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


class Step(NamedTuple):
    """One form of a method's step, ready to run."""

    run: Callable[[], Any]
    images: int
    shape: str
    precision: str


@contextmanager
def step_of(name: str, form: str, device: torch.device, *, small: bool) -> Iterator[Step]:
    """A method's step in one of `FORMS`, from bytes on the host to moved parameters."""
    work = training(name, device, small=small)
    pixels = (work.batch.images.cpu().clamp(-2, 2) * 63 + 128).to(torch.uint8)
    labels = [column.cpu() for column in work.batch[1:4]]
    if device.type == "cuda":
        pixels, labels = pixels.pin_memory(), [column.pin_memory() for column in labels]

    def batch() -> Batch:
        """Bytes to the device, where they become the network's input."""
        images = pixels.to(device, non_blocking=True).float().sub_(128).div_(63)
        columns = (column.to(device, non_blocking=True) for column in labels)
        return Batch(images, *columns, work.batch.paired)

    def whole() -> Any:
        return work.stepper(batch())

    contexts = {"published": published, "reference": lambda: fastreid_vi.backend("reference")}
    run = bare_backbone(work, device, batch) if form == "backbone" else whole
    precision = str(work.stepper.dtype).removeprefix("torch.")
    with contexts.get(form, nullcontext)():
        yield Step(run, len(pixels), work.shape, precision)


def bare_backbone(
    work: Training, device: torch.device, batch: Callable[[], Batch]
) -> Callable[[], Any]:
    """The same images through the network alone, the mean of its map as loss, its optimiser."""
    network = work.method.backbone
    named = [(f"backbone.{n}", p) for n, p in network.named_parameters() if p.requires_grad]
    player = work.method.player(work.method.phases[-1])
    optimizer = build_optimizer(named, work.recipe.optim_of(player), fused=True)
    size = getattr(work.method.options, "encoder_size", None)

    def step() -> None:
        on_device = move(batch(), device, work.recipe.run.channels_last)
        images = on_device.images
        if size is not None:  # AlignGAN's encoder sees larger images than its generators
            images = ops.resize_normalize(images, size, mean=0.0, std=1.0)
        with autocast(device, work.stepper.dtype):
            features = network(images, on_device.modality)
        optimizer.zero_grad(set_to_none=True)
        features.float().mean().backward()
        optimizer.step()

    return step
