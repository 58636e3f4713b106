"""The report's figures: plain arrays in, a matplotlib figure out, fit for a paper as they are.

`to_svg` makes a figure part of an HTML page: everything drawn in `INK` takes the page's text
colour, so that one drawing is legible on light and dark ground.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#0a0b0c"
# Mid-tones with a contrast of 3:1 on white and on near-black, told apart by colour-blind readers.
PALETTE = ("#2f81d6", "#d9742b", "#3a9b6e", "#a866c9", "#b8901f", "#c9536f")
MUTED = "#808691"
MATCH, WRONG = "#2da44e", "#d83a3a"


class MissingExtra(ImportError):
    """An optional package is needed; the message says how to get it."""


class Curve(NamedTuple):
    """Points of one line, with a band of one standard deviation where there is one."""

    x: NDArray[Any]  # [n]
    y: NDArray[Any]  # [n]
    std: NDArray[Any] | None = None  # [n]


class Tile(NamedTuple):
    """One image of a picture row: a query, a ranked gallery image or an overlay."""

    image: NDArray[np.uint8]  # [H, W, 3]
    lines: tuple[str, ...]
    alt: str
    correct: bool | None = None  # green or red frame; None for neither


@contextmanager
def _style() -> Iterator[Any]:
    """Matplotlib under the report's style; never pyplot, whose global figures are the caller's."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise MissingExtra("figures need matplotlib: pip install 'fastreid-vi[report]'") from error
    style = {
        "font.family": "sans-serif",
        "font.size": 9.0,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": MUTED,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "fastreid-vi",
    }
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color")
    with matplotlib.rc_context({**style, **dict.fromkeys((*inked, "ytick.color"), INK)}):
        yield matplotlib.figure.Figure


def palette(names: Sequence[str]) -> dict[str, str]:
    """One colour per run, the same in every figure."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def small_multiples(
    runs: Mapping[str, Mapping[str, Curve]], *, xlabel: str = "epoch", percent: bool = False
) -> Figure:
    """One panel per quantity, one line per run that has it.

    Args:
        runs: run name -> quantity -> curve.
        xlabel: label of the common horizontal axis.
        percent: show fractions as percentages, from zero up.
    Returns:
        A figure, three panels in a row.
    """
    quantities = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    colours = palette(list(runs))
    with _style() as figure_class:
        axes, figure = _grid(figure_class, len(quantities), columns=3, panel=(3.1, 2.1))
        for axis, quantity in zip(axes, quantities, strict=True):
            for name, curves in runs.items():
                if quantity in curves:
                    _draw(axis, curves[quantity], colours[name], name, 100.0 if percent else 1.0)
            axis.set_title(quantity + (", %" if percent else ""), loc="left")
            axis.set_xlabel(xlabel)
            _whole_ticks(axis)
            if percent:
                axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        _legend(figure, axes)
    return figure


def cmc_curves(settings: Mapping[str, Mapping[str, Curve]], *, chance: str = "chance") -> Figure:
    """Cumulative matching characteristics, one panel per setting.

    Args:
        settings: setting ("all/1") -> run -> curve over ranks 1.., fractions.
        chance: name of the curve that is drawn dashed and grey.
    Returns:
        A figure, two panels in a row.
    """
    names = dict.fromkeys(run for curves in settings.values() for run in curves if run != chance)
    colours = palette(list(names))
    with _style() as figure_class:
        axes, figure = _grid(figure_class, len(settings), columns=2, panel=(4.6, 2.7))
        for axis, (setting, curves) in zip(axes, settings.items(), strict=True):
            # Chance last: the legend then lists the runs first.
            for name, curve in sorted(curves.items(), key=lambda item: item[0] == chance):
                dashed = name == chance
                colour = MUTED if dashed else colours[name]
                _draw(axis, curve, colour, name, 100.0, linestyle="--" if dashed else "-")
            axis.set_title(setting, loc="left")
            axis.set_xlabel("rank")
            axis.set_ylabel("matched within rank, %")
            axis.set_ylim(0, 101)
            axis.set_xticks([1, 5, 10, 15, 20])
        _legend(figure, axes)
    return figure


def distance_histogram(
    distances: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], *, bins: int = 60
) -> Figure:
    """Distances between the same person and between different persons, one panel per run.

    Args:
        distances: run -> (same person [n], different persons [m]); each is normalised to area one.
        bins: number of bins over the common range.
    Returns:
        A figure, two panels in a row.
    """
    parts = [part for pair in distances.values() for part in pair]
    low, high = min(part.min() for part in parts), max(part.max() for part in parts)
    edges = np.linspace(low, high + 1e-6, bins + 1)  # common, so that runs can be compared
    with _style() as figure_class:
        axes, figure = _grid(figure_class, len(distances), columns=2, panel=(4.6, 2.5))
        for axis, (name, (same, different)) in zip(axes, distances.items(), strict=True):
            for values, colour, label in (
                (same, MATCH, "same person"),
                (different, WRONG, "different persons"),
            ):
                density, _ = np.histogram(values, edges, density=True)
                axis.stairs(density, edges, fill=True, color=colour, alpha=0.35)
                axis.stairs(density, edges, color=colour, label=label)
                axis.axvline(float(np.median(values)), color=colour, linestyle=":", linewidth=1.2)
            axis.set_title(name, loc="left")
            axis.set_xlabel("cosine distance (dotted: median)")
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
        _legend(figure, axes)
    return figure


def tile_rows(rows: Sequence[Sequence[Tile]], *, height: float = 1.25) -> Figure:
    """Rows of images with frames and captions: rank lists, or pattern maps over their image.

    Args:
        rows: one list of tiles per row; rows may differ in length.
        height: height of a tile, inches.
    Returns:
        A figure, one axes per tile.
    """
    columns = max(len(row) for row in rows)
    with _style() as figure_class:
        figure: Figure = figure_class(
            figsize=(0.85 * columns, (height + 0.45) * len(rows)), layout="constrained"
        )
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axis in grid.flat:
            axis.set_axis_off()
        for row, tiles in enumerate(rows):
            for axis, tile in zip(grid[row], tiles, strict=False):
                axis.set_axis_on()
                axis.grid(False)
                axis.imshow(tile.image, interpolation="none", aspect="auto")
                axis.set(xticks=[], yticks=[])
                axis.set_xlabel("\n".join(tile.lines), fontsize=6.5)
                colour = INK if tile.correct is None else MATCH if tile.correct else WRONG
                width = 0.6 if tile.correct is None else 2.5
                for spine in axis.spines.values():
                    spine.set(visible=True, color=colour, linewidth=width)
    return figure


def overlay(
    image: NDArray[np.uint8], attention: NDArray[Any], *, strength: float = 0.65
) -> NDArray[np.uint8]:
    """Heat of one attention map over its image.

    Args:
        image: [H, W, 3] uint8.
        attention: [h, w], any range; stretched from its smallest to its largest value.
        strength: opacity of the heat where the map is largest.
    Returns:
        [H, W, 3] uint8.
    """
    from PIL import Image

    with _style():
        from matplotlib import colormaps

        low, high = float(attention.min()), float(attention.max())
        scaled = (attention - low) / (high - low) if high > low else np.zeros_like(attention)
        height, width = image.shape[:2]
        resized = Image.fromarray(scaled.astype(np.float32)).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        heat = np.clip(np.asarray(resized), 0.0, 1.0)[..., None]  # [H, W, 1]
        colour = colormaps["inferno"](heat[..., 0])[..., :3] * 255.0  # [H, W, 3]
    faded = 0.5 * image.mean(axis=2, keepdims=True) + 0.5 * image  # half grey: heat stands out
    mixed: NDArray[np.uint8] = np.clip(
        (1.0 - strength * heat) * faded + strength * heat * colour, 0, 255
    ).astype(np.uint8)
    return mixed


def to_svg(figure: Figure, *, identifier: str, alt: str) -> str:
    """The figure as an inline SVG element whose ink is the page's text colour.

    Args:
        figure: what to draw.
        identifier: prefix of the element ids, unique in the page.
        alt: description for readers who do not see it.
    Returns:
        An `<svg>` element.
    """
    import html

    stream = io.StringIO()
    with _style():
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Inline drawings share the page's name space: ids and references to them get the prefix.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{identifier}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    label = html.escape(alt, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _grid(
    figure_class: Any, count: int, *, columns: int, panel: tuple[float, float]
) -> tuple[list[Axes], Figure]:
    if count < 1:
        raise ValueError("figure: expected at least one panel, got none")
    rows = -(-count // columns)
    # Always the full width: a lone panel keeps the size, and the text the scale, of its neighbours.
    figure = figure_class(figsize=(panel[0] * columns, panel[1] * rows + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[count:]:
        empty.set_axis_off()
    return axes[:count], figure


def _draw(
    axis: Axes, curve: Curve, colour: str, label: str, scale: float, linestyle: str = "-"
) -> None:
    y = np.asarray(curve.y, dtype=float) * scale
    marker = "o" if len(y) <= 12 else ""
    axis.plot(
        curve.x, y, color=colour, label=label, linestyle=linestyle, marker=marker, markersize=3
    )
    if curve.std is not None:
        spread = np.asarray(curve.std, dtype=float) * scale
        axis.fill_between(curve.x, y - spread, y + spread, color=colour, alpha=0.18, linewidth=0)


def _whole_ticks(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        found, labels = axis.get_legend_handles_labels()
        handles.update(dict(zip(labels, found, strict=True)))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles) or 1
    )
