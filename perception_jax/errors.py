"""Exceptions of the library.

Every message says what was expected, what was found, where, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED = 20
"""At most so many names are listed in a message."""


class PerceptionError(Exception):
    """Base class of every error that the library raises on purpose."""


class ConfigError(PerceptionError):
    """A setting is unknown, missing or contradicts another one."""


class DataError(PerceptionError):
    """A record, an annotation file or a data source cannot be used."""


class ImageError(DataError):
    """An image cannot be decoded (truncated, empty, not an image, too large)."""


class CheckpointError(PerceptionError):
    """A checkpoint is missing, damaged, refused or does not fit the model."""


class TrainingError(PerceptionError):
    """Training cannot continue (NaN loss, workdir in use, too many bad records)."""


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Returns the end of a message on an unknown name: ". Did you mean X?", or the known names.

    Dotted names are compared as a whole and by their last part, so that `lr` finds `optimizer.lr`.

    Args:
      prefix: stands before each name that is shown, e.g. "--".
    """
    known = list(known)
    last = word.rpartition(".")[2]

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, word, name).ratio()
        tail = difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * tail)

    best = max(known, key=likeness, default=None)
    if best is not None and likeness(best) >= 0.6:
        return f". Did you mean {prefix}{best}?"
    if len(known) > _LISTED:
        return f". None of the {len(known)} known names is similar."
    return f". Known: {', '.join(prefix + name for name in known)}."
