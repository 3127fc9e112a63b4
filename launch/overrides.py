"""Command-line text to typed config values: `--config.KEY=VALUE`.

The value already in the config gives the type, so a typo in a number never turns a setting into a
string. Nothing is evaluated: tuples and lists are read by `ast.literal_eval`.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_collections

from perception_jax.errors import ConfigError

_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class UsageError(ConfigError):
    """The command line cannot be understood (exit code 2)."""


def nearest(word: str, options: Iterable[str], *, count: int = 3) -> list[str]:
    """The options most like `word`, best first; empty if none is close.

    Dotted keys are compared as a whole and by their last part, so `lr` finds `optimizer.lr` as
    well as a misspelt `optimiser.lr` does.
    """
    last = word.rpartition(".")[2]

    def likeness(option: str) -> float:
        whole = difflib.SequenceMatcher(None, word, option).ratio()
        tail = difflib.SequenceMatcher(None, last, option.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * tail)

    scored = sorted(((likeness(option), option) for option in options), key=lambda pair: -pair[0])
    return [option for score, option in scored[:count] if score >= max(0.6, scored[0][0] - 0.15)]


def did_you_mean(word: str, options: Iterable[str], *, prefix: str = "--") -> str:
    """ " Did you mean X or Y?" for the nearest options, else what options there are."""
    options = list(options)
    near = nearest(word, options)
    if near:
        return f" Did you mean {' or '.join(prefix + option for option in near)}?"
    if len(options) > 12:
        return f" There are {len(options)}; --help with --config=FILE lists them."
    return f" Known: {', '.join(prefix + option for option in options)}."


def leaves(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted key, value)` of every setting, in alphabetical order."""
    for key in config:
        value = config[key]
        if isinstance(value, ml_collections.ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def apply(config: ml_collections.ConfigDict, overrides: Sequence[tuple[str, str | None]]) -> None:
    """Sets `(dotted key, text)` pairs in order; a text of None is a bare `--config.KEY`.

    Raises:
      UsageError: an unknown key (named with the nearest ones), a group, or text that does not fit
        the type of the setting.
    """
    for key, text in overrides:
        parent, name = _locate(config, key)
        if isinstance(parent[name], ml_collections.ConfigDict):
            inside = [f"--config.{key}.{k}" for k, _ in leaves(parent[name])]
            raise UsageError(
                f"--config.{key} is a group of settings; set one of them: {', '.join(inside)}."
            )
        parent[name] = parse_value(
            text, parent[name], kind=parent.get_type(name), where=f"--config.{key}"
        )


def _locate(config: ml_collections.ConfigDict, key: str) -> tuple[ml_collections.ConfigDict, str]:
    *groups, name = key.split(".")
    parent = config
    for depth, group in enumerate(groups):
        if group not in parent:
            raise _unknown_key(config, key)
        parent = parent[group]
        if not isinstance(parent, ml_collections.ConfigDict):
            path = ".".join(groups[: depth + 1])
            raise UsageError(
                f"--config.{key}: {path} is a single value ({parent!r}), it has no part "
                f"{'.'.join([*groups[depth + 1 :], name])!r}; write --config.{path}=VALUE."
            )
    if name not in parent:
        raise _unknown_key(config, key)
    return parent, name


def _unknown_key(config: ml_collections.ConfigDict, key: str) -> UsageError:
    options = [known for known, _ in leaves(config)]
    return UsageError(
        f"--config.{key}: the config has no such setting."
        + did_you_mean(key, options, prefix="--config.")
    )


def parse_value(text: str | None, current: Any, *, kind: type, where: str) -> Any:
    """`text` as a value of type `kind`, the type of the setting whose value now is `current`.

    Args:
      text: what stands after "=", or None for a bare flag (True for booleans).
      current: the present value; its elements give the element type of tuples and lists.
      kind: bool, int, float, str, tuple, list or NoneType (any literal; else the text itself);
        "None" is None for each of them.
      where: the flag as the user wrote it, for messages.

    Raises:
      UsageError: the text is not a `kind`.
    """
    if text is None:
        if kind is bool:
            return True
        raise UsageError(f"{where} needs a value: write {where}=VALUE (now {current!r}).")
    if text == "None":  # whether the setting may be empty is for its owner to say
        return None
    if kind in (tuple, list):
        return kind(_parse_sequence(text, current, where))
    if kind is type(None):
        return _literal_or_text(text)
    parser = _SCALARS.get(kind)
    if parser is None:
        raise UsageError(f"{where} holds a {kind.__name__}, which the command line cannot set.")
    try:
        return parser(text)
    except ValueError:
        raise UsageError(
            f"{where}={text}: expected {_DESCRIPTIONS[kind]} (now {current!r}), found {text!r}."
        ) from None


def _parse_bool(text: str) -> bool:
    try:
        return _BOOLS[text.lower()]
    except KeyError:
        raise ValueError(text) from None


_SCALARS: dict[type, Callable[[str], Any]] = {
    bool: _parse_bool,
    int: int,
    float: float,
    str: str,
}
_DESCRIPTIONS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}


def _literal_or_text(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parse_sequence(text: str, current: Any, where: str) -> list[Any]:
    kinds = {type(element) for element in current or ()}
    value = _literal_or_text(text)
    if isinstance(value, str):  # bare words: noto,twemoji
        if kinds - {str} or not text.strip():
            raise UsageError(
                f"{where}={text}: expected values separated by commas, e.g. {where}=1,2 "
                f"(now {current!r})."
            )
        value = [word.strip() for word in value.split(",") if word.strip()]
    elements = list(value) if isinstance(value, tuple | list) else [value]
    if len(kinds) != 1:
        return elements
    (kind,) = kinds
    if kind is float:
        elements = [float(e) if type(e) is int else e for e in elements]
    wrong = [e for e in elements if type(e) is not kind]
    if wrong:
        raise UsageError(
            f"{where}={text}: expected elements of type {kind.__name__} (now {current!r}), "
            f"found {wrong[0]!r}."
        )
    return elements
