"""What the stand-in cameras look at: rooms, a campus front, a park, a street; and obstacles."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fastreid_vi.data.drawing.fabric import Rng
from fastreid_vi.data.drawing.figure import Floats

Colour = tuple[int, int, int]
Tone = Callable[[str], Colour]

_CONTRAST = 0.5  # of the places, so that people stand out from them

PLACES = {1: "hall", 2: "office", 3: "office", 4: "front", 5: "park", 6: "street"}

# Ranges of hue, saturation and value in daylight, and of brightness in infrared, where leaves shine
# and the sky is dark.
_TONES: dict[
    str, tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]
] = {
    "wall": ((0.05, 0.16), (0.02, 0.16), (0.62, 0.85), (0.35, 0.6)),
    "panel": ((0.04, 0.62), (0.05, 0.3), (0.4, 0.75), (0.25, 0.6)),
    "wood": ((0.05, 0.1), (0.35, 0.6), (0.3, 0.6), (0.4, 0.7)),
    "floor": ((0.05, 0.6), (0.02, 0.15), (0.4, 0.7), (0.25, 0.5)),
    "glass": ((0.52, 0.62), (0.05, 0.25), (0.5, 0.95), (0.15, 0.4)),
    "frame": ((0.0, 1.0), (0.0, 0.1), (0.2, 0.5), (0.2, 0.6)),
    "poster": ((0.0, 1.0), (0.2, 0.7), (0.4, 0.9), (0.3, 0.8)),
    "brick": ((0.01, 0.09), (0.2, 0.5), (0.35, 0.7), (0.3, 0.55)),
    "sky": ((0.55, 0.6), (0.05, 0.3), (0.8, 0.97), (0.1, 0.22)),
    "leaf": ((0.22, 0.36), (0.35, 0.7), (0.2, 0.55), (0.5, 0.85)),
    "grass": ((0.2, 0.3), (0.3, 0.5), (0.35, 0.6), (0.5, 0.75)),
    "trunk": ((0.05, 0.1), (0.2, 0.4), (0.15, 0.35), (0.2, 0.4)),
    "paving": ((0.06, 0.6), (0.02, 0.1), (0.45, 0.7), (0.2, 0.4)),
    "asphalt": ((0.55, 0.65), (0.0, 0.08), (0.25, 0.45), (0.22, 0.4)),
    "line": ((0.1, 0.15), (0.0, 0.1), (0.8, 0.95), (0.5, 0.8)),
    "car": ((0.0, 1.0), (0.0, 0.8), (0.15, 0.9), (0.1, 0.7)),
    "metal": ((0.55, 0.65), (0.0, 0.1), (0.25, 0.6), (0.2, 0.5)),
}


def _toner(rng: Rng, infrared: bool) -> Tone:
    def tone(name: str) -> Colour:
        h, s, v, i = _TONES[name]
        rgb = colorsys.hsv_to_rgb(rng.uniform(*h), rng.uniform(*s), rng.uniform(*v))
        grey = rng.uniform(*i)  # drawn in both cases: rooms seen by two cameras keep their layout
        values = (grey,) * 3 if infrared else rgb
        return tuple(int(255 * c) for c in values)  # type: ignore[return-value]

    return tone


def _vary(rng: Rng, colour: Colour, by: int) -> Colour:
    d = int(rng.integers(-by, by + 1))
    return tuple(int(np.clip(c + d, 0, 255)) for c in colour)  # type: ignore[return-value]


def _darker(colour: Colour) -> Colour:
    red, green, blue = (int(c * 0.7) for c in colour)
    return red, green, blue


def _floor(
    draw: ImageDraw.ImageDraw,
    rng: Rng,
    colour: Colour,
    width: int,
    top: float,
    bottom: int,
    tiles: bool,
) -> None:
    draw.rectangle([0, top, width, bottom], fill=colour)
    if not tiles:
        return
    seam = _vary(rng, tuple(int(c * 0.8) for c in colour), 4)  # type: ignore[arg-type]
    deep = bottom - top
    for k in range(1, 9):  # rows come closer with distance
        y = top + deep * (1 - (1 - k / 9) ** 0.5) * 1.0
        draw.line([0, y, width, y], fill=seam, width=max(1, bottom // 200))
    for k in range(-24, 25):
        x = width / 2 + k * width / 22
        draw.line(
            [x, top, width / 2 + (x - width / 2) * 2.2, bottom],
            fill=seam,
            width=max(1, bottom // 200),
        )


def _foliage(
    image: Image.Image, rng: Rng, colour: Colour, box: tuple[float, float, float, float], count: int
) -> None:
    draw = ImageDraw.Draw(image)
    x0, y0, x1, y1 = box
    size = min(x1 - x0, y1 - y0)
    for k in range(count):
        a, r = rng.uniform(0, 6.28), np.sqrt(rng.random())
        x = (x0 + x1) / 2 + np.cos(a) * r * (x1 - x0) / 2
        y = (y0 + y1) / 2 + np.sin(a) * r * (y1 - y0) / 2
        radius = size * rng.uniform(0.04, 0.13)
        shade = 0.55 + 0.6 * (k / count) * (1.1 - 0.5 * (y - y0) / (y1 - y0))
        fill = _vary(rng, tuple(int(min(255, c * shade)) for c in colour), 12)  # type: ignore[arg-type]
        draw.ellipse([x - radius, y - radius * 0.8, x + radius, y + radius * 0.8], fill=fill)


def _tree(image: Image.Image, rng: Rng, tone: Tone, x: float, ground: float, tall: float) -> None:
    draw = ImageDraw.Draw(image)
    w = tall * rng.uniform(0.025, 0.05)
    draw.polygon(
        [
            (x - w, ground),
            (x + w, ground),
            (x + w * 0.6, ground - tall * 0.6),
            (x - w * 0.6, ground - tall * 0.6),
        ],
        fill=tone("trunk"),
    )
    spread = tall * rng.uniform(0.28, 0.42)
    _foliage(
        image,
        rng,
        tone("leaf"),
        (x - spread, ground - tall * 1.05, x + spread, ground - tall * 0.35),
        130,
    )


def _room(image: Image.Image, rng: Rng, tone: Tone, line: float) -> None:
    draw = ImageDraw.Draw(image)
    w, h = image.size
    draw.rectangle([0, 0, w, line], fill=tone("wall"))
    step = h * rng.uniform(0.35, 0.55)
    x = -rng.uniform(0, step)
    panel = tone("panel")
    while x < w:
        kind = rng.choice(
            ["panel", "window", "door", "poster", "plain", "shelf"],
            p=[0.3, 0.2, 0.15, 0.15, 0.1, 0.1],
        )
        x1 = x + step
        if kind == "panel":
            draw.rectangle(
                [x + 0.04 * step, 0.08 * h, x1 - 0.04 * step, line - 0.03 * h],
                fill=_vary(rng, panel, 8),
            )
            draw.line(
                [x1, 0, x1, line],
                fill=_vary(rng, _darker(panel), 3),
                width=max(1, h // 150),
            )
        elif kind == "window":
            draw.rectangle(
                [x + 0.08 * step, 0.05 * h, x1 - 0.08 * step, 0.45 * h], fill=tone("frame")
            )
            for k in range(2):
                a = x + (0.12 + 0.39 * k) * step
                draw.rectangle([a, 0.07 * h, a + 0.35 * step, 0.43 * h], fill=tone("glass"))
        elif kind == "door":
            draw.rectangle([x + 0.12 * step, 0.06 * h, x1 - 0.12 * step, line], fill=tone("frame"))
            draw.rectangle([x + 0.17 * step, 0.09 * h, x1 - 0.17 * step, line], fill=tone("wood"))
            draw.ellipse(
                [x1 - 0.28 * step, 0.38 * h, x1 - 0.23 * step, 0.38 * h + 0.05 * step],
                fill=tone("metal"),
            )
        elif kind == "poster":
            for _ in range(3):
                a, b = x + rng.uniform(0, 0.6) * step, h * rng.uniform(0.08, 0.3)
                draw.rectangle(
                    [a, b, a + step * rng.uniform(0.2, 0.35), b + step * rng.uniform(0.2, 0.4)],
                    fill=tone("poster"),
                )
        elif kind == "shelf":
            draw.rectangle([x + 0.06 * step, 0.15 * h, x1 - 0.06 * step, line], fill=tone("wood"))
            for row in range(4):
                y = 0.18 * h + row * (line - 0.18 * h) / 4
                for k in range(7):
                    a = x + (0.1 + 0.115 * k) * step
                    draw.rectangle(
                        [a, y, a + 0.1 * step, y + (line - 0.18 * h) / 4.6], fill=tone("poster")
                    )
        x = x1
    draw.rectangle([0, line - 0.025 * h, w, line], fill=tone("frame"))
    floor = tone("floor")
    _floor(draw, rng, floor, w, line, h, tiles=True)


def _building(
    draw: ImageDraw.ImageDraw, rng: Rng, tone: Tone, x0: float, x1: float, top: float, line: float
) -> None:
    wall = tone("brick") if rng.random() < 0.6 else tone("wall")
    draw.rectangle([x0, top, x1, line], fill=wall)
    step = (line - top) / max(1, round((line - top) / ((x1 - x0) * 0.22)))
    y = top + 0.15 * step
    while y + 0.6 * step < line:
        for k in range(4):
            a = x0 + (x1 - x0) * (0.07 + 0.235 * k)
            draw.rectangle([a, y, a + (x1 - x0) * 0.15, y + 0.6 * step], fill=tone("frame"))
            draw.rectangle(
                [a + (x1 - x0) * 0.012, y + 0.04 * step, a + (x1 - x0) * 0.138, y + 0.56 * step],
                fill=tone("glass"),
            )
        y += step


def _outdoors(image: Image.Image, rng: Rng, tone: Tone, line: float, place: str) -> None:
    draw = ImageDraw.Draw(image)
    w, h = image.size
    draw.rectangle([0, 0, w, line], fill=tone("sky"))
    if place in ("front", "street"):
        x = -0.2 * h
        while x < w:
            wide = h * rng.uniform(0.5, 1.1)
            _building(draw, rng, tone, x, x + wide, h * rng.uniform(-0.3, 0.12), line)
            x += wide
    else:
        _foliage(image, rng, tone("leaf"), (-0.1 * w, 0.0, 1.1 * w, line * 1.05), 420)
        draw.rectangle([0, line * 0.97, w, line + 0.12 * h], fill=tone("grass"))
    _floor(
        draw,
        rng,
        tone("asphalt" if place == "street" else "paving"),
        w,
        line + (0.08 * h if place == "park" else 0),
        h,
        tiles=place == "front",
    )
    if place == "street":
        draw.polygon(
            [
                (0, line + 0.1 * h),
                (w, line + 0.06 * h),
                (w, line + 0.085 * h),
                (0, line + 0.13 * h),
            ],
            fill=tone("line"),
        )
        for _ in range(3):
            x, s = rng.uniform(0, w), h * 0.22
            body = tone("car")
            draw.rounded_rectangle(
                [x, line - 0.42 * s, x + 2 * s, line + 0.12 * s], radius=0.15 * s, fill=body
            )
            draw.polygon(
                [
                    (x + 0.3 * s, line - 0.4 * s),
                    (x + 0.6 * s, line - 0.8 * s),
                    (x + 1.4 * s, line - 0.8 * s),
                    (x + 1.7 * s, line - 0.4 * s),
                ],
                fill=tone("glass"),
            )
            for k in (0.4, 1.6):
                draw.ellipse(
                    [x + (k - 0.2) * s, line - 0.08 * s, x + (k + 0.2) * s, line + 0.3 * s],
                    fill=tone("asphalt"),
                )
    for _ in range({"front": 3, "park": 6, "street": 3}[place]):
        _tree(
            image,
            rng,
            tone,
            rng.uniform(0, w),
            line + rng.uniform(0, 0.05) * h,
            h * rng.uniform(0.5, 0.9),
        )
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x = rng.uniform(0, w)
        draw.rectangle(
            [x, h * rng.uniform(0, 0.3), x + h * 0.012, line + 0.05 * h], fill=tone("metal")
        )


def plate(rng: Rng, place: str, infrared: bool, height: int, width: int, blur: float) -> Floats:
    """The empty scene of one camera, wider than any crop of it.

    Args:
        rng: generator; equal states give the same layout in both modalities.
        place: one of `PLACES`.
        infrared: grey, with infrared brightnesses.
        height: pixels.
        width: pixels.
        blur: standard deviation of the lens blur, share of the height.
    Returns:
        [height, width, 3] linear light.
    """
    image = Image.new("RGB", (width, height))
    tone = _toner(rng, infrared)
    line = height * rng.uniform(0.52, 0.66)
    if place in ("hall", "office"):
        _room(image, rng, tone, line)
    else:
        _outdoors(image, rng, tone, line, place)
    image = image.filter(ImageFilter.GaussianBlur(max(0.6, blur * height)))
    if place in ("park", "street"):
        _bokeh(image, rng, height, line)
    linear = (np.asarray(image, np.float32) / 255) ** 2.2
    mean = linear.mean(axis=(0, 1))
    linear = mean + _CONTRAST * (linear - mean)
    # Pools of light: low-frequency variation along the floor and the wall.
    x = np.linspace(0, 1, width)[None, :, None]
    y = np.linspace(0, 1, height)[:, None, None]
    waves = [rng.uniform(2, 14, 2).tolist() + rng.uniform(0, 6.28, 2).tolist() for _ in range(3)]
    pool = sum(np.sin(a * x + c) * np.sin(b * 0.4 * y + d) for a, b, c, d in waves)
    # Haze: people stand out from what lies behind them.
    mean = linear.mean((0, 1))
    linear = mean + 0.55 * (linear - mean)
    result: Floats = (linear * (1 + 0.10 * pool)).astype(np.float32)
    return result


def _bokeh(image: Image.Image, rng: Rng, height: int, line: float) -> None:
    layer = Image.new("L", image.size)
    draw = ImageDraw.Draw(layer)
    for _ in range(26):
        x, y, r = (
            rng.uniform(0, image.width),
            rng.uniform(0, line * 0.8),
            height * rng.uniform(0.008, 0.028),
        )
        draw.ellipse([x - r, y - r, x + r, y + r], fill=int(rng.integers(30, 90)))
    layer = layer.filter(ImageFilter.GaussianBlur(max(0.5, height * 0.003)))
    image.paste(Image.new("RGB", image.size, (255, 255, 255)), (0, 0), layer)


def obstacle(
    rng: Rng, infrared: bool, indoors: bool, height: int, width: int
) -> tuple[Floats, Floats]:
    """Something between the camera and the person.

    Returns:
        [height, width, 3] linear light and [height, width, 1] coverage.
    """
    image, mask = Image.new("RGB", (width, height)), Image.new("L", (width, height))
    tone, draw, cover = _toner(rng, infrared), ImageDraw.Draw(image), ImageDraw.Draw(mask)
    kind = rng.choice(["pole", "desk", "rail"] if indoors else ["pole", "bush", "rail"])
    if kind == "pole":
        x, w = rng.uniform(-0.05, 1.0) * width, width * rng.uniform(0.07, 0.16)
        colour = tone("metal")
        for k in range(8):  # round: darker towards the edges
            light = 0.55 + 0.6 * np.sin((k + 0.5) / 8 * np.pi)
            shade = tuple(int(min(255, c * light)) for c in colour)
            draw.rectangle([x + w * k / 8, 0, x + w * (k + 1) / 8 + 1, height], fill=shade)
        cover.rectangle([x, 0, x + w, height], fill=255)
    elif kind in ("desk", "rail"):
        y = height * rng.uniform(0.68, 0.86)
        if kind == "desk":
            draw.rectangle([0, y, width, height], fill=tone("wood"))
            draw.rectangle([0, y, width, y + 0.03 * height], fill=tone("frame"))
            cover.rectangle([0, y, width, height], fill=255)
        else:
            draw.rectangle([0, 0, width, height], fill=tone("metal"))
            thick = max(1.0, 0.018 * height)
            for k in range(3):
                cover.rectangle([0, y + k * 4 * thick, width, y + k * 4 * thick + thick], fill=255)
            for k in range(3):
                x = width * (k * 0.45 + rng.uniform(0, 0.1))
                cover.rectangle([x, y, x + thick, height], fill=255)
    else:
        side = rng.choice([0.0, 1.0])
        box = (
            width * (side - 0.45),
            height * rng.uniform(0.62, 0.8),
            width * (side + 0.45),
            height * 1.15,
        )
        _foliage(image, rng, tone("leaf"), box, 150)
        mask = Image.fromarray(np.where(np.asarray(image).max(2) > 0, 255, 0).astype(np.uint8))
    soft = ImageFilter.GaussianBlur(max(0.6, height * 0.004))
    light = (np.asarray(image.filter(soft), np.float32) / 255) ** 2.2
    return light, (np.asarray(mask.filter(soft), np.float32) / 255)[..., None]
