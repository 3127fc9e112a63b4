"""Ticks, number formats, thinning, and what the chart strings hold."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.errors import DataError
from perception_jax.viz import Bar, axes, bar_chart, heat_table, line_chart

numbers = st.floats(-1e9, 1e9, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-9)


def drawings(chart: str) -> list[ElementTree.Element]:
    """The two SVGs of a chart, parsed: also shows that the markup is well formed."""
    return [
        ElementTree.fromstring(svg)
        for svg in re.findall(r'<svg class="pj-(?:wide|narrow)".*?</svg>', chart, flags=re.DOTALL)
    ]


def texts(chart: str) -> list[str]:
    return [element.text for element in drawings(chart)[0].iter("text")]


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 1, 6, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 2000, 9, [0, 250, 500, 750, 1000, 1250, 1500, 1750, 2000]),
        (-0.3, 0.31, 5, [-0.2, 0.0, 0.2]),
        (4.99, 5.01, 3, [4.99, 5.0, 5.01]),
        (7, 7, 5, [7]),
    ],
)
def test_linear_ticks(low, high, count, expected):
    assert axes.linear_ticks(low, high, count) == expected


@settings(deadline=None)
@given(numbers, numbers, st.integers(2, 10))
def test_linear_ticks_are_few_even_and_inside(first, second, count):
    low, high = sorted((first, second))
    if high - low < 1e-6 * max(abs(low), abs(high)) or high == low:
        return
    ticks = axes.linear_ticks(low, high, count)
    slack = 1e-6 * (high - low)
    assert 1 <= len(ticks) <= count
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    if len(ticks) > 2:
        steps = np.diff(ticks)
        assert np.ptp(steps) <= 1e-6 * steps.max()
    # Adjacent labels can be told apart.
    assert len(set(ticks)) == len(ticks)


def test_log_ticks():
    assert axes.log_ticks(0.8, 6, 6) == [1, 2, 5]
    assert axes.log_ticks(1e-4, 1e4, 5) == [1e-4, 1e-2, 1, 1e2, 1e4]
    assert axes.log_ticks(2.1, 2.9, 5) == axes.linear_ticks(2.1, 2.9, 5)


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
    assert axes.format_number(value, percent=percent) == expected


@pytest.mark.parametrize(
    ("ticks", "percent", "expected"),
    [
        ([0, 2.5, 5], False, ["0", "2.5", "5"]),
        ([99_999.5, 100_000, 100_000.5], False, ["99,999.5", "100,000", "100,000.5"]),
        ([0.0, 0.025, 0.05], True, ["0 %", "2.5 %", "5 %"]),
        ([0.0, 2e-5], False, ["0", "2e-5"]),
        ([1e7, 2e7], False, ["1e7", "2e7"]),
    ],
)
def test_format_ticks_is_exact(ticks, percent, expected):
    assert axes.format_ticks(ticks, percent=percent) == expected


def test_series_stay_distinct_when_the_colours_come_round():
    chart = line_chart({str(k): ([0, 1], [k, k + 1]) for k in range(16)}, "t")
    paths = drawings(chart)[0].findall("path")
    assert len({(p.get("stroke"), p.get("stroke-dasharray")) for p in paths}) == 16


@settings(deadline=None)
@given(st.text(alphabet="abc WMé漢 ", max_size=60), st.integers(30, 200))
def test_wrap_text_fits_and_loses_nothing(text, width):
    lines = axes.wrap_text(text, width, 12)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert all(axes.text_width(line, 12) <= width for line in lines)


def test_thin_keeps_ends_extremes_and_gaps():
    y = np.sin(np.arange(10_000) / 50)
    y[4321], y[5000], y[7000] = 9.0, -9.0, np.nan
    kept = axes.thin(y, 100)
    assert len(kept) < 310
    assert {0, 4321, 5000, 7000, 9999} <= set(kept.tolist())
    assert axes.thin(y[:150], 100).tolist() == list(range(150))


def test_line_chart_draws_each_series_once_per_layout():
    chart = line_chart(
        {"train <a>": ([0, 50, 100], [1.0, 0.5, 0.25]), "test": (np.arange(3), np.ones(3))},
        'Loss & "more"',
        "step",
        "nats",
        references={"chance": 0.7},
    )
    assert len(drawings(chart)) == 2
    for svg in drawings(chart):
        assert svg.find("title").text == 'Loss & "more"'
        assert len(svg.findall("path")) == 2
    assert "train &lt;a&gt;" in chart
    assert "train <a>: 0.25 (step 100)" in [t.text for t in drawings(chart)[0].iter("title")][-1]
    assert "<script" not in chart
    assert "http" not in chart


def test_line_chart_breaks_at_gaps_and_marks_lone_points():
    chart = line_chart({"a": (range(6), [1, 2, math.nan, 4, math.inf, 6])}, "t")
    path = drawings(chart)[0].find("path").get("d")
    assert path.count("M") == 1
    # Points 3 and 5 stand alone between gaps.
    assert len(drawings(chart)[0].findall("circle")) == 2


def test_log_axis_places_decades_evenly_and_skips_what_has_no_logarithm():
    chart = line_chart({"a": (range(4), [1.0, 10.0, 100.0, 0.0])}, "t", log_y=True)
    path = drawings(chart)[0].find("path").get("d")
    ys = [float(p.split()[1]) for p in path[1:].split("L")]
    assert len(ys) == 3
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)
    with pytest.raises(DataError, match="at least one finite value above 0"):
        line_chart({"a": ([0], [0.0])}, "t", log_y=True)


def test_line_chart_refusals():
    with pytest.raises(DataError, match="found none in the 0 series"):
        line_chart({}, "t")
    with pytest.raises(DataError, match=r"found shapes \(2,\) and \(3,\) in series 'a'"):
        line_chart({"a": ([1, 2], [1, 2, 3])}, "t")


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-3.0, -3.0], [1e-12, 1e12]])
def test_line_chart_of_awkward_ranges_stays_inside(values):
    chart = line_chart({"a": (range(len(values)), values)}, "t")
    for svg in drawings(chart):
        width, height = map(float, svg.get("viewBox").split()[2:])
        for circle in svg.iter("circle"):
            assert 0 <= float(circle.get("cx")) <= width
            assert 0 <= float(circle.get("cy")) <= height


def test_bar_lengths_are_proportional_and_values_written():
    bars = [Bar("a", 0.2), Bar("b", 0.8, {"chance": 0.4}, (0.7, 0.9))]
    chart = bar_chart({"group <&>": bars}, "t", percent=True, maximum=1.0)
    svg = drawings(chart)[0]
    filled = [r for r in svg.iter("rect") if r.get("fill") != "currentColor"]
    track = next(r for r in svg.iter("rect") if r.get("fill") == "currentColor")
    widths = [float(r.get("width")) / float(track.get("width")) for r in filled]
    assert widths == pytest.approx([0.2, 0.8], abs=1e-3)
    assert texts(chart) == ["group <&>", "a", "20 %", "b", "80 %"]
    tips = [title.text for title in svg.iter("title")]
    assert tips[2] == "b: 80 %\nchance: 40 %"
    mark = svg.findall("g")[1].findall("line")[-1]
    share = (float(mark.get("x1")) - float(track.get("x"))) / float(track.get("width"))
    assert share == pytest.approx(0.4, abs=1e-3)


def test_bar_labels_keep_their_colour_across_groups():
    chart = bar_chart({"x": [Bar("a", 1), Bar("b", 1)], "y": [Bar("b", 2)]}, "t")
    colours = [r.get("fill") for r in drawings(chart)[0].iter("rect")][1::2]
    assert colours[0] != colours[1] == colours[2]


def test_bar_chart_refusals():
    with pytest.raises(DataError, match="at least one bar"):
        bar_chart({"a": []}, "t")
    with pytest.raises(DataError, match="for bar 'b' of bar_chart 't'"):
        bar_chart({"": [Bar("b", -1.0)]}, "t")


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
