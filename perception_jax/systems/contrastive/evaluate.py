"""Evaluators of a contrastive model: zero-shot naming and image-text retrieval.

Scores are functions of embeddings by id (`encode.Embeddings`): of a model in memory while it
trains, or of the predictions that `embeddings_on_disk` keeps. Letters: N images, S image side.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Int

from perception_jax.data import images as image_files
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import MMVP_PATTERNS, MinimalPair, Record, Source
from perception_jax.data.scenes.pairs import CAPTION
from perception_jax.errors import DataError
from perception_jax.evals import runner
from perception_jax.evals.baselines import nearest_labels, nearest_pixel_top
from perception_jax.evals.predictions import Prediction, text_of, vector_of
from perception_jax.evals.zero_shot import (
    RetrievalScores,
    ZeroShotScores,
    class_embeddings,
    fill_templates,
    retrieval,
    zero_shot,
)
from perception_jax.interop.fingerprint import fingerprint
from perception_jax.models.params import flatten
from perception_jax.systems.contrastive.encode import Embeddings, Encoder, Images, Texts, take

TEMPLATES = ("a drawing of a {}", "a picture of a {}", "a {}")
"""Prompts whose embeddings are averaged into one class vector (arXiv 2103.00020, §3.1.4)."""


class EmbeddingEvaluator(abc.ABC):
    """Numbers of a model, from the embeddings of its inputs.

    Attributes:
      encoder: embeds the inputs.
      inputs: all images and texts whose embeddings the scores need.
    """

    def __init__(self, encoder: Encoder, *inputs: Images | Texts):
        self.encoder, self.inputs = encoder, inputs

    @abc.abstractmethod
    def numbers(self, embeddings: Embeddings) -> dict[str, float]:
        """The main numbers, to log while training; fractions."""

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> Mapping[str, float]:
        """The main numbers of a model; nothing is kept."""
        return self.numbers(dict(self.encoder.embed(model, self.inputs, mesh)))


def embeddings_on_disk(
    encoder: Encoder,
    model: nnx.Module,
    inputs: Sequence[Images | Texts],
    folder: str | os.PathLike[str],
    *,
    settings: str,
) -> Embeddings:
    """The embeddings of all inputs; what a stopped run has written is not computed again.

    Args:
      folder: of predictions; those of a model lie in a folder of it that is named after the
        fingerprints of its weights and inputs, so that no other model's are ever read.
      settings: what else the embeddings depend on, e.g. the model's configuration.

    Raises:
      DataError: the folder cannot be written, or its files are damaged.
    """
    model_id = f"{fingerprint(flatten(model), exact=True)}-{encoder.fingerprint(inputs, settings)}"
    folder = pathlib.Path(folder) / model_id
    prompts = {name: "" for one in inputs for name in one.ids}
    for one in inputs:
        if isinstance(one, Texts):
            prompts |= dict(zip(one.ids, one.texts, strict=True))
    ids = tuple(prompts)

    def run(numbers: Sequence[int]) -> Iterator[Prediction]:
        for name, row in encoder.embed(model, inputs, only={ids[k] for k in numbers}):
            yield Prediction(id=name, prompt=prompts[name], output=text_of(row), model_id=model_id)

    made = runner.predict(ids, run, folder, model_id=model_id)
    print(f"predictions {folder} ({made:,} made, {len(ids) - made:,} of an earlier run)")
    return {one.id: vector_of(one.output) for one in runner.predicted(ids, folder)}


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledImages(Images):
    """Processed images with a class each.

    Attributes:
      labels: index into `names` of each image.
      names: the candidates.
    """

    labels: Int[np.ndarray, " N"]
    names: tuple[str, ...]


class Naming(EmbeddingEvaluator):
    """Names each image by the nearest of the candidates' text embeddings."""

    def __init__(self, encoder: Encoder, images: LabelledImages):
        super().__init__(encoder, images, Texts(tuple(fill_templates(images.names, TEMPLATES))))
        self.images = images

    def scores(self, embeddings: Embeddings) -> ZeroShotScores:
        """With predictions and ranks of every image."""
        names = class_embeddings(
            lambda texts: take(embeddings, Texts(tuple(texts))), self.images.names, TEMPLATES
        )
        return zero_shot(take(embeddings, self.images), names, self.images.labels)

    def numbers(self, embeddings: Embeddings) -> dict[str, float]:
        """Top-1 and top-5 rates."""
        return {f"top{k}": rate for k, rate in self.scores(embeddings).recall.items()}


class Matching(EmbeddingEvaluator):
    """Recognises each image by the closest picture of a gallery: no text takes part.

    So it also measures names that the text tower never read.
    """

    def __init__(self, encoder: Encoder, images: LabelledImages, gallery: LabelledImages):
        """Both share one list of names."""
        super().__init__(encoder, gallery, images)
        self.images, self.gallery = images, gallery

    def numbers(self, embeddings: Embeddings) -> dict[str, float]:
        """Top-1 and top-5 rates by the model's embeddings."""
        gallery, queries = take(embeddings, self.gallery), take(embeddings, self.images)
        return self._rates(nearest_labels(gallery, self.gallery.labels, queries, k=5))

    def by_pixels(self) -> dict[str, float]:
        """The baseline: the same by shrunken pixels."""
        return self._rates(
            nearest_pixel_top(self.gallery.pixels, self.gallery.labels, self.images.pixels, k=5)
        )

    def _rates(self, best: Int[np.ndarray, "N 5"]) -> dict[str, float]:
        hit = best == self.images.labels[:, None]
        return {"top1": float(hit[:, 0].mean()), "top5": float(hit.any(axis=1).mean())}


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedImages(Images):
    """Images with one caption each; equal captions count as right for each other.

    Attributes:
      captions: one of each image.
    """

    captions: tuple[str, ...]

    @classmethod
    def from_source(cls, source: Source, processor: ImageProcessor) -> CaptionedImages:
        """The images of a source with their first captions.

        Raises:
          DataError: a record without a caption.
        """
        ids, pixels, captions = [], [], []
        for k in range(len(source)):
            record = source[k]
            captions.append(first_caption(record))
            pixels.append(processor(image_files.decode(record.image, name=record.id)).pixels)
            ids.append(f"{k} {record.id}")
        return cls(tuple(ids), np.stack(pixels), tuple(captions))

    @property
    def texts(self) -> tuple[str, ...]:
        """The distinct captions, sorted."""
        return tuple(sorted(set(self.captions)))

    @property
    def pairs(self) -> Int[np.ndarray, "N 2"]:
        """(image, text) index of each image and its caption in `texts`."""
        index = {text: k for k, text in enumerate(self.texts)}
        return np.asarray([(k, index[text]) for k, text in enumerate(self.captions)])


def first_caption(record: Record) -> str:
    """The caption that an evaluation takes.

    Raises:
      DataError: there is none.
    """
    if not record.captions:
        raise DataError(f"record {record.id!r}: expected a caption, found none.")
    return record.captions[0]


class MinimalPairs(EmbeddingEvaluator):
    """Matches the two images of each pair with its two statements, after MMVP-VLM
    (arXiv 2401.06209, §3): a pair is right if both images are nearer to their own one."""

    def __init__(self, encoder: Encoder, pairs: Sequence[MinimalPair]):
        """Args: pairs: with images of the encoder's size."""
        records = [record for pair in pairs for record in pair.records]
        pixels = np.stack([encoder.processor(np.asarray(one.image)).pixels for one in records])
        captions = (CAPTION.format(text) for pair in pairs for text in pair.statements)
        super().__init__(
            encoder, Images(tuple(one.id for one in records), pixels), Texts(tuple(captions))
        )
        self._patterns = np.array([pair.pattern for pair in pairs])

    def numbers(self, embeddings: Embeddings) -> dict[str, float]:
        """Share of pairs that are right, by pattern, and the mean over patterns as "mean"."""
        images, texts = (
            take(embeddings, one).reshape(len(self._patterns), 2, -1) for one in self.inputs
        )
        cosine = np.einsum("nid,njd->nij", images, texts)
        right = (cosine[:, 0, 0] > cosine[:, 0, 1]) & (cosine[:, 1, 1] > cosine[:, 1, 0])
        patterns = [name for name in MMVP_PATTERNS if name in self._patterns]
        rates = {name: float(right[self._patterns == name].mean()) for name in patterns}
        return rates | {"mean": float(np.mean(list(rates.values())))}


class Retrieval(EmbeddingEvaluator):
    """Finds the caption of an image and the image of a caption."""

    def __init__(self, encoder: Encoder, images: CaptionedImages):
        super().__init__(encoder, images, Texts(images.texts))
        self.images = images

    def scores(self, embeddings: Embeddings) -> RetrievalScores:
        """Both directions, with ranks."""
        images, texts = (take(embeddings, one) for one in self.inputs)
        return retrieval(images, texts, self.images.pairs)

    def numbers(self, embeddings: Embeddings) -> dict[str, float]:
        """Recall at 1 and 5 in both directions."""
        scores = self.scores(embeddings)
        names = ("image_to_text", "text_to_image")
        return {f"{name}_r{k}": getattr(scores, name).recall[k] for name in names for k in (1, 5)}
