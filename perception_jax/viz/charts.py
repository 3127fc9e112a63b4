"""Line and bar charts by matplotlib, as HTML with inline SVG: no script, no font.

Colours come from a palette that reads on light and on dark; the rest follows the page's text.
Values appear under the pointer and, for screen readers, in the description.
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
from perception_jax.viz.figures import INK, LAYOUTS, Area
from perception_jax.viz.formatting import Number, format_number
from perception_jax.viz.grid import wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = np.ndarray | Sequence[Number]
"""A series of numbers."""

_STYLES = ("solid", "dashed", "dotted")
"""Line styles, named alike by matplotlib and by CSS."""
_FONT, _LINE, _BAR = 12, 16, 14
"""Size of text, height of a line of text and of a bar, pixels."""
_MARKS = {"": "❘", "v": "▼", "o": "●", "D": "◆", "s": "■", "^": "▲"}
"""What sits on a baseline's mark: matplotlib's marker, and a character for the legend."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of `bar_chart`.

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
      title: what the chart shows.
      x_label, y_label: quantities with their units.
      log_y: logarithmic y axis.
      percent: y values are fractions and shown as percentages.
      references: named horizontal lines, e.g. chance.

    Returns:
      HTML for `Report.add_chart` or a notebook.

    Raises:
      DataError: no series, x and y of different lengths, a bad x, or nothing to draw.
    """
    curves = {name: _curve(name, *xy, log_y=log_y) for name, xy in series.items()}
    if not any(np.isfinite(y).any() for _, y in curves.values()):
        raise DataError(
            f"expected at least one finite value{' above 0' if log_y else ''} to draw, found none "
            f"in the {len(curves)} series of line_chart {title!r}"
        )
    levels = {k: float(v) for k, v in (references or {}).items() if v > 0 or not log_y}
    said = [f"{name}: {format_number(v, percent=percent)}" for name, v in levels.items()]
    drawings = []
    with figures.style():
        for kind, size in LAYOUTS.items():
            figure = line_figure(curves, levels, size, log_y=log_y, percent=percent)
            areas = _columns(figure, curves, x_label or "x", percent)
            notes = [*dict.fromkeys((areas[0].text, areas[-1].text)), *said]
            drawings.append(figures.inline(figure, kind, title, "; ".join(notes), areas))
    legend = [(_sample(*_line_style(k)), name) for k, name in enumerate(curves)]
    legend += [(_sample("", _STYLES[2 - k % 3]), name) for k, name in enumerate(levels)]
    shown = legend if len(legend) > 1 else []
    return figures.frame(title, shown, "".join(drawings), x_label=x_label, y_label=y_label)


def _curve(name: str, x: Numbers, y: Numbers, *, log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    """A series as drawn: x ascending, y NaN where there is a gap."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1 or not np.isfinite(x).all():
        raise DataError(
            "expected x and y as equally long lists with finite x, found shapes "
            f"{x.shape} and {y.shape} in series {name!r} of line_chart"
        )
    y = np.where(np.isfinite(y) & ((y > 0) | (not log_y)), y, np.nan)
    order = np.argsort(x, kind="stable")
    return x[order], y[order]


def _line_style(index: int) -> tuple[str, str]:
    """Colour and style of a curve; once the colours come round again, styles are shifted by one."""
    turn, colour = divmod(index, len(CATEGORICAL))
    return CATEGORICAL[colour], _STYLES[(colour + turn) % len(_STYLES)]


def _sample(colour: str, style: str) -> str:
    return f'<span class="pj-line" style="border-top:2px {style} {colour}"></span>'


def line_figure(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    references: Mapping[str, float],
    size: tuple[int, int],
    *,
    log_y: bool,
    percent: bool,
) -> Figure:
    """The axes of a line chart: curves with their gaps, and references as level lines."""
    from matplotlib import ticker

    figure = figures.new(*size, layout="constrained")
    axes = figure.subplots()
    for k, value in enumerate(references.values()):
        pen = {"color": INK, "alpha": 0.75, "linewidth": 1.4}
        axes.axhline(value, linestyle=_STYLES[2 - k % 3], **pen)
    for k, (x, y) in enumerate(curves.values()):
        colour, style = _line_style(k)
        drawn = np.pad(np.isfinite(y), 1)
        alone = np.flatnonzero(drawn[1:-1] & ~drawn[:-2] & ~drawn[2:])
        dots = {"marker": "o", "markevery": alone} if len(alone) else {}
        axes.plot(x, y, color=colour, linestyle=style, clip_on=False, **dots)
    y_ticks, (low, high) = size[1] // 48, axes.dataLim.intervaly
    if log_y:
        axes.set_yscale("log")
        factors = (1, 2, 5) if high < 100 * low else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=factors, numticks=y_ticks))
        axes.yaxis.set_major_formatter(lambda value, _: format_number(value))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.locator_params(axis="y", nbins=y_ticks)
        # Zero is part of the picture unless the values are far from it.
        if 0 <= low < 0.5 * high:
            axes.set_ylim(bottom=0)
    if percent:
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=" %"))
    # As many x ticks as fit without their labels touching.
    for bins in range(size[0] // 80 + 1, 0, -1):
        axes.locator_params(axis="x", nbins=bins)
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        if all(a.x1 + 8 < b.x0 for a, b in itertools.pairwise(boxes)):
            break
    return figure


def _columns(
    figure: Figure,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    x_name: str,
    percent: bool,
) -> list[Area]:
    """Columns of the drawing with the value of each curve nearest to their middle."""
    axes = figure.axes[0]
    box, count = axes.get_window_extent(), round(figure.bbox.width / 16)
    edges, width = np.linspace(*axes.get_xlim(), count + 1), box.width / count
    areas = []
    for k, (start, end) in enumerate(itertools.pairwise(edges)):
        tips = []
        for name, (x, y) in curves.items():
            distance = np.abs(x - (start + end) / 2)
            inside = (x >= start) & (x <= end) & np.isfinite(y)
            if inside.any():
                nearest = np.argmin(np.where(inside, distance, np.inf))
                value = format_number(float(y[nearest]), percent=percent)
                tips.append(f"{name}: {value} ({x_name} {format_number(float(x[nearest]))})")
        if tips:
            top = figure.bbox.height - box.y1
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
      title: what the chart shows.
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
        for kind, (width, _) in LAYOUTS.items():
            end = float(maximum or largest or 1.0)
            figure, areas = bar_figure(groups, width, maximum=end, marks=marks, percent=percent)
            notes = "; ".join(area.text for area in areas)
            drawings.append(figures.inline(figure, kind, title, notes, areas))
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
