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

from perception_jax.data.records import Record, Source
from perception_jax.data.views import View
from perception_jax.evals.conditioned.accumulate import Measured
from perception_jax.evals.conditioned.annotations import ABSENT
from perception_jax.inference.single_image import Viewer
from perception_jax.nn.maps import text_relevance
from perception_jax.systems.give.adapter import InstructionFeatures
from perception_jax.systems.give.encode import CaptionTable, ConditionedEncoder
from perception_jax.systems.give.maps import MapComputer
from perception_jax.systems.give.model import ConditionedTower, Give
from perception_jax.viz import ImageCard, draw_boxes, overlay
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
        self._maps = MapComputer(model, encoder, notes.instructions)
        self._captions = CaptionTable(model, encoder, tuple(dict.fromkeys(notes.captions.texts)))
        patch = model.backbone.vision.patch_embed.patch
        self._view = Viewer(encoder.processor.image, patch=patch, side=PANEL)
        self._text_relevance = jax.jit(self._compute_text_relevance)

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
        view = self._view(record.image, name=record.id)
        attention, static = self._maps.static(view.pixels)
        shown = ", ".join(dict.fromkeys(item.name for item in record.objects))
        boxed = _boxed(view, record, range(len(record.objects)), named=True)
        plain = f"No instruction: attention\n{self._nearest(static, queries)}"
        cards = [
            ImageCard(boxed, f"The image: {shown}"),
            ImageCard(overlay.over_grey(view.picture, attention), plain.strip()),
        ]
        for query in queries:
            cards += [self._conditioned(view, query), self._static(view, image, query)]
        return cards

    def _conditioned(self, view: View, query: _Query) -> ImageCard:
        found = self._maps.conditioned(view.pixels, self._index(query))
        chance = float(jax.nn.sigmoid(found.presence_logit))
        present = chance > 0.5
        decision = f"“{self._instruction(query)}”: {'present' if present else 'absent'}"
        lines = [f"{decision}, {percent(chance)}", self._nearest(found.embedding, [query])]
        return ImageCard(
            overlay.over_grey(view.picture, found.relevance),
            "\n".join(filter(None, lines)),
            "ok" if present == (query.pair is not None) else "wrong",
        )

    def _static(self, view: View, image: int, query: _Query) -> ImageCard:
        instruction = self._maps.instruction(self._index(query))
        relevance = self._text_relevance(self._model, view.pixels[None], instruction)
        text = f"“{self._instruction(query)}”, unconditioned"
        if query.pair is not None:
            text += f"\n{self._ahead(image, query.class_id)}"
        return ImageCard(overlay.over_grey(view.picture, np.asarray(relevance)), text)

    def _card(self, pair: int, present: bool) -> ImageCard:
        notes = self._measured.annotations
        image, class_id = int(notes.pairs.image[pair]), int(notes.pairs.class_id[pair])
        record = self._records[image]
        name = notes.classes[class_id].name
        own = [k for k, item in enumerate(record.objects) if item.name == name]
        boxed = _boxed(self._view(record.image, name=record.id), record, own, named=False)
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
        notes = self._measured.annotations
        pairs = [query.pair for query in queries if query.pair is not None]
        own = np.flatnonzero(np.isin(notes.captions.pair, pairs))
        right = {notes.captions.texts[k] for k in own}
        return "\n".join(
            f"{_MARKS[one.caption in right]} {one.caption}, {one.cosine:.2f}"
            for one in self._captions.nearest(embedding, CAPTIONS)
        )

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

    def _compute_text_relevance(
        self, model: Give, pixels: UInt8[Array, "1 S S 3"], instruction: InstructionFeatures
    ) -> Float[Array, "rows columns"]:
        """Relevance for the cosine with the instruction, unconditioned."""
        off = dataclasses.replace(instruction, strength=jnp.float32(0.0))
        normal = self._encoder.normalised(pixels)
        return text_relevance(ConditionedTower(model, off), normal, instruction.embedding)[0]


def percent(share: float) -> str:
    """A share in whole percent."""
    return f"{100 * share:.0f} %"


def _boxed(
    view: View, record: Record, chosen: range | list[int], *, named: bool
) -> UInt8[np.ndarray, "C C 3"]:
    """Draws the boxes of some objects of the record on the picture."""
    items = [record.objects[k] for k in chosen if record.objects[k].box is not None]
    if not items:
        return view.picture
    left, top, right, bottom = view.region
    side = np.array([right - left, bottom - top] * 2)
    boxes = (np.array([item.box for item in items]) - [left, top] * 2) / side * PANEL
    return draw_boxes(view.picture, boxes, [item.name if named else "" for item in items])
