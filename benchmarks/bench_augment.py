"""The fused training transform against batched PyTorch, eager and compiled, and the folder path."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.augment_peers import Grouped, batched, grouped
from benchmarks.conftest import DEVICE, GPU, Workload, peers
from fastreid_vi.augment import augment, batch_plan
from fastreid_vi.augment.draws import draw_augmentation, draw_spectra
from fastreid_vi.config import DataConfig
from fastreid_vi.data import transform
from fastreid_vi.methods import recipe

SHAPES = {"mcja_384x192": "mcja", "mpanet_384x128": "mpanet"}
AT = {"seed": 3, "epoch": 1, "batch": 2}


def ours(images: Tensor, work: Grouped) -> Tensor:
    return augment(images, work.plan, dtype=torch.bfloat16)


def folder(images: Tensor, work: Grouped, config: DataConfig, modality: Any) -> Tensor:
    """Image by image in NumPy and Pillow, as the loaders do that read a folder."""
    rows = len(modality)
    planar = images[work.plan.source].permute(0, 3, 1, 2).numpy()
    draws, spectra = draw_augmentation(rows, config, **AT), draw_spectra(rows, config, **AT)
    floats = transform.augment(planar, draws, config, spectra=spectra, modality=modality)
    return torch.from_numpy(floats).to(torch.bfloat16, memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peer", peers("augment", "eager", "folder", "compiled"))
def bench_augment(run: Any, peer: str, shape: str) -> None:
    if peer == "folder" and GPU:
        pytest.skip("NumPy and Pillow work on the CPU")
    config = recipe(SHAPES[shape], "sysu").data
    count = 128 if GPU else 32
    generator = torch.Generator().manual_seed(0)
    pack = torch.randint(256, (2 * count, config.height, config.width, 3), generator=generator)
    images = pack.to(torch.uint8).to(DEVICE)
    modality = np.arange(count) % 2
    source = np.random.default_rng(0).permutation(2 * count)[:count]
    plan = batch_plan(source, modality, config, rows=count, **AT)
    work = grouped(plan.to(DEVICE))
    ways = {
        "eager": batched,
        "tidy": batched,
        "folder": partial(folder, config=config, modality=modality),
    }
    pixels = count * config.height * config.width * 3
    # The batched hue is a level or two off Pillow's.
    job = Workload("augment", ours, ways, (images, work), 5e-3, pixels * 3)
    run(job, peer, "forward", f"{shape}_b{count}")
