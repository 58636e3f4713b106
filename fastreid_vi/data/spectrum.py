"""MCJA's changes of the channels of a visible image, and its single-channel views for testing.

Images are planar: uint8 [3, H, W]. Infrared images are never changed. NumPy, and Pillow for hue.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastreid_vi.config import DataConfig
from fastreid_vi.data.boxes import ATTEMPTS, below, first_that_fits
from fastreid_vi.data.images import Bytes, Int64

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Rounding = Literal["trunc", "nearest"]
View = Literal["original", "r", "g", "b", "avg"]

KINDS = ("none", "hue", "gray", "cutmix", "jitter")
VIEWS: tuple[View, ...] = ("original", "r", "g", "b", "avg")

HUE = 0.2  # largest shift, a fraction of the circle
CUTMIX_AREA, CUTMIX_ASPECT = (0.02, 0.33), (0.3, 3.3)
# Choice, act, hue, three weights, pair of channels, channel, factor; then area, aspect, row, column
# of every attempt at a box.
_FIXED = 9
_UNIFORMS = _FIXED + 4 * ATTEMPTS


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
    uniform = random.random((count, _UNIFORMS))
    listed = np.array([KINDS.index(name) for name in config.visible_spectra], dtype=np.int64)
    kind = listed[below(uniform[:, 0], len(listed))]
    kind[uniform[:, 1] >= config.spectrum_probability] = 0
    raw = uniform[:, 3:6]
    pair = below(uniform[:, 6], 6)
    boxes, found = _draw_boxes(uniform[:, _FIXED:].reshape(count, ATTEMPTS, 4), config)
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


def _draw_boxes(uniform: Doubles, config: DataConfig) -> tuple[Int64, NDArray[np.bool_]]:
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


def change(image: Bytes, draws: SpectrumDraws, slot: int, rounding: Rounding = "trunc") -> Bytes:
    """A visible image with the change that its slot has drawn; uint8 [3, H, W] both."""
    kind = KINDS[draws.kind[slot]]
    if kind == "hue":
        return shift_hue(image, float(draws.hue[slot]))
    if kind == "gray":
        return weighted_gray(image, draws.weights[slot], rounding)
    if kind == "cutmix":
        outside, inside = draws.planes[slot].tolist()
        return cutmix_channels(image, draws.boxes[slot], outside, inside)
    if kind == "jitter":
        return jitter_spectrum(image, int(draws.channel[slot]), draws.factor[slot], rounding)
    return image


def shift_hue(image: Bytes, shift: float) -> Bytes:
    """Turn the hue by a fraction of the circle, through Pillow's HSV with 256 hues.

    Golden: mcja/augment `hue`.
    """
    planes = [Image.fromarray(plane) for plane in image]
    hue, saturation, value = Image.merge("RGB", planes).convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(255 * shift) % 256)  # modulo 256
    turned_image = Image.merge("HSV", [Image.fromarray(turned), saturation, value])
    return np.stack([np.asarray(plane) for plane in turned_image.convert("RGB").split()])


def weighted_gray(image: Bytes, weights: Doubles, rounding: Rounding = "trunc") -> Bytes:
    """Three equal planes (w1 R + w2 G) + w3 B, in float64 and this order.

    Golden: mcja/augment `wg`.
    """
    red, green, blue = image.astype(np.float64)
    return _spread(_levels((weights[0] * red + weights[1] * green) + weights[2] * blue, rounding))


def cutmix_channels(image: Bytes, box: Int64, outside: int, inside: int) -> Bytes:
    """Three equal planes: one channel, and another one in a box, clipped to the image.

    Golden: mcja/augment `cc`.
    """
    top, left, height, width = box.tolist()
    plane = image[outside].copy()
    part = slice(top, top + height), slice(left, left + width)
    plane[part] = image[inside][part]
    return _spread(plane)


def jitter_spectrum(
    image: Bytes, channel: int, factor: np.float32, rounding: Rounding = "trunc"
) -> Bytes:
    """Every channel c moved to g + factor (c - g), g one of them, in float32.

    Golden: mcja/augment `sj`.
    """
    centre = image[channel].astype(np.float32)
    return _levels(centre + np.float32(factor) * (image.astype(np.float32) - centre), rounding)


def view(image: Bytes, name: View, rounding: Rounding = "trunc") -> Bytes:
    """One of VIEWS of a visible image: itself, or one channel or their mean in all three planes.

    Args:
        image: uint8 [3, H, W].
        name: "original", "r", "g", "b" or "avg".
        rounding: of the mean.
    Returns:
        uint8 [3, H, W].
    Raises:
        ValueError: no such view.

    Spec: mcja 3.5. Golden: mcja/augment `sel`.
    """
    check_view(name)
    if name == "original":
        return image
    if name == "avg":
        return _spread(_levels(image.sum(axis=0, dtype=np.float64) / 3, rounding))
    return _spread(image["rgb".index(name)])


def views(image: Bytes, *, average: bool = False, rounding: Rounding = "trunc") -> Bytes:
    """The spectra that MCJA tests with, in the order of VIEWS: uint8 [4, 3, H, W].

    With `average` the fifth one too.
    """
    return np.stack([view(image, name, rounding) for name in VIEWS[: 4 + average]])


def check_view(name: str) -> None:
    """Raise ValueError unless `name` is one of VIEWS."""
    if name not in VIEWS:
        raise ValueError(f"spectrum: expected one of {', '.join(VIEWS)}, got {name!r}")


def _levels(values: Floats | Doubles, rounding: Rounding) -> Bytes:
    # Weights that sum to a little less than one make 254 of white when the fraction is cut off.
    rounded = np.rint(values) if rounding == "nearest" else values
    return rounded.astype(np.uint8)


def _spread(plane: Bytes) -> Bytes:
    return np.broadcast_to(plane, (3, *plane.shape))
