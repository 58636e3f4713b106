"""What is painted on the tubes: faces, glasses, open jackets, zips, straps, side stripes."""

from __future__ import annotations

import numpy as np

from fastreid_vi.data.drawing.fabric import Fabric, Reflectance, plain, reflect, second_dye
from fastreid_vi.data.drawing.figure import Floats, Surface
from fastreid_vi.data.drawing.head import CHIN
from fastreid_vi.data.drawing.pedestrian import (
    BAG,
    BOTTOM,
    HAIR,
    HEAD,
    INNER,
    SLEEVE,
    TOP,
    Person,
)
from fastreid_vi.data.drawing.skeleton import NECK

_DARK = plain((0.01, 0.01, 0.012), 0.06)
_LENS = plain((0.25, 0.27, 0.30), 0.35, gloss=0.5)
_LIPS = plain((0.33, 0.10, 0.09), 0.5)

_FOLDED = (TOP, SLEEVE, BOTTOM, INNER)
_ZIPPED = ("jacket", "coat", "puffer", "vest", "hoodie", "shirt")
_RIBBED = ("hoodie", "sweater", "puffer")


def reflectance(person: Person, surface: Surface, folds: Floats) -> Reflectance:
    """Both albedos of every pixel of a figure.

    Args:
        person: whose fabrics they are.
        surface: n pixels.
        folds: [k, 6] frequencies and phases of the garments' folds.
    """
    n = len(surface.pixel)
    whole = Reflectance(*(np.zeros((n, 3)[: 2 - (k > 0)], np.float32) for k in range(4)))
    for material in np.unique(surface.material):
        at = np.flatnonzero(surface.material == material)
        spots = Surface(*(values[at] for values in surface))
        part = reflect(person.fabrics[material], spots.along, spots.angle, spots.radius)
        if material == TOP:
            part = _straps(person, _front(person, part, spots), spots)
        elif material == HEAD:
            part = _face(person, part, spots)
        elif material == BOTTOM and person.stripe:
            part = _paint(part, second_dye(person.fabrics[BOTTOM]), spots, _seam(spots))
        if material in _FOLDED:
            part = _shaded(part, 0.10 * _folds(spots, folds[int(material) % len(folds)]))
        for target, values in zip(whole, part, strict=True):
            target[at] = values
    return whole


def _paint(base: Reflectance, fabric: Fabric, spots: Surface, share: Floats) -> Reflectance:
    """Lay a fabric over `base` where `share` [n] is 1."""
    over = reflect(fabric, spots.along, spots.angle, spots.radius)
    k = share.astype(np.float32)
    return Reflectance(
        base.visible + (over.visible - base.visible) * k[:, None],
        base.infrared + (over.infrared - base.infrared) * k,
        base.gloss + (over.gloss - base.gloss) * k,
        base.relief + (over.relief - base.relief) * k,
    )


def _shaded(base: Reflectance, by: Floats) -> Reflectance:
    """Brighter (positive) or darker by a share [n]."""
    return base._replace(relief=(base.relief * (1 + by)).astype(np.float32))


def _within(x: Floats, half: float, soft: float = 0.006) -> Floats:
    """1 where |x| < half, with a soft edge."""
    return np.clip((half - np.abs(x)) / soft + 0.5, 0, 1).astype(np.float32)


def _folds(spots: Surface, f: Floats) -> Floats:
    """Two crossing waves, -1 to 1: different for every garment and pass."""
    up, around = spots.along, spots.angle
    result: Floats = np.sin(up * f[0] + around * f[1] + f[2]) * np.sin(
        up * f[3] - around * f[4] + f[5]
    )
    return result


def _seam(spots: Surface) -> Floats:
    return _within(np.abs(spots.angle) - np.pi / 2, 0.28, 0.1)


def _front(person: Person, base: Reflectance, spots: Surface) -> Reflectance:
    """An open jacket shows the shirt; a closed one its zip."""
    length = (NECK - person.hem) * person.height
    if person.opening:
        width = person.opening * (0.55 + 0.45 * np.clip(1 - spots.along / length, 0, 1))
        off = np.abs(spots.angle) - width
        base = _paint(base, person.fabrics[INNER], spots, np.clip(0.5 - off / 0.08, 0, 1))
        base = _shaded(base, -0.45 * np.exp(-((off / 0.10) ** 2)))
    elif person.top in _ZIPPED:
        x = np.sin(spots.angle) * spots.girth
        base = _shaded(base, -0.5 * np.exp(-((x / 0.007) ** 2)) * (np.cos(spots.angle) > 0))
    if person.top in _RIBBED:
        base = _shaded(base, -0.25 * _within(spots.along - 0.055, 0.006))
    return base


def _straps(person: Person, base: Reflectance, spots: Surface) -> Reflectance:
    """Of a backpack, over both shoulders; of a crossbody bag, around the trunk."""
    x, length = np.sin(spots.angle) * spots.girth, (NECK - person.hem) * person.height
    shoulder = person.shoulder * person.height
    if person.bag == "backpack":
        high_in_front = (np.cos(spots.angle) > 0) & (spots.along > length - 0.36)
        share = _within(np.abs(x) - 0.55 * shoulder, 0.019) * high_in_front
    elif person.bag == "crossbody":
        slope = person.side * (length - 0.02) / (1.7 * shoulder)
        share = _within((spots.along - 0.5 * length + slope * x) / np.hypot(1, slope), 0.016)
    else:
        return base
    return _paint(base, second_dye(person.fabrics[BAG]), spots, share)


def _face(person: Person, base: Reflectance, spots: Surface) -> Reflectance:
    # Height above the middle of the skull, in sizes of the head; brows at 0.021, mouth at -0.034.
    y = spots.along / (person.height * person.head) + CHIN
    side = np.abs(spots.angle)
    brow = _within(y - 0.021, 0.003, 0.004) * _within(side - 0.42, 0.26, 0.1)
    eye = _within(y - 0.009, 0.0035, 0.004) * _within(side - 0.40, 0.14, 0.08)
    mouth = _within(y + 0.034, 0.0035, 0.004) * _within(spots.angle, 0.32, 0.15)
    base = _paint(base, person.fabrics[HAIR], spots, 0.8 * brow)
    base = _paint(base, _DARK, spots, 0.9 * eye)
    base = _paint(base, _LIPS, spots, 0.75 * mouth)
    if person.beard:
        chin = np.clip((-0.018 - y) / 0.006, 0, 1) * np.clip((1.5 - side) / 0.2, 0, 1)
        base = _paint(base, person.fabrics[HAIR], spots, 0.8 * chin * (1 - mouth))
    if person.glasses != "none":
        lens = _within(y - 0.008, 0.012, 0.004) * _within(side - 0.42, 0.30, 0.08)
        rim = _within(y - 0.008, 0.015, 0.004) * _within(side - 0.42, 0.37, 0.08)
        arms = _within(y - 0.013, 0.004, 0.004) * (side < 1.6)
        base = _paint(base, _DARK, spots, np.maximum(rim, arms))
        glass, cover = (_DARK, 0.95) if person.glasses == "dark" else (_LENS, 0.5)
        base = _paint(base, glass, spots, cover * lens)
    # Eye sockets lie in soft shadow.
    return _shaded(base, -0.15 * _within(y - 0.012, 0.012, 0.01) * (side < 0.9))
