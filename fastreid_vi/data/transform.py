"""From an image file to network input: Pillow for reading and resizing, NumPy for the rest.

Images are planar: uint8 [3, H, W]. Random draws are explicit arrays, so that a batch can be
replayed and tested.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image

from fastreid_vi.augment.draws import NORMALIZE, Doubles, Draws, Floats, SpectrumDraws
from fastreid_vi.augment.draws import draw_augmentation as draw_augmentation
from fastreid_vi.config import VISIBLE, DataConfig
from fastreid_vi.data.images import Bytes, DataError, Int64
from fastreid_vi.data.spectrum import change

RESIZE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# Modes whose larger values Pillow would clip to 255: a thermal image turns white.
_WIDE = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")

# Pillow reports damage under all of these names.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


def read_image(path: Path, height: int, width: int, resize: str = "bilinear") -> Bytes:
    """Decode and resize one file.

    Returns:
        uint8 [3, height, width]; a grey file gives three equal planes.
    Raises:
        DataError: the file cannot be read; the message names it.
    """
    try:
        with Image.open(path) as image:
            _refuse_wide(image)
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
            _refuse_wide(image)
            # Reads every byte of a JPEG but computes only an eighth of the pixels.
            image.draft("RGB", (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.load()
    except _UNREADABLE as error:
        return f"{path}: unreadable image: {_reason(error)}"
    return None


def _refuse_wide(image: Image.Image) -> None:
    if image.mode not in _WIDE:
        return
    low, high = (float(value) for value in np.ravel(image.getextrema()))
    if low < 0 or high > 255:
        raise ValueError(
            f"values from {low:g} to {high:g} (mode {image.mode}), expected 0 to 255: scale them"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition(" '")[0].partition(" <")[0] or type(error).__name__


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
    gains, offset = _tone(image, mix)
    red, green, blue = image.astype(np.float64)
    grey = ((gains[0] * red + gains[1] * green) + gains[2] * blue) + offset
    levels = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    return np.broadcast_to(levels, image.shape)


def _tone(image: Bytes, mix: Floats) -> tuple[Doubles, np.float64]:
    """Gain of every channel and offset. Sums are whole numbers, so that their order is free."""
    pixels = image.reshape(3, -1).astype(np.int64)
    count, sums = np.float64(max(pixels.shape[1], 1)), pixels.sum(axis=1).astype(np.float64)
    products = (pixels @ pixels.T).astype(np.float64)
    w, mean, spread = mix[:3].astype(np.float64), np.float64(mix[3]), np.float64(mix[4])

    def term(i: int, j: int) -> float:
        return float((w[i] * w[j]) * (products[i, j] - sums[i] * sums[j] / count))

    own, cross = (term(0, 0) + term(1, 1)) + term(2, 2), (term(0, 1) + term(0, 2)) + term(1, 2)
    deviation = np.sqrt(np.maximum((own + 2.0 * cross) / count, 0))
    scale = spread / (deviation + 1e-3)
    centre = ((w[0] * sums[0] + w[1] * sums[1]) + w[2] * sums[2]) / count
    return w * scale, mean - centre * scale


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
