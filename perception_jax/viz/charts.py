"""Line and bar charts by matplotlib, as HTML with inline SVG: no script, no font.

Colours come from a palette that reads on light and on dark; the rest follows the page's text.
Values appear under the pointer and, for readers of a screen, in the description.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import ImageFont

from perception_jax.errors import DataError
from perception_jax.viz import figures
from perception_jax.viz.colormap import CATEGORICAL
from perception_jax.viz.figures import INK, LAYOUTS, Area, Layout
from perception_jax.viz.formatting import Number, format_number
from perception_jax.viz.grid import wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = np.ndarray | Sequence[Number]

_WIDTH = 1.8
_DASHES = ((), (4, 1.7), (1, 1.7), (5, 1.7, 1, 1.7))
_REFERENCE_WIDTH = 1.4
_REFERENCE_DASHES = ((1, 3), (4, 3), (6, 2, 1, 2))
_FONT = 12
_LINE = 16
"""Height of a line of text, pixels."""
_BAR = 14
"""Height of a bar, pixels."""
_MARKS = {"": "❘", "v": "▼", "o": "●", "D": "◆", "s": "■", "^": "▲"}
"""What sits on a baseline's mark: matplotlib's marker, and a character for the legend."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar of `bar_chart`.

    Attributes:
      label: what it is.
      value: its length, finite and not negative.
      baselines: reference values by name, drawn as marks across the bar.
      interval: confidence interval (low, high), drawn as a whisker.
    """

    label: str
    value: Number
    baselines: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    interval: tuple[Number, Number] | None = None


@dataclasses.dataclass(frozen=True)
class _Curve:
    """A series as drawn: x ascending, y NaN where there is a gap."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    dashes: Sequence[Number]

    def describe(self, percent: bool) -> str:
        """Its ends and extremes in words."""
        drawn = np.isfinite(self.y)
        if not drawn.any():
            return f"{self.name}: no values"
        x, y = self.x[drawn], self.y[drawn]
        first, last, low, high = (
            format_number(float(value), percent=percent)
            for value in (y[0], y[-1], y.min(), y.max())
        )
        start, end = (format_number(float(value)) for value in (x[0], x[-1]))
        return f"{self.name}: {first} at {start} to {last} at {end}, lowest {low}, highest {high}"


def line_chart(
    series: Mapping[str, tuple[Numbers, Numbers]],
    title: str,
    x_label: str = "",
    y_label: str = "",
    *,
    log_y: bool = False,
    percent: bool = False,
    references: Mapping[str, Number] | None = None,
) -> str:
    """Lines over a common x axis.

    Args:
      series: name to (x, y), equally long. A y that is not finite is a gap; with `log_y` so is one
        that is not positive. Long curves are thinned to what the eye can see, extremes kept.
      title: what the reader should look at.
      x_label, y_label: quantities with their units.
      log_y: logarithmic y axis.
      percent: y values are fractions and shown as percentages.
      references: named horizontal lines, e.g. chance.

    Returns:
      HTML for `Report.add_chart` or a notebook.

    Raises:
      DataError: no series, x and y of different lengths, a bad x, or nothing to draw.
    """
    curves = [_curve(k, name, *xy, log_y=log_y) for k, (name, xy) in enumerate(series.items())]
    if not any(np.isfinite(curve.y).any() for curve in curves):
        raise DataError(
            f"expected at least one finite value{' above 0' if log_y else ''} to draw, found none "
            f"in the {len(curves)} series of line_chart {title!r}"
        )
    lines = {k: float(v) for k, v in (references or {}).items() if v > 0 or not log_y}
    notes = [curve.describe(percent) for curve in curves]
    notes += [f"{name}: {format_number(v, percent=percent)}" for name, v in lines.items()]
    drawings = []
    with figures.style():
        for layout in LAYOUTS:
            figure = line_figure(curves, lines, layout, log_y=log_y, percent=percent)
            areas = _columns(figure.axes[0], curves, layout, x_label or "x", percent)
            drawings.append(figures.inline(figure, layout.name, title, "; ".join(notes), areas))
    legend = [(figures.line_sample(c.colour, c.dashes, _WIDTH), c.name) for c in curves]
    for k, name in enumerate(lines):
        dashes = _REFERENCE_DASHES[k % len(_REFERENCE_DASHES)]
        legend.append((figures.line_sample("currentColor", dashes, _REFERENCE_WIDTH), name))
    shown = legend if len(legend) > 1 else []
    return figures.frame(title, shown, "".join(drawings), x_label=x_label, y_label=y_label)


def _curve(index: int, name: str, x: Numbers, y: Numbers, *, log_y: bool) -> _Curve:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1 or not np.isfinite(x).all():
        raise DataError(
            "expected x and y as equally long lists with finite x, found shapes "
            f"{x.shape} and {y.shape} in series {name!r} of line_chart"
        )
    y = np.where(np.isfinite(y) & ((y > 0) | (not log_y)), y, np.nan)
    order = np.argsort(x, kind="stable")
    # Once the colours come round again, the dashes are shifted by one.
    turn, colour = divmod(index, len(CATEGORICAL))
    dashes = _DASHES[(index + turn) % len(_DASHES)]
    return _Curve(name, x[order], y[order], CATEGORICAL[colour], dashes)


def line_figure(
    curves: Sequence[_Curve],
    references: Mapping[str, float],
    layout: Layout,
    *,
    log_y: bool,
    percent: bool,
) -> Figure:
    """The axes of a line chart: curves with their gaps, and references as level lines."""
    from matplotlib import ticker

    figure = figures.new(layout.width, layout.height, "constrained")
    axes = figure.subplots()
    for k, value in enumerate(references.values()):
        dashes = (0, _REFERENCE_DASHES[k % len(_REFERENCE_DASHES)])
        axes.axhline(value, color=INK, alpha=0.75, linewidth=_REFERENCE_WIDTH, linestyle=dashes)
    for curve in curves:
        drawn = np.pad(np.isfinite(curve.y), 1)
        alone = np.flatnonzero(drawn[1:-1] & ~drawn[:-2] & ~drawn[2:])
        dashes = (0, curve.dashes) if curve.dashes else "-"
        points = {"marker": "o", "markevery": alone} if len(alone) else {}
        axes.plot(curve.x, curve.y, color=curve.colour, linestyle=dashes, clip_on=False, **points)
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=layout.y_ticks))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        low, high = axes.dataLim.intervaly
        # Zero is part of the picture unless the values are far from it.
        if 0 <= low < 0.5 * high:
            axes.set_ylim(bottom=0)
        axes.locator_params(axis="y", nbins=layout.y_ticks)
    if percent:
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=" %"))
    elif log_y:
        axes.yaxis.set_major_formatter(lambda value, _: format_number(value))
    _spread(figure, axes, layout.x_ticks)
    return figure


def _spread(figure: Figure, axes: Axes, most: int) -> None:
    """As many x ticks as fit without their labels touching."""
    for bins in range(most, 0, -1):
        axes.locator_params(axis="x", nbins=bins)
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        if all(a.x1 + 8 < b.x0 for a, b in itertools.pairwise(boxes)):
            return


def _columns(
    axes: Axes, curves: Sequence[_Curve], layout: Layout, x_name: str, percent: bool
) -> list[Area]:
    """Columns of the drawing with the value of each curve nearest to their middle."""
    box = axes.get_window_extent()
    start, end = axes.get_xlim()
    edges, width = np.linspace(start, end, layout.areas + 1), box.width / layout.areas
    areas = []
    for k, middle in enumerate((edges[:-1] + edges[1:]) / 2):
        tips = []
        for curve in curves:
            inside = (curve.x >= edges[k]) & (curve.x <= edges[k + 1]) & np.isfinite(curve.y)
            if inside.any():
                nearest = np.argmin(np.where(inside, np.abs(curve.x - middle), np.inf))
                y = format_number(float(curve.y[nearest]), percent=percent)
                tips.append(
                    f"{curve.name}: {y} ({x_name} {format_number(float(curve.x[nearest]))})"
                )
        if tips:
            top = layout.height - box.y1
            areas.append(Area(box.x0 + k * width, top, width, box.height, "\n".join(tips)))
    return areas


def bar_chart(
    groups: Mapping[str, Sequence[Bar]],
    title: str,
    *,
    percent: bool = False,
    maximum: Number | None = None,
) -> str:
    """Horizontal bars in groups, with baselines as marks across them and values at the right.

    Args:
      groups: heading to its bars; the heading "" is not shown. Where labels come back in several
        groups, each label has its own colour.
      title: what the reader should look at.
      percent: values are fractions and shown as percentages.
      maximum: right end of the axis; the largest value where None.

    Returns:
      HTML for `Report.add_chart` or a notebook.

    Raises:
      DataError: no bar, or a value that is negative or not finite.
    """
    bars = [bar for group in groups.values() for bar in group]
    if not bars:
        raise DataError(f"expected at least one bar, found none in bar_chart {title!r}")
    largest = max(max(_values(bar, title)) for bar in bars)
    baselines = dict.fromkeys(name for bar in bars for name in bar.baselines)
    marks = dict(zip(baselines, itertools.cycle(_MARKS), strict=False))
    drawings = []
    with figures.style():
        for layout in LAYOUTS:
            figure, areas = bar_figure(
                groups,
                layout.width,
                maximum=float(maximum or largest or 1.0),
                marks=marks,
                percent=percent,
            )
            notes = "; ".join(area.text.replace("\n", ", ") for area in areas)
            drawings.append(figures.inline(figure, layout.name, title, notes, areas))
    legend = [(f'<span aria-hidden="true">{_MARKS[m]}</span>', name) for name, m in marks.items()]
    return figures.frame(title, legend, "".join(drawings))


def _values(bar: Bar, title: str) -> tuple[Number, ...]:
    values = (bar.value, *bar.baselines.values(), *(bar.interval or ()))
    if not all(math.isfinite(v) and v >= 0 for v in values):
        raise DataError(
            f"expected finite values of at least 0, found {values} for bar {bar.label!r} of "
            f"bar_chart {title!r}"
        )
    return values


def bar_figure(
    groups: Mapping[str, Sequence[Bar]],
    width: int,
    *,
    maximum: float,
    marks: Mapping[str, str],
    percent: bool,
) -> tuple[Figure, list[Area]]:
    """Bars below each other, each under its label and value; y counts pixels from the top.

    Args:
      width: of the figure, pixels; its height is what the rows need.
      marks: matplotlib's marker of each baseline.

    Returns:
      The figure, and for each bar its area with its numbers as text.
    """
    import matplotlib

    bold = pathlib.Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans-Bold.ttf")
    font = ImageFont.truetype(str(bold), _FONT)
    labels = list(dict.fromkeys(bar.label for bars in groups.values() for bar in bars))
    several = len(labels) < sum(map(len, groups.values()))
    figure = figures.new(width, _LINE)
    axes = figure.add_axes((0, 0, 1, 1))
    areas, y = [], 0
    for heading, bars in groups.items():
        y = _write(axes, wrap(heading, width, font), y, fontweight="bold") + 4 * bool(heading)
        for bar in bars:
            value = format_number(bar.value, percent=percent)
            axes.text(maximum, y + _FONT, value, ha="right", va="baseline")
            room = width - round(font.getlength(value)) - 8
            bottom = _write(axes, wrap(bar.label, room, font) or [""], y) + 6
            colour = CATEGORICAL[labels.index(bar.label) % len(CATEGORICAL) if several else 0]
            _draw(axes, bar, bottom + _BAR / 2, maximum, colour, marks)
            tips = [f"{bar.label}: {value}"]
            if bar.interval:
                low, high = (format_number(v, percent=percent) for v in bar.interval)
                tips[0] += f" ({low} – {high})"
            tips += [f"{k}: {format_number(v, percent=percent)}" for k, v in bar.baselines.items()]
            areas.append(Area(0, y, width, bottom + _BAR - y, "\n".join(tips)))
            y = bottom + _BAR + 6
        y += 10
    height = y - 14
    figure.set_size_inches(width / 72, height / 72)
    axes.set(xlim=(0, maximum), ylim=(height, 0))
    axes.set_axis_off()
    return figure, areas


def _write(axes: Axes, lines: Sequence[str], top: Number, **font: str) -> Number:
    """Writes lines of text at the left; returns where they end."""
    for k, line in enumerate(lines):
        axes.text(0, top + k * _LINE + _FONT, line, va="baseline", **font)
    return top + len(lines) * _LINE


def _draw(
    axes: Axes, bar: Bar, y: float, maximum: float, colour: str, marks: Mapping[str, str]
) -> None:
    """A bar over its track, with its interval and the marks of its baselines."""
    axes.barh(y, maximum, _BAR, color=INK, alpha=0.08, clip_on=False)
    axes.barh(y, bar.value, _BAR, color=colour, clip_on=False)
    pen = {"color": INK, "linewidth": 1.6, "clip_on": False}
    if bar.interval:
        axes.plot(bar.interval, (y, y), marker="|", markersize=7, alpha=0.8, **pen)
    ends = (y - _BAR / 2 - 2, y + _BAR / 2 + 2)
    for name, value in bar.baselines.items():
        axes.plot((value, value), ends, marker=marks[name], markevery=[0], **pen)
