"""HTML pieces of the report.

Nothing is fetched, every image is in the page; it reads well on light and dark ground and on paper.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastreid_vi import figures
from fastreid_vi.figures import Tile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE_HEIGHT = 144  # pixels: twice the size shown, for dense screens and print

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --card: #f5f6f8; --ink: #1c2128; --soft: #59626e; --line: #d5d9df;
}
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171c; --card: #1e232a; --ink: #e4e8ee; --soft: #9aa4b1; --line: #38404a; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem;
  background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.7rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 0 0 .4rem; }
h3 { font-size: 1rem; margin: 1.3rem 0 .3rem; }
section { margin-top: 2.6rem; }
.note { color: var(--soft); margin: 0 0 .9rem; max-width: 52rem; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: 1rem 1.1rem; min-width: 0;
}
.card p { margin: .8rem 0 .3rem; color: var(--soft); }
dl {
  display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem;
  margin: 0; font-size: .9rem;
}
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre {
  margin: 0; padding: .6rem .7rem; border: 1px solid var(--line); border-radius: .3rem;
  background: var(--ground); font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
}
.wide, .chart { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; }
tbody th { text-align: left; font-weight: 500; }
thead th { color: var(--soft); font-weight: 500; }
tbody tr { border-top: 1px solid var(--line); }
tr.group th { padding-top: .9rem; font-weight: 650; }
tr.chance, td small { color: var(--soft); }
.chart svg { display: block; width: 100%; height: auto; min-width: 36rem; }
.row { display: flex; gap: .4rem; align-items: flex-start; overflow-x: auto; padding: .35rem 0; }
.label { flex: 0 0 6.2rem; font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; }
.label b { color: var(--ink); }
.tile { flex: 0 0 auto; margin: 0; width: 4.9rem; }
.tile img {
  display: block; height: 6.6rem; max-width: 100%; margin: 0 auto;
  border: 3px solid transparent; border-radius: .25rem;
}
.match img { border-color: MATCH; }
.wrong img { border-color: WRONG; }
.label + .tile { margin-right: .7rem; }
.tile figcaption {
  font-size: .69rem; line-height: 1.3; color: var(--soft); text-align: center; padding-top: .15rem;
}
@media print {
  :root { --ground: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; }
  body {
    padding: 0; max-width: none; font-size: 11pt;
    print-color-adjust: exact; -webkit-print-color-adjust: exact;
  }
  .row, .chart, .wide { overflow: visible; }
  .chart svg { min-width: 0; }
  .row { gap: .2rem; }
  .label { flex-basis: 4.4rem; }
  .label + .tile { margin-right: .3rem; }
  .tile { width: 3.4rem; }
  .tile img { height: 4.8rem; }
  .tile figcaption { font-size: .55rem; }
  h2, h3, .note { break-after: avoid; break-inside: avoid; }
  .row, .chart, .card, tr { break-inside: avoid; }
}
"""


class Section(NamedTuple):
    """One block of the page: heading, a plain-text note below it, HTML."""

    title: str
    note: str
    body: str


def text(value: str) -> str:
    """Plain text, escaped for element content and attributes."""
    return html.escape(value, quote=True)


def render(title: str, cards: Iterable[str], sections: Iterable[Section]) -> str:
    """The whole page."""
    style = STYLE.replace("MATCH", figures.MATCH).replace("WRONG", figures.WRONG)
    blocks = "\n".join(
        f"<section>\n<h2>{text(s.title)}</h2>\n<p class=note>{text(s.note)}</p>\n"
        f"{s.body}\n</section>"
        for s in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>\n"
        f"<div class=cards>{''.join(cards)}</div>\n{blocks}\n</body>\n</html>\n"
    )


def card(name: str, facts: Mapping[str, str], commands: Sequence[str]) -> str:
    """A run's header: its facts and the commands that repeat it."""
    rows = "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in facts.items())
    lines = text("\n".join(commands))
    repeat = f"<p>To repeat:</p><pre>{lines}</pre>" if commands else ""
    return f"<article class=card><h2>{text(name)}</h2><dl>{rows}</dl>{repeat}</article>"


def chart(figure: Figure, identifier: str, alt: str) -> str:
    """A figure as an inline drawing."""
    drawing = figures.to_svg(figure, identifier=identifier, alt=alt)
    return f"<div class=chart>{drawing}</div>"


def tile_row(tiles: Iterable[Tile], label: str) -> str:
    """A row of framed images with captions; `label` is HTML."""
    cells = []
    for tile in tiles:
        frame = "" if tile.correct is None else " match" if tile.correct else " wrong"
        caption = "<br>".join(text(line) for line in tile.lines)
        cells.append(
            f'<figure class="tile{frame}"><img src="{_jpeg(tile.image)}" alt="{text(tile.alt)}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f"<div class=row><div class=label>{label}</div>{''.join(cells)}</div>"


def _jpeg(image: NDArray[np.uint8]) -> str:
    from PIL import Image

    picture: Any = Image.fromarray(image)
    width = max(1, round(picture.width * TILE_HEIGHT / picture.height))
    stream = io.BytesIO()
    resized = picture.resize((width, TILE_HEIGHT), Image.Resampling.BICUBIC)
    resized.save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
