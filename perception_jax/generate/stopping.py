"""Stop strings: the end of a text by what its tokens decode to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from perception_jax.errors import ConfigError

Decode = Callable[[Sequence[int]], str]
"""Function from token ids to text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopStrings:
    """Strings at which a text ends.

    Attributes:
      strings: the first that occurs ends the text; it does not belong to it.
      decode: from the ids of all generated tokens to their text.

    Raises:
      ConfigError: no string, or an empty one.
    """

    strings: tuple[str, ...]
    decode: Decode

    def __post_init__(self) -> None:
        if not self.strings or not all(self.strings):
            raise ConfigError(
                f"stop strings: expected one or more that are not empty, found {self.strings!r}."
            )

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated tokens up to the first stop string."""
        text = self.decode(ids)
        return text[: min((i for s in self.strings if (i := text.find(s)) >= 0), default=None)]

    def end(self, ids: Sequence[int], known: int = 0) -> int | None:
        """How many tokens it takes until a stop string is complete; None if none occurs.

        Args:
          known: so many of the first tokens contain none.
        """
        if not self._occurs(ids):
            return None
        found = (n for n in range(known + 1, len(ids)) if self._occurs(ids[:n]))
        return next(found, len(ids))

    def _occurs(self, ids: Sequence[int]) -> bool:
        text = self.decode(ids)
        return any(string in text for string in self.strings)
