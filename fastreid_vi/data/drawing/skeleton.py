"""Where the joints of a walking person are, and how thick the trunk is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastreid_vi.data.drawing.pedestrian import Person
from fastreid_vi.data.drawing.shapes import Vector, vector

# Joint heights and lengths, share of the body height.
KNEE, SHIN, UPPER_ARM, FOREARM = 0.275, 0.235, 0.172, 0.150
NECK, SKULL = 0.842, 0.925


@dataclass(frozen=True)
class Moment:
    """What changes from image to image."""

    phase: float  # of the gait, radians
    sway: float  # of the head, radians
    vigour: float  # factor on stride and swing


@dataclass(frozen=True)
class Skeleton:
    """Joint positions, metres; lists hold right (-1) then left (+1)."""

    hips: list[Vector]
    knees: list[Vector]
    ankles: list[Vector]
    feet: list[Vector]  # unit direction of the foot
    shoulders: list[Vector]
    elbows: list[Vector]
    wrists: list[Vector]
    head: Vector  # centre of the skull
    trunk: float  # lean, radians
    lift: float  # raises everything so that the lower foot stands on the ground


def _hanging(forward: float, outward: float, side: int) -> Vector:
    """Unit vector that hangs down, turned forward and outward."""
    return vector(
        side * math.sin(outward),
        -math.cos(forward) * math.cos(outward),
        math.sin(forward) * math.cos(outward),
    )


def lean(person: Person, y: float, trunk: float) -> float:
    """Forward shift (metres) of the trunk at height y (share of the body height)."""
    above = max(0.0, y - person.legs)
    hunch = 0.7 * person.stoop * max(0.0, y - 0.66) ** 2
    return person.height * (math.tan(trunk) * above + hunch)


def trunk_profile(person: Person) -> tuple[Vector, Vector, Vector]:
    """Heights (share of the body height), half-widths and half-depths (metres) of the trunk."""
    h, k, belly = person.height, person.bulk, person.belly
    hip, shoulder = person.hip * h * k**0.6, person.shoulder * h * k**0.3
    waist = (0.45 * hip + 0.36 * shoulder) * (1 + 0.25 * (k - 1)) * (1 + 0.15 * belly)
    front, chest = 1 + 0.5 * belly, 1 + 0.2 * belly
    thick, neck = h * k**0.8, 0.034 * h
    stations = [
        (0.200, 0.94 * hip, 0.060 * thick),
        (0.400, 0.97 * hip, 0.066 * thick),
        (0.470, hip, 0.070 * thick),
        (0.520, hip, 0.070 * thick),
        (0.580, (hip + waist) / 2, 0.066 * thick * front),
        (0.630, waist, 0.064 * thick * front),
        (0.690, (waist + shoulder) / 2, 0.066 * thick * chest),
        (0.740, 0.93 * shoulder, 0.069 * thick),
        (0.785, 0.97 * shoulder, 0.062 * thick),
        (0.812, 0.80 * shoulder, 0.052 * thick),
        (0.828, 0.56 * shoulder, 0.043 * thick),
        (NECK, 0.040 * h, 0.036 * h),
        (0.862, neck, neck),
    ]
    y, across, depth = np.array(stations).T
    return y, across, depth


def _arm(person: Person, moment: Moment, side: int, shoulder: Vector) -> tuple[Vector, Vector]:
    """Elbow and wrist."""
    swing = -0.9 * side * math.sin(moment.phase) * person.swing * moment.vigour
    mine = side == person.side
    carries = person.bag in ("tote", "briefcase", "trolley") and mine
    # Angles of the upper arm, bend of the elbow, turn of the forearm towards the chest.
    forward, outward = 0.08 + swing, 0.03 + 0.09 * person.bulk
    bend, inward = person.elbow + 0.5 * max(0.0, swing), 0.02
    if person.arms == "pockets":
        forward, outward, bend, inward = -0.25 + 0.15 * swing, 0.32, 0.75, -0.1
    elif person.arms == "phone" and mine:
        forward, outward, bend, inward = 0.35, 0.12, 1.75, 0.35
    elif person.arms == "strap" and (mine or person.bag != "backpack"):
        forward, outward, bend, inward = 0.25, 0.2, 2.25, 0.3
    elif person.arms == "folded":
        forward, outward, bend, inward = 0.3, 0.15, 1.35, 1.0
    elif carries:
        back = 0.35 if person.bag == "trolley" else 0.0
        forward, outward, bend = 0.3 * swing - back, 0.17, 0.12
    elbow = shoulder + UPPER_ARM * person.height * _hanging(forward, outward, side)
    turn = outward - inward if bend < 1 else -inward
    return elbow, elbow + FOREARM * person.height * _hanging(forward + bend, turn, side)


def _leg(person: Person, moment: Moment, side: int) -> tuple[Vector, Vector, Vector, Vector]:
    """Hip, knee, ankle, direction of the foot."""
    h = person.height
    step = side * math.sin(moment.phase)
    swinging = max(0.0, side * math.cos(moment.phase)) ** 1.5
    thigh = person.stride * moment.vigour * step + 0.06
    bend = 0.10 + person.knee * moment.vigour * swinging * min(1.0, person.stride / 0.3)
    bend += 0.2 * max(0.0, -step) * person.stride
    hip = vector(0.55 * side * person.hip * h, person.legs * h, 0.0)
    knee = hip + (person.legs - KNEE) * h * _hanging(thigh, person.splay, side)
    ankle = knee + SHIN * h * _hanging(thigh - bend, 0.6 * person.splay, side)
    pitch = 0.9 * min(0.0, thigh - bend + 0.2) + 0.18 * max(0.0, step)
    flat = math.cos(pitch)
    toes = person.toes
    foot = vector(side * math.sin(toes) * flat, math.sin(pitch), math.cos(toes) * flat)
    return hip, knee, ankle, foot


def skeleton(person: Person, moment: Moment) -> Skeleton:
    """The joints of `person` at one moment."""
    h = person.height
    legs = [_leg(person, moment, side) for side in (-1, 1)]
    lowest = min(ankle[1] - 0.12 * h * max(0.0, -foot[1]) for _, _, ankle, foot in legs)
    trunk = person.lean + 0.03 * math.sin(2 * moment.phase)
    drop = 0.012 * person.stoop
    y = 0.795 - drop
    shoulders = [
        vector(side * (person.shoulder - 0.008) * h, y * h, lean(person, y, trunk))
        for side in (-1, 1)
    ]
    arms = [_arm(person, moment, side, s) for side, s in zip((-1, 1), shoulders, strict=True)]
    return Skeleton(
        hips=[leg[0] for leg in legs],
        knees=[leg[1] for leg in legs],
        ankles=[leg[2] for leg in legs],
        feet=[leg[3] for leg in legs],
        shoulders=shoulders,
        elbows=[arm[0] for arm in arms],
        wrists=[arm[1] for arm in arms],
        head=vector(
            0.2 * moment.sway * h, (SKULL - drop) * h, lean(person, SKULL, trunk) + 0.012 * h
        ),
        trunk=trunk,
        lift=0.042 * h - float(lowest),
    )
