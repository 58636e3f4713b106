"""A small software renderer for figures made of tubes: the geometry of the stand-in pedestrians.

A tube is a generalised cylinder: an axis and an elliptical section that varies along it. Limbs,
garments, hats and bags are all tubes. They are sampled densely enough for the image, projected, and
the nearest sample of each pixel wins.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32 where it is stored
Ints = NDArray[np.int64]

# Samples per pixel and axis: below about 1.2 the far side shows through the near one.
_DENSITY = 1.3


@dataclass(frozen=True, kw_only=True)
class Tube:
    """A generalised cylinder in the person's frame: x to the left, y up, z forward, metres."""

    axis: NDArray[np.float64]  # [n, 3] stations along the axis
    across: NDArray[np.float64]  # [n] half-width along `lateral`
    depth: NDArray[np.float64]  # [n] half-width along the third direction
    lateral: tuple[float, float, float] = (1.0, 0.0, 0.0)
    up: tuple[float, float, float] | None = None  # fixed axis direction, for discs and boxes
    material: int = 0
    boxy: float = 1.0  # below 1 the section turns from an ellipse to a rounded rectangle
    arc: tuple[float, float] = (
        -math.pi,
        math.pi,
    )  # part of the section that exists, 0 is the front
    smooth: bool = True  # spline through the stations, or straight pieces


class View(NamedTuple):
    """Where the camera stands, and how metres become pixels."""

    yaw: float  # radians; 0 shows the face, pi the back
    pitch: float  # radians the camera looks down
    distance: float  # metres, sets the strength of perspective
    scale: float  # pixels in a metre at the figure's distance
    x: float  # pixel column of the figure's axis
    y: float  # pixel row of the ground under it


class Surface(NamedTuple):
    """What each covered pixel shows, n pixels."""

    pixel: Ints  # [n] row-major position in the image
    material: Ints  # [n]
    along: Floats  # [n] metres along the axis from its first station
    angle: Floats  # [n] radians around it, 0 in front
    girth: Floats  # [n] mean radius of the section there, metres
    radius: Floats  # [n] mean radius of the whole tube, metres
    normal: Floats  # [n, 3] unit, camera frame, z towards the viewer
    depth: Floats  # [n] metres towards the viewer


def rotation(yaw: float, pitch: float) -> Floats:
    """[3, 3] matrix from the person's frame to the camera's."""
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    tilt = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    result: Floats = (tilt @ turn).astype(np.float32)
    return result


def project(points: NDArray[np.floating], view: View) -> Floats:
    """[n, 3] points of the person's frame to [n, 3] column, row (pixels) and depth (metres)."""
    moved = np.asarray(points, np.float32) @ rotation(view.yaw, view.pitch).T
    return _pixels(moved, view)


def _pixels(moved: Floats, view: View) -> Floats:
    zoom = np.float32(view.scale) / (1 - moved[:, 2] / np.float32(view.distance))
    return np.stack([view.x + moved[:, 0] * zoom, view.y - moved[:, 1] * zoom, moved[:, 2]], 1)


@functools.lru_cache(maxsize=64)
def _spline(stations: int, refine: int = 4) -> Floats:
    """Catmull-Rom weights [(stations - 1) * refine + 1, stations]."""
    t = np.arange((stations - 1) * refine + 1) / refine
    left = np.minimum(t.astype(int), stations - 2)
    f = t - left
    cubic = np.stack(
        [-f + 2 * f**2 - f**3, 2 - 5 * f**2 + 3 * f**3, f + 4 * f**2 - 3 * f**3, f**3 - f**2], 1
    )
    weights = np.zeros((len(t), stations), np.float32)
    for k in range(4):
        np.add.at(
            weights, (np.arange(len(t)), np.clip(left + k - 1, 0, stations - 1)), cubic[:, k] / 2
        )
    return weights


@functools.lru_cache(maxsize=512)
def _section(count: int, low: float, high: float, boxy: float) -> tuple[Floats, Floats]:
    """Angles [count] and coefficients [5, count]: 1, sin, cos (shaped), sin^2, cos^2."""
    angle = low + (high - low) * (np.arange(count) + 0.5) / count
    s, c = np.sin(angle), np.cos(angle)
    if boxy != 1.0:
        s, c = np.sign(s) * np.abs(s) ** boxy, np.sign(c) * np.abs(c) ** boxy
    return angle.astype(np.float32), np.stack([np.ones(count), s, c, s * s, c * c]).astype(
        np.float32
    )


class _Samples(NamedTuple):
    points: Floats  # [u * v, 3] camera frame
    normals: Floats  # [u * v, 3] not unit
    along: Floats  # [u]
    girth: Floats  # [u]
    angle: Floats  # [v]


def _unit(x: Floats) -> Floats:
    result: Floats = x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), np.float32(1e-9))
    return result


def _cross(a: Floats, b: Floats) -> Floats:
    """Rowwise; np.cross spends most of its time on axes."""
    ax, ay, az, bx, by, bz = a[:, 0], a[:, 1], a[:, 2], b[:, 0], b[:, 1], b[:, 2]
    return np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], 1)


def _stations(tube: Tube) -> Floats:
    """[n, 5] centre, half-width, half-depth along the axis, smoothed."""
    stations = np.column_stack([tube.axis, tube.across, tube.depth]).astype(np.float32)
    if tube.smooth and len(stations) > 2:
        stations = _spline(len(stations)) @ stations
        np.maximum(stations[:, 3:], 0, out=stations[:, 3:])
    return stations


def _course(stations: Floats, bends: bool) -> Floats:
    """[n] path length on the surface up to each station."""
    step = np.diff(stations, axis=0)
    # Radius counts as length too: the lid of a flat disc needs samples.
    length = np.sqrt((step * step).sum(1))
    if bends:  # and so does the outer side of a bend
        heading = _unit(step[:, :3])
        turn = np.zeros(len(step), np.float32)
        turn[1:] = np.sqrt(((heading[1:] - heading[:-1]) ** 2).sum(1))
        turn[:-1] = np.maximum(turn[:-1], turn[1:])
        length = length + turn * stations[1:, 3]
    return np.concatenate([[0], np.cumsum(length)])


def _resample(at: Floats, path: Floats, values: Floats) -> Floats:
    columns = [np.interp(at, path, values[:, k]) for k in range(values.shape[1])]
    return np.stack(columns, 1).astype(np.float32)


def _sample(tube: Tube, turn: Floats, scale: float) -> _Samples:
    stations = _stations(tube)
    path = _course(stations, tube.up is None)
    at = np.linspace(0, path[-1], max(3, math.ceil(path[-1] * scale * _DENSITY)))
    fine = _resample(at, path, stations)
    slope = np.gradient(fine, axis=0)
    centre, a, b = fine[:, :3], fine[:, 3:4], fine[:, 4:5]
    if tube.up is None:
        # Interpolated, not taken from `centre`: sections must turn gradually, or they gape on the
        # outer side of a bend.
        up = _unit(_resample(at, path, _unit(np.gradient(stations[:, :3], axis=0))))
    else:
        up = np.broadcast_to(np.array(tube.up, np.float32), centre.shape)
    lateral = np.array(tube.lateral, np.float32)
    side = _unit(lateral - (up @ lateral)[:, None] * up)
    front = _cross(side, up)
    speed = (slope[:, :3] * up).sum(1, keepdims=True)
    none = np.zeros_like(centre)
    # Columns go with the rows of the section: 1, sin, cos, sin^2, cos^2.
    place = np.stack([centre, a * side, b * front, none, none], 2)  # [u, 3, 5]
    thin, thick = -slope[:, 3:4] * b * up, -slope[:, 4:5] * a * up
    tilt = np.stack([none, b * speed * side, a * speed * front, thin, thick], 2)
    low, high = tube.arc
    around = (high - low) * max(float(a.max()), float(b.max())) * scale * _DENSITY
    angle, section = _section(max(6, math.ceil(around / 4) * 4), low, high, tube.boxy)
    gaps = np.sqrt((np.diff(centre, axis=0) ** 2).sum(1))
    return _Samples(
        np.matmul(section.T, (turn @ place).transpose(0, 2, 1)).reshape(-1, 3),
        np.matmul(section.T, (turn @ tilt).transpose(0, 2, 1)).reshape(-1, 3),
        np.concatenate([[0], np.cumsum(gaps)]).astype(np.float32),
        ((a + b) / 2)[:, 0],
        angle,
    )


def render(tubes: Sequence[Tube], view: View, height: int, width: int) -> Surface:
    """The visible surface of `tubes` in an image of height x width pixels.

    Args:
        tubes: figure in the person's frame; `Tube.material` is passed on.
        view: camera.
        height: pixels.
        width: pixels.
    Returns:
        One record for every covered pixel.
    """
    turn = rotation(view.yaw, view.pitch)
    parts = [_sample(tube, turn, view.scale) for tube in tubes]
    points = np.concatenate([p.points for p in parts])
    normals = np.concatenate([p.normals for p in parts])
    nearest = _nearest(points, normals, view, height, width)
    pixel = np.flatnonzero(nearest >= 0)
    winner = nearest[pixel]
    start = np.cumsum([0] + [len(p.points) for p in parts])
    tube = np.searchsorted(start, winner, side="right") - 1
    local = winner - start[tube]
    sections = np.array([len(p.angle) for p in parts])
    rows = np.cumsum([0] + [len(p.along) for p in parts])
    columns = np.cumsum([0, *sections])
    u = rows[tube] + local // sections[tube]
    v = columns[tube] + local % sections[tube]
    return Surface(
        pixel=pixel,
        material=np.array([t.material for t in tubes])[tube],
        along=np.concatenate([p.along for p in parts])[u],
        angle=np.concatenate([p.angle for p in parts])[v],
        girth=np.concatenate([p.girth for p in parts])[u],
        radius=np.array([p.girth.mean() for p in parts], np.float32)[tube],
        normal=_unit(normals[winner]),
        depth=points[winner, 2],
    )


def _nearest(points: Floats, normals: Floats, view: View, height: int, width: int) -> Ints:
    """[height * width] the sample each pixel shows, or -1."""
    seen = _pixels(points, view)
    column, row = np.floor(seen[:, 0]).astype(np.int64), np.floor(seen[:, 1]).astype(np.int64)
    # Facing the viewer, who is at (0, 0, distance) in this frame.
    facing = normals[:, 2] * view.distance - (normals * points).sum(1) > 0
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    keep = np.flatnonzero(facing & inside)
    # 16-bit depth in steps of 0.05 mm: NumPy's stable sort is then a radix sort.
    depth = ((points[keep, 2] + 1.6) * 20000).clip(0, 65535).astype(np.uint16)
    order = keep[np.argsort(depth, kind="stable")]
    nearest = np.full(height * width, -1, np.int64)
    nearest[row[order] * width + column[order]] = order  # the last one written is the nearest
    return _fill_pinholes(nearest.reshape(height, width)).ravel()


def _fill_pinholes(nearest: Ints) -> Ints:
    """Empty pixels between two covered neighbours take one of them."""
    padded = np.pad(nearest, 1, constant_values=-1)
    left, right = padded[1:-1, :-2], padded[1:-1, 2:]
    above, below = padded[:-2, 1:-1], padded[2:, 1:-1]
    bridge = np.where(
        (left >= 0) & (right >= 0), left, np.where((above >= 0) & (below >= 0), above, -1)
    )
    return np.where(nearest >= 0, nearest, bridge)
