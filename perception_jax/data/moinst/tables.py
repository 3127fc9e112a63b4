"""Tables of category ids and names: bundled tables, files, and detection of the table of a dataset.

Bundled are the categories of LVIS v1 and v0.5 with their synonyms, of COCO, and of COCO-Stuff with
COCO's. Their files, `assets/*.tsv`, have a line for each category: id, name, synonyms joined by
"|". Names are verbatim, LVIS's misspellings included.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import os
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from perception_jax.data.moinst.names import mentions
from perception_jax.data.sources import fields
from perception_jax.errors import DataError

BUNDLED = ("lvis_v1", "lvis_v0.5", "coco80", "coco_stuff")
"""Names of the bundled category tables."""
SAMPLED_ROWS = 5000
"""Number of rows that `detect` compares with each table."""
MIN_SHARE = 0.5
"""Smallest share of captions with the category's name for which `detect` accepts a table."""
MIN_LEAD = 0.15
"""Smallest lead of the best table over the second for which `detect` accepts it."""

CategoryId = int | str
"""Category id of the source; a string where data names classes instead of numbering them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """A category of a source; `synonyms` do not repeat its `name`."""

    id: CategoryId
    name: str
    synonyms: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """The name, then its synonyms."""
        return (self.name, *self.synonyms)


Table = Mapping[CategoryId, Category]
"""Categories by id."""


@functools.cache
def bundled(name: str) -> Table:
    """Reads one of the tables `BUNDLED`."""
    file = importlib.resources.files(__package__).joinpath("assets", f"{name}.tsv")
    rows = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
    found = (_bundled_category(int(row[0]), row[1], row[2:]) for row in rows)
    return {category.id: category for category in found}


def _bundled_category(number: int, name: str, synonyms: Sequence[str]) -> Category:
    listed = synonyms[0].split("|") if synonyms else []
    return Category(id=number, name=name, synonyms=(*listed, *_stuff_words(name)))


def _stuff_words(name: str) -> tuple[str, ...]:
    """How people say COCO-Stuff's compounds: "wall-brick" is "brick wall", or just "wall"."""
    head, hyphen, kind = name.partition("-")
    if not hyphen or " " in name:
        return {"playingfield": ("playing field",), "waterdrops": ("water drops",)}.get(name, ())
    return (head,) if kind in ("other", "stuff") else (head, f"{kind} {head}")


def read_categories(path: str | os.PathLike) -> Table:
    """A file of categories: a JSON list of {"id", "name"}, or an object with it as "categories".

    Raises:
      DataError: not such a file.
    """
    content = fields.read_json(path)
    entries = content.get("categories") if isinstance(content, Mapping) else content
    return parse_categories(entries, f"{path}: categories")


def parse_categories(entries: Any, where: str) -> Table:
    """Categories as LVIS and COCO write them, synonyms included where given.

    Raises:
      DataError: not a list of {"id", "name"}, or one id twice.
    """
    if not isinstance(entries, list) or not entries:
        raise fields.fail(where, 'a list of {"id": …, "name": …}', entries)
    table: dict[CategoryId, Category] = {}
    for k, entry in enumerate(entries):
        category = _category(fields.mapping(entry, f"{where}[{k}]"), f"{where}[{k}]")
        if category.id in table:
            raise DataError(f"{where}[{k}]: id {category.id} is also that of another category.")
        table[category.id] = category
    return table


def _category(entry: Mapping[str, Any], where: str) -> Category:
    name = fields.text(entry.get("name"), f"{where}: name")
    synonyms = fields.list_of(fields.text)(entry.get("synonyms", []), f"{where}: synonyms")
    return Category(
        id=fields.integer(entry.get("id"), f"{where}: id"),
        name=name,
        synonyms=tuple(other for other in synonyms if other != name),
    )


def detect(rows: Sequence[tuple[CategoryId, Collection[str]]]) -> tuple[str, dict[str, float]]:
    """Detects the bundled table that fits the category ids and captions of rows.

    A table's share is that of the rows with a caption that contains the name which the table gives
    the row's id, or a synonym. Tables that give all ids the same names are one candidate, so COCO
    does not tie with COCO-Stuff, which contains it.

    Args:
      rows: category id and captions; of more than `SAMPLED_ROWS`, so many at random.

    Returns:
      The table's name, and every candidate's share.

    Raises:
      DataError: no table reaches `MIN_SHARE`, or the best is not `MIN_LEAD` ahead.
    """
    if len(rows) > SAMPLED_ROWS:
        rows = random.Random(0).sample(rows, SAMPLED_ROWS)
    shares = {name: _share(bundled(name), rows) for name in _candidates(rows)}
    ranked = sorted(shares, key=lambda name: -shares[name])
    second = shares[ranked[1]] if len(ranked) > 1 else 0.0
    if shares[ranked[0]] < MIN_SHARE or shares[ranked[0]] < second + MIN_LEAD:
        found = ", ".join(f"{name} {shares[name]:.0%}" for name in ranked)
        raise DataError(
            "categories: expected one bundled table whose names are in at least "
            f"{MIN_SHARE:.0%} of the captions, {100 * MIN_LEAD:.0f} points ahead of the next; "
            f"found {found}. Name the table, or give a file of categories: a JSON list of "
            '{"id", "name"}.'
        )
    return ranked[0], shares


def _candidates(rows: Iterable[tuple[CategoryId, Collection[str]]]) -> list[str]:
    ids = {number for number, _ in rows}
    by_names: dict[tuple[str | None, ...], str] = {}
    for name in BUNDLED:
        table = bundled(name)
        names = tuple(table[k].name if k in table else None for k in sorted(ids, key=str))
        by_names.setdefault(names, name)
    return list(by_names.values())


def _share(table: Table, rows: Sequence[tuple[CategoryId, Collection[str]]]) -> float:
    hits = 0
    for number, captions in rows:
        category = table.get(number)
        hits += category is not None and any(mentions(c, category.names()) for c in captions)
    return hits / len(rows) if rows else 0.0
