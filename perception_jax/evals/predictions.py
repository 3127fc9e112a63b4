"""The predictions file: what a model said, one JSON object a line, so that any score can be redone.

Keys of a line: `id` (of the example, unique in the file), `prompt`, `output`, `boxes` (xyxy float
pixels of the original image), `scores`, `prompt_hash`, `model_id`; where used also `labels` (class
names of the boxes) and `extras` (anything else a protocol needs).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perception_jax.data.records import Box
from perception_jax.errors import DataError
from perception_jax.files import replacing

_REQUIRED = {"id": str, "prompt": str, "output": str, "prompt_hash": str, "model_id": str}
_OPTIONAL = {"boxes": list, "scores": list, "labels": list, "extras": dict}
_JSON_NAMES = {str: "a string", list: "a list", dict: "an object"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a model said about one example.

    Attributes:
      id: of the example, unique in its file; an image with several questions gives several ids.
      prompt: the text that the model was given, "" for models without one.
      output: the text that it gave.
      boxes: xyxy float pixels of the original image.
      scores: one per box; without boxes, whatever the protocol says.
      labels: class names of the boxes, one per box, or empty.
      model_id: which weights, e.g. "scenes-clip" or a checkpoint's path.
      extras: JSON values that only a protocol knows.
    """

    id: str
    prompt: str
    output: str
    model_id: str
    boxes: tuple[Box, ...] = ()
    scores: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def prompt_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the prompt: tells prompts apart at a glance."""
        return prompt_hash(self.prompt)


def prompt_hash(prompt: str) -> str:
    """First 16 hex digits of the SHA-256 of the UTF-8 prompt."""
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()[:16]


def write_predictions(path: str | os.PathLike[str], predictions: Iterable[Prediction]) -> int:
    """Writes predictions as they come; the file appears when all of them are safely on disk.

    Args:
      path: the JSONL file; its folder is made, an older file of that name replaced.
      predictions: may be a generator.

    Returns:
      The number of predictions.

    Raises:
      DataError: a prediction is malformed, an id comes twice, there is none, or the disk refuses.
        No file is left behind, and an older one stays as it was.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            seen: dict[str, int] = {}
            for number, prediction in enumerate(predictions, start=1):
                line = _to_line(prediction, f"prediction {number} for {path}")
                _check_new(prediction.id, number, seen, str(path))
                file.write(line.encode())
            if not seen:
                raise DataError(f"expected at least one prediction to write to {path}, found none")
    except OSError as error:
        raise DataError(
            f"expected to write predictions to {path}, found {error}; check the free space and the "
            "permissions of its folder"
        ) from error
    return len(seen)


def read_predictions(path: str | os.PathLike[str]) -> list[Prediction]:
    """Reads and validates a whole predictions file; empty lines are passed over.

    Raises:
      DataError: the file is missing or empty, a line is cut off, not JSON, lacks a key or holds a
        wrong value (the message names line and key), or an id comes twice.
    """
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"expected a predictions file at {path}, found {error}; write one with "
            "`python -m launch.evaluate` or check the path"
        ) from error
    predictions: list[Prediction] = []
    seen: dict[str, int] = {}
    lines = data.split(b"\n")
    for number, raw in enumerate(lines, start=1):
        if raw.strip():
            # Each line is written with its newline, so text after the last one was cut off.
            prediction = _from_line(raw, f"{path}, line {number}", unfinished=number == len(lines))
            _check_new(prediction.id, number, seen, str(path))
            predictions.append(prediction)
    if not predictions:
        raise DataError(f"expected at least one prediction, found an empty file at {path}")
    return predictions


def align(predictions: Sequence[Prediction], ids: Sequence[str]) -> list[Prediction]:
    """The predictions in the order of the annotations' ids.

    Raises:
      DataError: an id has no prediction, or a prediction's id is not among the ids.
    """
    by_id = {prediction.id: prediction for prediction in predictions}
    missing = [i for i in ids if i not in by_id]
    known = set(ids)
    unknown = [i for i in by_id if i not in known]
    if missing or unknown:
        raise DataError(
            f"expected one prediction for each of {len(ids)} examples, found {len(missing)} without"
            f" one (first: {missing[:3]}) and {len(unknown)} predictions of other examples (first: "
            f"{unknown[:3]}); check that predictions and annotations are of the same split"
        )
    return [by_id[i] for i in ids]


def _check_new(name: str, number: int, seen: dict[str, int], where: str) -> None:
    if name in seen:
        raise DataError(
            f"expected distinct ids, found {name!r} as number {seen[name]} and {number} in {where}"
            "; an id names an example (image and prompt), not an image"
        )
    seen[name] = number


def _to_line(prediction: Prediction, where: str) -> str:
    try:
        boxes = [[float(v) for v in box] for box in prediction.boxes]
        scores = [float(v) for v in prediction.scores]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"expected numbers in boxes and scores, found {error} in {where}, id {prediction.id!r}"
        ) from error
    values: dict[str, Any] = {
        "id": prediction.id,
        "prompt": prediction.prompt,
        "output": prediction.output,
        "boxes": boxes,
        "scores": scores,
        "prompt_hash": prediction.prompt_hash,
        "model_id": prediction.model_id,
    }
    if prediction.labels:
        values["labels"] = list(prediction.labels)
    if prediction.extras:
        values["extras"] = dict(prediction.extras)
    _check_values(values, where)
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise DataError(
            f"expected JSON values in extras, found {error} in {where}, id {prediction.id!r}; "
            "convert arrays with `.tolist()` and replace NaN"
        ) from error


def _from_line(raw: bytes, where: str, *, unfinished: bool) -> Prediction:
    try:
        values = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:
        if unfinished:
            raise DataError(
                f"expected a whole last line, found it cut off in {where} ({error}); the file was "
                "truncated: copy it again, or repeat the prediction run"
            ) from error
        raise DataError(
            f"expected one JSON object a line, found {error} in {where}; repair or remove the line"
        ) from error
    if not isinstance(values, dict):
        raise DataError(f"expected a JSON object, found {type(values).__name__} in {where}")
    for key in values:
        if key not in _REQUIRED and key not in _OPTIONAL:
            close = difflib.get_close_matches(key, [*_REQUIRED, *_OPTIONAL], n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise DataError(
                f"expected only known keys, found {key!r} in {where}; {hint}put keys of your own "
                "under 'extras'"
            )
    for key in _REQUIRED:
        if key not in values:
            raise DataError(f"expected the key {key!r}, found {sorted(values)} in {where}")
    _check_values(values, where)
    if values["prompt_hash"] != prompt_hash(values["prompt"]):
        raise DataError(
            f"expected prompt_hash {prompt_hash(values['prompt'])!r} for the prompt, found "
            f"{values['prompt_hash']!r} in {where}; the prompt was changed after prediction"
        )
    return Prediction(
        id=values["id"],
        prompt=values["prompt"],
        output=values["output"],
        model_id=values["model_id"],
        boxes=tuple(tuple(float(v) for v in box) for box in values.get("boxes", ())),
        scores=tuple(float(v) for v in values.get("scores", ())),
        labels=tuple(values.get("labels", ())),
        extras=values.get("extras", {}),
    )


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name}, which JSON does not have")


def _check_values(values: Mapping[str, Any], where: str) -> None:
    """Types, finite numbers, ordered corners, and as many scores and labels as boxes."""
    for key, kind in (_REQUIRED | _OPTIONAL).items():
        if key in values and not isinstance(values[key], kind):
            _fail(_JSON_NAMES[kind], values[key], where, key)
    if not values["id"]:
        _fail("a non-empty string", values["id"], where, "id")
    boxes, scores = values.get("boxes", []), values.get("scores", [])
    labels = values.get("labels", [])
    for index, box in enumerate(boxes):
        whole = isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))
        if not whole or box[0] > box[2] or box[1] > box[3]:
            expected = "four finite numbers x1 <= x2, y1 <= y2 in the order x1 y1 x2 y2"
            _fail(expected, box, where, f"boxes[{index}]")
    for index, score in enumerate(scores):
        if not _is_finite(score):
            _fail("a finite number", score, where, f"scores[{index}]")
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            _fail("a string", label, where, f"labels[{index}]")
    if boxes and scores and len(scores) != len(boxes):
        _fail(f"as many scores as boxes ({len(boxes)})", len(scores), where, "scores")
    if labels and len(labels) != len(boxes):
        _fail(f"as many labels as boxes ({len(boxes)})", len(labels), where, "labels")


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _fail(expected: str, found: Any, where: str, key: str) -> None:
    raise DataError(f"expected {expected}, found {found!r} in {where}, key {key!r}")
