"""Results on test questions about scenes, each beside what can be had without seeing.

Floors are the same model with blank images and without images, the most frequent answer of each
kind of question, and chance.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from perception_jax.data.records import Source
from perception_jax.data.sources.combine import Mapped
from perception_jax.systems.mof.records import FLOORS, PAIRS, QUESTIONS, test_questions
from perception_jax.viz.html_report import Report

if TYPE_CHECKING:
    from flax import nnx

    from perception_jax.api import Loaded
    from perception_jax.inference.held_out import TokenPredictions

MAJORITY, CHANCE = "most frequent answer", 0.25
"""Name of a floor; the share of pairs that are right by chance."""

_TITLES = {
    PAIRS: (
        "Minimal pairs",
        "Two scenes differ in one visual pattern; a pair counts if its question is answered right "
        f"for both, exactly as asked for. By chance {CHANCE:.0%} do, with one answer to all none.",
    ),
    QUESTIONS: (
        "Questions",
        "Answered word by word as asked for: with the words, or with the letter of an option.",
    ),
}


def floors(
    config: Any, base: Loaded, model: nnx.Module, predictions: TokenPredictions
) -> dict[str, dict[str, float]]:
    """Accuracies without seeing, by the set's name and the floor's: "pairs/blank image".

    Floors that run the model are left out where its features are kept, since they lie there for
    the images alone.

    Args:
      predictions: of the evaluators, whose program is compiled already.
    """
    from perception_jax.systems.mof.training import exact_answers

    asked, changed = test_questions(config), {}
    if not config.evaluation.features:
        for name, source in asked.items():
            changed |= {
                f"{name}/{floor}": Mapped(source, change) for floor, change in FLOORS.items()
            }
    evaluators = exact_answers(config, base, changed, predictions)
    found = {name: dict(evaluator(model)) for name, evaluator in evaluators.items()}
    if QUESTIONS in asked:
        found[f"{QUESTIONS}/{MAJORITY}"] = majority(asked[QUESTIONS])
    return found


def majority(source: Source) -> dict[str, float]:
    """The accuracy of the most frequent answer to each kind of question, and of all of these."""
    counted: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for k in range(len(source)):
        record = source[k]
        counted[record.questions[0].kind][record.conversation[-1].text] += 1
    best = {kind: max(answers.values()) for kind, answers in counted.items()}
    found = {kind: best[kind] / answers.total() for kind, answers in counted.items()}
    return {"accuracy": sum(best.values()) / len(source), **found}


def add_test_questions(
    page: Report,
    found: Mapping[str, Mapping[str, float]],
    floor: Mapping[str, Mapping[str, float]],
) -> None:
    """Adds a section for each set of test questions: a table by kind, floors beside it."""
    for name, numbers in found.items():
        page.add_section(*_TITLES[name])
        own = {key.partition("/")[2]: x for key, x in floor.items() if key.startswith(f"{name}/")}
        rows = [
            (
                "all" if kind == "accuracy" else kind,
                f"{value:.1%}",
                *(f"{one[kind]:.1%}" for one in own.values()),
            )
            for kind, value in numbers.items()
        ]
        page.add_table(("kind", "accuracy", *own), rows)
