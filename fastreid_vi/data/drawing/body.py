"""A person in one moment of walking, as tubes: limbs, clothes, bags; `head` adds the rest."""

from __future__ import annotations

import numpy as np

from fastreid_vi.data.drawing.figure import Tube
from fastreid_vi.data.drawing.head import head_tubes
from fastreid_vi.data.drawing.pedestrian import (
    BAG,
    BOTTOM,
    HOSE,
    SCARF,
    SHOES,
    SKIN,
    SLEEVE,
    TOP,
    Person,
)
from fastreid_vi.data.drawing.shapes import UP, Vector, between, box, limb, shell, vector
from fastreid_vi.data.drawing.skeleton import (
    NECK,
    Moment,
    Skeleton,
    lean,
    skeleton,
    trunk_profile,
)


def tubes(person: Person, moment: Moment) -> tuple[list[Tube], float]:
    """The figure, and how far (metres) it must be raised to stand on the ground."""
    s = skeleton(person, moment)
    parts = [
        *_legs(person, s),
        *_arms(person, s),
        *_clothes(person, s),
        *head_tubes(person, s),
        *_bags(person, s),
    ]
    return parts, s.lift


def _upright(person: Person, s: Skeleton, heights: Vector) -> Vector:
    """Axis [n, 3] of the trunk at heights given as shares of the body height."""
    forward = [lean(person, float(y), s.trunk) for y in heights]
    return np.stack([np.zeros_like(heights), heights * person.height, np.array(forward)], 1)


def _trunk(
    person: Person, s: Skeleton, low: float, high: float, ease: float, flare: float, material: int
) -> Tube:
    """Cloth around the trunk between two heights (shares of the body height)."""
    y, across, depth = trunk_profile(person)
    at = np.concatenate([[low], y[(y > low + 0.01) & (y < high - 0.004)], [high]])
    # Clothes fall straight from the shoulders, they do not follow the neck.
    stand = ease * np.clip((0.85 - at) / 0.06, 0.15, 1)
    widening = flare * person.height * np.clip((0.6 - at) / 0.3, 0, 2)
    return Tube(
        axis=_upright(person, s, at),
        across=np.interp(at, y, across) + stand + 0.08 * widening,
        depth=np.interp(at, y, depth) + stand + 0.07 * widening,
        material=material,
        boxy=0.9,
    )


def _legs(person: Person, s: Skeleton) -> list[Tube]:
    h, k = person.height, person.bulk**0.7
    seat = 0.5 * person.hip * h * person.bulk**0.6  # wider thighs would show through the hips
    parts = []
    for hip, knee, ankle, foot in zip(s.hips, s.knees, s.ankles, s.feet, strict=True):
        top = hip + vector(0, 0.03 * h, 0)
        calf, shin, thigh = (
            between(ankle, knee, 0.3),
            between(ankle, knee, 0.65),
            between(knee, hip, 0.5),
        )
        if person.bottom == "trousers":
            cuff = 0.75 * person.cut * h
            mid = 0.5 * (cuff + 0.038 * h * k)
            radii = [
                max(cuff, 0.024 * h),
                max(0.96 * mid, 0.029 * h),
                max(mid, 0.034 * h * k),
                max(0.037 * h * k, 0.62 * cuff),
                0.044 * h * k,
                seat,
                0.9 * seat,
            ]
            start = between(ankle, knee, 0.12 if person.boots else -0.06)
            parts.append(limb([start, calf, shin, knee, thigh, hip, top], radii, BOTTOM))
        else:
            slim = [0.019 * h, *(v * h * k for v in (0.024, 0.029, 0.028, 0.040))]
            parts.append(
                limb([ankle, calf, shin, knee, thigh, hip, top], [*slim, seat, 0.9 * seat], HOSE)
            )
        if person.bottom == "shorts":
            hem = float(np.clip((person.length - 0.28) / max(person.legs - 0.28, 0.1), 0.05, 0.8))
            loose = 0.044 * h * k * (1.12 + 3 * person.cut)
            path = [between(knee, hip, hem), between(knee, hip, 0.8), hip, top]
            parts.append(limb(path, [loose, 0.051 * h * k, 1.04 * seat, 0.9 * seat], BOTTOM))
        parts.extend(_foot(person, ankle, knee, foot))
    if person.bottom != "skirt":
        parts.append(_trunk(person, s, person.legs - 0.055, 0.60, 0.006, 0.0, BOTTOM))
    return parts


def _foot(person: Person, ankle: Vector, knee: Vector, foot: Vector) -> list[Tube]:
    h = person.height
    sole = ankle - vector(0, 0.022 * h, 0)
    lateral = np.cross(np.array(UP), foot)
    shoe = Tube(
        axis=np.array([sole + foot * t * h for t in (-0.036, -0.026, 0.01, 0.06, 0.092, 0.104)]),
        across=np.array([0.006, 0.019, 0.022, 0.028, 0.022, 0.006]) * h,
        depth=np.array([0.006, 0.021, 0.026, 0.020, 0.013, 0.005]) * h,
        lateral=(float(lateral[0]), float(lateral[1]), float(lateral[2])),
        material=SHOES,
        boxy=0.8,
    )
    if person.boots:
        path = [
            ankle - vector(0, 0.02 * h, 0),
            between(ankle, knee, 0.2),
            between(ankle, knee, 0.5),
        ]
        return [shoe, limb(path, [0.027 * h, 0.029 * h, 0.036 * h], SHOES)]
    path = [ankle - vector(0, 0.025 * h, 0), between(ankle, knee, 0.2)]
    bare = BOTTOM if person.bottom == "trousers" else HOSE
    return [shoe, limb(path, [0.021 * h, 0.021 * h], bare)]


def _arms(person: Person, s: Skeleton) -> list[Tube]:
    h, k, ease = person.height, person.bulk**0.7, 0.75 * person.ease
    parts = []
    for shoulder, elbow, wrist in zip(s.shoulders, s.elbows, s.wrists, strict=True):
        reach = wrist - elbow
        hand = wrist + 0.075 * h * reach / max(float(np.linalg.norm(reach)), 1e-6)
        inside = shoulder + vector(-0.225 * float(shoulder[0]), 0.004 * h, 0)
        upper = [between(elbow, shoulder, 0.5), between(elbow, shoulder, 0.92), inside]
        path = [wrist, between(wrist, elbow, 0.5), elbow, *upper]
        radii = [0.0145 * h, *(v * h * k for v in (0.020, 0.021, 0.024, 0.027)), 0.024 * h]
        if person.arms != "pockets":
            palm = [hand, between(hand, wrist, 0.35), between(hand, wrist, 0.8), wrist]
            parts.append(limb(palm, [v * h for v in (0.006, 0.019, 0.018, 0.014)], SKIN))
        if person.sleeves == "long":
            parts.append(limb(path, [r + ease + 0.003 * h for r in radii], SLEEVE))
            continue
        parts.append(limb(path, radii, SKIN))
        if person.sleeves == "short":
            wide = [v * h * k + ease for v in (0.036, 0.034, 0.031)]
            parts.append(limb([between(elbow, shoulder, 0.25), *upper], [*wide, 0.026 * h], SLEEVE))
    return parts


def _clothes(person: Person, s: Skeleton) -> list[Tube]:
    parts = [_trunk(person, s, person.hem, NECK, person.ease, person.flare, TOP)]
    if person.bottom == "skirt":
        parts.append(_skirt(person, s))
    if person.collar:
        parts.append(_trunk(person, s, 0.825, 0.862, 0.012, 0.0, TOP))
    if person.scarf:
        parts.extend(_scarf(person, s))
    return parts


def _skirt(person: Person, s: Skeleton) -> Tube:
    h, hem = person.height, max(person.length, 0.09)
    stride = 0.30 * abs(float(s.knees[0][2] - s.knees[1][2]))
    low = float(np.clip((0.3 - hem) / 0.2, 0, 1))
    stride += 0.22 * low * abs(float(s.ankles[0][2] - s.ankles[1][2]))
    y, across, depth = trunk_profile(person)
    at = np.array([hem, 0.5 * hem + 0.25, 0.5, 0.56, 0.61])
    fall = np.clip((0.56 - at) / 0.36, 0, 1)
    return Tube(
        axis=_upright(person, s, at),
        across=np.interp(at, y, across) + 0.008 + 1.1 * fall * person.cut * h,
        depth=np.interp(at, y, depth) + 0.008 + fall * (0.9 * person.cut * h + stride),
        material=BOTTOM,
    )


def _scarf(person: Person, s: Skeleton) -> list[Tube]:
    h = person.height
    centre = vector(0, 0.845 * h, lean(person, 0.845, s.trunk) + 0.006 * h)
    loop = shell(
        centre,
        (-0.026, -0.02, 0.0, 0.02, 0.026),
        (0.045, 0.062, 0.066, 0.058, 0.04),
        (0.045, 0.058, 0.062, 0.055, 0.04),
        SCARF,
        size=h,
    )
    knot = centre + vector(0.03 * person.side * h, -0.02 * h, 0.05 * h)
    tail = Tube(
        axis=np.array(
            [knot + vector(0, -0.2 * h, 0.022 * h), knot + vector(0, -0.1 * h, 0.026 * h), knot]
        ),
        across=np.full(3, 0.022 * h),
        depth=np.full(3, 0.012 * h),
        material=SCARF,
        boxy=0.7,
    )
    return [loop, tail]


def _bags(person: Person, s: Skeleton) -> list[Tube]:
    h, size, side = person.height, person.height * person.bag_size, person.side
    y, across, depth = trunk_profile(person)
    if person.bag == "backpack":
        thick = 0.048 * size
        back = float(np.interp(0.695, y, depth)) + person.ease + 0.8 * thick
        centre = vector(0, 0.695 * h, lean(person, 0.695, s.trunk) - back)
        pocket = centre - vector(0, 0.05 * size, 0.9 * thick)
        return [
            box(centre, 0.085 * size, 0.235 * size, thick, BAG),
            box(pocket, 0.062 * size, 0.09 * size, 0.02 * h, BAG),
        ]
    if person.bag == "crossbody":
        out = side * (float(np.interp(0.5, y, across)) + 0.03 * h)
        return [box(vector(out, 0.5 * h, 0.01 * h), 0.032 * size, 0.11 * size, 0.075 * size, BAG)]
    hand = s.wrists[(side + 1) // 2] - vector(0, 0.055 * h, 0)
    if person.bag in ("tote", "briefcase"):
        tall, long = (0.19, 0.075) if person.bag == "tote" else (0.13, 0.12)
        centre = hand + vector(0.012 * side * h, -0.5 * tall * size - 0.03 * h, 0)
        rim = centre + vector(0, 0.5 * tall * size, 0)
        grip = vector(0, 0, 0.03 * h)
        return [
            box(centre, 0.025 * size, tall * size, long * size, BAG),
            limb([rim + grip, hand, rim - grip], [0.005 * h] * 3, BAG),
        ]
    if person.bag == "trolley":
        centre = vector(hand[0] + 0.02 * side * h, 0.17 * size - s.lift, hand[2] - 0.16 * h)
        top = centre + vector(0, 0.12 * size, 0)
        return [
            box(centre, 0.075 * size, 0.30 * size, 0.05 * h, BAG),
            limb([top, hand], [0.007 * h, 0.007 * h], BAG),
        ]
    return []
