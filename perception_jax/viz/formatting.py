"""Short forms of numbers for people."""

from __future__ import annotations

import math
import numbers

Number = numbers.Real
"""Any real number: int, float, or a scalar of numpy."""


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
