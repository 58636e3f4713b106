"""How one of the stand-in cameras takes a picture of a person walking by."""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy.ndimage import gaussian_filter

from fastreid_vi.data.drawing.backdrop import obstacle, plate
from fastreid_vi.data.drawing.body import tubes
from fastreid_vi.data.drawing.camera import (
    Camera,
    Pixels,
    Walk,
    develop,
    draw_light,
)
from fastreid_vi.data.drawing.fabric import Rng
from fastreid_vi.data.drawing.figure import Floats, View, render
from fastreid_vi.data.drawing.pedestrian import Person, draw_person
from fastreid_vi.data.drawing.shade import Light, illuminate
from fastreid_vi.data.drawing.site import SYSU_SITES, Site
from fastreid_vi.data.drawing.skeleton import Moment

_PASSERS_BY = 16  # other people of a place
_COMPANY = 0.08  # share of pictures with one of them in the background
_OBSTACLE = 0.04  # share of pictures with something in front of the person
_CARELESS = 0.03  # share of badly cut boxes


def photograph(
    person: Person,
    number: int | Site,
    walk: Walk,
    frame: int,
    rng: Rng,
    *,
    seed: int,
    height: int,
    width: int,
) -> Pixels:
    """One picture of `person` by camera `number`.

    Args:
        person: who walks by.
        number: camera of SYSU-MM01, 1 to 6, or any other.
        walk: the pass this frame belongs to.
        frame: position in the pass.
        rng: everything that differs from frame to frame.
        seed: of the data set, fixes the backdrop.
        height: pixels.
        width: pixels.
    Returns:
        uint8 [height, width, 3]; equal channels for infrared cameras.
    """
    site = SYSU_SITES[number] if isinstance(number, int) else number
    camera, infrared = site.camera, site.infrared
    fine = 3 if height < 100 else 2  # supersampling
    h, w = height * fine, width * fine
    light = draw_light(rng, camera, walk)
    brightness = 0.5 + 0.4 * (light.lamp if infrared else walk.sun)
    canvas = _backdrop(seed, site, walk, frame, rng, h, w) * np.float32(brightness)
    if rng.random() < _COMPANY:
        canvas = _passer_by(canvas, seed, camera, walk, light, rng, infrared=infrared)
    moment = Moment(
        phase=walk.phase + walk.pace * frame + rng.normal(0, 0.1),
        sway=rng.normal(0, 0.02),
        vigour=rng.uniform(0.85, 1.1),
    )
    view = _box(person, camera, walk, rng, h, w)
    _draw(canvas, person, moment, view, light, walk, infrared=infrared, shadow=0.5)
    if rng.random() < _OBSTACLE:
        thing, cover = obstacle(rng, infrared, site.indoor, h, w)
        canvas += (0.8 * thing - canvas) * cover
    small = canvas.reshape(height, fine, width, fine, 3).mean((1, 3))
    return develop(small, camera, walk, rng, infrared=infrared)


@functools.lru_cache(maxsize=20)  # LLCM has 17 sites
def _plate(seed: int, site: Site, height: int, width: int) -> Floats:
    # Cameras in the same place share its layout, not their colours.
    rng = np.random.default_rng([seed, 7, site.layout])
    # The lens is on the person, the place behind is soft.
    return plate(rng, site.place, site.infrared, height, width, site.softness)


def _backdrop(
    seed: int, site: Site, walk: Walk, frame: int, rng: Rng, height: int, width: int
) -> Floats:
    whole = _plate(seed, site, int(1.12 * height), int(2.2 * height + 2 * width))
    slide = (0.8 * walk.place + 0.02 * frame + rng.normal(0, 0.02)) % 1.0
    x = int(slide * (whole.shape[1] - width))
    y = int(rng.uniform(0, whole.shape[0] - height))
    return whole[y : y + height, x : x + width]


@functools.lru_cache(maxsize=_PASSERS_BY)
def _stranger(seed: int, number: int) -> Person:
    return draw_person(np.random.default_rng([seed, 8, number]))


def _passer_by(
    canvas: Floats,
    seed: int,
    camera: Camera,
    walk: Walk,
    light: Light,
    rng: Rng,
    *,
    infrared: bool,
) -> Floats:
    """Someone else in the background, out of focus."""
    height, width = canvas.shape[:2]
    view = View(
        yaw=rng.uniform(0, 2 * math.pi),
        pitch=camera.pitch,
        distance=2 * camera.distance,
        scale=rng.uniform(0.3, 0.55) * height / 1.8,
        x=rng.uniform(0, width),
        y=rng.uniform(0.68, 0.8) * height,
    )
    other = _stranger(seed, int(rng.integers(_PASSERS_BY)))
    moment = Moment(rng.uniform(0, 2 * math.pi), 0.0, 1.0)
    _draw(canvas, other, moment, view, light, walk, infrared=infrared, shadow=0.3)
    result: Floats = gaussian_filter(canvas, (0.004 * height, 0.004 * height, 0))
    return result


def _draw(
    canvas: Floats,
    person: Person,
    moment: Moment,
    view: View,
    light: Light,
    walk: Walk,
    *,
    infrared: bool,
    shadow: float,
) -> None:
    """Put a person and the dark patch under the feet into [height, width, 3] `canvas`."""
    height, width = canvas.shape[:2]
    r = 0.36 * view.scale
    y = (np.arange(height, dtype=np.float32)[:, None] - view.y + 0.01 * view.scale) / (0.42 * r)
    x = (np.arange(width, dtype=np.float32)[None, :] - view.x) / r
    canvas *= (1 - np.float32(shadow) * np.exp(-(x * x + y * y)))[..., None]
    parts, lift = tubes(person, moment)
    view = view._replace(y=view.y - lift * view.scale * math.cos(view.pitch))
    surface = render(parts, view, height, width)
    if len(surface.pixel):
        canvas.reshape(-1, 3)[surface.pixel] = illuminate(
            person,
            surface,
            light,
            walk.folds,
            infrared=infrared,
            height=height,
            width=width,
            scale=view.scale,
        )


def _box(person: Person, camera: Camera, walk: Walk, rng: Rng, height: int, width: int) -> View:
    """What a detector cuts out: the person roughly centred, now and then badly cut."""
    loose = camera.jitter * (2.2 if rng.random() < _CARELESS else 1.0)
    fill = float(np.clip(rng.normal(0.885, 0.02 * loose), 0.70, 1.12))
    pitch = camera.pitch + rng.normal(0, 0.02)
    tall = person.height * (1.03 if person.hat == "none" else 1.06)
    return View(
        yaw=walk.heading + rng.normal(0, 0.08),
        pitch=pitch,
        distance=camera.distance,
        scale=fill * height / (tall * math.cos(pitch) + 0.25 * math.sin(pitch)),
        x=width * (0.5 + rng.normal(0, 0.025 * loose)),
        y=height * (0.48 + fill / 2 + rng.normal(0, 0.012 * loose)),
    )
