"""Checks of what annotation files say; a failure names the place, what was expected and found."""

from __future__ import annotations

import difflib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from perception_jax.data import records
from perception_jax.errors import DataError

Outside = Literal["error", "clip"]
"""What to do with a box that leaves its image or has no area: raise, or cut it and drop it if
nothing remains."""

BOX_SLACK = 1.0
"""Pixels by which a box may leave its image and is cut without a word: rounding."""

Check = Callable[[Any, str], Any]
"""Takes a JSON value and where it stands; returns it in our types or raises `DataError`."""


def check_index(index: int, count: int) -> None:
    """Raises `IndexError` outside [0, count), as `Source` asks; negative numbers do not wrap."""
    if not 0 <= index < count:
        raise IndexError(f"record {index} of {count}")


def fail(where: str, expected: str, value: Any) -> DataError:
    """The error to raise for `value` at `where`."""
    found = repr(value)
    found = found if len(found) <= 80 else f"{found[:77]}..."
    return DataError(f"{where}: expected {expected}, found {found}.")


def text(value: Any, where: str) -> str:
    """A string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise fail(where, "a text that is not blank", value)
    return value


def any_text(value: Any, where: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise fail(where, "a text", value)
    return value


def integer(value: Any, where: str) -> int:
    """A whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise fail(where, "a whole number", value)
    return value


def boolean(value: Any, where: str) -> bool:
    """True, False, or COCO's 0 and 1."""
    if value not in (True, False):
        raise fail(where, "true or false", value)
    return bool(value)


def numbers(count: int) -> Check:
    """A list of `count` finite numbers."""

    def check(value: Any, where: str) -> tuple[float, ...]:
        good = isinstance(value, list) and len(value) == count
        if not good or not all(_is_finite(number) for number in value):
            raise fail(where, f"a list of {count} finite numbers", value)
        return tuple(float(number) for number in value)

    return check


def list_of(check: Check) -> Check:
    """A list, each item checked."""

    def check_all(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise fail(where, "a list", value)
        return tuple(check(item, f"{where}[{k}]") for k, item in enumerate(value))

    return check_all


def optional(check: Check) -> Check:
    """Null, or what `check` asks for."""
    return lambda value, where: None if value is None else check(value, where)


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise fail(where, "an object {…}", value)
    return value


def text_mapping(value: Any, where: str) -> dict[str, str]:
    """A JSON object of texts."""
    return {key: any_text(item, f"{where}.{key}") for key, item in mapping(value, where).items()}


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
            raise DataError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    for key in required:
        if key not in found:
            raise DataError(
                f"{where}: expected the key {key!r}, found only {sorted(found) or 'none'}."
            )
    return {key: known[key](item, f"{where}: {key}") for key, item in found.items()}


def nearest(word: str, known: Iterable[str]) -> str:
    """'. Did you mean …?' or what there is, for the end of a message."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f". Did you mean {close[0]!r}?"
    return f"; known are {', '.join(known)}."


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
      DataError: missing, not UTF-8, or not JSON.
    """
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, found: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text ({error}).") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}). Is the file complete?") from None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
