"""Captions with one attribute changed: "a small red cat" → "a small green cat".

Works on plain English words; a caption without any of them has no altered form.
"""

from __future__ import annotations

import re
import zlib

GROUPS = (
    (
        *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black"),
        *("grey", "white"),
    ),
    ("tiny", "small", "medium-sized", "large", "huge"),
    ("left", "right"),
    ("top", "bottom"),
)
"""Words that exclude each other; the first group with a word in the caption is used."""

_PATTERNS = tuple(re.compile(rf"\b({'|'.join(group)})\b") for group in GROUPS)


def altered(caption: str) -> str:
    """The caption with one word exchanged for another of its group, always the same one; "" if
    there is none to exchange."""
    for group, pattern in zip(GROUPS, _PATTERNS, strict=True):
        if found := pattern.search(caption):
            others = [word for word in group if word != found[0]]
            chosen = others[zlib.crc32(caption.encode()) % len(others)]
            return caption[: found.start()] + chosen + caption[found.end() :]
    return ""
