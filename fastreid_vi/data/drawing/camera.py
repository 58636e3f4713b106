"""The six stand-in cameras: where people walk in their view, their light, lens and sensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from fastreid_vi.data.drawing.fabric import Rng
from fastreid_vi.data.drawing.figure import Floats
from fastreid_vi.data.drawing.shade import Light

Pixels = NDArray[np.uint8]

INFRARED_CAMERAS = (3, 6)
INDOOR_CAMERAS = (1, 2, 3)
_GARMENTS = 8  # sets of folds


@dataclass(frozen=True, kw_only=True)
class Camera:
    """What a camera does to every picture it takes."""

    headings: tuple[
        tuple[float, float], ...
    ]  # (direction people walk in, weight); radians, 0 is towards the camera
    pitch: float  # radians, downwards
    distance: float  # metres
    sun: float = 0.0  # strength of the directional light, visible cameras
    warmth: float = 0.0  # below 0 bluish, above 0 yellowish
    azimuth: float = 0.0  # of the light, radians from the viewer to the right
    exposure: float
    contrast: float
    blur: float  # standard deviation, share of the height
    noise: float  # standard deviation at mid grey
    jitter: float  # of the crop


_PI = math.pi
CAMERAS = {
    1: Camera(
        headings=((0, 6), (0.1, 2), (-0.1, 2)),
        pitch=0.164,
        distance=6,
        sun=0.7,
        warmth=0.05,
        azimuth=0.4,
        exposure=1.05,
        contrast=1.0,
        blur=0.00105,
        noise=0.0036,
        jitter=0.5,
    ),
    2: Camera(
        headings=((0.06, 6), (0.15, 2), (-0.1, 2)),
        pitch=0.196,
        distance=5,
        sun=0.5,
        warmth=0.18,
        azimuth=-0.8,
        exposure=0.85,
        contrast=1.1,
        blur=0.00168,
        noise=0.006,
        jitter=0.6,
    ),
    3: Camera(
        headings=((0.03, 6), (-0.125, 2), (0.15, 2)),
        pitch=0.196,
        distance=5,
        exposure=1.0,
        contrast=1.1,
        blur=0.00168,
        noise=0.006,
        jitter=0.5,
    ),
    4: Camera(
        headings=((-0.08, 6), (0.1, 2), (-0.175, 2)),
        pitch=0.14,
        distance=10,
        sun=1.1,
        warmth=0.0,
        azimuth=0.9,
        exposure=1.0,
        contrast=1.15,
        blur=0.00126,
        noise=0.0036,
        jitter=0.6,
    ),
    5: Camera(
        headings=((-0.05, 6), (0.15, 2), (-0.15, 2)),
        pitch=0.18,
        distance=8,
        sun=0.9,
        warmth=-0.12,
        azimuth=-1.2,
        exposure=0.95,
        contrast=0.95,
        blur=0.00189,
        noise=0.0045,
        jitter=0.7,
    ),
    6: Camera(
        headings=((0.08, 6), (-0.1, 2), (0.175, 2)),
        pitch=0.156,
        distance=9,
        exposure=0.9,
        contrast=1.2,
        blur=0.0021,
        noise=0.0075,
        jitter=0.65,
    ),
}


@dataclass(frozen=True)
class Walk:
    """One pass of a person through a camera's view: frames of it look alike."""

    heading: float
    phase: float
    pace: float
    gain: float
    tint: tuple[float, float, float]  # of the white balance
    saturation: float
    sun: float
    place: float  # 0 to 1 along the backdrop
    folds: Floats  # [8, 6]


def draw_walk(rng: Rng, camera: Camera) -> Walk:
    """A random pass."""
    angles, weights = np.array(camera.headings).T
    red, blue = np.exp(rng.normal(0, 0.12, 2))
    folds = np.column_stack(
        [
            rng.uniform(8, 30, _GARMENTS),
            rng.integers(1, 4, _GARMENTS),
            rng.uniform(0, 6.3, _GARMENTS),
            rng.uniform(5, 20, _GARMENTS),
            rng.integers(0, 3, _GARMENTS),
            rng.uniform(0, 6.3, _GARMENTS),
        ]
    )
    return Walk(
        heading=float(rng.choice(angles, p=weights / weights.sum()) + rng.normal(0, 0.09)),
        phase=float(rng.uniform(0, 2 * _PI)),
        pace=float(rng.uniform(0.5, 1.1)),
        gain=float(np.exp(rng.normal(0, 0.1))),
        tint=(float(red), 1.0, float(blue)),
        saturation=float(rng.uniform(0.25, 1.0)),
        sun=float(rng.uniform(0.6, 1.25)),
        place=float(rng.random()),
        folds=folds.astype(np.float32),
    )


def draw_light(rng: Rng, camera: Camera, walk: Walk) -> Light:
    """The illumination of one frame."""
    azimuth, up = camera.azimuth + rng.normal(0, 0.2), 0.65
    flat = math.sqrt(1 - up * up)
    red, green, blue = 1 + camera.warmth, 1.0, 1 - camera.warmth
    sun, sky = camera.sun * walk.sun, 0.62
    # The stronger the sun, the bluer its shadows.
    return Light(
        sun=(sun * red, sun * green, sun * blue),
        direction=(math.sin(azimuth) * flat, up, math.cos(azimuth) * flat),
        sky=(
            sky * red * (1 - 0.06 * camera.sun),
            sky * green,
            sky * blue * (1 + 0.15 * camera.sun),
        ),
        ground=(0.30 * red, 0.30 * green, 0.30 * blue),
        lamp=float(rng.uniform(0.5, 0.8)),
        fill=float(rng.uniform(0.08, 0.22)),
    )


def develop(light: Floats, camera: Camera, walk: Walk, rng: Rng, *, infrared: bool) -> Pixels:
    """Lens, sensor and tone curve.

    Args:
        light: [H, W, 3] linear.
        camera: adds its blur, noise and contrast.
        walk: adds its exposure.
        rng: for noise.
        infrared: one channel, with the fall-off of a lamp.
    Returns:
        uint8 [H, W, 3].
    """
    height, width = light.shape[:2]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] + rng.normal(0, 0.2)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :] - rng.normal(0, 0.15)
    edge = ((0.30 if infrared else 0.12) * (x * x + y * y)).clip(0, 0.7)[..., None]
    gain = camera.exposure * walk.gain * math.exp(rng.normal(0, 0.06))
    if infrared:
        light = light[..., :1]
    else:
        grey = light @ np.array([0.3, 0.6, 0.1], np.float32)
        light = grey[..., None] + walk.saturation * (light - grey[..., None])
        light = light * np.array(walk.tint, np.float32)
    spread = camera.blur * height * rng.uniform(0.6, 1.5)
    motion = spread * rng.uniform(1.0, 1.6)
    light = gaussian_filter((light * (1 - edge) * gain).astype(np.float32), (spread, motion, 0))
    tone = np.clip(light, 0, None) ** np.float32(1 / 2.2)
    tone = 0.5 + (tone - 0.5) * np.float32(camera.contrast)
    tone += rng.standard_normal(light.shape, dtype=np.float32) * np.float32(camera.noise)
    # A soft shoulder keeps highlights from clipping hard.
    tone = np.where(tone > 0.8, 0.8 + 0.2 * np.tanh((tone - 0.8) / 0.2), tone)
    out = (np.clip(tone, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.repeat(out, 3, 2) if infrared else out
