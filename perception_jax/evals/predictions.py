"""Predictions of a model on disk, from which any score can be computed again.

A folder has, for each process that predicted, two files that grow by appending:

- `predictions-00000-of-00001.jsonl`: one JSON object a line with `id` (of the example, unique in
  the folder), `prompt`, `output`, `prompt_hash`, `model_id`, where used `extras` (anything that
  only a benchmark knows) and `detections` (first row and number of rows in the other file);
- `detections-00000-of-00001.bin`: rows of `DETECTION`, for models that give boxes.

What a crash cut off is left out when the files are read, and dropped when they are opened to go
on.
"""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from perception_jax.data.sources import fields
from perception_jax.errors import DataError

DETECTION = np.dtype([("box", "<f4", (4,)), ("score", "<f4"), ("label", "<i4")])
"""A row of detections: xyxy pixels of the original image, score, index of the class."""
SYNC_SECONDS = 5.0
"""At most so long predictions wait before they are safely on disk."""

_FILE = re.compile(r"predictions-(\d+)-of-(\d+)\.jsonl")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Detections:
    """Boxes of one image.

    Attributes:
      boxes: xyxy, pixels of the original image.
      scores: one of each box.
      labels: index of each box's class in the benchmark's list of classes.
    """

    boxes: Float[np.ndarray, "R 4"]
    scores: Float[np.ndarray, " R"]
    labels: Int[np.ndarray, " R"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Prediction:
    """The output of a model for one example.

    Attributes:
      id: of the example, unique in its folder; an image with several questions gives several ids.
      prompt: the text that the model was given, "" for models without one.
      output: the text that it gave, or a vector (`text_of`).
      model_id: which weights, e.g. "scenes-clip" or a checkpoint's path.
      detections: boxes, for models that give them.
      extras: JSON values that only a benchmark knows.
    """

    id: str
    output: str
    model_id: str
    prompt: str = ""
    detections: Detections | None = None
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def text_of(vector: Float[np.ndarray, " d"]) -> str:
    """A vector as an `output`: Base64 of its float32 numbers, the smallest byte first."""
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def vector_of(output: str) -> Float[np.ndarray, " d"]:
    """The vector of `text_of`, float32.

    Raises:
      DataError: the output is something else.
    """
    try:
        return np.frombuffer(base64.b64decode(output, validate=True), "<f4").astype(np.float32)
    except ValueError as error:
        raise DataError(
            f"expected a vector as Base64 of float32 numbers, found {output[:20]!r} ({error}); "
            "delete the folder of predictions to make them again"
        ) from error


def prompt_hash(prompt: str) -> str:
    """First 16 hex digits of the SHA-256 of the UTF-8 prompt."""
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()[:16]


class PredictionWriter:
    """Appends the predictions of one process to a folder, and goes on where it stopped.

    Attributes:
      done: ids that this process's files already hold.
    """

    def __init__(self, folder: str | os.PathLike[str], *, host: tuple[int, int] = (0, 1)):
        """Opens or makes the files; drops what a crash cut off at their end, and logs it.

        Args:
          host: index and number of the processes that predict.

        Raises:
          DataError: the files cannot be written, hold something else, or are being written by
            another process.
        """
        self._path, self._rows_path = _paths(pathlib.Path(folder), *host)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lines, self._rows = (
                path.open("r+b" if path.exists() else "w+b")
                for path in (self._path, self._rows_path)
            )
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
            self._drop_what_is_cut_off()
        except BlockingIOError as error:
            self._close_files()
            raise DataError(
                f"{self._path}: another process is writing these predictions. Wait until it has "
                "ended, or give another folder."
            ) from error
        except BaseException:
            self._close_files()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, prediction: Prediction) -> None:
        """Appends one prediction.

        Raises:
          DataError: it is malformed, its id is there already, or the disk refuses.
        """
        where = f"a prediction for {self._path}"
        values = _to_values(prediction, self._row)
        _checked(values, where)
        if prediction.id in self.done:
            raise DataError(
                f"expected distinct ids, found {prediction.id!r} a second time in {where}; an id "
                "names an example (image and prompt), not an image"
            )
        rows = _to_rows(prediction, where)
        try:
            line = json.dumps(values, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"expected JSON values in extras, found {error} in {where}, id {prediction.id!r}; "
                "convert arrays with `.tolist()` and replace NaN"
            ) from error
        try:
            self._rows.write(rows.tobytes())
            self._lines.write(f"{line}\n".encode())
        except OSError as error:
            raise self._unwritable(error) from error
        self._row += len(rows)
        self.done.add(prediction.id)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Puts everything safely on disk: rows first, for lines point to them."""
        try:
            for file in (self._rows, self._lines):
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        self._synced = time.monotonic()

    def close(self) -> None:
        """Syncs and closes the files."""
        if self._lines.closed:
            return
        try:
            self.sync()
        finally:
            self._close_files()

    def _close_files(self) -> None:
        self._lines.close()
        self._rows.close()

    def _drop_what_is_cut_off(self) -> None:
        shard = _read_shard(self._path, self._rows_path)
        self.done = {prediction.id for prediction, _ in shard.found}
        self._row = shard.rows
        for file, size in (
            (self._lines, shard.end),
            (self._rows, shard.rows * DETECTION.itemsize),
        ):
            file.truncate(size)
            file.seek(size)

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"expected to write predictions to {self._path}, found {error}; check the free space "
            "and the permissions of its folder"
        )


def read_predictions(folder: str | os.PathLike[str], *, none_ok: bool = False) -> list[Prediction]:
    """Reads and checks all predictions of a folder, of all processes.

    What a crash cut off at the end of a file is left out, and logged.

    Args:
      none_ok: whether the folder may be empty; otherwise that is an error.

    Raises:
      DataError: there are none; a line is not JSON, lacks a key or holds a wrong value (the message
        names file and line); an id comes twice, or models differ.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise DataError(f"expected a folder of predictions, found no folder {folder}")
    found: dict[str, Prediction] = {}
    for path in sorted(folder.iterdir()):
        if host := _FILE.fullmatch(path.name):
            for prediction, where in _read_shard(*_paths(folder, *map(int, host.groups()))).found:
                if prediction.id in found:
                    raise DataError(
                        f"expected distinct ids, found {prediction.id!r} again in {where}"
                    )
                found[prediction.id] = prediction
    if not (found or none_ok):
        raise DataError(
            f"expected predictions in {folder}, found none that are whole (boxes are in the file "
            "detections-*.bin beside each); make them with `python -m launch.evaluate` or check "
            "the path"
        )
    models = sorted({one.model_id for one in found.values()})
    if len(models) > 1:
        raise DataError(
            f"expected predictions of one model in {folder}, found {', '.join(models)}; give each "
            "model a folder of its own"
        )
    return list(found.values())


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


def _paths(folder: pathlib.Path, index: int, count: int) -> tuple[pathlib.Path, pathlib.Path]:
    part = f"{index:05d}-of-{count:05d}"
    return folder / f"predictions-{part}.jsonl", folder / f"detections-{part}.bin"


@dataclasses.dataclass(frozen=True, eq=False)
class _Shard:
    """What is whole in the files of one process.

    Attributes:
      found: predictions, and where each stands.
      end: bytes of their lines.
      rows: rows that they point to.
    """

    found: list[tuple[Prediction, str]]
    end: int
    rows: int


def _read_shard(path: pathlib.Path, rows_path: pathlib.Path) -> _Shard:
    table = np.fromfile(rows_path, DETECTION) if rows_path.exists() else np.zeros(0, DETECTION)
    data, found, end, rows = path.read_bytes(), [], 0, 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        if line.strip():
            where = f"{path}, line {number}"
            values = _parse(line, where)
            first, count = values.get("detections", (rows, 0))
            if first + count > len(table):  # the system may have written the lines before the rows
                break
            rows = first + count
            found.append((_from_values(values, table[first:rows]), where))
        end += len(line)
    if end < len(data):
        _log.warning("%s: left out %d bytes that were cut off", path, len(data) - end)
    return _Shard(found, end, rows)


def _from_values(values: Mapping[str, Any], rows: np.ndarray) -> Prediction:
    detections = None
    if "detections" in values:
        detections = Detections(boxes=rows["box"], scores=rows["score"], labels=rows["label"])
    return Prediction(
        **{name: values[name] for name in ("id", "prompt", "output", "model_id")},
        detections=detections,
        extras=values.get("extras", {}),
    )


def _to_values(prediction: Prediction, row: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "id": prediction.id,
        "prompt": prediction.prompt,
        "output": prediction.output,
        "prompt_hash": prompt_hash(prediction.prompt),
        "model_id": prediction.model_id,
    }
    if prediction.extras:
        values["extras"] = dict(prediction.extras)
    if prediction.detections is not None:
        values["detections"] = [row, len(prediction.detections.boxes)]
    return values


def _to_rows(prediction: Prediction, where: str) -> np.ndarray:
    found = prediction.detections
    if found is None:
        return np.zeros(0, DETECTION)
    boxes, scores = np.asarray(found.boxes), np.asarray(found.scores)
    counts = (len(boxes), len(scores), len(found.labels))
    if boxes.shape != (counts[0], 4) or len(set(counts)) > 1:
        raise DataError(
            f"expected as many scores and labels as boxes [R, 4], found {boxes.shape}, {counts[1]} "
            f"and {counts[2]} in {where}, id {prediction.id!r}"
        )
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise DataError(f"expected finite boxes and scores in {where}, id {prediction.id!r}")
    if (boxes[:, :2] > boxes[:, 2:]).any():
        raise DataError(
            f"expected boxes with x1 <= x2 and y1 <= y2 (x1 y1 x2 y2) in {where}, id "
            f"{prediction.id!r}"
        )
    rows = np.zeros(len(boxes), DETECTION)
    rows["box"], rows["score"], rows["label"] = boxes, scores, found.labels
    return rows


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected one JSON object a line, found {error}; repair or remove the line"
        ) from error
    values = _checked(values, where)
    if values["prompt_hash"] != prompt_hash(values["prompt"]):
        raise DataError(
            f"{where}: expected prompt_hash {prompt_hash(values['prompt'])!r} for the prompt, "
            f"found {values['prompt_hash']!r}; the prompt was changed after prediction"
        )
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name}, which JSON does not have")


def _row_numbers(value: Any, where: str) -> tuple[int, ...]:
    found = fields.list_of(fields.integer)(value, where)
    if len(found) != 2 or min(found) < 0:
        raise fields.fail(where, "[first row, number of rows]", value)
    return found


_TEXTS = dict.fromkeys(("prompt", "output", "prompt_hash", "model_id"), fields.any_text)
_KNOWN = {"id": fields.text, **_TEXTS, "extras": fields.plain_mapping, "detections": _row_numbers}


def _checked(values: Any, where: str) -> dict[str, Any]:
    return fields.entries(values, where, _KNOWN, required=("id", *_TEXTS))
