"""The pictures of a report: scenes under several instructions, overlooked objects found and missed.

Which are shown is drawn at random from all that were measured. Letters: S image side, C side of a
picture, E embedding width, n captions.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from perception_jax.data import images, views
from perception_jax.data.records import Record, Source
from perception_jax.evals.conditioned.accumulate import Measured
from perception_jax.evals.conditioned.annotations import ABSENT
from perception_jax.nn import maps
from perception_jax.systems.give.adapter import Instruction
from perception_jax.systems.give.encoding.encode import Encoder, pick
from perception_jax.systems.give.model import Give, Steered
from perception_jax.systems.give.showing.looking import look
from perception_jax.viz import ImageCard, draw_boxes, patch_maps
from perception_jax.viz.sheet import PANEL

SCENES = 6
"""Scenes with maps."""
PRESENT = 2
"""Most objects of a scene that are asked about, beside one that it lacks."""
OVERLOOKED = 8
"""Overlooked objects shown as found, and as missed."""
CAPTIONS = 2
"""Nearest captions that are named."""
_MARKS = {True: "✓", False: "✗"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """One image under one instruction, and without it.

    Attributes:
      steered, static: unit embeddings with the instruction and without.
      presence: probability that the object is there.
      for_presence: which patches speak for that, steered.
      for_words: which patches of the unsteered tower speak for the instruction's words.
      attention: of the unsteered tower, of its class token or pooling head.
    """

    steered: Float[Array | np.ndarray, " E"]
    static: Float[Array | np.ndarray, " E"]
    presence: Float[Array | np.ndarray, ""]
    for_presence: Float[Array | np.ndarray, "rows columns"]
    for_words: Float[Array | np.ndarray, "rows columns"]
    attention: Float[Array | np.ndarray, "rows columns"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """A class that a scene is asked about, and the pair that it is; None if it is absent."""

    kind: int
    pair: int | None


class Pictures:
    """Draws what an evaluation measured on some records."""

    def __init__(self, model: Give, encoder: Encoder, records: Source, measured: Measured):
        """Args:
        encoder: runs the model as it was evaluated.
        records: that were measured, in order.
        """
        self._model, self._encoder = model, encoder
        self._records, self._measured = records, measured
        notes = measured.annotations
        self._told = encoder.instructions(model, notes.instructions)
        self._captions = tuple(dict.fromkeys(notes.captions.texts))
        self._rows = encoder.texts(model, self._captions) if self._captions else None
        self._patch = model.backbone.vision.patch_embed.patch
        self._see = jax.jit(self._seen)

    def scenes(self) -> list[list[ImageCard]]:
        """Some images, each in pairs: itself and its attention; then for each instruction the map
        with it and the map without."""
        chosen = np.random.default_rng(0).permutation(self._measured.annotations.count)
        questions = ((image, self._questions(image)) for image in chosen.tolist())
        shown = (one for one in questions if any(asked.pair is not None for asked in one[1]))
        return [self._scene(*one) for one in itertools.islice(shown, SCENES)]

    def overlooked(self) -> tuple[list[ImageCard], list[ImageCard]]:
        """Overlooked objects that the model finds there, and those that it misses."""
        notes = self._measured.annotations
        chosen = np.random.default_rng(1).permutation(
            np.flatnonzero(notes.pairs.within("overlooked"))
        )
        found, missed = [], []
        for pair in chosen.tolist():
            there = self._logit(pair) > 0
            cards = found if there else missed
            if len(cards) < OVERLOOKED:
                cards.append(self._card(pair, there))
        return found, missed

    def _questions(self, image: int) -> list[_Asked]:
        """The smallest objects of an image, then a class that it lacks."""
        notes = self._measured.annotations
        pairs = np.flatnonzero(notes.pairs.image == image)
        overlooked = notes.pairs.within("overlooked")[pairs]
        pairs = pairs[np.argsort(~overlooked, kind="stable")][:PRESENT]
        asked = [_Asked(kind=int(notes.pairs.class_id[pair]), pair=int(pair)) for pair in pairs]
        absent = np.flatnonzero(notes.labels[image] == ABSENT)
        if len(absent):
            kind = np.random.default_rng([2, image]).choice(absent)
            asked.append(_Asked(kind=int(kind), pair=None))
        return asked

    def _scene(self, image: int, asked: list[_Asked]) -> list[ImageCard]:
        record = self._records[image]
        view = self._view(record)
        seen = [self._look(view, one) for one in asked]
        shown = ", ".join(dict.fromkeys(item.name for item in record.objects))
        boxed = _boxed(view, record, range(len(record.objects)), named=True)
        plain = f"Not steered: attention\n{self._nearest(seen[0].static, asked)}"
        cards = [
            ImageCard(boxed, f"The image: {shown}"),
            ImageCard(patch_maps.over(view.picture, seen[0].attention), plain.strip()),
        ]
        for one, found in zip(asked, seen, strict=True):
            cards += [self._steered(view, one, found), self._static(view, image, one, found)]
        return cards

    def _steered(self, view: views.View, asked: _Asked, seen: Seen) -> ImageCard:
        there = bool(seen.presence > 0.5)
        said = f"“{self._instruction(asked)}”: {'there' if there else 'not there'}"
        lines = [f"{said}, {percent(float(seen.presence))}", self._nearest(seen.steered, [asked])]
        return ImageCard(
            patch_maps.over(view.picture, seen.for_presence),
            "\n".join(filter(None, lines)),
            "ok" if there == (asked.pair is not None) else "wrong",
        )

    def _static(self, view: views.View, image: int, asked: _Asked, seen: Seen) -> ImageCard:
        text = f"“{self._instruction(asked)}”, not steered"
        if asked.pair is not None:
            text += f"\n{self._ahead(image, asked.kind)}"
        return ImageCard(patch_maps.over(view.picture, seen.for_words), text)

    def _card(self, pair: int, there: bool) -> ImageCard:
        notes = self._measured.annotations
        image, kind = int(notes.pairs.image[pair]), int(notes.pairs.class_id[pair])
        record = self._records[image]
        name = notes.classes[kind].name
        mine = [k for k, item in enumerate(record.objects) if item.name == name]
        boxed = _boxed(self._view(record), record, mine, named=False)
        chance = float(jax.nn.sigmoid(self._logit(pair)))
        text = f"{name}: {percent(chance)}\n{self._ahead(image, kind)}"
        return ImageCard(boxed, text, "ok" if there else "wrong")

    def _ahead(self, image: int, kind: int) -> str:
        """How many absent classes of an image score higher, steered and not."""
        measured = self._measured
        absent = measured.annotations.labels[image] == ABSENT
        steered, static = (
            int(np.count_nonzero(scores[image, absent] > scores[image, kind]))
            for scores in (measured.presence, measured.static)
        )
        return (
            f"Absent things rated higher: {steered} of {np.count_nonzero(absent)}, "
            f"not steered {static}"
        )

    def _nearest(self, embedding: Float[np.ndarray, " E"], asked: list[_Asked]) -> str:
        """The nearest captions, those of what was asked about marked as right."""
        if self._rows is None:
            return ""
        notes = self._measured.annotations
        mine = [one.pair for one in asked if one.pair is not None]
        own = np.flatnonzero(np.isin(notes.captions.pair, mine))
        right = {notes.captions.texts[k] for k in own}
        cosines = self._rows @ embedding
        best = np.argsort(-cosines, kind="stable")[:CAPTIONS]
        texts = [(cosines[k], self._captions[k]) for k in best]
        return "\n".join(f"{_MARKS[text in right]} {text}, {cosine:.2f}" for cosine, text in texts)

    def _instruction(self, asked: _Asked) -> str:
        return self._measured.annotations.instructions[self._number(asked)]

    def _number(self, asked: _Asked) -> int:
        notes = self._measured.annotations
        of_class = notes.class_instruction[asked.kind]
        return int(of_class if asked.pair is None else notes.pairs.instruction[asked.pair])

    def _logit(self, pair: int) -> float:
        pairs = self._measured.annotations.pairs
        return float(self._measured.presence[pairs.image[pair], pairs.class_id[pair]])

    def _view(self, record: Record) -> views.View:
        original = images.decode(record.image, name=record.id)
        image = self._encoder.processor.image
        return views.view(image, original, patch=self._patch, side=PANEL)

    def _look(self, view: views.View, asked: _Asked) -> Seen:
        told = pick(self._told, jnp.array([self._number(asked)]))
        return jax.device_get(self._see(self._model, view.pixels[None], told))

    def _seen(self, model: Give, pixels: UInt8[Array, "1 S S 3"], told: Instruction) -> Seen:
        normal = self._encoder.normalised(pixels)
        steered = look(model, normal, told, told.mask)
        unsteered = Steered(model, dataclasses.replace(told, strength=jnp.float32(0.0)))
        return Seen(
            steered=steered.embedding,
            static=model(normal).embedding[0],
            presence=jax.nn.sigmoid(steered.presence_logit),
            for_presence=steered.relevance,
            for_words=maps.text_relevance(unsteered, normal, told.embedding)[0],
            attention=maps.class_attention(model.backbone.vision, normal)[0],
        )


def percent(share: float) -> str:
    """For people, in whole numbers."""
    return f"{100 * share:.0f} %"


def _boxed(
    view: views.View, record: Record, chosen: range | list[int], *, named: bool
) -> UInt8[np.ndarray, "C C 3"]:
    """The picture with the boxes of some of its objects."""
    items = [record.objects[k] for k in chosen if record.objects[k].box is not None]
    if not items:
        return view.picture
    left, top, right, bottom = view.region
    side = np.array([right - left, bottom - top] * 2)
    boxes = (np.array([item.box for item in items]) - [left, top] * 2) / side * PANEL
    return draw_boxes(view.picture, boxes, [item.name if named else "" for item in items])
