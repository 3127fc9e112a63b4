"""Settings from files: size-limited JSON, and the type and range of every value.

A checkpoint's settings are written by others. Each value is read as a kind (`WIDTH`, `EPS`, a
`Choice`), so that one of another type or out of range ends in one error that names it, before a
model is built:

    settings = Settings(read_json(path), "config.json")
    vision = settings.section("vision_config")
    width = vision.get("hidden_size", WIDTH, default=768)

The bounds are far outside of what is published; they keep a wrong number from becoming a hang or
gigabytes. Booleans are no integers here, and neither are strings or 12.0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import pathlib
import reprlib
from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from perception_jax.errors import ConfigError, PerceptionError

MAX_JSON = 2**28
"""Largest JSON file, bytes."""
MAX_CONTAINERS = 2**22
"""Largest number of lists and objects in one JSON; each takes 60 bytes or more of memory."""
MAX_DEPTH = 64
"""Largest nesting depth of lists and objects."""

_MISSING = object()


@runtime_checkable
class SettingType(Protocol):
    """Protocol of a setting's type and range."""

    @property
    def expected(self) -> str:
        """Describes the accepted values for messages."""

    def read(self, value: Any) -> Any:
        """Converts the value to a Python type; raises `ValueError` for other values."""


@dataclasses.dataclass(frozen=True)
class Integer:
    """A whole number of `low` to `high`."""

    low: int
    high: int

    @property
    def expected(self) -> str:
        return f"an integer of {self.low} to {self.high}"

    def read(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError
        if not self.low <= value <= self.high:
            raise ValueError
        return int(value)


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number of `low` to `high`; `above` instead of `low` leaves the bound itself out."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    @property
    def expected(self) -> str:
        low = f"above {self.above:g}" if self.above > self.low else f"from {self.low:g}"
        bounds = "" if max(self.low, self.above) == -math.inf else f" {low}"
        return "a finite number" + bounds + ("" if self.high == math.inf else f" to {self.high:g}")

    def read(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError
        try:
            number = float(value)
        except OverflowError:
            raise ValueError from None
        if not (math.isfinite(number) and self.low <= number <= self.high and number > self.above):
            raise ValueError
        return number


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or false."""

    expected = "true or false"

    def read(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclasses.dataclass(frozen=True)
class Text:
    """A string of at most `longest` characters."""

    longest: int = 4096

    @property
    def expected(self) -> str:
        return f"a string of at most {self.longest} characters"

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or len(value) > self.longest:
            raise ValueError
        return value


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values, compared with their type (True is not 1)."""

    values: Collection[Any]

    @property
    def expected(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"

    def read(self, value: Any) -> Any:
        for item in self.values:
            if type(item) is type(value) and item == value:
                return value
        raise ValueError


@dataclasses.dataclass(frozen=True)
class Several:
    """A list of `least` to `most` values of one kind; becomes a tuple."""

    kind: SettingType
    least: int
    most: int

    @property
    def expected(self) -> str:
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"a list of {count}, each {self.kind.expected}"

    def read(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not self.least <= len(value) <= self.most:
            raise ValueError
        return tuple(self.kind.read(item) for item in value)


@dataclasses.dataclass(frozen=True)
class Either:
    """A value of the first of two kinds that it fits."""

    first: SettingType
    second: SettingType

    @property
    def expected(self) -> str:
        return f"{self.first.expected}, or {self.second.expected}"

    def read(self, value: Any) -> Any:
        try:
            return self.first.read(value)
        except ValueError:
            return self.second.read(value)


@dataclasses.dataclass(frozen=True)
class Optional:
    """A kind, or null."""

    kind: SettingType

    @property
    def expected(self) -> str:
        return f"{self.kind.expected}, or null"

    def read(self, value: Any) -> Any:
        return None if value is None else self.kind.read(value)


WIDTH = Integer(1, 2**16)
"""Width of a model, a head, an MLP or an embedding."""
DEPTH = Integer(1, 1024)
"""Number of layers."""
HEADS = Integer(1, 4096)
"""Number of attention heads."""
IMAGE_SIZE = Integer(1, 2**14)
"""Side of an image or a patch, pixels."""
CONTEXT = Integer(1, 2**20)
"""Length of a text, tokens."""
VOCABULARY = Integer(1, 2**24)
"""Number of tokens of a vocabulary."""
REGISTERS = Integer(0, 4096)
"""Number of register tokens."""
RATIO = Number(above=0.0, high=1024.0)
"""Ratio of two widths."""
EPS = Number(above=1e-30, high=1.0)
"""Epsilon of a norm, far above the smallest float32, which XLA flushes to 0."""
FACTOR = Number(low=-1e6, high=1e6)
"""Initial value of a factor, such as a temperature's logarithm."""
MEAN = Several(Number(low=0.0, high=1.0), 3, 3)
"""Mean of pixels in [0, 1] per channel."""
STD = Several(Number(above=1e-6, high=2.0), 3, 3)
"""Standard deviation of pixels; the bound keeps the quotient finite."""
FLAG = Flag()
"""A boolean."""
TEXT = Text()
"""A string."""

TRANSFORMER: Mapping[str, SettingType] = {
    "width": WIDTH,
    "depth": DEPTH,
    "heads": HEADS,
    "mlp_dim": WIDTH,
    "eps": EPS,
}
"""Types of the fields of a transformer's configuration."""
IMAGE_TOWER: Mapping[str, SettingType] = {
    **TRANSFORMER,
    "image_size": IMAGE_SIZE,
    "patch_size": IMAGE_SIZE,
}
"""Types of the fields of an image tower's configuration."""


def check(
    value: Any, kind: SettingType, name: str, *, error: type[PerceptionError] = ConfigError
) -> Any:
    """Returns a value converted by its type.

    Args:
      name: of the setting and where it stands, for the message.

    Raises:
      ConfigError, or `error`: a value of another type or out of range.
    """
    try:
        return kind.read(value)
    except ValueError:
        raise error(f"{name}: expected {kind.expected}, found {shown(value)}.") from None


def check_fields(config: Any, kinds: Mapping[str, SettingType]) -> None:
    """Checks fields of a configuration, and those that belong together.

    Args:
      config: a frozen dataclass.
      kinds: by name of the field.

    Raises:
      ConfigError: a field of another type or out of range, heads that do not divide the width, or
        a patch larger than the image.
    """
    kind_of = type(config).__name__
    for name, kind in kinds.items():
        check(getattr(config, name), kind, f"{kind_of}.{name}")
    if "heads" in kinds and config.width % config.heads:
        raise ConfigError(
            f"{kind_of}: expected a number of heads that divides the width {config.width}, found "
            f"{config.heads}."
        )
    if "patch_size" in kinds and config.patch_size > config.image_size:
        raise ConfigError(
            f"{kind_of}: expected patches no larger than the image ({config.image_size} pixels), "
            f"found {config.patch_size}."
        )


class Settings:
    """A JSON object whose values are checked when read.

    Args:
      content: the object.
      where: the file, and the way to the object in it, for messages.
      error: what is raised.

    Raises:
      ConfigError, or `error`: `content` is no object with strings as keys.
    """

    def __init__(self, content: Any, where: str, *, error: type[PerceptionError] = ConfigError):
        if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
            raise error(f"{where}: expected an object of named settings, found {shown(content)}.")
        self.content, self.where, self._error = content, where, error

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def get(self, key: str, kind: SettingType, default: Any = _MISSING) -> Any:
        """The setting `key`.

        Args:
          default: where the key is left out; it is not checked. Without one the key must be there.

        Raises:
          ConfigError, or as given: it is missing, of another type or out of range.
        """
        if key in self.content:
            name = f"{self.where}: {key}"
            return check(self.content[key], kind, name, error=self._error)
        if default is _MISSING:
            found = ", ".join(map(shown, list(self.content)[:12])) or "none"
            raise self._error(
                f"{self.where}: expected the key {key!r} ({kind.expected}), found only {found}."
            )
        return default

    def refuse_others(self, known: Collection[str]) -> None:
        """Refuses settings that nothing here reads.

        Raises:
          ConfigError, or as given: it holds others than `known`.
        """
        if others := {key: v for key, v in self.content.items() if key not in known}:
            raise self._error(
                f"{self.where}: expected only {', '.join(sorted(known))}, found {shown(others)}."
            )

    def section(self, key: str, *, optional: bool = False) -> Settings:
        """The object under `key`.

        Args:
          optional: one that is left out or null is empty.

        Raises:
          ConfigError, or as given: it is missing or no object.
        """
        content = self.content.get(key)
        if content is None and optional:
            content = {}
        elif key not in self.content:
            raise self._error(
                f"{self.where}: expected the key {key!r}, found only "
                f"{', '.join(map(shown, list(self.content)[:12])) or 'none'}."
            )
        return Settings(content, f"{self.where}: {key}", error=self._error)


def parse_json(raw: bytes | str, where: str, *, error: type[PerceptionError] = ConfigError) -> Any:
    """A JSON text that others wrote, in bounded memory.

    Args:
      raw: UTF-8, also with a byte order mark.
      where: the file, for messages.

    Raises:
      ConfigError, or `error`: no JSON, not UTF-8, an object with a key twice, more than `MAX_JSON`
        bytes, `MAX_CONTAINERS` lists and objects, or `MAX_DEPTH` of them inside one another.
    """
    try:
        text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw.removeprefix("\ufeff")
        containers = text.count("[") + text.count("{")
        if len(raw) > MAX_JSON or containers > MAX_CONTAINERS:
            raise ValueError(
                f"{len(raw)} bytes with {containers} brackets, more than {MAX_JSON} or "
                f"{MAX_CONTAINERS}"
            )
        value = json.loads(text, object_pairs_hook=_unique)
        if containers > MAX_DEPTH:
            _check_depth(value)
    except (ValueError, RecursionError) as problem:
        raise error(
            f"{where}: expected valid JSON, found otherwise: {problem!s:.200}. Is the file "
            "complete?"
        ) from None
    return value


def read_json(path: str | os.PathLike[str], *, error: type[PerceptionError] = ConfigError) -> Any:
    """A JSON file; see `parse_json`.

    Raises:
      ConfigError, or `error`: also if the file cannot be read.
    """
    try:
        with open(pathlib.Path(path), "rb") as file:
            raw = file.read(MAX_JSON + 1)
    except (OSError, ValueError) as problem:
        raise error(f"Expected a readable JSON file at {path}: {problem}.") from problem
    return parse_json(raw, os.fspath(path), error=error)


def shown(value: Any) -> str:
    """A value of any size or depth in at most about a hundred characters."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = reprlib.repr(value)
    except Exception:  # of whatever lies inside, e.g. an integer of too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"repeated key {name!r:.80}")
            seen.add(name)
    return result


def _check_depth(value: Any) -> None:
    level = [[value]]
    for _ in range(MAX_DEPTH + 1):
        children = (child for item in level for child in _values(item))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} lists and objects inside one another")


def _values(container: dict | list) -> Collection[Any]:
    return container.values() if isinstance(container, dict) else container
