"""The random choices of the published augmentations, out of a counter-based generator. No torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastreid_vi.augment.boxes import ATTEMPTS, Int64, below, first_that_fits
from fastreid_vi.config import DataConfig

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

SPECTRA = ("none", "hue", "gray", "cutmix", "jitter")
"""Changes of a visible image's channels that may be drawn."""
KINDS = (*SPECTRA, "channel", "average")
"""All changes; a kind is a position in here. The last two show one channel, or the mean of all, in
all three planes: MCJA's test-time spectra."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Mean and deviation that are taken off pixels in [0, 1].
NORMALIZE = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

MIX_MEAN, MIX_SPREAD = (80.0, 150.0), (35.0, 60.0)  # grey levels of a mixed image
# Flip, crop row, crop column, erase; then area, aspect, row, column of every attempt.
_SHARED = 4 + 4 * ATTEMPTS

HUE = 0.2  # largest shift, a fraction of the circle
CUTMIX_AREA, CUTMIX_ASPECT = (0.02, 0.33), (0.3, 3.3)
# Choice, act, hue, three weights, pair of channels, channel, factor; then area, aspect, row, column
# of every attempt at a box.
_FIXED = 9
_SPECTRAL = _FIXED + 4 * ATTEMPTS


class Draws(NamedTuple):
    """The random choices for the B images of a batch."""

    flip: NDArray[np.bool_]  # [B]
    top: Int64  # [B] first row of the crop in the padded image
    left: Int64  # [B]
    boxes: Int64  # [B, 4] erased box: top, left, height, width; height 0 erases nothing
    mix: Floats  # [B, 5] weights of the three channels, mean, spread; spread 0 mixes nothing

    def rows(self, slots: Int64) -> Draws:
        """The draws of some slots."""
        return Draws._make(column[slots] for column in self)


class SpectrumDraws(NamedTuple):
    """The random choices for the B images of a batch; those of an infrared image are not used."""

    kind: Int64  # [B] position in KINDS of the change that acts; 0 for none
    hue: Doubles  # [B] shift, a fraction of the circle
    weights: Doubles  # [B, 3] of the channels of a weighted grayscale, sum 1
    boxes: Int64  # [B, 4] cutmix: top, left, height, width; may reach beyond the image
    planes: Int64  # [B, 2] cutmix: channel outside, channel inside the box
    channel: Int64  # [B] jitter: the channel that all others are drawn to
    factor: Floats  # [B] jitter: share of the image, 0 for the channel alone

    def rows(self, slots: Int64) -> SpectrumDraws:
        """The draws of some slots."""
        return SpectrumDraws._make(column[slots] for column in self)


def draw_spectra(
    count: int, config: DataConfig, *, seed: int, epoch: int, batch: int
) -> SpectrumDraws | None:
    """Draws for slots 0..count-1 of a batch: a pure function of (seed, epoch, batch, slot).

    Every slot chooses one of `config.visible_spectra` with equal probability, which acts with
    `spectrum_probability`. None without `visible_spectra`.

    Spec: mcja 3.5.
    """
    if not config.visible_spectra:
        return None
    key = np.array([seed, epoch], dtype=np.uint64)
    # The batch's other augmentation starts at 0 and at 1 << 40: see `draw_augmentation`.
    counter = np.array([1 << 41, 0, batch + 1, 0], dtype=np.uint64)
    random = np.random.Generator(np.random.Philox(key=key, counter=counter))
    uniform = random.random((count, _SPECTRAL))
    listed = np.array([KINDS.index(name) for name in config.visible_spectra], dtype=np.int64)
    kind = listed[below(uniform[:, 0], len(listed))]
    kind[uniform[:, 1] >= config.spectrum_probability] = 0
    raw = uniform[:, 3:6]
    pair = below(uniform[:, 6], 6)
    boxes, found = _draw_cutmix(uniform[:, _FIXED:].reshape(count, ATTEMPTS, 4), config)
    # Ten attempts that all failed leave the image as it is.
    kind[(kind == KINDS.index("cutmix")) & ~found] = 0
    return SpectrumDraws(
        kind=kind,
        hue=HUE * (2 * uniform[:, 2] - 1),
        weights=raw / ((raw[:, 0] + raw[:, 1]) + raw[:, 2])[:, None],
        boxes=boxes,
        planes=np.stack([pair // 2, (pair // 2 + 1 + pair % 2) % 3], axis=1),
        channel=below(uniform[:, 7], 3),
        factor=uniform[:, 8].astype(np.float32),
    )


def _draw_cutmix(uniform: Doubles, config: DataConfig) -> tuple[Int64, NDArray[np.bool_]]:
    height, width = box_sides(
        _between(uniform[:, :, 0], *CUTMIX_AREA),
        _between(uniform[:, :, 1], *np.log(CUTMIX_ASPECT)),
        config.height,
        config.width,
    )
    rows, columns = config.height, config.width
    if config.cutmix_axes == "official":  # Q1: takes (width, height) for (height, width)
        rows, columns = columns, rows
    return first_that_fits(height, width, uniform[:, :, 2:], rows, columns)


def _between(uniform: Doubles, low: float, high: float) -> Floats:
    return (low + uniform * (high - low)).astype(np.float32)


def box_sides(area: Floats, log_aspect: Floats, height: int, width: int) -> tuple[Int64, Int64]:
    """Height and width in pixels of boxes with a fraction of the area of an H x W image."""
    pixels = height * width * area.astype(np.float64)
    aspect = np.exp(log_aspect).astype(np.float64)
    sides = np.rint(np.sqrt(pixels * aspect)), np.rint(np.sqrt(pixels / aspect))
    return sides[0].astype(np.int64), sides[1].astype(np.int64)


def draw_augmentation(
    count: int, config: DataConfig, *, seed: int, epoch: int, batch: int
) -> Draws:
    """Draws for slots 0..count-1 of a batch: a pure function of (seed, epoch, batch, slot).

    Every slot owns a fixed run of a counter-based generator, so neither the number of workers nor
    the point of resumption changes anything. Erasing is the usual procedure: area uniform, aspect
    log-uniform, at most ten attempts at a box that is smaller than the image in both directions.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    # Samplers use counter 0 of the same key: batches start at 1.
    counter = np.array([0, 0, batch + 1, 0], dtype=np.uint64)
    random = np.random.Generator(np.random.Philox(key=key, counter=counter))
    uniform = random.random((count, _SHARED))
    span = 2 * config.pad + 1
    counter[0] = 1 << 40  # far from the draws above
    random = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return Draws(
        flip=uniform[:, 0] < config.flip,
        top=below(uniform[:, 1], span),
        left=below(uniform[:, 2], span),
        boxes=_draw_erased(
            uniform[:, 4:].reshape(count, ATTEMPTS, 4), uniform[:, 3] < config.erase, config
        ),
        mix=_draw_mix(random, count, config.channel_mix),
    )


def _draw_mix(random: np.random.Generator, count: int, probability: float) -> Floats:
    chosen = random.random(count) < probability
    weights = random.standard_normal((count, 3))
    mean, spread = random.uniform(*MIX_MEAN, count), random.uniform(*MIX_SPREAD, count)
    mix = np.column_stack([weights, mean, spread]).astype(np.float32)
    mix[~chosen] = 0
    return mix


def _draw_erased(
    uniform: NDArray[np.float64], erased: NDArray[np.bool_], config: DataConfig
) -> Int64:
    smallest, largest = config.erase_area
    area = config.height * config.width * (smallest + uniform[:, :, 0] * (largest - smallest))
    low, high = np.log(config.erase_aspect)
    aspect = np.exp(low + uniform[:, :, 1] * (high - low))
    height = np.rint(np.sqrt(area * aspect)).astype(np.int64)  # [B, attempts]
    width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    places = uniform[:, :, 2:]
    boxes, found = first_that_fits(height, width, places, config.height, config.width)
    boxes[~(erased & found)] = 0
    return boxes
