"""Plans out of random draws: those of the loaders, or out of a torch generator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreid_vi.augment.boxes import Int64
from fastreid_vi.augment.draws import (
    NORMALIZE,
    Draws,
    SpectrumDraws,
    draw_augmentation,
    draw_spectra,
)
from fastreid_vi.augment.plan import Plan, level_table, plain_plan
from fastreid_vi.config import VISIBLE, Batch, DataConfig, Recipe


def sample_plan(
    batch: int | Tensor | Batch, recipe: Recipe | DataConfig, generator: torch.Generator
) -> Plan:
    """Draw the augmentation that a recipe asks for.

    Args:
        batch: the images: how many, all of them visible; or the modality [B] int64 of each, 0
            visible, 1 infrared, which are not given visible spectra; or a `Batch`.
        recipe: a recipe or its `data` part: probabilities, sizes, rounding, normalisation.
        generator: gives one number, the seed of a counter-based generator; slot b is drawn from
            (that number, b) alone.
    Returns:
        A plan on the CPU, or on the device of `batch`, with `source` 0 to B - 1.
    Raises:
        TypeError: `batch` is none of the three, or the modalities are not int64.
        ValueError: `batch` is negative, or modalities are not a vector.

    >>> import torch
    >>> from fastreid_vi.methods import recipe
    >>> generator = torch.Generator().manual_seed(1)
    >>> sample_plan(4, recipe("mpanet", "sysu"), generator).source.tolist()
    [0, 1, 2, 3]

    Spec: mcja 3.5, mpanet 4, lba 4, aligngan 3.1.
    """
    modality = batch.modality if isinstance(batch, Batch) else batch
    if isinstance(modality, bool) or not isinstance(modality, (int, Tensor)):
        raise TypeError(
            f"batch: expected a count, modalities [B] or a Batch, got {type(batch).__name__}"
        )
    device = modality.device if isinstance(modality, Tensor) else torch.device("cpu")
    if isinstance(modality, int):
        if modality < 0:
            raise ValueError(f"batch: expected a count >= 0, got {modality}")
        modality = torch.full((modality,), VISIBLE)
    if modality.dtype != torch.int64:
        raise TypeError(f"batch: expected modalities in int64, got {modality.dtype}")
    if modality.dim() != 1:
        raise ValueError(f"batch: expected modalities [B], got shape {list(modality.shape)}")
    config = recipe.data if isinstance(recipe, Recipe) else recipe
    number = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    modalities = modality.cpu().numpy()
    slots = np.arange(len(modalities))
    plan = batch_plan(
        slots, modalities, config, rows=len(slots), seed=int(number), epoch=0, batch=0
    )
    return plan.to(device)


def batch_plan(
    source: Int64,
    modality: Int64,
    config: DataConfig,
    *,
    rows: int,
    seed: int,
    epoch: int,
    batch: int,
    slots: Int64 | None = None,
) -> Plan:
    """The plan of one batch of a training run: a pure function of (seed, epoch, batch, slot).

    What it gives is what the loaders of `fastreid_vi.data` give for the same numbers, to the bit.

    Args:
        source: [B] rows of the images that `augment` is given.
        modality: [B] of these images, 0 visible, 1 infrared.
        config: probabilities, sizes, rounding, normalisation.
        rows: of the whole batch, of which this may be a share.
        seed: of the run.
        epoch: from 1.
        batch: number in the epoch, from 0.
        slots: [B] rows of the whole batch; all of them by default.
    Raises:
        ValueError: lengths differ.
    """
    at = {"seed": seed, "epoch": epoch, "batch": batch}
    draws, spectra = draw_augmentation(rows, config, **at), draw_spectra(rows, config, **at)
    if slots is not None:
        draws = draws.rows(slots)
        spectra = None if spectra is None else spectra.rows(slots)
    return plan_of(draws, spectra, config, source=source, modality=modality)


def plan_of(
    draws: Draws,
    spectra: SpectrumDraws | None,
    config: DataConfig,
    *,
    source: Int64,
    modality: Int64 | None = None,
) -> Plan:
    """The plan that does what was drawn.

    Args:
        draws: of B slots.
        spectra: of the same slots; None leaves the channels alone.
        config: `pad`, `pad_value`, `gray_rounding`, `normalize`, `channel_mix`, the size.
        source: [B] rows of the images that `augment` is given.
        modality: [B] of these images; only those of visible ones are changed by `spectra`.
    Returns:
        A plan on the CPU.
    Raises:
        ValueError: lengths differ, or `spectra` without `modality`.
    """
    count = len(draws.flip)
    if len(source) != count:
        raise ValueError(f"source: expected {count} rows, as many as draws, got {len(source)}")
    if modality is not None and len(modality) != count:
        raise ValueError(f"modality: expected {count} entries, got {len(modality)}")
    plan = plain_plan(
        _tensor(source, np.int64),
        border=config.pad_value,
        levels=level_table(*NORMALIZE[config.normalize]),
        rounding=config.gray_rounding,
    )
    # Further out there is nothing but border.
    top = np.clip(draws.top - config.pad, -config.height, config.height)
    left = np.clip(draws.left - config.pad, -config.width, config.width)
    plan = plan._replace(
        flip=_tensor(draws.flip, np.bool_),
        top=_tensor(top, np.int64),
        left=_tensor(left, np.int64),
        erase=_tensor(draws.boxes, np.int64),
        channel_mix=_tensor(draws.mix, np.float32) if config.channel_mix > 0 else None,
    )
    if spectra is None:
        return plan
    if modality is None:
        raise ValueError("modality: expected one of every image, for spectra, got None")
    kind = np.where(modality == VISIBLE, spectra.kind, 0)
    return plan._replace(
        kind=_tensor(kind, np.int64),
        hue=_tensor(np.trunc(255 * spectra.hue).astype(np.int64) % 256, np.int64),
        weights=_tensor(spectra.weights, np.float64),
        boxes=_tensor(spectra.boxes, np.int64),
        planes=_tensor(spectra.planes, np.int64),
        channel=_tensor(spectra.channel, np.int64),
        factor=_tensor(spectra.factor, np.float32),
    )


def _tensor(values: Any, dtype: type) -> Tensor:
    # A copy: draws may be shared, or not be contiguous.
    return torch.from_numpy(np.array(values, dtype=dtype, order="C"))
