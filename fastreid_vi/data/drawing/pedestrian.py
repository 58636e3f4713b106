"""Who the stand-in pedestrians are: build, gait, hair, what they wear and carry. No drawing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastreid_vi.data.drawing.fabric import Fabric, Rng, draw_fabric, plain, second_dye

# Indices into `Person.fabrics`; `figure.Tube.material` carries them.
SKIN, HEAD, HAIR, TOP, SLEEVE, INNER, BOTTOM, HOSE, SHOES, HAT, BAG, SCARF = range(12)

Weights = dict[str, float]

_TOP_PATTERNS: Weights = {
    "plain": 2.5,
    "stripes": 3.0,
    "pinstripes": 1.0,
    "check": 1.0,
    "plaid": 1.5,
    "dots": 1.0,
    "chevron": 1.0,
    "argyle": 1.0,
    "camouflage": 0.7,
    "blocks": 2.5,
    "band": 2.0,
    "halves": 0.7,
    "print": 3.0,
    "logo": 2.0,
    "fade": 0.8,
}
_BOTTOM_PATTERNS: Weights = {
    "plain": 6.0,
    "pinstripes": 0.6,
    "check": 0.6,
    "plaid": 0.6,
    "camouflage": 0.6,
    "blocks": 1.2,
    "band": 0.6,
    "stripes": 0.5,
}
_BAG_PATTERNS: Weights = {"plain": 3.0, "blocks": 1.5, "stripes": 0.7, "print": 0.7, "band": 1.0}
# These have a place on the garment; sleeves of the same cloth show only its ground.
_PLACED = ("print", "logo", "blocks", "band", "halves", "fade")

_CLOTHS = {
    "tee": ("cotton", "fleece"),
    "shirt": ("cotton", "denim"),
    "hoodie": ("fleece", "cotton"),
    "sweater": ("wool",),
    "jacket": ("leather", "denim", "nylon"),
    "coat": ("wool", "cotton", "leather"),
    "puffer": ("nylon",),
    "vest": ("nylon", "wool"),
    "dress": ("cotton", "wool"),
}
_EASE = {"puffer": 0.035, "hoodie": 0.018, "coat": 0.02, "jacket": 0.016}
_OPEN = {"jacket": 0.7, "coat": 0.5, "vest": 0.7, "puffer": 0.3, "hoodie": 0.3, "shirt": 0.2}


@dataclass(frozen=True, kw_only=True)
class Person:
    """Everything that stays the same from image to image. Lengths in metres, angles in radians."""

    height: float
    shoulder: float  # half-width of the shoulders, share of the height
    hip: float  # half-width of the hips, share of the height
    bulk: float  # thickness of trunk and limbs
    belly: float  # extra depth of the waist
    legs: float  # height of the hip joint, share of the height
    head: float  # size of the head
    stride: float  # largest angle of the thigh
    swing: float  # largest angle of the arm
    elbow: float  # resting bend
    knee: float  # bend while the leg swings
    lean: float  # of the trunk
    stoop: float  # forward shift of head and shoulders
    splay: float  # outward angle of the legs
    toes: float  # outward angle of the feet
    arms: str  # swing, pockets, strap, phone, folded
    side: int  # of bag, phone, scarf: -1 or 1
    hair: str
    beard: bool
    hat: str
    glasses: str  # none, clear, dark
    scarf: bool
    top: str
    sleeves: str  # none, short, long
    hem: float  # lower edge of the top, share of the height
    ease: float  # how far the top stands off the body
    flare: float  # widening towards the hem
    collar: bool
    opening: float  # half-width of an open jacket's front, radians; 0 is closed
    bottom: str  # trousers, shorts, skirt
    cut: float  # width of trousers at the ankle, or flare of a skirt
    length: float  # lower edge of shorts or skirt, share of the height
    stripe: bool  # along the outer side of the trousers
    boots: bool
    bag: str
    bag_size: float
    fabrics: tuple[Fabric, ...]


def _pick(rng: Rng, weights: Weights) -> str:
    p = np.array(list(weights.values()))
    return list(weights)[rng.choice(len(p), p=p / p.sum())]


def _around(rng: Rng, mean: float, spread: float, low: float, high: float) -> float:
    return float(np.clip(rng.normal(mean, spread), low, high))


def _skin(rng: Rng) -> Fabric:
    light, dark = np.array([0.93, 0.76, 0.64]), np.array([0.36, 0.23, 0.16])
    red, green, blue = (light + (dark - light) * rng.random() ** 1.3) ** 2.2
    # Skin is bright in infrared whatever its colour: melanin absorbs little there.
    return plain((float(red), float(green), float(blue)), float(rng.uniform(0.5, 0.68)))


def _hair_fabric(rng: Rng) -> Fabric:
    tones = (
        (0.06, 0.05, 0.05),
        (0.12, 0.08, 0.06),
        (0.25, 0.15, 0.09),
        (0.45, 0.30, 0.16),
        (0.72, 0.56, 0.34),
        (0.60, 0.60, 0.60),
    )
    weights = np.array([4, 3, 2.5, 1.5, 1, 0.8])
    red, green, blue = np.array(tones[rng.choice(len(tones), p=weights / weights.sum())]) ** 2.0
    colour = (float(red), float(green), float(blue))
    return plain(colour, float(rng.uniform(0.08, 0.5)), gloss=0.12, weave="rib")


def _sleeve(rng: Rng, top: str, shirt: Fabric, inner: Fabric) -> Fabric:
    if top == "vest":
        return inner
    if rng.random() < 0.6:
        return shirt if shirt.pattern not in _PLACED else second_dye(shirt, turns=3)
    return second_dye(shirt, pattern=_pick(rng, {"plain": 3, "stripes": 1, "band": 1}))


def _wardrobe(rng: Rng, top: str) -> tuple[Fabric, ...]:
    """One fabric for each of the indices above."""
    patterns = dict(_TOP_PATTERNS)
    if top in ("jacket", "coat", "puffer"):
        patterns["plain"] *= 3
    shirt = draw_fabric(rng, patterns, _CLOTHS[top], length=0.6)
    inner = draw_fabric(rng, _TOP_PATTERNS, ("cotton", "wool"), length=0.6)
    sleeve = _sleeve(rng, top, shirt, inner)
    legs = ("cotton", "denim", "wool", "leather")
    lower = draw_fabric(rng, _BOTTOM_PATTERNS, legs, length=0.9)
    skin, hair = _skin(rng), _hair_fabric(rng)
    tights = draw_fabric(rng, {"plain": 3, "stripes": 1}, ("cotton",), length=0.9)
    return (
        skin,
        skin,
        hair,
        shirt,
        sleeve,
        inner,
        shirt if top == "dress" else lower,
        skin if rng.random() < 0.5 else tights,
        draw_fabric(rng, {"plain": 1}, ("leather", "cotton", "nylon"), length=0.2),
        draw_fabric(rng, {"plain": 2, "stripes": 1, "band": 1}, ("cotton", "wool"), length=0.2),
        draw_fabric(rng, _BAG_PATTERNS, ("leather", "nylon", "cotton"), length=0.4),
        draw_fabric(rng, {"plain": 1, "stripes": 1, "check": 1}, ("wool", "fleece"), length=0.2),
    )


def _build(rng: Rng, slight: float) -> dict[str, float]:
    heavy = rng.normal()
    return {
        "height": _around(rng, 1.78 - 0.13 * slight, 0.06, 1.5, 1.98),
        "shoulder": _around(rng, 0.122 - 0.016 * slight, 0.006, 0.095, 0.14),
        "hip": _around(rng, 0.088 + 0.008 * slight, 0.005, 0.078, 0.11),
        "bulk": float(np.clip(1.02 + 0.20 * heavy, 0.75, 1.5)),
        "belly": _around(rng, 0.1 + 0.25 * max(heavy, 0), 0.1, 0.0, 0.8),
        "legs": _around(rng, 0.505, 0.014, 0.47, 0.54),
        "head": float(rng.uniform(0.94, 1.08)),
        "stride": float(rng.uniform(0.18, 0.55)),
        "swing": float(rng.uniform(0.1, 0.75)),
        "elbow": float(rng.uniform(0.1, 0.7)),
        "knee": float(rng.uniform(0.5, 1.0)),
        "lean": _around(rng, 0.05, 0.05, -0.06, 0.18),
        "stoop": _around(rng, 0.2, 0.3, 0.0, 1.0),
        "splay": float(rng.uniform(0.0, 0.07)),
        "toes": float(rng.uniform(-0.05, 0.45)),
    }


def _hairstyle(rng: Rng, slight: float) -> str:
    return _pick(
        rng,
        {
            "short": 3.0,
            "buzz": 1.0 - 0.7 * slight,
            "bald": 0.7 * (1 - slight),
            "bob": 1.4 * slight + 0.2,
            "long": 2.2 * slight + 0.1,
            "ponytail": 1.4 * slight + 0.1,
            "bun": 0.9 * slight,
            "afro": 0.7,
        },
    )


def _top(rng: Rng, slight: float) -> str:
    return _pick(
        rng,
        {
            "tee": 3.0,
            "shirt": 2.0,
            "hoodie": 2.0,
            "sweater": 1.8,
            "jacket": 2.5,
            "coat": 1.6,
            "puffer": 1.2,
            "vest": 0.8,
            "dress": 1.8 * slight,
        },
    )


def _sleeve_length(rng: Rng, top: str) -> str:
    lengths: dict[str, Weights] = {
        "tee": {"short": 1},
        "vest": {"long": 2, "short": 1, "none": 0.7},
        "dress": {"long": 1, "short": 1, "none": 0.7},
        "shirt": {"long": 6, "short": 1},
    }
    return _pick(rng, lengths.get(top, {"long": 1}))


def _hem(rng: Rng, top: str) -> float:
    low, high = {"coat": (0.24, 0.40), "puffer": (0.42, 0.52), "jacket": (0.45, 0.53)}.get(
        top, (0.43, 0.50)
    )
    return 0.5 if top == "dress" else float(rng.uniform(low, high))


def draw_person(rng: Rng) -> Person:
    """A random pedestrian: the same generator state gives the same person."""
    slight = rng.random()  # one latent axis ties height, build, hair and clothes loosely together
    top = _top(rng, slight)
    below: Weights = {"trousers": 4, "shorts": 1.6, "skirt": 2.4 * slight}
    bottom = "skirt" if top == "dress" else _pick(rng, below)
    hood = 1.0 if top in ("hoodie", "puffer") else 0.0
    bag = _pick(
        rng,
        {
            "none": 3,
            "backpack": 2.4,
            "crossbody": 1.5,
            "tote": 1.2,
            "briefcase": 0.6,
            "trolley": 0.6,
        },
    )
    strap = 1.2 if bag == "backpack" else 0.3
    return Person(
        **_build(rng, slight),
        arms=_pick(rng, {"swing": 4, "pockets": 1.5, "strap": strap, "phone": 1.1, "folded": 0.5}),
        side=int(rng.choice([-1, 1])),
        hair=_hairstyle(rng, slight),
        beard=bool(rng.random() < 0.35 * (1 - slight)),
        hat=_pick(rng, {"none": 4, "cap": 1.4, "beanie": 1.2, "brim": 1.2, "hood": hood}),
        glasses=_pick(rng, {"none": 2.6, "clear": 1, "dark": 0.7}),
        scarf=bool(rng.random() < (0.3 if top in ("coat", "jacket", "sweater") else 0.08)),
        top=top,
        sleeves=_sleeve_length(rng, top),
        hem=_hem(rng, top),
        ease=_EASE.get(top, 0.008) + float(rng.uniform(0, 0.012)),
        flare=float(rng.uniform(0.0, 0.6)),
        collar=top in ("shirt", "jacket", "coat") or bool(rng.random() < 0.15),
        opening=float(rng.uniform(0.3, 0.7)) if rng.random() < _OPEN.get(top, 0.0) else 0.0,
        bottom=bottom,
        cut=float(rng.choice([0.028, 0.040, 0.060, 0.085, 0.12]) * rng.uniform(0.9, 1.1)),
        length=float(rng.uniform(0.26, 0.36) if bottom == "shorts" else rng.uniform(0.12, 0.38)),
        stripe=bottom == "trousers" and bool(rng.random() < 0.2),
        boots=bool(rng.random() < 0.3),
        bag=bag,
        bag_size=float(rng.uniform(0.85, 1.45)),
        fabrics=_wardrobe(rng, top),
    )
