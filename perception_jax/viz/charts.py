"""Charts as strings of HTML with inline SVG: no script, no font, no plotting library.

A chart is drawn twice, for wide and for narrow places, and a container query shows the one that
fits: text keeps its size on a phone and is laid out for it. Titles, axis labels and legends are
HTML, so that the browser wraps them. Colours come from a palette that reads on light and on dark;
the rest follows `currentColor`. Values appear as tooltips.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from perception_jax.errors import DataError
from perception_jax.viz import axes, svg
from perception_jax.viz.axes import Number
from perception_jax.viz.colormap import CATEGORICAL

Numbers = np.ndarray | Sequence[Number]

_Scale = Callable[[Number], float]
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_REFERENCE_DASHES = ("1 4", "5 4", "8 3 1 3")
_LINE = 1.35 * svg.FONT_SIZE
_BAR = 14.0


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
    name: str
    colour: str
    dash: str
    x: np.ndarray
    y: np.ndarray


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
    references = {k: float(v) for k, v in (references or {}).items() if v > 0 or not log_y}
    picture = _LinePicture(curves, references, log_y=log_y, percent=percent, x_name=x_label or "x")
    drawings = "".join(picture.draw(layout, title) for layout in svg.LAYOUTS)
    middle = ((1, 6), (25, 6))
    legend = [(c.name, svg.swatch(svg.polyline(middle, c.colour, c.dash))) for c in curves]
    legend += [(name, svg.swatch(_reference(k, *middle))) for k, name in enumerate(references)]
    if len(legend) == 1:
        legend = []
    return svg.frame(title, legend, drawings, x_label=x_label, y_label=y_label)


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
    dash = _DASHES[(index + turn) % len(_DASHES)]
    return _Curve(name, CATEGORICAL[colour], dash, x[order], y[order])


def _reference(kind: int, start: tuple[Number, Number], end: tuple[Number, Number]) -> str:
    dash = _REFERENCE_DASHES[kind % len(_REFERENCE_DASHES)]
    return svg.line(start, end, opacity=0.75, width=1.4, dash=dash)


class _LinePicture:
    """Curves with the ranges that both drawings share."""

    def __init__(
        self,
        curves: Sequence[_Curve],
        references: Mapping[str, float],
        *,
        log_y: bool,
        percent: bool,
        x_name: str,
    ):
        self.curves, self.references = curves, references
        self.log_y, self.percent, self.x_name = log_y, percent, x_name
        y = np.concatenate([*(c.y[np.isfinite(c.y)] for c in curves), [*references.values()]])
        x = np.concatenate([c.x for c in curves])
        self.x_range = float(x.min()), float(x.max())
        self.y_range = self._padded(float(y.min()), float(y.max()))

    def _padded(self, low: float, high: float) -> tuple[float, float]:
        if self.log_y:
            margin = (high / low) ** 0.04 if high > low else 2.0
            return low / margin, high * margin
        # Zero is part of the picture unless the values are far from it.
        if 0 <= low < 0.5 * high:
            low = 0.0
        margin = 0.04 * (high - low) if high > low else 0.5 * abs(high) or 1.0
        return (low if low == 0 < high else low - margin), high + margin

    def draw(self, layout: svg.Layout, title: str) -> str:
        """The chart as one SVG."""
        make_ticks = axes.log_ticks if self.log_y else axes.linear_ticks
        y_ticks = make_ticks(*self.y_range, layout.y_ticks)
        y_texts = axes.format_ticks(y_ticks, percent=self.percent)
        left = max(axes.text_width(t, svg.FONT_SIZE) for t in y_texts) + 8
        x_ticks, x_texts, right = self._fit_x_ticks(layout, left)
        left = max(left, axes.text_width(x_texts[0], svg.FONT_SIZE) / 2)
        top, bottom = svg.FONT_SIZE, layout.height - 2.0 * svg.FONT_SIZE
        right = layout.width - right
        to_x = svg.scale(self.x_range, left, right)
        to_y = svg.scale(self.y_range, bottom, top, log=self.log_y)
        parts = []
        for tick, text in zip(y_ticks, y_texts, strict=True):
            y = to_y(tick)
            parts.append(svg.line((left, y), (right, y), opacity=0.14))
            parts.append(svg.text(left - 8, y + 0.35 * svg.FONT_SIZE, text, "end"))
        for tick, text in zip(x_ticks, x_texts, strict=True):
            x = to_x(tick)
            parts.append(svg.line((x, bottom), (x, bottom + 4), opacity=0.4))
            parts.append(svg.text(x, bottom + 1.7 * svg.FONT_SIZE, text, "middle"))
        parts.append(svg.line((left, bottom), (right, bottom), opacity=0.4))
        for k, value in enumerate(self.references.values()):
            parts.append(_reference(k, (left, to_y(value)), (right, to_y(value))))
        for curve in self.curves:
            kept = axes.thin(curve.y, layout.width // 3)
            points = [
                (to_x(x), to_y(y) if np.isfinite(y) else math.nan)
                for x, y in zip(curve.x[kept].tolist(), curve.y[kept].tolist(), strict=True)
            ]
            parts.append(svg.polyline(points, curve.colour, curve.dash))
        parts += self._bands(layout, (left, top, right, bottom), to_x, to_y)
        return svg.drawing(layout, layout.height, title, "".join(parts))

    def _fit_x_ticks(self, layout: svg.Layout, left: float) -> tuple[list[float], list[str], float]:
        """As many x ticks as fit without their labels touching, and the right margin."""
        low, high = self.x_range
        for count in range(layout.x_ticks, 0, -1):
            ticks = axes.linear_ticks(low, high, count)
            texts = axes.format_ticks(ticks)
            widths = [axes.text_width(t, svg.FONT_SIZE) for t in texts]
            right = max(8.0, widths[-1] / 2)
            if len(ticks) == 1:
                break
            step = (layout.width - left - right) * (ticks[1] - ticks[0]) / (high - low)
            if step >= max(widths) + 10:
                break
        return ticks, texts, right

    def _bands(
        self,
        layout: svg.Layout,
        box: tuple[Number, Number, Number, Number],
        to_x: _Scale,
        to_y: _Scale,
    ) -> list[str]:
        """Columns that show the values under the pointer, each with a tooltip."""
        left, top, right, bottom = box
        edges = np.linspace(*self.x_range, layout.bands + 1)
        width = (right - left) / layout.bands
        parts = []
        for k in range(layout.bands):
            dots, tips = [], []
            for curve in self.curves:
                inside = (curve.x >= edges[k]) & (curve.x <= edges[k + 1]) & np.isfinite(curve.y)
                if not inside.any():
                    continue
                distance = np.abs(curve.x - (edges[k] + edges[k + 1]) / 2)
                nearest = np.argmin(np.where(inside, distance, np.inf))
                x, y = float(curve.x[nearest]), float(curve.y[nearest])
                dots.append(svg.circle(to_x(x), to_y(y), curve.colour))
                shown = axes.format_number(y, percent=self.percent)
                tips.append(f"{curve.name}: {shown} ({self.x_name} {axes.format_number(x)})")
            if tips:
                x = left + k * width
                area = svg.rectangle(x, top, width, bottom - top, "transparent")
                guide = svg.line((x + width / 2, top), (x + width / 2, bottom))
                inner = svg.tooltip(*tips) + area + guide + "".join(dots)
                parts.append(f'<g class="pj-band">{inner}</g>')
        return parts


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
    values = [_values(bar, title) for bar in bars]
    if maximum is None:
        maximum = max(max(v) for v in values) or 1.0
    labels = list(dict.fromkeys(bar.label for bar in bars))
    several = len(labels) < len(bars)
    picture = _BarPicture(
        groups,
        colours={
            label: CATEGORICAL[k % len(CATEGORICAL) if several else 0]
            for k, label in enumerate(labels)
        },
        baselines=list(dict.fromkeys(name for bar in bars for name in bar.baselines)),
        maximum=float(maximum),
        percent=percent,
    )
    drawings = "".join(picture.draw(layout, title) for layout in svg.LAYOUTS)
    legend = [(name, svg.swatch(_mark(k, 13, 1, 10))) for k, name in enumerate(picture.baselines)]
    return svg.frame(title, legend, drawings)


def _values(bar: Bar, title: str) -> tuple[Number, ...]:
    values = (bar.value, *bar.baselines.values(), *(bar.interval or ()))
    if not all(math.isfinite(v) and v >= 0 for v in values):
        raise DataError(
            f"expected finite values of at least 0, found {values} for bar {bar.label!r} of "
            f"bar_chart {title!r}"
        )
    return values


def _mark(kind: int, x: Number, top: Number, height: Number, tip: str = "") -> str:
    """A baseline's mark: a line across the bar, told apart by what sits on its upper end."""
    mark = svg.line((x, top), (x, top + height), width=1.6, dash="" if kind < 3 else "2 2", tip=tip)
    if kind % 3 == 1:
        mark += f'<path d="M{x - 3.5:.1f} {top:.1f}h7l-3.5 5z" fill="currentColor"/>'
    elif kind % 3 == 2:
        mark += svg.circle(x, top + 1, "currentColor", 2.6)
    return mark


@dataclasses.dataclass(frozen=True)
class _BarPicture:
    """Bars with the choices that both drawings share."""

    groups: Mapping[str, Sequence[Bar]]
    colours: Mapping[str, str]
    baselines: Sequence[str]
    maximum: float
    percent: bool

    def _shown(self, value: Number) -> str:
        return axes.format_number(value, percent=self.percent)

    def draw(self, layout: svg.Layout, title: str) -> str:
        """The chart as one SVG, as tall as its rows need."""
        shown = [self._shown(bar.value) for bars in self.groups.values() for bar in bars]
        left = layout.label_column + 10.0 if layout.label_column else 0.0
        right = layout.width - max(axes.text_width(t, svg.FONT_SIZE) for t in shown) - 14
        to_x = svg.scale((0.0, self.maximum), left, right)
        parts, y = [], 2.0
        for heading, bars in self.groups.items():
            if heading:
                lines = axes.wrap_text(heading, layout.width - 4, 1.1 * svg.FONT_SIZE)
                parts += _text_block(lines, y, bold=True)
                y += len(lines) * _LINE + 6
            for bar in bars:
                row, y = self._row(layout, bar, y, to_x)
                parts.append(row)
            y += 10
        return svg.drawing(layout, y - 10, title, "".join(parts))

    def _row(self, layout: svg.Layout, bar: Bar, y: Number, to_x: _Scale) -> tuple[str, float]:
        """One bar with its label (beside it, or above where there is no label column)."""
        lines = axes.wrap_text(bar.label, (layout.label_column or layout.width) - 4, svg.FONT_SIZE)
        block = len(lines) * _LINE
        if layout.label_column:
            height = max(block, _BAR)
            labels, top = _text_block(lines, y + (height - block) / 2), y + (height - _BAR) / 2
        else:
            height = block + 2 + _BAR
            labels, top = _text_block(lines, y), y + block + 2
        value = self._shown(bar.value)
        middle = top + _BAR / 2
        track = svg.rectangle(to_x(0), top, to_x(self.maximum) - to_x(0), _BAR, "currentColor")
        tips = [f"{bar.label}: {value}"]
        tips += [f"{name}: {self._shown(v)}" for name, v in bar.baselines.items()]
        parts = [
            svg.tooltip(*tips),
            *labels,
            f'<g opacity="0.08">{track}</g>',
            svg.rectangle(to_x(0), top, to_x(bar.value) - to_x(0), _BAR, self.colours[bar.label]),
            svg.text(layout.width, middle + 0.35 * svg.FONT_SIZE, value, "end"),
        ]
        if bar.interval:
            low, high = (to_x(v) for v in bar.interval)
            parts.append(svg.line((low, middle), (high, middle), opacity=0.75, width=1.4))
        for kind, name in enumerate(self.baselines):
            if name in bar.baselines:
                parts.append(_mark(kind, to_x(bar.baselines[name]), top - 2, _BAR + 4))
        return f"<g>{''.join(parts)}</g>", y + height + 8


def _text_block(lines: Sequence[str], top: Number, *, bold: bool = False) -> list[str]:
    return [svg.text(0, top + (k + 0.77) * _LINE, line, bold=bold) for k, line in enumerate(lines)]
