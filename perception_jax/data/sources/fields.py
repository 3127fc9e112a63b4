"""JSON and checks of what it says; a failure names the place, what was expected and found.

Every value that a reader takes from a file goes through one of these checks, so that no type, range
or depth of a value leads to another error than `DataError`.
"""

from __future__ import annotations

import collections
import json
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from perception_jax.data import records, text_lines
from perception_jax.errors import DataError, did_you_mean

Outside = Literal["error", "clip"]
"""What to do with a box that leaves its image or has no area: raise, or cut it and drop it if
nothing remains."""

BOX_SLACK = 1.0
"""Pixels by which a box may exceed its image before clipping is reported: rounding."""

MAX_NUMBER = 1e12
"""Largest absolute value of a coordinate or an area: below it sums and products stay finite."""

MAX_DEPTH = 32
"""Nesting depth of a value that is kept unparsed."""

_MAX_INTEGER = 2**63 - 1
_MAX_SIDE = 2**31 - 1
_MAX_NAME, _MAX_PATH = 255, 2048

Check = Callable[[Any, str], Any]
"""A function that converts a JSON value at a location to a Python value or raises `DataError`."""


def check_index(index: int, count: int) -> None:
    """Raises `IndexError` outside [0, count), as `Source` asks; negative numbers do not wrap."""
    if not 0 <= index < count:
        raise IndexError(f"record {index} of {count}")


def fail(where: str, expected: str, value: Any) -> DataError:
    """The error to raise for `value` at `where`."""
    return DataError(f"{where}: expected {expected}, found {_SHORT.repr(value)}.")


def fail_without(where: str, key: str, entry: Mapping[str, Any]) -> DataError:
    """The error to raise for an object that lacks a key."""
    return DataError(f"{where}: expected the key {key!r}, found only {keys_of(entry)}.")


def keys_of(entry: Mapping[str, Any]) -> str:
    """The keys of an object for a message, not all if they are many."""
    return _SHORT.repr(sorted(entry)) if entry else "none"


def text(value: Any, where: str) -> str:
    """A string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise fail(where, "a text that is not blank", value)
    return any_text(value, where)


def any_text(value: Any, where: str) -> str:
    """A string of whole Unicode characters: escapes of JSON can also make halves of them."""
    if not isinstance(value, str):
        raise fail(where, "a text", value)
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise fail(where, "a text without lone surrogates", value)
    return value


def file_name(value: Any, where: str) -> str:
    """A string that can be a path."""
    if "\0" in text(value, where):
        raise fail(where, "a path without NUL characters", value)
    if max(map(len, value.split("/"))) > _MAX_NAME or len(value) > _MAX_PATH:
        raise fail(where, f"a path of names of at most {_MAX_NAME} letters", value)
    return value


def integer(value: Any, where: str) -> int:
    """A whole number of 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise fail(where, "a whole number", value)
    if abs(value) > _MAX_INTEGER:
        raise fail(where, "a whole number of at most 64 bits", value)
    return value


def identity(value: Any, where: str) -> int | str:
    """An id: a whole number of 64 bits, or a text that is not blank."""
    if isinstance(value, str):
        return text(value, where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise fail(where, "a whole number or a text", value)
    return integer(value, where)


def side(value: Any, where: str) -> int:
    """A width or a height in pixels."""
    if integer(value, where) < 1:
        raise fail(where, "at least 1 pixel", value)
    if value > _MAX_SIDE:
        raise fail(where, f"at most {_MAX_SIDE} pixels", value)
    return value


def area(value: Any, where: str) -> float:
    """A finite number that is not negative."""
    if not _is_number(value) or value < 0:
        raise fail(where, "a finite number of at least 0", value)
    return float(value)


def boolean(value: Any, where: str) -> bool:
    """True, False, or COCO's 0 and 1."""
    if not isinstance(value, int) or value not in (0, 1):
        raise fail(where, "true or false", value)
    return bool(value)


def numbers(count: int) -> Check:
    """A list of `count` finite numbers."""

    def check(value: Any, where: str) -> tuple[float, ...]:
        good = isinstance(value, list) and len(value) == count
        if not good or not all(_is_number(number) for number in value):
            raise fail(where, f"a list of {count} finite numbers below {MAX_NUMBER:g}", value)
        return tuple(float(number) for number in value)

    return check


def list_of(check: Check) -> Check:
    """A list, each item checked."""

    def check_all(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise fail(where, "a list", value)
        return tuple(check(item, f"{where}[{k}]") for k, item in enumerate(value))

    return check_all


def required(entry: Any, key: str, check: Check, where: str) -> Any:
    """The value of a key that a JSON object must have, checked."""
    if key not in mapping(entry, where):
        raise fail_without(where, key, entry)
    return check(entry[key], f"{where}: {key}")


def values(entry: Any, where: str, **checks: Check) -> tuple[Any, ...]:
    """The values of several keys that a JSON object must have, checked, in the order given."""
    return tuple(required(entry, key, check, where) for key, check in checks.items())


def optional(check: Check) -> Check:
    """Null, or what `check` asks for."""
    return lambda value, where: None if value is None else check(value, where)


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise fail(where, "an object {…}", value)
    return value


def plain_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A JSON object that is kept as it is: of bounded depth."""
    level = [mapping(value, where)]
    for _ in range(MAX_DEPTH):
        inner = (one.values() if isinstance(one, Mapping) else one for one in level)
        level = [one for values in inner for one in values if isinstance(one, Mapping | list)]
        if not level:
            return value
    raise fail(where, f"at most {MAX_DEPTH} levels of nesting", value)


def text_mapping(value: Any, where: str) -> dict[str, str]:
    """A JSON object of texts."""
    found = mapping(value, where)
    return {any_text(key, where): any_text(item, f"{where}.{key}") for key, item in found.items()}


def entries(
    value: Any, where: str, known: Mapping[str, Check], required: Iterable[str]
) -> dict[str, Any]:
    """A JSON object with known keys only, each checked.

    Raises:
      DataError: an unknown key (with the nearest known one), a missing one, or a bad value.
    """
    found = mapping(value, where)
    for key in found:
        if key not in known:
            short = _SHORT.repr(key)
            raise DataError(f"{where}: unknown key {short}{did_you_mean(key[:_SHOWN], known)}")
    for key in required:
        if key not in found:
            raise fail_without(where, key, found)
    return {key: known[key](item, f"{where}: {key}") for key, item in found.items()}


def fit_box(
    box: tuple[float, ...], size: tuple[int, int] | None, outside: Outside, where: str
) -> records.Box | None:
    """A box (xyxy, pixels) checked against its image, or None if nothing remains of it.

    Args:
      box: as the file has it.
      size: the image's width and height, or None if not known yet.
      outside: see `Outside`.
      where: for the message.
    """
    x1, y1, x2, y2 = box
    if size is not None:
        slack = math.inf if outside == "clip" else BOX_SLACK
        width, height = size
        if min(x1, y1) < -slack or x2 > width + slack or y2 > height + slack:
            raise DataError(
                f"{where}: the box {box} (xyxy) leaves the image of {width}×{height} pixels. "
                'Repair it, or open the source with outside="clip".'
            )
        x1, x2 = (min(max(x, 0.0), float(width)) for x in (x1, x2))
        y1, y2 = (min(max(y, 0.0), float(height)) for y in (y1, y2))
    if x2 > x1 and y2 > y1:
        return x1, y1, x2, y2
    if outside == "clip":
        return None
    raise DataError(
        f"{where}: expected x1 < x2 and y1 < y2, found {box} (xyxy). Repair the box, or open the "
        'source with outside="clip" to leave it out.'
    )


def read_json(path: str | os.PathLike) -> Any:
    """A whole JSON file.

    Raises:
      DataError: missing, not UTF-8, or not JSON; see `parse_json`.
    """
    return parse_json(text_lines.read_text(path), str(path), " Is the file complete?")


def json_lines(path: str | os.PathLike, check: Check) -> Iterator[Any]:
    """The JSON values of a file's lines, each checked; blank lines are allowed.

    Raises:
      DataError: naming file, line and key.
    """
    for line in text_lines.lines(path):
        where = f"{path}:{line.number}"
        yield check(parse_json(line.text, where), where)


def parse_json(content: str, where: str, hint: str = "") -> Any:
    """A JSON value.

    Args:
      hint: a sentence for the end of the message if it is none.

    Raises:
      DataError: not JSON, nested too deeply to be read, or with a key twice in one object.
    """
    try:
        return json.loads(content, object_pairs_hook=_object)
    except RecursionError:
        raise DataError(f"{where}: the JSON is nested too deeply. Is it an annotation?") from None
    except ValueError as error:  # numbers of thousands of digits included
        raise DataError(f"{where}: not JSON ({error}).{hint}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"the key {_SHORT.repr(twice)} is twice in one object")
    return found


def _is_number(value: Any) -> bool:
    """Whether it is a number of bounded size: no NaN, no infinity, no boolean."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -MAX_NUMBER <= value <= MAX_NUMBER
    )


_SHOWN = 77
_SHORT = reprlib.Repr()
_SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 20, _SHOWN, _SHOWN
