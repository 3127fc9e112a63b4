"""Cleaning of texts before they are split into tokens, with the place that each character had.

`clean="hf"` leaves cleaning to what `transformers` does; "open_clip" is what the authors' code and
open_clip do: mojibake repaired (ftfy), HTML entities decoded twice, white space collapsed.
"""

from __future__ import annotations

import dataclasses
import difflib
import html
import re
from collections.abc import Callable

import ftfy
import numpy as np
from jaxtyping import Int32

from perception_jax.errors import ConfigError

CLEANINGS = ("hf", "open_clip")
"""Supported text cleanings."""

_SPACES = re.compile(r"\s+")
_MAX_COMPARED = 1 << 20
"""Pairs of characters beyond which a repaired passage is not compared in detail."""


def check_clean(clean: str) -> None:
    """Refuses a way of cleaning that does not exist."""
    if clean not in CLEANINGS:
        raise ConfigError(f"clean: expected 'hf' or 'open_clip', found {clean!r}.")


def repair(text: str) -> str:
    """Mojibake repaired, HTML entities decoded."""
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def collapse(text: str) -> str:
    """Single spaces, none at the ends."""
    return _SPACES.sub(" ", text).strip()


@dataclasses.dataclass(frozen=True)
class Aligned:
    """A text on its way through cleaning.

    Attributes:
      text: as it is now, N characters.
      spans: for each character the first and the one behind the last that it stands for in the
        original text.
    """

    text: str
    spans: Int32[np.ndarray, "N 2"]

    @classmethod
    def of(cls, text: str) -> Aligned:
        """A text in which nothing is changed yet."""
        first = np.arange(len(text), dtype=np.int32)
        return cls(text, np.stack([first, first + 1], axis=1))

    def cut(self, first: int, last: int) -> Aligned:
        """The characters `first` to `last`."""
        return Aligned(self.text[first:last], self.spans[first:last])

    def repaired(self) -> Aligned:
        """`repair`; characters of a passage that changed stand for all of it."""
        text = repair(self.text)
        return self if text == self.text else self._replaced(text)

    def collapsed(self) -> Aligned:
        """`collapse`; a space stands for all the white space that it replaces."""
        kept, spans, at = [], [], 0
        for run in _SPACES.finditer(self.text):
            kept += [self.text[at : run.start()], " "]
            spans += [self.spans[at : run.start()], self._span(run.start(), run.end())[None]]
            at = run.end()
        text = "".join([*kept, self.text[at:]])
        joined = np.concatenate([*spans, self.spans[at:]])
        left = len(text) - len(text.lstrip())
        return Aligned(text, joined).cut(left, max(left, len(text.rstrip())))

    def lowered(self) -> Aligned:
        """`str.lower`, which may make two characters of one."""
        counts = [len(character.lower()) for character in self.text]
        text = self.text.lower()
        if sum(counts) != len(text):
            return self._replaced(text)
        return Aligned(text, np.repeat(self.spans, counts, axis=0))

    def translated(self, table: dict[int, str | None]) -> Aligned:
        """`str.translate` with a table that keeps a character, replaces it by one, or drops it."""
        keep = [table.get(ord(character), "") is not None for character in self.text]
        return Aligned(self.text.translate(table), self.spans[np.array(keep, bool)])

    def at(self, offsets: Int32[np.ndarray, "T 2"]) -> Int32[np.ndarray, "T 2"]:
        """Spans in this text to spans in the original one."""
        result = np.zeros_like(offsets)
        for row, (first, last) in zip(result, offsets.tolist(), strict=True):
            row[:] = self._span(first, last)
        return result

    def _span(self, first: int, last: int) -> Int32[np.ndarray, "2"]:
        if first >= last:  # of nothing: the place where it stands
            place = self.spans[first][0] if first < len(self.spans) else self._length()
            return np.array([place, place], np.int32)
        inside = self.spans[first:last]
        return np.array([inside[:, 0].min(), inside[:, 1].max()], np.int32)

    def _length(self) -> int:
        return int(self.spans[-1, 1]) if len(self.spans) else 0

    def _replaced(self, text: str) -> Aligned:
        before, after = self.text, text
        same = _common(before, after)
        tail = _common(before[same:][::-1], after[same:][::-1])
        spans = [self.spans[:same]]
        for first, last, count, equal in _differences(
            before[same : len(before) - tail], after[same : len(after) - tail]
        ):
            if equal:
                spans.append(self.spans[same + first : same + last])
            else:
                spans.append(np.tile(self._span(same + first, same + last), (count, 1)))
        spans.append(self.spans[len(before) - tail :])
        return Aligned(text, np.concatenate(spans).astype(np.int32))


def in_steps(text: str, *steps: Callable[[Aligned], Aligned]) -> Aligned:
    """A text after several steps of cleaning."""
    aligned = Aligned.of(text)
    for step in steps:
        aligned = step(aligned)
    return aligned


def _common(left: str, right: str) -> int:
    pairs = zip(left, right, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _differences(before: str, after: str) -> list[tuple[int, int, int, bool]]:
    """First and last in `before`, number of characters in `after`, whether they are the same."""
    if len(before) * len(after) > _MAX_COMPARED:
        return [(0, len(before), len(after), False)]
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    return [
        (first, last, there - here, tag == "equal")
        for tag, first, last, here, there in matcher.get_opcodes()
    ]
