"""Questions about images: answers, and the attention of an answer over its image.

Letters: A answer tokens, C side of a picture.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from perception_jax.data import text_lines
from perception_jax.data.conversation import image_spans
from perception_jax.data.sources import fields
from perception_jax.data.views import at_size
from perception_jax.errors import DataError
from perception_jax.generate import Generated
from perception_jax.inference.images import ImageResult
from perception_jax.inference.single_image import listed
from perception_jax.models.hosts import image_attention
from perception_jax.nn.taps import Taps
from perception_jax.systems.text.model import TextModel
from perception_jax.viz import overlay, sheet

_COLUMNS = 4
"""Largest number of panels in a row."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageQuestion:
    """A question about an image.

    Attributes:
      id: unique in its file.
      image: path of the image.
      text: verbatim.
      where: it comes from, for messages.
    """

    id: str
    image: pathlib.Path
    text: str
    where: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageAnswer:
    """The answer to a question about an image.

    Attributes:
      question: verbatim.
      generated: text and tokens.
      attention: of the moments at which its tokens were chosen to the patches of the image; mean
        over tokens and heads. None for an empty answer.
    """

    question: str
    generated: Generated
    attention: Float[np.ndarray, "rows columns"] | None

    def to_json(self) -> dict[str, Any]:
        """Texts, tokens and attention, rows from the top."""
        return {
            "question": self.question,
            "answer": self.generated.text,
            "ids": list(self.generated.ids),
            "log_probs": list(self.generated.log_probs),
            "ended": self.generated.ended,
            "attention": None if self.attention is None else listed(self.attention),
        }


class Asker:
    """Asks one model the same questions about many images.

    Args:
      model: reads images.
      questions: asked one by one, each without the others.
      tokens: at most so many for each answer.
      layer: whose attention is shown; None is the middle one.
      facts: JSON values that are the same for all images.
    """

    def __init__(
        self,
        model: TextModel,
        questions: Sequence[str],
        *,
        tokens: int,
        layer: int | None,
        facts: dict[str, Any],
    ):
        self._model, self._questions, self._tokens = model, tuple(questions), tokens
        self._prompts = [model.prompt_ids(one, images=1, where="--question") for one in questions]
        depth = model.generator.model.empty_cache(1, 1).keys.shape[0]
        self._layer = depth // 2 if layer is None else layer
        self._facts = facts | {"layer": self._layer}

    def __call__(self, image: pathlib.Path) -> ImageResult:
        """Answers the questions about an image file.

        Raises:
          ImageError: it cannot be decoded.
        """
        pixels = self._model.pixels([image])[None]
        tokens = self._model.image_tokens(pixels)
        answers = [
            self._ask(question, prompt, tokens)
            for question, prompt in zip(self._questions, self._prompts, strict=True)
        ]
        shown = at_size(self._model.image, sheet.PANEL).read(image).pixels
        return ImageResult(
            picture=draw(shown, answers, image.name, self._layer),
            facts={
                **self._facts,
                "image": str(image),
                "answers": [one.to_json() for one in answers],
            },
            line="".join(f"  {one.question} {one.generated.text}" for one in answers),
        )

    def _ask(self, question: str, prompt: Sequence[int], images: Any) -> ImageAnswer:
        (found,) = self._model.answer([prompt], image_tokens=images, tokens=self._tokens)
        attention = None
        if found.ids:
            chosen_at = jnp.arange(len(prompt) - 1, len(prompt) - 1 + len(found.ids))
            taps = Taps(attention=(self._layer,), rows=chosen_at)
            read = [[*prompt, *found.ids[:-1]]]
            out = self._model.generator.prefill(read, image_tokens=images, taps=taps)
            size = self._model.host.tokens_per_image
            start = image_spans(np.asarray(prompt, np.int32), counts=(size,))[0, :1]
            maps = image_attention(self._model.host, out.attention, start)
            attention = np.asarray(maps, np.float32)[0, 0].mean(axis=(0, 1))
        return ImageAnswer(question=question, generated=found, attention=attention)


def draw(
    shown: UInt8[np.ndarray, "C C 3"], answers: Sequence[ImageAnswer], name: str, layer: int
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Draws an image beside the attention of each answer.

    Args:
      shown: the part that the model reads.
      name: of the image.
    """
    panels = [(shown, f"{name}\nas the model reads it")]
    for one in answers:
        text = f"{one.question}\n{one.generated.text or '(no text)'}"
        panels.append(
            (shown, text)
            if one.attention is None
            else (
                overlay.over_grey(shown, one.attention),
                f"{text}\n{one.attention.sum():.0%} of the attention in layer {layer}",
            )
        )
    columns = min(len(panels), _COLUMNS)
    width = sheet.width_of(columns)
    return sheet.stacked([sheet.panels(panels, columns=columns), sheet.legend(width)], width)


def read_questions(path: str | os.PathLike[str]) -> list[ImageQuestion]:
    """Reads a file of questions about images; blank lines are left out.

    Args:
      path: `.jsonl` with an object a line: "image" (a path from the file's folder), "question" and,
        where wanted, "id" (otherwise the number of the line).

    Raises:
      DataError: the file cannot be read, is empty, or a line of it is damaged (it is named); two
        questions have one id.
    """
    folder = pathlib.Path(path).parent
    found: dict[str, ImageQuestion] = {}
    for line in text_lines.lines(path):
        where = f"{path}:{line.number}"
        entry = fields.parse_json(line.text, where)
        text = fields.required(entry, "question", fields.text, where)
        image = fields.required(entry, "image", fields.file_name, where)
        name = str(fields.identity(entry.get("id", line.number), f"{where}: id"))
        if name in found:
            raise DataError(f"{where}: expected a new id, found {name!r} of {found[name].where}.")
        found[name] = ImageQuestion(id=name, image=folder / image, text=text, where=where)
    if not found:
        raise DataError(f"{path}: expected one question a line, found none.")
    return list(found.values())
