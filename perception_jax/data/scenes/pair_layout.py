"""Layout of the scenes of minimal pairs, in which no object covers another."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from perception_jax.data.scenes import concepts as table
from perception_jax.data.scenes import palette
from perception_jax.data.scenes.backgrounds import contrast
from perception_jax.data.scenes.concepts import Concept
from perception_jax.data.scenes.sample import MAX_CONTRAST, SceneConfig, can_be_tinted
from perception_jax.data.scenes.spec import Background, DrawnText, Placement, SceneSpec
from perception_jax.errors import ConfigError

Cell = tuple[float, float]
"""The centre of a cell, fractions of the canvas."""

CENTRES = (1 / 6, 1 / 2, 5 / 6)
"""Centres of the three columns and the three rows of cells, fractions of the canvas."""
CELLS: tuple[Cell, ...] = tuple((x, y) for y in CENTRES for x in CENTRES)
"""Centres of all cells."""
CELL_SIZE = (0.18, 0.28)
"""Range of the sizes that fit a cell, in shorter sides of the canvas."""
JITTER = 0.02
"""Largest offset of an object from its cell's centre."""
MOST_BYSTANDERS = 2
"""Largest number of other objects."""
TRIES = 30
"""Attempts to draw an object in colours that differ from the background."""


class PairLayout:
    """A scene under construction: its background, used families and free cells.

    Of the config it uses split, styles, names, backgrounds and probability of a tint. There are no
    collages: their far things could be taken for the objects of a presence or count pair.
    """

    def __init__(self, config: SceneConfig, draw: random.Random) -> None:
        self.draw = draw
        self.vocabulary = config.vocabulary()
        self.aspect = _aspect(config.shape)
        self._config = config
        self._background = _plain_background(config, draw)
        self._families: set[str] = set()
        self._cells: set[Cell] = set()

    def scene(self, placements: Sequence[Placement], text: DrawnText | None = None) -> SceneSpec:
        """Returns a spec with this background."""
        return SceneSpec(background=self._background, placements=tuple(placements), text=text)

    def concept(self, fits: Callable[[Concept], bool], wanted: str) -> Concept:
        """A concept that fits, of a family that has not been chosen before.

        Raises:
          ConfigError: there is none; `wanted` says what was looked for.
        """
        known = [c for c in self.vocabulary if c.family not in self._families and fits(c)]
        if not known:
            raise ConfigError(
                f"expected {wanted} among the {len(self.vocabulary)} concepts of the split "
                f"{self._config.split!r}, found none that is still free; widen `names` or leave "
                "this pattern out."
            )
        chosen = self.draw.choice(known)
        self._families.add(chosen.family)
        return chosen

    def colours(self, number: int, among: Sequence[str]) -> list[str]:
        """Draws different colours that do not occur in the background."""
        free = [name for name in among if name not in self._background.colours]
        return self.draw.sample(free, number)

    def cell(self, among: Sequence[Cell]) -> Cell:
        """Draws a free cell and returns its centre with jitter."""
        x, y = chosen = self.draw.choice([cell for cell in among if cell not in self._cells])
        self._cells.add(chosen)
        return x + self.draw.uniform(-JITTER, JITTER), y + self.draw.uniform(-JITTER, JITTER)

    def place(self, concept: Concept, at: Cell) -> Placement:
        """The concept by one of the artists, in colours that stand out from the background."""
        placement = self._look(concept, at)
        for _ in range(TRIES):
            if table.colour_of(placement) not in self._background.colours:
                break
            placement = self._look(concept, at)
        return placement

    def _look(self, concept: Concept, at: Cell) -> Placement:
        tinted = self.draw.random() < self._config.tint and can_be_tinted(concept)
        return Placement(
            concept=concept.name,
            style=self.draw.choice(self._config.drawn_styles),
            x=at[0],
            y=at[1],
            size=self.draw.uniform(*CELL_SIZE),
            flip=self.draw.random() < 0.5,
            tint=self.draw.choice(palette.TINTS) if tinted else None,
        )

    def bystanders(self, cells: Sequence[Cell], *, fewest: int = 0) -> list[Placement]:
        """Places up to `MOST_BYSTANDERS` other objects in free cells."""
        number = self.draw.randint(fewest, MOST_BYSTANDERS)
        free = len({c.family for c in self.vocabulary} - self._families)
        return [
            self.place(self.concept(lambda c: True, "another thing"), self.cell(cells))
            for _ in range(max(fewest, min(number, free)))
        ]


def copy(model: Placement, at: Cell) -> Placement:
    """Returns the same drawing at another place."""
    return dataclasses.replace(model, x=at[0], y=at[1])


def _aspect(shape: tuple[int, int]) -> tuple[float, float]:
    """Canvas (width, height) in shorter sides."""
    height, width = shape
    return width / min(shape), height / min(shape)


def _plain_background(config: SceneConfig, draw: random.Random) -> Background:
    kinds = [kind for kind in config.backgrounds if kind != "collage"] or ["flat"]
    kind, colour = draw.choice(kinds), draw.choice(palette.NAMES)
    others = [name for name in palette.NAMES if 0.0 < contrast(colour, name) <= MAX_CONTRAST]
    second = () if kind == "flat" else (draw.choice(others),)
    return Background(kind=kind, colours=(colour, *second), seed=draw.randrange(2**31))
