"""From an image file to network input: Pillow for reading and resizing, NumPy for the rest.

Images are planar: uint8 [3, H, W]. Random draws are explicit arrays, so that a batch can be
replayed and tested.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastreid_vi.config import VISIBLE, DataConfig
from fastreid_vi.data.boxes import ATTEMPTS, below, first_that_fits
from fastreid_vi.data.images import Bytes, DataError, Int64
from fastreid_vi.data.spectrum import SpectrumDraws, change

Floats = NDArray[np.float32]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Mean and deviation that are taken off pixels in [0, 1].
NORMALIZE = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

RESIZE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

MIX_MEAN, MIX_SPREAD = (80.0, 150.0), (35.0, 60.0)  # grey levels of a mixed image
# Flip, crop row, crop column, erase; then area, aspect, row, column of every attempt.
_UNIFORMS = 4 + 4 * ATTEMPTS

# Pillow reports damage under all of these names.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


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


def read_image(path: Path, height: int, width: int, resize: str = "bilinear") -> Bytes:
    """Decode and resize one file.

    Returns:
        uint8 [3, height, width]; a grey file gives three equal planes.
    Raises:
        DataError: the file cannot be read; the message names it.
    """
    try:
        with Image.open(path) as image:
            # Planes are resized independently: a grey file may be resized before it is repeated.
            small = image if image.mode == "L" else image.convert("RGB")
            if small.size != (width, height):
                small = small.resize((width, height), RESIZE[resize])
            pixels = np.asarray(small)
    except _UNREADABLE as error:
        raise DataError(f"{path}: unreadable image: {_reason(error)}") from error
    planes = np.empty((3, height, width), dtype=np.uint8)
    planes[:] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return planes


def verify_image(path: Path) -> str | None:
    """None for a file that can be read in full, else one line that names it and the reason."""
    try:
        with Image.open(path) as image:
            # Reads every byte of a JPEG but computes only an eighth of the pixels.
            image.draft("RGB", (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.load()
    except _UNREADABLE as error:
        return f"{path}: unreadable image: {_reason(error)}"
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition(" '")[0].partition(" <")[0] or type(error).__name__


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
    uniform = random.random((count, _UNIFORMS))
    span = 2 * config.pad + 1
    counter[0] = 1 << 40  # far from the draws above
    random = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return Draws(
        flip=uniform[:, 0] < config.flip,
        top=below(uniform[:, 1], span),
        left=below(uniform[:, 2], span),
        boxes=_draw_boxes(
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


def _draw_boxes(
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


def mix_channels(image: Bytes, mix: Floats) -> Bytes:
    """One grey image out of three channels, with a given mean and spread of its grey levels.

    The weights may be negative: an infrared sensor may see as dark what the eye sees as bright.

    Args:
        image: uint8 [3, H, W].
        mix: [5], three weights, mean and standard deviation of the result before clipping;
            deviation 0 returns the image as it is.
    Returns:
        uint8 [3, H, W], three equal planes.
    """
    if mix[4] == 0:
        return image
    grey = np.tensordot(mix[:3], image.astype(np.float32), axes=1)
    grey -= grey.mean()
    grey *= mix[4] / (grey.std() + np.float32(1e-3))
    levels = np.clip(np.rint(grey + mix[3]), 0, 255).astype(np.uint8)
    return np.broadcast_to(levels, image.shape)


def flip_pad_crop(
    image: Bytes, out: Bytes, *, flip: bool, top: int, left: int, pad: int, value: int
) -> None:
    """Flip, pad by `pad` on every side with `value`, crop back at (top, left), into `out`.

    Args:
        image: uint8 [3, H, W].
        out: uint8 [3, H, W], overwritten.
        flip: mirror left and right, before padding.
        top: first row of the crop in the padded image, 0 to 2 * pad.
        left: first column, likewise.
        pad: pixels added on every side.
        value: of the added pixels, 0 to 255.
    """
    source = image[:, :, ::-1] if flip else image
    rows, target_rows = _overlap(top - pad, image.shape[1])
    columns, target_columns = _overlap(left - pad, image.shape[2])
    if top != pad or left != pad:
        out.fill(value)
    out[:, target_rows, target_columns] = source[:, rows, columns]


def _overlap(shift: int, size: int) -> tuple[slice, slice]:
    """Of a window of `size` moved by `shift` over an axis of the same size: source, target."""
    kept = max(size - abs(shift), 0)
    return slice(max(shift, 0), max(shift, 0) + kept), slice(max(-shift, 0), max(-shift, 0) + kept)


def normalize(images: Bytes, kind: str = "imagenet") -> Floats:
    """uint8 [B, 3, H, W] to float32: divide by 255, subtract a mean, divide by a deviation.

    `kind` names them: ImageNet's, or 0.5 and 0.5, which give -1 to 1.
    """
    mean, std = NORMALIZE[kind]
    out = images.astype(np.float32)
    out /= np.float32(255)
    out -= np.array(mean, dtype=np.float32).reshape(3, 1, 1)
    out /= np.array(std, dtype=np.float32).reshape(3, 1, 1)
    return out


def erase(images: Floats, boxes: Int64) -> None:
    """Set the boxes [B, 4] (top, left, height, width) of normalised images [B, 3, H, W] to 0."""
    for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = 0


def augment(
    images: Bytes,
    draws: Draws,
    config: DataConfig,
    *,
    spectra: SpectrumDraws | None = None,
    modality: Int64 | None = None,
) -> Floats:
    """The whole training transform on decoded images, with given draws.

    Args:
        images: uint8 [B, 3, H, W], resized.
        draws: one of each for every image.
        config: `pad`, `pad_value`, `gray_rounding`, `normalize`.
        spectra: for every image; None leaves the channels alone.
        modality: [B] VISIBLE or INFRARED, for `spectra`.
    Returns:
        float32 [B, 3, H, W].
    Raises:
        ValueError: `spectra` without `modality`.

    Spec: mpanet 4, mcja 3.5, datasets 4. Golden: mcja/augment, `tail`.
    """
    out = normalize(
        place(images, draws, config, spectra=spectra, modality=modality), config.normalize
    )
    erase(out, draws.boxes)
    return out


def place(
    images: Bytes,
    draws: Draws,
    config: DataConfig,
    *,
    spectra: SpectrumDraws | None = None,
    modality: Int64 | None = None,
) -> Bytes:
    """The part of `augment` on uint8: spectra of visible images, mix, flip, pad, crop."""
    if spectra is not None and modality is None:
        raise ValueError("modality: expected one of every image, for spectra, got None")
    out = np.empty_like(images)
    for slot, image in enumerate(images):
        visible = modality is not None and modality[slot] == VISIBLE
        place_one(image, out[slot], slot, draws, config, spectra if visible else None)
    return out


def place_one(
    image: Bytes,
    out: Bytes,
    slot: int,
    draws: Draws,
    config: DataConfig,
    spectra: SpectrumDraws | None,
) -> None:
    """`place` for one image, into `out`; `spectra` is None for an infrared one."""
    if spectra is not None:
        image = change(image, spectra, slot, config.gray_rounding)
    flip_pad_crop(
        mix_channels(image, draws.mix[slot]),
        out,
        flip=bool(draws.flip[slot]),
        top=int(draws.top[slot]),
        left=int(draws.left[slot]),
        pad=config.pad,
        value=config.pad_value,
    )
