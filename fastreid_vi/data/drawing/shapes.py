"""Tubes for common solids: limbs, shells of ellipses, domes, balls, boxes. Metres."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastreid_vi.data.drawing.figure import Tube

Vector = NDArray[np.float64]
Span = tuple[float, float]
Stations = Sequence[float] | Vector
UP = (0.0, 1.0, 0.0)
AROUND = (-np.pi, np.pi)


def vector(x: float, y: float, z: float) -> Vector:
    """A point or direction: left, up, forward."""
    return np.array([x, y, z], dtype=np.float64)


def between(start: Vector, end: Vector, share: float) -> Vector:
    """The point `share` of the way from start to end; beyond either for shares outside [0, 1]."""
    return start + (end - start) * share


def limb(points: Sequence[Vector], radii: Sequence[float], material: int) -> Tube:
    """A round tube through points. Start at the lower end, so that angle 0 is in front."""
    r = np.array(radii)
    return Tube(axis=np.array(points), across=r, depth=r, material=material)


def shell(
    centre: Vector,
    heights: Stations,
    across: Stations,
    depth: Stations,
    material: int,
    *,
    size: float = 1.0,
    arc: Span = AROUND,
    boxy: float = 1.0,
    smooth: bool = True,
) -> Tube:
    """A vertical stack of ellipses around `centre`; all measures are multiplied by `size`."""
    axis = np.zeros((len(heights), 3))
    axis[:, 1] = np.array(heights) * size
    return Tube(
        axis=centre + axis,
        across=np.array(across) * size,
        depth=np.array(depth) * size,
        material=material,
        up=UP,
        arc=arc,
        boxy=boxy,
        smooth=smooth,
    )


def dome(
    centre: Vector, low: float, half: tuple[float, float, float], material: int, size: float
) -> Tube:
    """The part above height `low` of an ellipsoid with half-axes `half` (across, up, depth)."""
    across, high, depth = half
    t = np.linspace(low / high, 0.995, 8)
    r = np.sqrt(1 - t * t)
    return shell(centre, t * high, r * across, r * depth, material, size=size)


def ball(centre: Vector, radius: float, material: int) -> Tube:
    """A sphere."""
    t = np.linspace(-1.5, 1.5, 7)
    r = np.cos(t)
    return shell(centre, np.sin(t), r, r, material, size=radius)


def box(centre: Vector, half_width: float, height: float, half_depth: float, material: int) -> Tube:
    """An upright box with rounded edges."""
    edge = 0.01
    heights = np.array([-0.5, -0.5, -0.25, 0.0, 0.25, 0.5, 0.5]) * height
    heights[1] += edge
    heights[-2] -= edge
    r = np.array([0.75, 0.97, 1.0, 1.0, 1.0, 0.94, 0.6])
    return shell(centre, heights, half_width * r, half_depth * r, material, boxy=0.45, smooth=False)
