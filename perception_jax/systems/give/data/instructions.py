"""What an instruction says, and a table of all instructions of a training set.

A record's own instruction is used as it stands; otherwise it is made of the class name. The text
tower is frozen, so its states are computed once for each different string of the table.

Letters: C classes, F the four forms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from perception_jax.evals.conditioned.prompts import INSTRUCTION
from perception_jax.evals.conditioned.prompts import instruction as instruction_for

__all__ = ["FORMS", "InstructionTable", "instruction_for"]

FORMS = (INSTRUCTION, "{}", "a photo of the {}", "focus on the {}")
"""In training one of them at random; in evaluation the first."""


@dataclasses.dataclass(frozen=True, eq=False)
class InstructionTable:
    """Attributes:
    strings: all different ones.
    by_class: where those of a class are in `strings`, in the order of `FORMS`.
    own: where the records' own are, in the order in which they were given.
    """

    strings: tuple[str, ...]
    by_class: Int32[np.ndarray, "C F"]
    own: Int32[np.ndarray, "_"]

    @classmethod
    def build(cls, names: Sequence[str], own: Sequence[str] = ()) -> InstructionTable:
        """Of class names, and of records' own instructions."""
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
