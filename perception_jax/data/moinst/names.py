"""Class names: readable forms for instructions, and matching in captions."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

_VOWELS = "aeiou"
_IRREGULAR = {
    "man": "men",
    "woman": "women",
    "person": "people",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "shelf": "shelves",
    "wolf": "wolves",
    "calf": "calves",
    "scarf": "scarves",
}


def clean_name(name: str) -> str:
    """Returns a category's name as plain words: "bead_(jewelry)" → "bead".

    `_` becomes a space, what stands in parentheses at the end goes, all is lower case. (LVIS has
    one name with words behind the parenthesis, "monitor_(computer_equipment) computer_monitor";
    they go too.)
    """
    words = _squeeze(name.replace("_", " ")).lower()
    return words.partition("(")[0].strip() or words


def mentions(text: str, names: Iterable[str]) -> bool:
    """Whether a text has one of the names as whole words, singular or plural, in any case.

    Args:
      names: categories' names or synonyms, not yet cleaned.
    """
    plain = _plain(text)
    return any(_pattern(name).search(plain) for name in names)


@functools.lru_cache(maxsize=16384)
def _pattern(name: str) -> re.Pattern[str]:
    forms = "|".join(re.escape(form) for form in number_forms(_plain(clean_name(name))))
    return re.compile(rf"(?<!\w)(?:{forms})(?!\w)")


def number_forms(name: str) -> tuple[str, ...]:
    """Returns the singular and plural forms of a name: "wine glass", "wine glasses"."""
    start, space, last = name.rpartition(" ")
    forms = dict.fromkeys((last, *_plurals(last), *_singulars(last)))
    return tuple(start + space + form for form in forms if form)


def _plurals(word: str) -> list[str]:
    if word in _IRREGULAR:
        return [_IRREGULAR[word], f"{word}s"]
    if word.endswith("man"):  # "snowman", but also "human"
        return [f"{word[:-3]}men", f"{word}s"]
    if re.search(r"(s|x|z|ch|sh)$", word):
        return [f"{word}es"]
    if word.endswith("y") and word[-2:-1] not in _VOWELS:
        return [f"{word[:-1]}ies"]
    return [f"{word}s", f"{word}es"] if word.endswith("o") else [f"{word}s"]


def _singulars(word: str) -> list[str]:
    found = [singular for singular, plural in _IRREGULAR.items() if word == plural]
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        found.append(word[:-1])
        if re.search(r"(s|x|z|ch|sh|o)es$", word):
            found.append(word[:-2])
        if word.endswith("ies"):
            found.append(f"{word[:-3]}y")
    return found


def _plain(text: str) -> str:
    """Lower case with single spaces for hyphens and underscores: "T-shirt" is "t shirt"."""
    return _squeeze(re.sub(r"[-_]", " ", text)).lower()


def _squeeze(text: str) -> str:
    return " ".join(text.split())
