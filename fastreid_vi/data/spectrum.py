"""MCJA's changes of the channels of a visible image, and its single-channel views for testing.

Images are planar: uint8 [3, H, W]. Infrared images are never changed. NumPy, and Pillow for hue.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastreid_vi.augment.draws import SPECTRA as KINDS
from fastreid_vi.augment.draws import Floats, SpectrumDraws
from fastreid_vi.augment.draws import box_sides as box_sides
from fastreid_vi.augment.draws import draw_spectra as draw_spectra
from fastreid_vi.data.images import Bytes, Int64

Doubles = NDArray[np.float64]
Rounding = Literal["trunc", "nearest"]
View = Literal["original", "r", "g", "b", "avg"]

VIEWS: tuple[View, ...] = ("original", "r", "g", "b", "avg")


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
