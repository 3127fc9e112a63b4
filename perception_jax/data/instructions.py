"""Instructions that name an object: templates, and a table of all instructions of a data set.

Letters: C classes, F templates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from perception_jax.data.moinst.names import clean_name

INSTRUCTION = "the {}"
"""Default instruction of a class, used where a record has no instruction of its own."""

FORMS = (INSTRUCTION, "{}", "a photo of the {}", "focus on the {}")
"""Templates of instructions: training draws one at random, evaluation takes the first."""


def instruction_for(name: str, form: str = INSTRUCTION) -> str:
    """Fills a class name into a template; "bead_(jewelry)" becomes "the bead"."""
    return form.replace("{}", clean_name(name))


@dataclasses.dataclass(frozen=True, eq=False)
class InstructionTable:
    """The distinct instructions of a data set, so that each is encoded once.

    Attributes:
      strings: the distinct instructions.
      by_class: positions in `strings` of each class's instructions, in the order of `FORMS`.
      own: positions in `strings` of the records' own instructions, in the order given.
    """

    strings: tuple[str, ...]
    by_class: Int32[np.ndarray, "C F"]
    own: Int32[np.ndarray, "_"]

    @classmethod
    def build(cls, names: Sequence[str], own: Sequence[str] = ()) -> InstructionTable:
        """Collects the instructions of class names, and the records' own."""
        places: dict[str, int] = {}
        by_class = [
            [places.setdefault(instruction_for(name, form), len(places)) for form in FORMS]
            for name in names
        ]
        own_places = [places.setdefault(text, len(places)) for text in own]
        return cls(
            strings=tuple(places),
            by_class=np.array(by_class, np.int32).reshape(-1, len(FORMS)),
            own=np.array(own_places, np.int32),
        )
