"""Sections of the page of `check_data`: a record and the model's inputs."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from perception_jax.data import images
from perception_jax.data.records import ObjectAnnotation, Question, Record, Turn
from perception_jax.data.tokenization import Tokenizer
from perception_jax.viz.html_report import Report
from perception_jax.viz.overlay import draw_boxes

SHOWN_SIDE = 320
"""Smaller pictures are enlarged by an integer factor to this side, so that labels are legible."""
SHOWN_TEXT = 300
"""Number of characters of an extra that are shown."""


def add_record(report: Report, record: Record, example: Mapping[str, Any], tokenizer: Any) -> None:
    """Adds a section for one record.

    Args:
      report: the page.
      record: as the source has it.
      example: what the transform made of it. Its keys are those of `train.task.Batch`:
        uint8[H, W, 3] arrays are shown as pictures, "boxes" on the one named "image" where
        "box_mask" says so, "ids" as text.
      tokenizer: with `decode(ids)`, or None.
    """
    report.add_section(record.id)
    if pictures := [*_draw_record(record), *_draw_example(example)]:
        report.add_image_rows([pictures], width=SHOWN_SIDE)
    rows = [("record", kind, text) for kind, text in _record_texts(record)]
    rows += [("model", name, _describe(name, value, tokenizer)) for name, value in example.items()]
    report.add_table(("from", "what", "content"), rows)


def _draw_record(record: Record) -> list[tuple[np.ndarray, str]]:
    """The original images, with the boxes of the objects that have one."""
    placed = [one for one in record.objects if one.box is not None]
    boxes = np.array([one.box for one in placed], np.float64).reshape(-1, 4)
    names = [one.name for one in placed]
    decoded = [images.decode(image, name=record.id) for image in record.images]
    return [
        (_draw(image, boxes, names), f"record, {image.shape[1]}×{image.shape[0]}")
        for image in decoded
    ]


def _draw_example(example: Mapping[str, Any]) -> list[tuple[np.ndarray, str]]:
    """Each picture among the arrays, with its boxes."""
    drawn = []
    for name, value in example.items():
        if not _is_picture(value):
            continue
        boxes = np.zeros((0, 4))
        if name == "image" and "boxes" in example:
            boxes = np.asarray(example["boxes"], np.float64)[example["box_mask"]]
        numbers = [str(k) for k in range(len(boxes))]
        drawn.append((_draw(value, boxes, numbers), f"{name}, {value.shape[1]}×{value.shape[0]}"))
    return drawn


def _draw(image: np.ndarray, boxes: np.ndarray, names: list[str]) -> np.ndarray:
    factor = max(1, -(-SHOWN_SIDE // max(image.shape[:2])))
    image = image.repeat(factor, axis=0).repeat(factor, axis=1)
    return draw_boxes(image, boxes * factor, names) if len(boxes) else image


def _is_picture(value: Any) -> bool:
    value = np.asarray(value)
    return value.dtype == np.uint8 and value.ndim == 3 and value.shape[-1] == 3


def _record_texts(record: Record) -> list[tuple[str, str]]:
    def named(target: int | None) -> str:
        return "absent" if target is None else f"{target} ({record.objects[target].name})"

    kind = record.class_name + _source_name(record.class_name, record.raw_class_name)
    rows = [("class", kind)] if kind else []
    rows += [("caption", text) for text in record.captions]
    rows += [("object", _describe_object(k, one)) for k, one in enumerate(record.objects)]
    rows += [("referring", f"{one.text} → {named(one.target)}") for one in record.referring]
    rows += [("question", _describe_question(one)) for one in record.questions]
    rows += [("instruction", f"{one.text} → {named(one.target)}") for one in record.instructions]
    rows += [(one.role, _describe_turn(one, named)) for one in record.conversation]
    rows += [("text", record.text)] if record.text else []
    rows += [("absent", ", ".join(record.absent))] if record.absent else []
    unsure = ", ".join(record.not_exhaustive)
    rows += [("not exhaustive", unsure)] if unsure else []
    return rows + [("extra", text) for text in _plain_extras(record.extras)]


def _plain_extras(extras: Mapping[str, Any]) -> list[str]:
    """Those that are numbers, texts, or lists of them."""
    texts = []
    for key, value in extras.items():
        try:
            text = f"{key}: {json.dumps(value, ensure_ascii=False)}"
        except (TypeError, ValueError):
            continue
        texts.append(text if len(text) <= SHOWN_TEXT else f"{text[: SHOWN_TEXT - 1]}…")
    return texts


def _describe_object(number: int, one: ObjectAnnotation) -> str:
    place = "" if one.box is None else " at " + ", ".join(f"{side:.0f}" for side in one.box)
    marks = [("area", one.area), ("salient", one.salient), ("crowd", one.crowd or None)]
    known = [*one.attributes.items(), *((key, value) for key, value in marks if value is not None)]
    more = ", ".join(f"{key} {value}" for key, value in known)
    name = f"{number}: {one.name}{place}{_source_name(one.name, one.raw_name)}"
    return "; ".join(part for part in (name, more, *one.captions) if part)


def _describe_question(one: Question) -> str:
    """The question, what it offers, and each different answer with its number."""
    offered = f" ({' | '.join(one.options)})" if one.options else ""
    counts = collections.Counter(one.answers)
    answers = [text + (f" ×{count}" if count > 1 else "") for text, count in counts.items()]
    return f"{one.text}{offered} → {', '.join(answers)}"


def _describe_turn(one: Turn, named: Callable[[int], str]) -> str:
    return one.text + (f" → {', '.join(map(named, one.targets))}" if one.targets else "")


def _source_name(name: str, raw: str | None) -> str:
    """A remark on the source's own name of a class, where it is another than the display name."""
    return "" if raw == name else f" (“{raw}” in the source)"


def _describe(name: str, value: Any, tokenizer: Any) -> str:
    value = np.asarray(value)
    kind = f"{value.dtype}{list(value.shape)}"
    if name in ("ids", "label") and value.ndim == 1 and isinstance(tokenizer, Tokenizer):
        return f"{kind} “{tokenizer.decode(value[value >= 0])}”"  # labels below 0 do not count
    if value.size == 0:
        return kind
    if value.size <= 8:
        return f"{kind} {np.array2string(value, precision=4, separator=', ')}"
    if value.dtype == bool:
        return f"{kind} {int(value.sum())} true"
    return f"{kind} {value.min()} to {value.max()}"
