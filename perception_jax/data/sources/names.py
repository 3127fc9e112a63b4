"""Names of classes for people and prompts, different wherever the source's own names are.

A display name is the source's name in lower case with spaces for underscores. Where that would make
two names one ("Q" and "q", "a_b" and "a b"), each of them keeps more of its own form: its case, or
all of it. A blank name is shown as what its source numbers it by.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
"""Type of the ids of classes."""


def words(name: str) -> str:
    """A name in lower case with spaces for underscores."""
    return name.replace("_", " ").strip().lower()


def display_names(
    raw: Mapping[Key, str], blank: Callable[[Key], str] = lambda key: f"class {key}"
) -> dict[Key, str]:
    """The display name of each class.

    Args:
      raw: the source's own names, by whatever the source knows a class by.
      blank: what a class is called whose name is blank.

    Returns:
      By the same keys. Two classes share a display name only if their own names are equal.
    """
    # Equal names are one class, except blank ones, which say nothing.
    kinds = {key: (name, "") if name.strip() else (name, blank(key)) for key, name in raw.items()}
    forms = {kind: _forms(*kind) for kind in kinds.values()}
    level = dict.fromkeys(forms, 0)
    while True:
        sharing = collections.defaultdict(list)
        for kind, given in forms.items():
            sharing[given[level[kind]]].append(kind)
        clashes = [kind for shared in sharing.values() if len(shared) > 1 for kind in shared]
        rising = [kind for kind in clashes if level[kind] + 1 < len(forms[kind])]
        if not rising:
            return {key: forms[kind][level[kind]] for key, kind in kinds.items()}
        for kind in rising:
            level[kind] += 1


def display_names_of(raw: Iterable[str]) -> dict[str, str]:
    """Computes `display_names` for a source that identifies classes by name."""
    return display_names({name: name for name in raw}, repr)


def _forms(name: str, blank: str) -> tuple[str, ...]:
    """From the plainest to the source's own."""
    if blank:
        return blank, f"{blank} ({name!r})"
    return words(name), name.replace("_", " ").strip(), name
