"""Elements of inline SVG as strings, and the frame around a chart. All text is escaped here."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

from perception_jax.viz.axes import Number

FONT_SIZE = 12
"""Size of text inside a drawing, in pixels where the drawing is shown at its own size."""

_STYLE = (
    "<style>"
    ".pj-chart{container-type:inline-size;max-width:760px;font-size:13px;line-height:1.45}"
    ".pj-chart svg{display:block;width:100%;height:auto}"
    ".pj-chart .pj-narrow{display:none}"
    "@container (max-width:540px){.pj-chart .pj-wide{display:none}"
    ".pj-chart .pj-narrow{display:block}}"
    f".pj-chart svg text{{font-size:{FONT_SIZE}px;fill:currentColor;"
    "font-variant-numeric:tabular-nums}"
    ".pj-title{font-weight:600;margin:0 0 .4em}"
    ".pj-chart p{max-width:none}.pj-axis{opacity:.72;margin:0}.pj-x{text-align:right}"
    ".pj-chart .pj-legend{display:flex;flex-wrap:wrap;gap:.2em 1.2em;list-style:none;"
    "margin:0 0 .6em;padding:0}"
    ".pj-legend li{display:flex;align-items:center;gap:.45em;margin:0}"
    ".pj-chart .pj-legend svg{flex:none;width:26px;height:12px}"
    ".pj-band>line,.pj-band>circle{opacity:0}"
    ".pj-band:hover>line{opacity:.35}.pj-band:hover>circle{opacity:1}"
    "</style>"
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One of the two drawings of a chart: its size in pixels and how much it holds."""

    name: str
    width: int
    height: int
    x_ticks: int
    y_ticks: int
    bands: int
    label_column: int


LAYOUTS = (
    Layout("wide", 720, 300, x_ticks=9, y_ticks=6, bands=60, label_column=190),
    Layout("narrow", 344, 240, x_ticks=5, y_ticks=5, bands=24, label_column=0),
)


def scale(
    domain: tuple[Number, Number], start: Number, end: Number, *, log: bool = False
) -> Callable[[Number], float]:
    """Maps the domain to pixels [start, end], linearly or by logarithm; a point to the middle."""
    low, high = (math.log(v) for v in domain) if log else domain

    def to_pixels(value: Number) -> float:
        if high == low:
            return (start + end) / 2
        position = math.log(value) if log else value
        return start + (position - low) / (high - low) * (end - start)

    return to_pixels


def drawing(layout: Layout, height: Number, title: str, body: str) -> str:
    """The `<svg>` element around a body."""
    return (
        f'<svg class="pj-{layout.name}" viewBox="0 0 {layout.width} {math.ceil(height)}" '
        f'role="img"><title>{html.escape(title)}</title>{body}</svg>'
    )


def tooltip(*lines: str) -> str:
    """A title element, which browsers show on hover; "" without lines."""
    return f"<title>{html.escape(chr(10).join(lines))}</title>" if lines else ""


def text(x: Number, y: Number, content: str, anchor: str = "start", *, bold: bool = False) -> str:
    """A line of text with its baseline at y; `anchor` is start, middle or end."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>'
        f"{html.escape(content)}</text>"
    )


def line(
    start: tuple[Number, Number],
    end: tuple[Number, Number],
    *,
    opacity: Number = 1.0,
    width: Number = 1.0,
    dash: str = "",
    tip: str = "",
) -> str:
    """A straight line in the text's colour."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" '
        f'stroke="currentColor" stroke-opacity="{opacity:g}" stroke-width="{width:g}"{dashes}>'
        f"{tooltip(tip) if tip else ''}</line>"
    )


def circle(x: Number, y: Number, colour: str, radius: Number = 3.5) -> str:
    """A filled dot."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>'


def rectangle(x: Number, y: Number, width: Number, height: Number, fill: str, tip: str = "") -> str:
    """A filled rectangle with slightly rounded corners."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}" '
        f'rx="2" fill="{fill}">{tooltip(tip) if tip else ""}</rect>'
    )


def polyline(points: Sequence[tuple[Number, Number]], colour: str, dash: str = "") -> str:
    """A path through points; a point whose y is NaN is a gap, a lone point a dot."""
    runs: list[list[tuple[Number, Number]]] = [[]]
    for point in points:
        if math.isnan(point[1]):
            runs.append([])
        else:
            runs[-1].append(point)
    dots = "".join(circle(*run[0], colour, 2.5) for run in runs if len(run) == 1)
    moves = "".join(
        "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run) for run in runs if len(run) > 1
    )
    if not moves:
        return dots
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<path d="{moves}" fill="none" stroke="{colour}" stroke-width="1.8" '
        f'stroke-linejoin="round" stroke-linecap="round"{dashes}/>{dots}'
    )


def swatch(body: str) -> str:
    """A 26 x 12 legend sample; its name stands beside it, so it is hidden from readers."""
    return f'<svg viewBox="0 0 26 12" aria-hidden="true">{body}</svg>'


def frame(
    title: str,
    legend: Sequence[tuple[str, str]],
    drawings: str,
    *,
    x_label: str = "",
    y_label: str = "",
) -> str:
    """A chart: title, legend of (name, swatch), y label, drawings, x label."""
    items = "".join(f"<li>{sample}{html.escape(name)}</li>" for name, sample in legend)
    parts = [
        f'<div class="pj-chart">{_STYLE}<p class="pj-title">{html.escape(title)}</p>',
        f'<ul class="pj-legend">{items}</ul>' if items else "",
        f'<p class="pj-axis">{html.escape(y_label)}</p>' if y_label else "",
        drawings,
        f'<p class="pj-axis pj-x">{html.escape(x_label)}</p>' if x_label else "",
        "</div>",
    ]
    return "".join(parts)
