"""Bar charts as SVG, written here: the same record gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#1b6ca8", "#e07b39", "#6a994e", "#9d4edd", "#8a8a8a", "#c9a227")
BAR, GAP, GROUP_GAP = 9, 2, 9
LEFT, PLOT, RIGHT, TOP, BOTTOM = 250, 420, 90, 64, 34


class Bar(NamedTuple):
    """A value with its spread; None is a bar that was not measured."""

    series: str
    value: float | None
    low: float | None = None
    high: float | None = None


class Group(NamedTuple):
    """Bars under one label."""

    label: str
    bars: Sequence[Bar]


class Axis(NamedTuple):
    """From `low` to `high`; a line at `mark`."""

    title: str
    low: float
    high: float
    log: bool = False
    mark: float | None = None

    def place(self, value: float) -> float:
        """Pixels from the left."""
        value = min(max(value, self.low), self.high)
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return LEFT + PLOT * part

    def ticks(self) -> list[float]:
        """Powers of ten (and half-way points of a short axis), or round steps."""
        if self.log:
            first, last = (round(math.log10(v)) for v in (self.low, self.high))
            decades = [10.0**i for i in range(first, last + 1)]
            steps = (1, 2, 5) if last - first < 3 else (1,)
            return [d * s for d in decades for s in steps if self.low <= d * s <= self.high]
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        while (self.high - self.low) / step < 4:
            step /= 2
        count = int((self.high - self.low) / step + 1e-9)
        return [self.low + i * step for i in range(count + 1)]


def number(value: float) -> str:
    """Three digits, no exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def axis_for(title: str, groups: Sequence[Group], *, log: bool, mark: float | None = None) -> Axis:
    """An axis that holds every bar and the mark."""
    values = [
        v
        for g in groups
        for b in g.bars
        for v in (b.value, b.low, b.high)
        if v is not None and v > 0
    ]
    values += [mark] if mark is not None else []
    if not values:
        return Axis(title, 0.1 if log else 0.0, 1.0, log, mark)
    if log:
        low = 10.0 ** math.floor(math.log10(min(values)))
        return Axis(title, low, 10.0 ** max(math.ceil(math.log10(max(values))), 1), True, mark)
    return Axis(title, 0.0, max(values) * 1.05, False, mark)


def _text(x: float, y: float, words: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def _bar(bar: Bar, axis: Axis, y: float, colour: str, unit: str) -> list[str]:
    begin = axis.place(axis.mark if axis.log and axis.mark is not None else axis.low)
    middle = y + BAR - 1.5
    if bar.value is None:
        return [_text(begin + 4, middle, "not measured", extra=' fill="#888"')]
    end = axis.place(bar.value)
    left, width = min(begin, end), max(abs(end - begin), 1.0)
    parts = [
        f'<rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>'
    ]
    right = max(begin, end)
    if bar.low is not None and bar.high is not None:
        a, b = axis.place(bar.low), axis.place(bar.high)
        right = max(right, b)
        parts.append(
            f'<path d="M{a:.1f} {y + BAR / 2:.1f}H{b:.1f}M{a:.1f} {y + 2:.1f}v{BAR - 4}'
            f'M{b:.1f} {y + 2:.1f}v{BAR - 4}" stroke="#222" fill="none"/>'
        )
    parts.append(_text(right + 4, middle, number(bar.value) + unit))
    return parts


def chart(
    title: str,
    groups: Sequence[Group],
    axis: Axis,
    *,
    unit: str = "",
    note: str = "",
    series: Sequence[str] = (),
) -> str:
    """Horizontal bars, grouped; the legend in the order of the first appearance.

    Args:
        title, groups, axis: what is drawn.
        unit, note: behind every number; below the chart.
        series: names whose colours are the same in every chart that is given them.
    """
    names = list(dict.fromkeys(bar.series for group in groups for bar in group.bars))
    colours = {
        name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys([*series, *names]))
    }
    body: list[str] = []
    y = float(TOP)
    for group in groups:
        height = len(group.bars) * (BAR + GAP)
        body.append(_text(LEFT - 8, y + height / 2 + 3, group.label, "end"))
        for bar in group.bars:
            body += _bar(bar, axis, y, colours[bar.series], unit)
            y += BAR + GAP
        y += GROUP_GAP
    width, height = LEFT + PLOT + RIGHT, y + BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
        f'viewBox="0 0 {width} {height:.0f}" font-family="sans-serif" font-size="10">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        _text(10, 18, title, extra=' font-size="14" font-weight="bold"'),
    ]
    x = 10.0
    for name in names:
        lines.append(f'<rect x="{x:.1f}" y="28" width="10" height="10" fill="{colours[name]}"/>')
        lines.append(_text(x + 14, 37, name))
        x += 30 + 6.2 * len(name)
    for tick in axis.ticks():
        place = axis.place(tick)
        lines.append(f'<path d="M{place:.1f} {TOP - 6}V{y:.1f}" stroke="#ddd"/>')
        lines.append(_text(place, TOP - 10, number(tick) + unit, "middle"))
    if axis.mark is not None:
        lines.append(f'<path d="M{axis.place(axis.mark):.1f} {TOP - 6}V{y:.1f}" stroke="#222"/>')
    lines += body
    lines.append(_text(LEFT, y + 14, axis.title))
    lines.append(_text(10, y + 28, note, extra=' fill="#555"'))
    return "\n".join([*lines, "</svg>", ""])
