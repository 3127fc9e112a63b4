"""Captions made false by one word: hard negatives for losses that compare images with texts."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

CLAIMS = (
    (
        *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black"),
        *("grey", "white"),
    ),
    ("tiny", "small", "medium-sized", "large", "huge"),
    ("two", "three", "four", "five", "six"),
    ("left", "right"),
    ("top", "bottom"),
    ("above", "below"),
    ("with", "without"),
    ("open", "closed"),
    ("solid", "faded"),
    ("close up", "far away"),
    ("from the side", "from the front"),
    ("the right way up", "upside down"),
    ("side by side", "one above another", "in a circle"),
)
"""Groups of words of which at most one is true."""


@dataclasses.dataclass(frozen=True, slots=True)
class ClaimedWord:
    """A word of a caption, from `start` to `end`, and the others of its group."""

    start: int
    end: int
    others: tuple[str, ...]

    def replaced(self, caption: str, choice: int) -> str:
        """Returns the caption with another word of the group instead."""
        return caption[: self.start] + self.others[choice] + caption[self.end :]


def claims(caption: str, groups: Sequence[Sequence[str]] = CLAIMS) -> list[ClaimedWord]:
    """Finds the words of a caption that are in a group, ordered by group and then by place."""
    pattern, group_of = _pattern(tuple(map(tuple, groups)))
    found = [(group_of[match[0]], match) for match in pattern.finditer(caption)]
    found.sort(key=lambda one: one[0])
    return [
        ClaimedWord(*match.span(), tuple(word for word in groups[group] if word != match[0]))
        for group, match in found
    ]


def altered(caption: str, rng: np.random.Generator) -> str:
    """Replaces one word of a caption by another of its group in `CLAIMS`; "" if it has none."""
    found = claims(caption)
    if not found:
        return ""
    claim = found[int(rng.integers(len(found)))]
    return claim.replaced(caption, int(rng.integers(len(claim.others))))


@functools.cache
def _pattern(groups: tuple[tuple[str, ...], ...]) -> tuple[re.Pattern[str], dict[str, int]]:
    """A pattern of all words, longer ones first ("one above another" before "above")."""
    group_of = {word: number for number, group in enumerate(groups) for word in group}
    words = sorted(group_of, key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(map(re.escape, words))})\b"), group_of
