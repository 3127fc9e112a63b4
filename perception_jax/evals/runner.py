"""Predict, keep, score: an evaluation that a crash interrupts goes on where it stopped.

`predict` appends to files (`evals.predictions`); scores are functions of what `predicted` reads
back and of the annotations, so they can be computed again without the model.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

from perception_jax.errors import DataError
from perception_jax.evals.predictions import (
    Prediction,
    PredictionWriter,
    align,
    read_predictions,
)

Run = Callable[[Sequence[int]], Iterable[Prediction]]
"""Takes the numbers of examples and yields the prediction of each, in order."""


def predict(
    ids: Sequence[str],
    run: Run,
    folder: str | os.PathLike[str],
    *,
    model_id: str,
    host: tuple[int, int] = (0, 1),
) -> int:
    """Predicts what the folder does not hold yet.

    Args:
      ids: of all examples, the same on every process; each takes its share of them.
      run: the model; called once, with the numbers that are left for this process.
      folder: of the predictions; may hold those of an earlier run, also on other processes.
      model_id: which weights; those of the folder must be of the same.
      host: index and number of the processes.

    Returns:
      How many predictions this call made.

    Raises:
      DataError: ids come twice; the folder holds predictions of another model or of other examples;
        `run` gives another example's prediction, or too few.
    """
    folder, known = pathlib.Path(folder), {name: k for k, name in enumerate(ids)}
    if len(known) < len(ids):
        raise DataError(f"expected distinct ids, found {len(ids) - len(known)} more than once")
    index, count = host
    with PredictionWriter(folder, host=host) as writer:
        done = _done(folder, known, model_id)
        left = [k for k in range(index, len(ids), count) if ids[k] not in done]
        made = 0
        for prediction in run(left) if left else ():
            expected = ids[left[made]] if made < len(left) else None
            if prediction.id != expected or prediction.model_id != model_id:
                raise DataError(
                    f"expected the prediction of {expected!r} by {model_id!r}, found that of "
                    f"{prediction.id!r} by {prediction.model_id!r}"
                )
            writer.add(prediction)
            made += 1
        if made < len(left):
            raise DataError(f"expected {len(left)} predictions, found {made}")
    return made


def predicted(ids: Sequence[str], folder: str | os.PathLike[str]) -> list[Prediction]:
    """The predictions of all examples, in their order, from the files of all processes.

    Raises:
      DataError: some are missing, or damaged.
    """
    return align(read_predictions(folder), ids)


def _done(folder: pathlib.Path, known: dict[str, int], model_id: str) -> set[str]:
    """Ids that any process has predicted."""
    found = read_predictions(folder, none_ok=True)
    strange = [one.id for one in found if one.id not in known]
    if strange or any(one.model_id != model_id for one in found):
        what = f"of {found[0].model_id!r}" if not strange else f"of other examples ({strange[0]!r})"
        raise DataError(
            f"{folder} holds predictions {what}, expected those of {len(known)} examples by "
            f"{model_id!r}. Give another folder, or delete that one."
        )
    return {one.id for one in found}
