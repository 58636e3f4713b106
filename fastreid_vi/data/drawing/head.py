"""Head, hair and hats, as tubes. Measures are shares of the body height times the head's size."""

from __future__ import annotations

import math

from fastreid_vi.data.drawing.figure import Tube
from fastreid_vi.data.drawing.pedestrian import HAIR, HAT, HEAD, SCARF, SKIN, TOP, Person
from fastreid_vi.data.drawing.shapes import Vector, ball, between, dome, limb, shell, vector
from fastreid_vi.data.drawing.skeleton import Skeleton, lean

CHIN = -0.068  # lowest point of the face, from the centre of the skull

# Hairstyle: how far it stands off the skull, where it ends at the nape, how wide it is there.
_CUTS = {
    "buzz": (0.002, -0.035, 1.0),
    "short": (0.006, -0.040, 1.0),
    "bob": (0.009, -0.085, 1.12),
    "long": (0.008, -0.050, 1.0),
    "ponytail": (0.004, -0.035, 1.0),
    "bun": (0.004, -0.035, 1.0),
}


def _open_in_front(half: float) -> tuple[float, float]:
    """The arc that leaves `half` radians to either side of the face free."""
    return half, 2 * math.pi - half


def head_tubes(person: Person, s: Skeleton) -> list[Tube]:
    """Neck, face, nose, hair, hat."""
    size, c = person.height * person.head, s.head
    neck = vector(0, 0.80 * person.height, lean(person, 0.80, s.trunk))
    skull = shell(
        c + vector(0, 0, 0.004 * size),
        (CHIN, -0.064, -0.052, -0.03, 0.0, 0.03, 0.055, 0.068, 0.074),
        (0.006, 0.020, 0.030, 0.038, 0.0415, 0.041, 0.033, 0.019, 0.003),
        (0.012, 0.030, 0.042, 0.048, 0.051, 0.051, 0.042, 0.025, 0.004),
        HEAD,
        size=size,
    )
    nose = shell(
        c + vector(0, -0.012, 0.052) * size,
        (-0.014, -0.008, 0.012),
        (0.004, 0.009, 0.003),
        (0.004, 0.012, 0.003),
        SKIN,
        size=size,
    )
    throat = limb([neck, between(neck, c, 0.6), c], [0.036 * size, 0.031 * size, 0.03 * size], SKIN)
    hair = [] if person.hat == "hood" else _hair(person, c, size)
    return [throat, skull, nose, *hair, *_hat(person, c, size)]


def _hair(person: Person, c: Vector, size: float) -> list[Tube]:
    if person.hair == "bald":
        return []
    if person.hair == "afro":
        return [
            dome(c + vector(0, 0.012, -0.008) * size, -0.02, (0.072, 0.083, 0.076), HAIR, size),
            shell(
                c - vector(0, 0, 0.01 * size),
                (-0.05, -0.03, 0.0),
                (0.05, 0.066, 0.072),
                (0.05, 0.07, 0.076),
                HAIR,
                size=size,
                arc=_open_in_front(1.1),
            ),
        ]
    puff, nape, wide = _CUTS[person.hair]
    half = (0.0455 + puff, 0.077 + puff, 0.055 + puff)
    crown = dome(c - vector(0, 0, 0.001 * size), 0.034, half, HAIR, size)
    sides = shell(
        c - vector(0, 0, 0.003 * size),
        (nape, 0.6 * nape, 0.0, 0.036),
        (0.034 * wide + puff, 0.041 * wide + puff, 0.044 + puff, 0.042 + puff),
        (0.036 + puff, 0.047 + puff, 0.052 + puff, 0.050 + puff),
        HAIR,
        size=size,
        arc=_open_in_front(1.25),
    )
    return [crown, sides, *_tresses(person, c, size)]


def _tresses(person: Person, c: Vector, size: float) -> list[Tube]:
    if person.hair == "long":
        fall = shell(
            c - vector(0, 0, 0.02 * size),
            (-0.21, -0.19, -0.12, -0.05, 0.0),
            (0.03, 0.052, 0.056, 0.052, 0.048),
            (0.03, 0.042, 0.044, 0.042, 0.04),
            HAIR,
            size=size,
            arc=_open_in_front(1.15),
        )
        return [fall]
    if person.hair == "ponytail":
        root = c + vector(0, 0.02, -0.055) * size
        drops = ((-0.17, -0.03), (-0.10, -0.04), (-0.03, -0.03), (0.0, 0.0))
        path = [root + vector(0, y, z) * size for y, z in drops]
        return [limb(path, [v * size for v in (0.006, 0.02, 0.022, 0.012)], HAIR)]
    if person.hair == "bun":
        return [ball(c + vector(0, 0.055, -0.045) * size, 0.028 * size, HAIR)]
    return []


def _hat(person: Person, c: Vector, size: float) -> list[Tube]:
    if person.hat == "cap":
        visor = shell(
            c + vector(0, 0.026, 0.012) * size,
            (0.0, 0.0, 0.006, 0.008),
            (0.03, 0.05, 0.05, 0.03),
            (0.03, 0.095, 0.095, 0.03),
            HAT,
            size=size,
            arc=(-1.5, 1.5),
            smooth=False,
        )
        crown = c + vector(0, 0.016, -0.001) * size
        return [dome(crown, 0.008, (0.052, 0.072, 0.060), HAT, size), visor]
    if person.hat == "beanie":
        crown = c + vector(0, 0.014, -0.003) * size
        fold = shell(
            crown,
            (-0.002, 0.0, 0.024, 0.026),
            (0.05, 0.057, 0.056, 0.05),
            (0.058, 0.064, 0.063, 0.058),
            SCARF,
            size=size,
        )
        top = ball(c + vector(0, 0.105, -0.004) * size, 0.022 * size, SCARF)
        parts = [dome(crown, 0.0, (0.053, 0.084, 0.060), HAT, size), fold]
        return [*parts, top] if person.side > 0 else parts
    if person.hat == "brim":
        crown = c + vector(0, 0.03, -0.002) * size
        return [
            shell(
                crown,
                (0.0, 0.005, 0.045, 0.056, 0.058),
                (0.053, 0.053, 0.047, 0.038, 0.002),
                (0.06, 0.06, 0.054, 0.044, 0.002),
                HAT,
                size=size,
            ),
            shell(
                crown,
                (0.0, -0.004, 0.001, 0.006),
                (0.05, 0.098, 0.099, 0.05),
                (0.05, 0.105, 0.106, 0.05),
                HAT,
                size=size,
                smooth=False,
            ),
        ]
    if person.hat == "hood":
        centre = c - vector(0, 0, 0.008 * size)
        wrap = shell(
            centre,
            (-0.10, -0.06, 0.0, 0.036),
            (0.052, 0.054, 0.058, 0.0545),
            (0.058, 0.062, 0.068, 0.064),
            TOP,
            size=size,
            arc=_open_in_front(0.75),
        )
        return [dome(centre, 0.034, (0.058, 0.092, 0.068), TOP, size), wrap]
    return []
