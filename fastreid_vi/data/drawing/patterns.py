"""Patterns, prints and weaves of cloth: pure functions of the position on a garment."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fastreid_vi.data.drawing.figure import Floats


class Cloth(NamedTuple):
    """n points of a garment, and what its pattern looks like."""

    along: Floats  # [n] metres from the hem
    across: Floats  # [n] metres around, 0 in front
    angle: Floats  # [n] radians around, 0 in front
    radius: Floats  # [n] of the garment, metres
    period: float  # metres between repeats
    duty: float  # share of the second dye in a repeat
    motif: int  # which print; odd ones add a third dye to bands
    level: float  # metres above the hem: split, band or centre of the print
    span: float  # metres: half-size of the print, half-height of the band
    phase: float  # shift of the pattern, in repeats


# Share of the second dye, and of the third where there is one.
Shares = tuple[Floats, Floats | None]


def _edge(x: Floats, soft: float) -> Floats:
    """0 below zero, 1 above, with a soft step."""
    return np.clip(x / soft + 0.5, 0, 1).astype(np.float32)


def _repeat(x: Floats) -> Floats:
    """Position in a repeat of period 1, -0.5 to 0.5."""
    result: Floats = x - np.floor(x) - np.float32(0.5)
    return result


def _wave(x: Floats, duty: float) -> Floats:
    """Stripes of period 1, `duty` of it set."""
    return _edge(duty / 2 - np.abs(_repeat(x)), 0.08)


def _grid(c: Cloth) -> tuple[Floats, Floats]:
    return c.along / c.period + c.phase, c.across / c.period + c.phase


def _plain(c: Cloth) -> Shares:
    return np.zeros_like(c.along), None


def _stripes(c: Cloth) -> Shares:
    s, _ = _grid(c)
    return _wave(s, c.duty), _wave(s + 0.5, 0.16) if c.motif % 2 else None


def _pinstripes(c: Cloth) -> Shares:
    return _wave(1.6 * _grid(c)[1], 0.7 * c.duty), None


def _check(c: Cloth) -> Shares:
    s, t = _grid(c)
    return (_wave(s, 0.5) + _wave(t, 0.5)) / 2, None


def _plaid(c: Cloth) -> Shares:
    s, t = (0.7 * x for x in _grid(c))
    broad = 0.8 * np.maximum(_wave(s, 0.3), _wave(t, 0.3))
    return broad, np.maximum(_wave(s + 0.5, 0.12), _wave(t + 0.5, 0.12))


def _dots(c: Cloth) -> Shares:
    s, t = (1.3 * x for x in _grid(c))
    t = t + np.where(np.floor(s) % 2 == 0, 0.0, 0.5)
    r = np.sqrt(_repeat(s) ** 2 + _repeat(t) ** 2)
    return _edge(0.10 + 0.2 * c.duty - r, 0.12), None


def _chevron(c: Cloth) -> Shares:
    s, t = _grid(c)
    return _wave(s + 1.2 * np.abs(_repeat(t)), c.duty), None


def _argyle(c: Cloth) -> Shares:
    s, t = _grid(c)
    return _edge(0.42 - np.abs(_repeat(0.5 * s)) - np.abs(_repeat(0.7 * t)), 0.08), None


def _camouflage(c: Cloth) -> Shares:
    k = np.pi / c.period
    s, t = k * c.along, k * c.across
    one = np.sin(s + 2 * np.sin(0.9 * t + 6 * c.phase)) + np.sin(1.3 * t + 5 * c.along)
    two = np.sin(1.4 * s + 5 + 2 * np.sin(1.1 * t)) + np.sin(t + 9 * c.phase)
    return _edge(one - 0.3, 0.3), _edge(two - 0.7, 0.3)


def _blocks(c: Cloth) -> Shares:
    border = _edge(c.span - np.abs(c.along - c.level), 0.01) if c.motif % 2 else None
    return _edge(c.along - c.level, 0.01), border


def _band(c: Cloth) -> Shares:
    d = np.abs(c.along - c.level)
    core = _edge(0.35 * c.span - d, 0.01) if c.motif % 2 else None
    return _edge(0.8 * c.span - d, 0.01), core


def _halves(c: Cloth) -> Shares:
    return _edge(np.sin(c.angle) * c.radius, 0.01), None


def _print(c: Cloth) -> Shares:
    """A large print on the chest, and again on the back."""
    y = (c.along - c.level) / c.span
    back = (np.abs(c.angle) - np.pi) * np.sign(c.angle) * c.radius
    return np.maximum(
        _motif(c.motif, c.across / c.span, y), _motif(c.motif, back / c.span, y)
    ), None


def _logo(c: Cloth) -> Shares:
    """A small mark over the heart."""
    size = 0.06
    return _motif(c.motif, (c.across - 0.07) / size, (c.along - c.level) / size), None


def _fade(c: Cloth) -> Shares:
    return np.clip(c.along / (1.6 * c.level), 0, 1), None


def _motif(number: int, x: Floats, y: Floats) -> Floats:
    """A mark inside the square [-1, 1]^2."""
    r = np.sqrt(x * x + y * y)
    if number == 0:
        return _edge(0.95 - r, 0.1)
    if number == 1:  # ring
        return _edge(0.3 - np.abs(r - 0.7), 0.1)
    if number == 2:  # star
        return _edge(0.62 + 0.34 * np.cos(5 * np.arctan2(x, y)) - r, 0.12)
    if number == 3:  # lines of lettering
        letters = 0.65 + 0.35 * _wave(3.1 * x + 0.37 * np.floor(1.6 * y), 0.7)
        return (
            _wave(1.6 * y, 0.55)
            * letters
            * _edge(0.95 - np.maximum(0.8 * np.abs(x), np.abs(y)), 0.1)
        )
    if number == 4:  # heart
        return _edge(0.8 - np.hypot(x, 1.1 * y - 0.6 * np.sqrt(np.abs(x)) + 0.1), 0.12)
    diamond = np.abs(x) + 0.8 * np.abs(y)
    return _edge(1.0 - diamond, 0.1) - _edge(0.45 - diamond, 0.1)


PATTERNS: dict[str, Callable[[Cloth], Shares]] = {
    "plain": _plain,
    "stripes": _stripes,
    "pinstripes": _pinstripes,
    "check": _check,
    "plaid": _plaid,
    "dots": _dots,
    "chevron": _chevron,
    "argyle": _argyle,
    "camouflage": _camouflage,
    "blocks": _blocks,
    "band": _band,
    "halves": _halves,
    "print": _print,
    "logo": _logo,
    "fade": _fade,
}


def relief(weave: str, depth: float, c: Cloth) -> Floats:
    """Brightness factor [n] of the threads and seams of a weave."""
    if weave == "quilt":
        seam = (2 * np.abs(_repeat(c.along / 0.085 + c.phase))) ** 3
        return (1 - depth * seam).astype(np.float32)
    waves = {
        "twill": lambda: np.sin(330 * (c.along + c.across)),
        "rib": lambda: np.sin(220 * c.across),
        "fuzz": lambda: np.sin(270 * c.along + 3 * np.sin(230 * c.across)),
    }
    if weave not in waves:
        return np.ones_like(c.along)
    result: Floats = (1 - depth * (0.5 + 0.5 * waves[weave]())).astype(np.float32)
    return result
