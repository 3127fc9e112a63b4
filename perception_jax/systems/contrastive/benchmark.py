"""What a contrastive model trains and is measured on.

For scenes: the drawings of an artist that never trained, the same for any model and image size:
naming among all training names, naming of the held-out concepts, retrieval of composed scenes.
Held-out names were never read, so their drawings are also matched with other artists' drawings of
the same things. Baselines are chance and the nearest pixels among those drawings. For a user's own
images: retrieval among held-out records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import MMVP_PATTERNS, Record, Source
from perception_jax.data.scenes.concepts import concepts
from perception_jax.data.scenes.pairs import PairImages, PairSource
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource, portrait
from perception_jax.data.scenes.spec import TEST_STYLE, TRAIN_STYLES
from perception_jax.data.skipping import MAX_BAD_FRACTION, usable
from perception_jax.data.sources.combine import InMemory, Mixture
from perception_jax.data.tokenization import PaddedTokenizer
from perception_jax.errors import ConfigError
from perception_jax.systems.contrastive.encode import Encoder, Images, Texts
from perception_jax.systems.contrastive.evaluate import (
    CaptionedImages,
    EmbeddingEvaluator,
    LabelledImages,
    Matching,
    MinimalPairs,
    Naming,
    Retrieval,
    first_caption,
)

SEED = 20_000
"""Of the benchmark's images; training seeds never reach it."""
PICTURES = 6
"""Records over which the report draws maps."""


def training_source(
    canvas: int,
    *,
    seed: int,
    length: int,
    singles: int,
    objects: int,
    pairs: int = 0,
    facts: bool = False,
) -> Source:
    """Scenes of the four training artists: `singles` of eight show one large object, `pairs` are
    images of minimal pairs with their statements, the others show one to `objects` of any size.

    Each is rendered once per process and stays in memory.

    Args:
      facts: whether scenes have a fourth caption that states one fact.

    Raises:
      ConfigError: `singles` and `pairs` are not parts of eight.
    """
    if min(singles, pairs) < 0 or singles + pairs > 8:
        raise ConfigError(
            "scenes: expected singles and pairs of at least 0 and together at most 8, found "
            f"{singles} and {pairs}."
        )
    language = "facts" if facts else "captions"
    single = SceneConfig.single(canvas=canvas, language=language)
    several = SceneConfig(canvas=canvas, count=(1, objects), language=language)
    sources: list[Source] = [
        ScenesSource(single, seed=seed, length=length),
        ScenesSource(several, seed=seed, length=length),
    ]
    if pairs:
        shown = SceneConfig(canvas=canvas, language="none")
        sources.append(PairImages(PairSource(shown, seed=seed, length=length)))
    shares = (singles, 8 - singles - pairs, pairs)
    used = [(source, share) for source, share in zip(sources, shares, strict=False) if share]
    mixed = Mixture(*map(list, zip(*used, strict=True)), length=length)
    return InMemory(mixed, keep=("captions",))


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """What a contrastive model is measured on.

    Attributes:
      encoder: embeds images and texts for all of it.
      retrieval: images and their captions.
      naming: zero-shot naming, by title.
      matching: for each kind of naming, the same images against the training artists' drawings of
        those names.
      pairs: minimal pairs; None where none are measured.
      pictures: records over which the report draws maps.
    """

    encoder: Encoder
    retrieval: Retrieval
    naming: Mapping[str, Naming]
    matching: Mapping[str, Matching]
    pictures: tuple[Record, ...]
    pairs: MinimalPairs | None = None

    def evaluators(self) -> dict[str, EmbeddingEvaluator]:
        """By the names under which their numbers are logged."""
        matching = {f"{name}_matching": one for name, one in self.matching.items()}
        found = {**self.naming, **matching, "retrieval": self.retrieval}
        return found if self.pairs is None else found | {"pairs": self.pairs}

    @property
    def inputs(self) -> tuple[Images | Texts, ...]:
        """All that has to be embedded for it."""
        return tuple(part for one in self.evaluators().values() for part in one.inputs)


def scenes_benchmark(
    processor: ImageProcessor,
    tokenizer: PaddedTokenizer,
    *,
    per_name: int,
    scenes: int,
    pairs: int = 0,
    batch_size: int = 64,
) -> Benchmark:
    """The unseen artist's drawings, at the processor's size.

    "naming" has the concepts that trained (with other artists' drawings), "held_out" those that
    never did.

    Args:
      per_name: portraits of each name.
      scenes: composed scenes for retrieval.
      pairs: minimal pairs of each visual pattern.
      batch_size: rows per device call.
    """
    encoder = Encoder(processor, tokenizer, batch_size=batch_size)
    naming, matching = {}, {}
    for group in ("naming", "held_out"):
        names = tuple(concept.name for concept in concepts(held_out=group == "held_out"))
        unseen = portraits(names, (TEST_STYLE,) * per_name, processor)
        naming[group] = Naming(encoder, unseen)
        matching[group] = Matching(encoder, unseen, portraits(names, TRAIN_STYLES, processor))
    test = SceneConfig(canvas=processor.size, split="test", count=(1, 4))
    composed = ScenesSource(test, seed=SEED, length=scenes)
    clear = dataclasses.replace(test, count=(2, 3), size=(0.25, 0.6), text=0.0)
    shown = ScenesSource(clear, seed=SEED + 1, length=PICTURES)
    return Benchmark(
        encoder=encoder,
        retrieval=Retrieval(encoder, CaptionedImages.from_source(composed, processor)),
        naming=naming,
        matching=matching,
        pictures=tuple(shown[k] for k in range(len(shown))),
        pairs=_minimal_pairs(encoder, pairs) if pairs else None,
    )


def _minimal_pairs(encoder: Encoder, number: int) -> MinimalPairs:
    """So many pairs of each pattern, drawn by the unseen artist."""
    config = SceneConfig(canvas=encoder.processor.size, split="test", language="none")
    source = PairSource(config, seed=SEED + 2, length=number * len(MMVP_PATTERNS))
    return MinimalPairs(encoder, [source[k] for k in range(len(source))])


def own_benchmark(
    source: Source,
    processor: ImageProcessor,
    tokenizer: PaddedTokenizer,
    *,
    batch_size: int = 64,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> Benchmark:
    """Retrieval among held-out records of a user's own source.

    Records without a caption or whose image cannot be decoded are skipped, as in training.
    """
    source = usable(source, max_bad_fraction=max_bad_fraction, check=first_caption)
    encoder = Encoder(processor, tokenizer, batch_size=batch_size)
    return Benchmark(
        encoder=encoder,
        retrieval=Retrieval(encoder, CaptionedImages.from_source(source, processor)),
        naming={},
        matching={},
        pictures=tuple(source[k] for k in range(min(len(source), PICTURES))),
    )


def portraits(
    names: tuple[str, ...], styles: tuple[str, ...], processor: ImageProcessor
) -> LabelledImages:
    """One portrait of each name for each entry of `styles`, each over its own background."""
    pixels = {
        f"{name}, {style} {k}": processor(portrait(name, style, processor.size, SEED + k)).pixels
        for name in names
        for k, style in enumerate(styles)
    }
    labels = np.repeat(np.arange(len(names)), len(styles))
    return LabelledImages(tuple(pixels), np.stack(list(pixels.values())), labels, names)
