"""Cloth, leather, skin and hair of the stand-in pedestrians, and what two sensors see of them.

A fabric has a pattern, a weave and three dyes. Each dye has a colour, seen by visible cameras, and
a reflectance, seen by infrared ones. The two are drawn independently, much as with real dyes: black
cotton is often white in infrared. What both sensors share is the pattern's shape and the weave.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fastreid_vi.data.drawing.figure import Floats
from fastreid_vi.data.drawing.patterns import PATTERNS, Cloth, relief

Rng = np.random.Generator
Colour = tuple[float, float, float]


class Material(NamedTuple):
    """What a fabric is made of decides its infrared brightness; its colour does not."""

    reflectance: tuple[float, float]  # lowest and highest in infrared
    gloss: float
    weave: str
    relief: float  # depth of the weave


MATERIALS = {
    "cotton": Material((0.50, 0.72), 0.00, "flat", 0.00),
    "denim": Material((0.40, 0.60), 0.02, "twill", 0.12),
    "wool": Material((0.35, 0.60), 0.00, "rib", 0.20),
    "fleece": Material((0.55, 0.78), 0.00, "fuzz", 0.10),
    "nylon": Material((0.25, 0.55), 0.25, "quilt", 0.55),
    "leather": Material((0.05, 0.16), 0.40, "flat", 0.00),
}
_FADES = 0.06  # share of dyes that cannot be told from the ground in infrared
_HUES = (0.60, 0.62, 0.0, 0.08, 0.11, 0.35)
_VALUES = (0.14, 0.20, 0.30, 0.62, 0.85)


class Reflectance(NamedTuple):
    """Per pixel, n of them."""

    visible: Floats  # [n, 3] linear albedo
    infrared: Floats  # [n] linear albedo
    gloss: Floats  # [n] strength of the highlight
    relief: Floats  # [n] brightness factor of weave and seams


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """One material of a person; see `patterns.Cloth` for the pattern's measures."""

    pattern: str
    weave: str
    relief: float
    gloss: float
    colours: tuple[Colour, Colour, Colour]  # linear RGB of the dyes
    reflectances: tuple[float, float, float]  # of the same dyes in infrared
    period: float = 0.1
    duty: float = 0.5
    motif: int = 0
    level: float = 0.3
    span: float = 0.1
    phase: float = 0.0


def draw_colour(rng: Rng) -> Colour:
    """Linear RGB of a dye: what a street shows, mostly greys and dark or muted tones."""
    kind = rng.random()
    hue = rng.choice(_HUES) + rng.normal(0, 0.02)
    value = rng.choice(_VALUES) * rng.uniform(0.92, 1.08)
    if kind < 0.5:
        saturation = rng.uniform(0.0, 0.1)
    elif kind < 0.92:
        saturation = rng.uniform(0.2, 0.45)
    else:
        saturation = rng.uniform(0.55, 0.8)
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, float(saturation), float(value))
    return red**2.2, green**2.2, blue**2.2


def _tone(colour: Colour) -> float:
    """Perceived brightness."""
    return float((0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2]) ** 0.45)


def _draw_colours(rng: Rng) -> tuple[Colour, Colour, Colour]:
    """Three colours of different brightness, so that a pattern of them can be seen."""
    ground = second = third = draw_colour(rng)
    while abs(_tone(second) - _tone(ground)) < 0.28:
        second = draw_colour(rng)
    while min(abs(_tone(third) - _tone(c)) for c in (ground, second)) < 0.15:
        third = draw_colour(rng)
    return ground, second, third


def _draw_reflectances(rng: Rng, span: tuple[float, float]) -> tuple[float, float, float]:
    """Of the ground, and of two dyes that are lighter or darker than it in infrared."""
    ground = float(rng.uniform(*span))
    values = [ground]
    for _ in range(2):
        fades = rng.random() < _FADES
        apart = rng.choice([-1.0, 1.0]) * rng.uniform(*((0.0, 0.05) if fades else (0.3, 0.6)))
        value = ground + apart if 0.04 <= ground + apart <= 0.95 else ground - apart
        values.append(float(np.clip(value, 0.03, 0.95)))
    return values[0], values[1], values[2]


def draw_fabric(
    rng: Rng, patterns: dict[str, float], materials: tuple[str, ...], *, length: float
) -> Fabric:
    """A random fabric for a piece `length` metres high.

    Args:
        rng: generator.
        patterns: weight of each pattern.
        materials: what the piece may be made of.
        length: metres, places splits, bands and prints.
    """
    weights = np.array(list(patterns.values()))
    pattern = list(patterns)[rng.choice(len(weights), p=weights / weights.sum())]
    material = MATERIALS[materials[rng.integers(len(materials))]]
    return Fabric(
        pattern=pattern,
        weave=material.weave,
        relief=material.relief * float(rng.uniform(0.6, 1.0)),
        gloss=material.gloss,
        colours=_draw_colours(rng),
        reflectances=_draw_reflectances(rng, material.reflectance),
        period=float(rng.uniform(0.10, 0.26)),
        duty=float(rng.uniform(0.3, 0.6)),
        motif=int(rng.integers(6)),
        level=float(length * rng.uniform(0.35, 0.8)),
        span=float(rng.uniform(0.08, 0.16)),
        phase=float(rng.random()),
    )


def plain(colour: Colour, reflectance: float, *, gloss: float = 0.0, weave: str = "flat") -> Fabric:
    """A fabric of one dye: skin, hair, lenses."""
    return Fabric(
        pattern="plain",
        weave=weave,
        relief=0.18,
        gloss=gloss,
        colours=(colour,) * 3,
        reflectances=(reflectance,) * 3,
    )


def second_dye(fabric: Fabric, *, pattern: str = "plain", turns: int = 1) -> Fabric:
    """The same cloth with its dyes rotated: contrasting sleeves, straps, stripes."""
    order = [(k + turns) % 3 for k in range(3)]
    c, r = fabric.colours, fabric.reflectances
    return replace(
        fabric,
        pattern=pattern,
        colours=(c[order[0]], c[order[1]], c[order[2]]),
        reflectances=(r[order[0]], r[order[1]], r[order[2]]),
    )


def reflect(fabric: Fabric, along: Floats, angle: Floats, radius: Floats) -> Reflectance:
    """What both sensors see of a fabric at points of a tube.

    Args:
        fabric: the material.
        along: [n] metres from the hem.
        angle: [n] radians around the tube, 0 in front.
        radius: [n] of the tube, metres.
    """
    cloth = Cloth(
        along,
        angle * radius,
        angle,
        radius,
        fabric.period,
        fabric.duty,
        fabric.motif,
        fabric.level,
        fabric.span,
        fabric.phase,
    )
    second, third = PATTERNS[fabric.pattern](cloth)
    over = np.zeros_like(along) if third is None else third
    shares = np.stack([(1 - second) * (1 - over), second * (1 - over), over], 1)
    shares = shares.astype(np.float32)
    return Reflectance(
        visible=shares @ np.array(fabric.colours, np.float32),
        infrared=shares @ np.array(fabric.reflectances, np.float32),
        gloss=np.full_like(along, fabric.gloss),
        relief=relief(fabric.weave, fabric.relief, cloth),
    )
