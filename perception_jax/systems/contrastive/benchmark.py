"""The scenes benchmark of a contrastive model: drawings of an artist that never trained.

Three evaluators, the same for any model and image size: naming among all training names, naming
of the held-out concepts, retrieval of composed scenes. Baselines: chance, and naming by the nearest
picture of the training artists' drawings on comparable backgrounds.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Source
from perception_jax.data.scenes.concepts import concepts
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource, portrait
from perception_jax.data.scenes.spec import TEST_STYLE, TRAIN_STYLES
from perception_jax.data.sources.combine import Mixture
from perception_jax.data.tokenizers import ClipTokenizer
from perception_jax.systems.contrastive.encode import Encoder
from perception_jax.systems.contrastive.evaluate import (
    CaptionedImages,
    LabelledImages,
    Naming,
    Retrieval,
)

SEED = 20_000
"""Of the benchmark's images; training seeds never reach it."""


def training_source(canvas: int, *, seed: int, length: int, singles: int, objects: int) -> Source:
    """Scenes of the four training artists: `singles` of eight show one large object, the others
    one to `objects` of any size."""
    one = ScenesSource(SceneConfig.single(canvas=canvas), seed=seed, length=length)
    if singles >= 8:
        return one
    many = ScenesSource(SceneConfig(canvas=canvas, count=(1, objects)), seed=seed, length=length)
    return Mixture([one, many], [singles, 8 - singles], length=length)


@dataclasses.dataclass(frozen=True, eq=False)
class ScenesBenchmark:
    """Attributes:
    naming: the unseen artist's drawings of all training concepts.
    held_out: the unseen artist's drawings of the held-out concepts, among their names.
    retrieval: the unseen artist's composed scenes and their captions.
    gallery: per evaluator of naming, the training artists' drawings of the same names.
    """

    naming: Naming
    held_out: Naming
    retrieval: Retrieval
    gallery: dict[str, LabelledImages]

    @classmethod
    def make(
        cls,
        processor: ImageProcessor,
        tokenizer: ClipTokenizer,
        *,
        per_name: int,
        scenes: int,
        batch_size: int = 64,
    ) -> ScenesBenchmark:
        """Draws the benchmark at the processor's size.

        Args:
          per_name: portraits of each name.
          scenes: composed scenes for retrieval.
          batch_size: rows per device call.
        """
        encoder = Encoder(processor, tokenizer, batch_size=batch_size)
        groups = {
            "naming": tuple(concept.name for concept in concepts(held_out=False)),
            "held_out": tuple(concept.name for concept in concepts(held_out=True)),
        }
        images = {
            group: portraits(names, (TEST_STYLE,) * per_name, processor)
            for group, names in groups.items()
        }
        composed = ScenesSource(
            SceneConfig(canvas=processor.size, split="test", count=(1, 4)),
            seed=SEED,
            length=scenes,
        )
        return cls(
            naming=Naming(encoder, images["naming"]),
            held_out=Naming(encoder, images["held_out"]),
            retrieval=Retrieval(encoder, CaptionedImages.from_source(composed, processor)),
            gallery={
                group: portraits(names, TRAIN_STYLES, processor) for group, names in groups.items()
            },
        )

    def evaluators(self) -> dict[str, Naming | Retrieval]:
        """By the names under which their numbers are logged."""
        return {"naming": self.naming, "held_out": self.held_out, "retrieval": self.retrieval}


def portraits(
    names: tuple[str, ...], styles: tuple[str, ...], processor: ImageProcessor
) -> LabelledImages:
    """One portrait of each name for each entry of `styles`, each over its own background."""
    pixels = [
        processor(portrait(name, style, processor.size, SEED + k)).pixels
        for name in names
        for k, style in enumerate(styles)
    ]
    labels = np.repeat(np.arange(len(names)), len(styles))
    return LabelledImages(np.stack(pixels), labels, names)
