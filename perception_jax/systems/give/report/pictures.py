"""The pictures of a report: maps under several instructions, overlooked objects found and missed.

Examples are drawn at random from all test images. Letters: S image side, C side of a
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
from perception_jax.systems.give.adapter import InstructionFeatures
from perception_jax.systems.give.encode import ConditionedEncoder, take_rows
from perception_jax.systems.give.maps import conditioned_maps
from perception_jax.systems.give.model import ConditionedTower, Give
from perception_jax.viz import ImageCard, draw_boxes, patch_maps
from perception_jax.viz.sheet import PANEL

SCENES = 6
"""Number of images with maps."""
PRESENT = 2
"""Largest number of an image's objects with an instruction, besides one absent class."""
OVERLOOKED = 8
"""Number of overlooked objects shown as found, and as missed."""
CAPTIONS = 2
"""Number of nearest captions shown."""
_MARKS = {True: "✓", False: "✗"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedMaps:
    """One image with an instruction and without it.

    Attributes:
      conditioned, static: unit embeddings with the instruction and without.
      presence: probability that the object is present.
      presence_relevance: relevance of each patch for the presence logit, conditioned.
      text_relevance: relevance for the cosine with the instruction, unconditioned.
      attention: of the unconditioned tower's class token or pooling head.
    """

    conditioned: Float[Array | np.ndarray, " E"]
    static: Float[Array | np.ndarray, " E"]
    presence: Float[Array | np.ndarray, ""]
    presence_relevance: Float[Array | np.ndarray, "rows columns"]
    text_relevance: Float[Array | np.ndarray, "rows columns"]
    attention: Float[Array | np.ndarray, "rows columns"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Query:
    """A class to look for in an image, and its pair of image and class; None if it is absent."""

    class_id: int
    pair: int | None


class Pictures:
    """Draws images of an evaluation with the model's maps and decisions."""

    def __init__(
        self, model: Give, encoder: ConditionedEncoder, records: Source, measured: Measured
    ):
        """Args:
        encoder: runs the model as it was evaluated.
        records: of the test images, in order.
        measured: the scores of the evaluation.
        """
        self._model, self._encoder = model, encoder
        self._records, self._measured = records, measured
        notes = measured.annotations
        self._instructions = encoder.instructions(model, notes.instructions)
        self._captions = tuple(dict.fromkeys(notes.captions.texts))
        self._caption_rows = encoder.texts(model, self._captions) if self._captions else None
        self._patch = model.backbone.vision.patch_embed.patch
        self._compare = jax.jit(self._compared)

    def scenes(self) -> list[list[ImageCard]]:
        """Rows of cards, one an image: the image and its attention, then for each instruction the
        map with it and the map without."""
        chosen = np.random.default_rng(0).permutation(self._measured.annotations.count)
        queries = ((image, self._queries(image)) for image in chosen.tolist())
        shown = (one for one in queries if any(query.pair is not None for query in one[1]))
        return [self._scene(*one) for one in itertools.islice(shown, SCENES)]

    def overlooked(self) -> tuple[list[ImageCard], list[ImageCard]]:
        """Examples of overlooked objects that the presence head finds, and of those it misses."""
        notes = self._measured.annotations
        chosen = np.random.default_rng(1).permutation(
            np.flatnonzero(notes.pairs.within("overlooked"))
        )
        found, missed = [], []
        for pair in chosen.tolist():
            present = self._logit(pair) > 0
            cards = found if present else missed
            if len(cards) < OVERLOOKED:
                cards.append(self._card(pair, present))
        return found, missed

    def _queries(self, image: int) -> list[_Query]:
        """Classes of an image, overlooked objects first, then one absent class."""
        notes = self._measured.annotations
        pairs = np.flatnonzero(notes.pairs.image == image)
        overlooked = notes.pairs.within("overlooked")[pairs]
        pairs = pairs[np.argsort(~overlooked, kind="stable")][:PRESENT]
        queries = [_Query(class_id=int(notes.pairs.class_id[k]), pair=int(k)) for k in pairs]
        absent = np.flatnonzero(notes.labels[image] == ABSENT)
        if len(absent):
            chosen = np.random.default_rng([2, image]).choice(absent)
            queries.append(_Query(class_id=int(chosen), pair=None))
        return queries

    def _scene(self, image: int, queries: list[_Query]) -> list[ImageCard]:
        record = self._records[image]
        view = self._view(record)
        compared = [self._maps(view, query) for query in queries]
        shown = ", ".join(dict.fromkeys(item.name for item in record.objects))
        boxed = _boxed(view, record, range(len(record.objects)), named=True)
        plain = f"No instruction: attention\n{self._nearest(compared[0].static, queries)}"
        cards = [
            ImageCard(boxed, f"The image: {shown}"),
            ImageCard(patch_maps.over(view.picture, compared[0].attention), plain.strip()),
        ]
        for query, found in zip(queries, compared, strict=True):
            cards += [
                self._conditioned(view, query, found),
                self._static(view, image, query, found),
            ]
        return cards

    def _conditioned(self, view: views.View, query: _Query, found: ComparedMaps) -> ImageCard:
        present = bool(found.presence > 0.5)
        decision = f"“{self._instruction(query)}”: {'present' if present else 'absent'}"
        lines = [
            f"{decision}, {percent(float(found.presence))}",
            self._nearest(found.conditioned, [query]),
        ]
        return ImageCard(
            patch_maps.over(view.picture, found.presence_relevance),
            "\n".join(filter(None, lines)),
            "ok" if present == (query.pair is not None) else "wrong",
        )

    def _static(
        self, view: views.View, image: int, query: _Query, found: ComparedMaps
    ) -> ImageCard:
        text = f"“{self._instruction(query)}”, unconditioned"
        if query.pair is not None:
            text += f"\n{self._ahead(image, query.class_id)}"
        return ImageCard(patch_maps.over(view.picture, found.text_relevance), text)

    def _card(self, pair: int, present: bool) -> ImageCard:
        notes = self._measured.annotations
        image, class_id = int(notes.pairs.image[pair]), int(notes.pairs.class_id[pair])
        record = self._records[image]
        name = notes.classes[class_id].name
        own = [k for k, item in enumerate(record.objects) if item.name == name]
        boxed = _boxed(self._view(record), record, own, named=False)
        chance = float(jax.nn.sigmoid(self._logit(pair)))
        text = f"{name}: {percent(chance)}\n{self._ahead(image, class_id)}"
        return ImageCard(boxed, text, "ok" if present else "wrong")

    def _ahead(self, image: int, class_id: int) -> str:
        """The number of absent classes that score higher, with an instruction and without."""
        measured = self._measured
        absent = measured.annotations.labels[image] == ABSENT
        conditioned, static = (
            int(np.count_nonzero(scores[image, absent] > scores[image, class_id]))
            for scores in (measured.presence, measured.static)
        )
        return (
            f"Absent classes with a higher score: {conditioned} of {np.count_nonzero(absent)}; "
            f"without an instruction {static}"
        )

    def _nearest(self, embedding: Float[np.ndarray, " E"], queries: list[_Query]) -> str:
        """The nearest captions; those of the queried objects are marked as right."""
        if self._caption_rows is None:
            return ""
        notes = self._measured.annotations
        pairs = [query.pair for query in queries if query.pair is not None]
        own = np.flatnonzero(np.isin(notes.captions.pair, pairs))
        right = {notes.captions.texts[k] for k in own}
        cosines = self._caption_rows @ embedding
        best = np.argsort(-cosines, kind="stable")[:CAPTIONS]
        texts = [(cosines[k], self._captions[k]) for k in best]
        return "\n".join(f"{_MARKS[text in right]} {text}, {cosine:.2f}" for cosine, text in texts)

    def _instruction(self, query: _Query) -> str:
        return self._measured.annotations.instructions[self._index(query)]

    def _index(self, query: _Query) -> int:
        """Index of the query's instruction."""
        notes = self._measured.annotations
        if query.pair is None:
            return int(notes.class_instruction[query.class_id])
        return int(notes.pairs.instruction[query.pair])

    def _logit(self, pair: int) -> float:
        pairs = self._measured.annotations.pairs
        return float(self._measured.presence[pairs.image[pair], pairs.class_id[pair]])

    def _view(self, record: Record) -> views.View:
        original = images.decode(record.image, name=record.id)
        image = self._encoder.processor.image
        return views.view(image, original, patch=self._patch, side=PANEL)

    def _maps(self, view: views.View, query: _Query) -> ComparedMaps:
        instruction = take_rows(self._instructions, jnp.array([self._index(query)]))
        return jax.device_get(self._compare(self._model, view.pixels[None], instruction))

    def _compared(
        self, model: Give, pixels: UInt8[Array, "1 S S 3"], instruction: InstructionFeatures
    ) -> ComparedMaps:
        normal = self._encoder.normalised(pixels)
        conditioned = conditioned_maps(model, normal, instruction, instruction.mask)
        off = dataclasses.replace(instruction, strength=jnp.float32(0.0))
        static = ConditionedTower(model, off)
        return ComparedMaps(
            conditioned=conditioned.embedding,
            static=model(normal).embedding[0],
            presence=jax.nn.sigmoid(conditioned.presence_logit),
            presence_relevance=conditioned.relevance,
            text_relevance=maps.text_relevance(static, normal, instruction.embedding)[0],
            attention=maps.class_attention(model.backbone.vision, normal)[0],
        )


def percent(share: float) -> str:
    """A share in whole percent."""
    return f"{100 * share:.0f} %"


def _boxed(
    view: views.View, record: Record, chosen: range | list[int], *, named: bool
) -> UInt8[np.ndarray, "C C 3"]:
    """Draws the boxes of some objects of the record on the picture."""
    items = [record.objects[k] for k in chosen if record.objects[k].box is not None]
    if not items:
        return view.picture
    left, top, right, bottom = view.region
    side = np.array([right - left, bottom - top] * 2)
    boxes = (np.array([item.box for item in items]) - [left, top] * 2) / side * PANEL
    return draw_boxes(view.picture, boxes, [item.name if named else "" for item in items])
