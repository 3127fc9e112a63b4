"""Axes without a plotting library: round ticks, number formats, text widths, thinning of curves."""

from __future__ import annotations

import math
import numbers
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

Number = numbers.Real
"""Any real number: int, float, or a scalar of numpy."""

_NARROW = frozenset("iljtfrI.,:;'`|!()[]{}/\\ -·")
_WIDE = frozenset("mwMW@%&—")


def text_width(text: str, font_size: Number) -> float:
    """An upper estimate of the width of sans-serif text in pixels; the reader's font is unknown.

    The classes are those of DejaVu Sans, the widest of the usual system fonts.
    """
    units = 0.0
    for character in text:
        if unicodedata.combining(character):
            continue
        if unicodedata.east_asian_width(character) in "WF":
            units += 1.05
        elif character in _NARROW:
            units += 0.42
        elif character in _WIDE:
            units += 1.0
        elif character.isupper():
            units += 0.77
        else:
            units += 0.64
    return units * font_size


def wrap_text(text: str, width: Number, font_size: Number) -> list[str]:
    """Breaks text into lines of at most `width` pixels by `text_width`; at least one line."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        candidate = f"{line} {word}" if line else word
        if text_width(candidate, font_size) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        line = ""
        for character in word:
            if line and text_width(line + character, font_size) > width:
                lines.append(line)
                line = ""
            line += character
    lines.append(line)
    return lines


def linear_ticks(low: Number, high: Number, count: int) -> list[float]:
    """At most `count` (>= 2) round numbers inside [low, high], steps of 1, 2, 2.5 or 5 x 10^k."""
    if not high > low:
        return [float(low)]
    smallest = (high - low) / count
    power = 10.0 ** math.floor(math.log10(smallest))
    for factor in (1.0, 2.0, 2.5, 5.0, 10.0, 20.0):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= count:
            break
    # Multiples of the step, rounded, so that 0.1 + 0.2 shows as 0.3 and -0.0 as 0.
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(k * step, digits) + 0.0 for k in range(first, last + 1)]


def log_ticks(low: Number, high: Number, count: int) -> list[float]:
    """At most `count` round positive numbers inside [low, high]: 1, 2, 5 x 10^k, or whole decades.

    Falls back to `linear_ticks` where fewer than two of them lie inside.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors, stride in (((1, 2, 5), 1), *(((1,), s) for s in range(1, last - first + 2))):
        ticks = [f * 10.0**k for k in range(first, last + 1, stride) for f in factors]
        inside = [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if len(inside) <= count:
            break
    return inside if len(inside) >= 2 else linear_ticks(low, high, count)


def format_number(value: Number, *, percent: bool = False) -> str:
    """A short number: four significant digits, thousands grouped; percents to one decimal."""
    if percent:
        hundredths = value * 100
        tiny = 0 < abs(hundredths) < 0.1
        return f"{_plain(hundredths) if tiny else _strip(f'{hundredths:.1f}')} %"
    size = abs(value)
    if size != 0 and (size >= 1e7 or size < 1e-4):
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{_strip(mantissa)}e{int(exponent)}"
    return _plain(value)


def format_ticks(ticks: Sequence[Number], *, percent: bool = False) -> list[str]:
    """Labels with just enough decimals for each tick's exact value, the same for all."""
    values = [float(t) * (100 if percent else 1) for t in ticks]
    largest = max(abs(v) for v in values)
    if largest >= 1e7 or 0 < largest < 1e-3:
        return [format_number(t, percent=percent) for t in ticks]
    for digits in range(9):
        if all(abs(round(v, digits) - v) <= 1e-9 * largest for v in values):
            break
    unit = " %" if percent else ""
    return [f"{_strip(f'{v:,.{digits}f}')}{unit}" for v in values]


def _plain(value: Number) -> str:
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000 or value == 0:
        return f"{value:,.0f}"
    digits = 3 - math.floor(math.log10(size))
    return _strip(f"{value:.{digits}f}")


def _strip(number: str) -> str:
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return "0" if number in ("-0", "") else number


def thin(y: Float[np.ndarray, " n"], buckets: int) -> Int[np.ndarray, " m"]:
    """Indices that keep the look of a long curve: first, last, and each bucket's extremes.

    Buckets hold equally many points. Gaps (NaN in `y`) stay gaps: a bucket's first NaN is kept.
    """
    count = len(y)
    if count <= 2 * buckets:
        return np.arange(count)
    keep = {0, count - 1}
    for bucket in np.array_split(np.arange(count), buckets):
        values = y[bucket]
        finite = bucket[np.isfinite(values)]
        if len(finite):
            keep.update((int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])))
        if len(finite) < len(bucket):
            keep.add(int(bucket[np.argmax(~np.isfinite(values))]))
    return np.array(sorted(keep))
