"""Number formats, and charts: what is drawn where, what is said next to it, and what it costs."""

from __future__ import annotations

import itertools
import math
import re
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib import colors

from perception_jax.errors import DataError
from perception_jax.viz import Bar, bar_chart, charts, figures, heat_table, line_chart
from perception_jax.viz.formatting import format_number

HOSTILE = '<script>alert(1)</script> & "$x^2$" 漢 id="p1" font-family: a; 0.123456  M 1'
XLINK = "{http://www.w3.org/1999/xlink}href"


def drawings(chart: str) -> list[ElementTree.Element]:
    """The two SVGs of a chart, parsed: also shows that the markup is well formed."""
    space = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    return [
        ElementTree.fromstring(svg.replace("<svg", f"<svg {space}", 1))
        for svg in re.findall(r'<svg class="pj-(?:wide|narrow)".*?</svg>', chart, flags=re.DOTALL)
    ]


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text for element in svg.iter("text")]


def tips(svg: ElementTree.Element) -> list[str]:
    return [area.find("title").text for area in svg.findall("rect")]


def stroke(svg: ElementTree.Element, colour: str) -> str:
    """The path of the only curve in a colour; markers are defined with an id."""
    paths = (p for p in svg.iter("path") if p.get("id") is None)
    (found,) = (p.get("d") for p in paths if f"stroke: {colour}" in p.get("style"))
    return found


def path(svg: ElementTree.Element, colour: str) -> np.ndarray:
    """Its points, pixels from the left top."""
    return np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", stroke(svg, colour)), float)


def drawn_lines(series: dict, *, size=(720, 300), **references):
    """The axes of a line chart, drawn."""
    curves = {name: charts._curve(name, *xy, log_y=False) for name, xy in series.items()}
    with figures.style():
        figure = charts.line_figure(curves, references, size, log_y=False, percent=False)
        figure.draw_without_rendering()
    return figure.axes[0]


def drawn_bars(groups: dict, **options):
    with figures.style():
        figure, areas = charts.bar_figure(groups, 720, percent=False, **options)
        figure.draw_without_rendering()
    return figure.axes[0], areas


@pytest.mark.parametrize(
    ("value", "percent", "expected"),
    [
        (0.0, False, "0"),
        (-0.00001, False, "-1e-5"),
        (0.8123456, False, "0.8123"),
        (12.0, False, "12"),
        (1234.5, False, "1,234"),
        (2.5e8, False, "2.5e8"),
        (math.nan, False, "nan"),
        (0.41249, True, "41.2 %"),
        (1.0, True, "100 %"),
        (0.0000321, True, "0.00321 %"),
    ],
)
def test_format_number(value, percent, expected):
    assert format_number(value, percent=percent) == expected


def test_lines_are_drawn_at_their_values_in_order_of_x():
    axes = drawn_lines({"a": ([3, 1, 2], [-5.0, 4.0, 0.5]), "b": ([1], [2.0])}, chance=0.25)
    reference, a, b = axes.get_lines()
    np.testing.assert_array_equal(a.get_xydata(), [[1, 4], [2, 0.5], [3, -5]])
    np.testing.assert_array_equal(b.get_xydata(), [[1, 2]])
    assert set(reference.get_ydata()) == {0.25}
    low, high = axes.get_ylim()
    assert low < -5 < 4 < high
    assert axes.get_xlim() == (1, 3)


def test_a_chart_holds_the_values_in_both_layouts():
    """From the SVG alone: y is linear between two labelled ticks."""
    chart = line_chart({"a": ([0, 50, 100], [0.0, 0.5, 1.0])}, "t", "step", percent=True)
    for svg in drawings(chart):
        points = path(svg, charts.CATEGORICAL[0])
        labels = {t.text: float(t.get("y")) for t in svg.iter("text")}
        zero, full = (labels[name] - 4 for name in ("0 %", "100 %"))
        np.testing.assert_allclose(points[:, 1], [zero, (zero + full) / 2, full], atol=1.5)
        assert points[1, 0] == pytest.approx(points[[0, 2], 0].mean(), abs=0.11)
        assert tips(svg)[0] == "a: 0 % (step 0)"
        assert tips(svg)[-1] == "a: 100 % (step 100)"
    assert len(drawings(chart)) == 2


def test_gaps_break_a_line_and_lone_points_are_dots():
    values = [1, 2, math.nan, 4, math.inf, 6]
    (line,) = drawn_lines({"a": (range(6), values)}).get_lines()
    np.testing.assert_array_equal(line.get_ydata(), [1, 2, math.nan, 4, math.nan, 6])
    assert line.get_marker() == "o"
    assert line.get_markevery().tolist() == [3, 5]
    svg = drawings(line_chart({"a": (range(6), values)}, "t"))[0]
    dots = [u for u in svg.iter("use") if charts.CATEGORICAL[0] in u.get("style")]
    assert len(dots) == 2
    line = stroke(svg, charts.CATEGORICAL[0])
    assert (line.count("M"), line.count("L")) == (3, 1)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.8, 6, {"1", "2", "5"}),
        (1, 30, {"1", "2", "5", "10", "20"}),
        (1e-4, 1e4, {"0.0001", "1", "10,000"}),
        (2.1, 2.9, {"2.2", "2.4", "2.6", "2.8"}),
    ],
)
def test_a_log_axis_has_few_round_labels(low, high, wanted):
    for svg in drawings(line_chart({"a": ([0, 1], [low, high])}, "t", log_y=True)):
        labels = [t.text for t in svg.iter("text") if "end" in t.get("style")]
        assert len(set(labels)) == len(labels) <= 10
        assert set(labels) >= wanted & {"1", "2.4"}
        assert all(float(t.replace(",", "")) for t in labels)
        if svg.get("class") == "pj-wide":
            assert set(labels) >= wanted


def test_a_log_axis_has_decades_evenly_and_skips_what_has_no_logarithm():
    series = {"a": (range(4), [1.0, 10.0, 100.0, 0.0])}
    svg = drawings(line_chart(series, "t", log_y=True, references={"zero": 0, "ten": 10}))[0]
    points = path(svg, charts.CATEGORICAL[0])
    assert len(points) == 3
    assert points[0, 1] - points[1, 1] == pytest.approx(points[1, 1] - points[2, 1], abs=0.21)
    assert {"1", "10", "100"} <= set(texts(svg))
    assert "zero" not in svg.find("desc").text
    with pytest.raises(DataError, match="at least one finite value above 0"):
        line_chart({"a": ([0], [0.0])}, "t", log_y=True)


@pytest.mark.parametrize(
    ("values", "has_zero"),
    [([2.0, 5.0], True), ([99.0, 100.0], False), ([-1.0, 1.0], True), ([-7.0, -6.0], False)],
)
def test_zero_is_shown_unless_the_values_are_far_from_it(values, has_zero):
    low, high = drawn_lines({"a": ([0, 1], values)}).get_ylim()
    assert (low <= 0 <= high) == has_zero


@pytest.mark.parametrize(
    ("low", "high"), [(0, 2000), (0, 1), (-1e-7, 3e-7), (1e6, 1e9), (99_999.5, 100_000.5), (7, 7)]
)
def test_tick_labels_are_distinct_true_and_do_not_touch(low, high):
    for size in figures.LAYOUTS.values():
        axis = drawn_lines({"a": ([low, high], [low, high])}, size=size).xaxis
        start, end = axis.get_view_interval()
        labels = [t for t in axis.get_ticklabels() if start <= t.get_position()[0] <= end]
        boxes = [label.get_window_extent() for label in labels]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
        scale = 10.0 ** float((axis.get_offset_text().get_text() or "1e0")[2:].replace("−", "-"))
        found = [float(t.get_text().replace("−", "-")) * scale for t in labels]
        expected = [t.get_position()[0] for t in labels]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * abs(high - low))
        assert len(labels) >= 1


def test_series_stay_distinct_when_the_colours_come_round():
    series = {str(k): ([0, 1], [k, k + 1]) for k in range(16)}
    lines = drawn_lines(series).get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 16
    samples = re.findall(r'class="pj-line" style="(.*?)"', line_chart(series, "t"))
    assert len(set(samples)) == len(samples) == 16


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-3.0, -3.0], [1e-12, 1e12], [-2.0, 3.0]])
def test_awkward_ranges_stay_inside(values):
    for svg in drawings(line_chart({"a": (range(len(values)), values)}, "t")):
        width, height = map(float, svg.get("viewBox").split()[2:])
        dots = [(u.get("x"), u.get("y")) for u in svg.iter("use")]
        points = [*path(svg, charts.CATEGORICAL[0])] if len(values) > 1 else []
        assert len(dots) + len(points) >= len(values)
        for x, y in [*dots, *points]:
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def test_long_curves_are_small_and_keep_their_extremes():
    y = np.random.default_rng(0).normal(0, 1, 50_000)
    y[12_345], y[40_000] = 50.0, -50.0
    chart = line_chart({"a": (np.arange(50_000), y)}, "t")
    assert len(chart) < 120_000
    for svg in drawings(chart):
        points = path(svg, charts.CATEGORICAL[0])
        low, high = points[points[:, 1].argmax()], points[points[:, 1].argmin()]
        span = np.ptp(points[:, 0])
        assert (high[0] - points[0, 0]) / span == pytest.approx(12_345 / 50_000, abs=0.005)
        assert (low[0] - points[0, 0]) / span == pytest.approx(40_000 / 50_000, abs=0.005)
        assert np.ptp(points[:, 1]) > 0.8 * float(svg.get("viewBox").split()[3])


def test_line_chart_refusals():
    with pytest.raises(DataError, match="found none in the 0 series"):
        line_chart({}, "t")
    with pytest.raises(DataError, match="found none in the 1 series"):
        line_chart({"a": ([1, 2], [math.nan, math.inf])}, "t")
    with pytest.raises(DataError, match=r"found shapes \(2,\) and \(3,\) in series 'a'"):
        line_chart({"a": ([1, 2], [1, 2, 3])}, "t")
    with pytest.raises(DataError, match="finite x"):
        line_chart({"a": ([1, math.nan], [1, 2])}, "t")


def test_screen_readers_get_the_numbers():
    svg = drawings(
        line_chart({"loss": ([0, 9, 10], [3.0, 0.5, 1.0])}, "Loss", references={"chance": 2})
    )[0]
    assert svg.get("role") == "img"
    assert svg.find("title").text == "Loss"
    assert svg.find("desc").text == "loss: 3 (x 0); loss: 1 (x 10); chance: 2"
    bars = drawings(bar_chart({"": [Bar("b", 0.8, {"chance": 0.4}, (0.7, 0.9))]}, "t"))[0]
    assert bars.find("desc").text == "b: 0.8 (0.7 – 0.9), chance: 0.4"


def test_bars_marks_and_intervals_are_as_long_as_their_values():
    bars = [Bar("a", 0.2), Bar("b", 0.8, {"chance": 0.4, "pixels": 0.5}, (0.7, 0.9))]
    marks = {"chance": "", "pixels": "v"}
    axes, areas = drawn_bars({"group": bars}, maximum=1.0, marks=marks)
    track, a, other, b = axes.patches
    assert [bar.get_width() for bar in (track, a, other, b)] == [1.0, 0.2, 1.0, 0.8]
    assert (a.get_y(), b.get_y()) == (track.get_y(), other.get_y())
    assert a.get_y() + a.get_height() < b.get_y()
    assert axes.get_xlim() == (0, 1)
    interval, chance, pixels = axes.get_lines()
    assert list(interval.get_xdata()) == [0.7, 0.9]
    assert (set(chance.get_xdata()), set(pixels.get_xdata())) == ({0.4}, {0.5})
    for mark in (chance, pixels):
        start, end = mark.get_ydata()
        assert start < b.get_y() < b.get_y() + b.get_height() < end
    assert chance.get_marker() != pixels.get_marker()
    assert areas[1].text == "b: 0.8 (0.7 – 0.9)\nchance: 0.4\npixels: 0.5"


def test_bars_have_their_labels_and_values_above_them():
    groups = {"group": [Bar("a", 0.2), Bar("b", 0.8, {"chance": 0.1})], "": [Bar("long " * 40, 1)]}
    chart = bar_chart(groups, "t", percent=True)
    for svg, lines in zip(drawings(chart), (2, 5), strict=True):
        found = texts(svg)
        assert found[:5] == ["group", "20 %", "a", "80 %", "b"]
        assert found[5] == "100 %"
        assert " ".join(found[6:]).split() == ["long"] * 40
        assert len(found[6:]) == lines
    assert re.findall(r"<li><span[^>]*>(.)</span>(\w+)</li>", chart) == [("❘", "chance")]


def test_bar_labels_keep_their_colour_across_groups():
    groups = {"x": [Bar("a", 1), Bar("b", 1)], "y": [Bar("b", 2)]}
    axes, _ = drawn_bars(groups, maximum=2.0, marks={})
    found = [colors.to_hex(bar.get_facecolor()) for bar in axes.patches[1::2]]
    assert found == [charts.CATEGORICAL[k] for k in (0, 1, 1)]
    plain, _ = drawn_bars({"x": groups["x"]}, maximum=2.0, marks={})
    assert len({bar.get_facecolor() for bar in plain.patches[1::2]}) == 1


def test_bar_chart_refusals():
    with pytest.raises(DataError, match="at least one bar"):
        bar_chart({"a": []}, "t")
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(DataError, match="for bar 'b' of bar_chart 't'"):
            bar_chart({"": [Bar("b", value)]}, "t")
    assert len(drawings(bar_chart({"": [Bar("none", 0)]}, "t"))) == 2


def test_text_is_escaped_and_drawn_as_it_is():
    bars = bar_chart({HOSTILE: [Bar(HOSTILE, 1, {HOSTILE: 0.5})]}, HOSTILE)
    lines = line_chart(
        {HOSTILE: ([0, 1], [0, 1]), "b": ([0], [0.25])},
        HOSTILE,
        HOSTILE,
        HOSTILE,
        references={HOSTILE: 0.5},
    )
    wanted = HOSTILE.split()
    for svg in drawings(bars):
        words = " ".join(texts(svg)).split()
        assert words == [*wanted, "1", *wanted]
    for chart in (bars, lines):
        assert "<script" not in chart
        assert not re.search(r"https?:", chart)
        for svg in drawings(chart):
            assert svg.find("title").text == HOSTILE
            assert HOSTILE in tips(svg)[0]


def test_ids_do_not_meet_on_one_page():
    """Clip paths and markers of different charts, and of both layouts, keep to themselves."""
    page = "".join(
        [
            line_chart({"a": ([0, 1], [0, 1])}, "t"),
            line_chart({"a": ([0, 1], [0, 2])}, "t"),
            bar_chart({"": [Bar("a", 1, {"x": 1}, (0, 1))]}, "t"),
        ]
    )
    every = []
    for svg in drawings(page):
        ids = [e.get("id") for e in svg.iter() if e.get("id")]
        used = {e.get(XLINK, "")[1:] for e in svg.iter("use")}
        used |= set(re.findall(r"url\(#([^)]*)\)", ElementTree.tostring(svg, "unicode")))
        assert set(ids) == used
        every += ids
    assert len(set(every)) == len(every) > 6
    # A style sheet inside an SVG applies to the whole page.
    assert "<style" not in "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))


def test_the_same_chart_is_the_same_bytes_whatever_else_is_set(monkeypatch):
    def charts_of_today() -> str:
        lines = line_chart({"a": ([0, 1, 2], [0, math.nan, 1])}, "t", references={"b": 0.5})
        return lines + bar_chart({"g": [Bar("a", 1, {"x": 1}, (0, 1))]}, "t")

    # Without pyplot, which has global state and may open windows.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    first = charts_of_today()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        assert charts_of_today() == first
        assert matplotlib.rcParams["font.size"] == 30
        assert matplotlib.rcParams["svg.fonttype"] == "path"


def test_charts_follow_the_colour_of_the_page():
    chart = line_chart({"a": ([0, 1], [0, 1])}, "t") + bar_chart({"": [Bar("a", 1)]}, "t")
    for svg in drawings(chart):
        assert all("fill: currentColor" in t.get("style") for t in svg.iter("text"))
        markup = ElementTree.tostring(svg, "unicode")
        found = set(re.findall(r"#[0-9a-f]{6}\b", markup))
        assert found == {charts.CATEGORICAL[0]}
        assert "font-family" not in markup


def test_heat_table_tints_by_value_and_leaves_nan_empty():
    table = heat_table(np.array([[0.0, 1.0], [0.5, np.nan]]), ["r", "<s>"], ["c", "d"], "t")
    assert re.findall(r"/(0\.\d\d)\)\">([^<]*)<", table) == [
        ("0.00", "0"),
        ("0.40", "1"),
        ("0.20", "0.5"),
    ]
    assert "<td></td></tr>" in table
    assert "&lt;s&gt;" in table
    with pytest.raises(DataError, match="1 x 2 as named"):
        heat_table(np.ones((2, 2)), ["r"], ["c", "d"], "t")


def test_heat_table_without_numbers_tints_by_the_root_and_keeps_them_under_the_pointer():
    values = np.array([[0.0, 0.5], [0.125, np.nan]])
    table = heat_table(values, ["r", "s"], ["c", "d"], "t", percent=True, numbered=False)
    assert re.findall(r"/(\d\.\d\d)\)\" title=\"([^\"]*)\"></td>", table) == [
        ("0.00", "0 %"),
        ("1.00", "50 %"),
        ("0.50", "12.5 %"),
    ]
    assert '<table class="heat fine">' in table
