"""From geometry to light: what a visible and an infrared sensor receive from a figure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import uniform_filter

from fastreid_vi.data.drawing.details import reflectance
from fastreid_vi.data.drawing.figure import Floats, Surface
from fastreid_vi.data.drawing.pedestrian import Person

RGB = tuple[float, float, float]


class Light(NamedTuple):
    """Illumination of one image, linear units."""

    sun: RGB  # the directional light
    direction: RGB  # unit vector towards it, camera frame
    sky: RGB  # from above
    ground: RGB  # from below
    lamp: float  # infrared: strength of the lamp at the camera
    fill: float  # infrared: light from everywhere


def illuminate(
    person: Person,
    surface: Surface,
    light: Light,
    folds: Floats,
    *,
    infrared: bool,
    height: int,
    width: int,
    scale: float,
) -> Floats:
    """Linear radiance of every covered pixel.

    Args:
        person: whose fabrics they are.
        surface: n pixels of the figure.
        light: illumination.
        folds: [k, 6] frequencies and phases of the garments' folds.
        infrared: sensor.
        height: of the image, pixels.
        width: of the image, pixels.
        scale: pixels in a metre.
    Returns:
        [n, 3], equal channels in infrared.
    """
    what = reflectance(person, surface, folds)
    shadow = _occlusion(surface, height, width, scale) * what.relief
    n = surface.normal
    if infrared:
        # The lamp sits at the camera: brightest where the surface faces it.
        facing = np.clip(n[:, 2], 0, 1)
        lit = light.fill * (0.75 + 0.25 * n[:, 1]) + light.lamp * (0.35 + 0.65 * facing)
        value = what.infrared * lit * shadow + 0.35 * what.gloss * light.lamp * facing**24
        return np.repeat(value[:, None], 3, 1)
    sun, direction = np.array(light.sun, np.float32), np.array(light.direction, np.float32)
    halfway = direction + np.array([0, 0, 1], np.float32)
    halfway /= np.sqrt(halfway @ halfway)
    shine = np.clip(n @ halfway, 0, 1) ** 20
    up = (0.5 + 0.5 * n[:, 1])[:, None]
    ambient = np.array(light.sky, np.float32) * up + np.array(light.ground, np.float32) * (1 - up)
    direct = np.clip(n @ direction, 0, 1)[:, None] * sun
    matt = what.visible * (ambient + direct) * shadow[:, None]
    result: Floats = matt + 0.4 * (what.gloss * shine)[:, None] * sun
    return result


def _occlusion(surface: Surface, height: int, width: int, scale: float) -> Floats:
    """Darkening [n] where a neighbour stands in front: under arms, hems and bags."""
    depth, mask = np.zeros(height * width, np.float32), np.zeros(height * width, np.float32)
    depth[surface.pixel], mask[surface.pixel] = surface.depth, 1
    size = max(3, int(0.09 * scale) | 1)
    total, count = (
        uniform_filter(uniform_filter(x.reshape(height, width), size), size) for x in (depth, mask)
    )
    around = (total / np.maximum(count, 1e-4)).ravel()[surface.pixel]
    result: Floats = 1 - np.float32(0.55) * np.clip((around - surface.depth) / 0.07, 0, 1)
    return result
