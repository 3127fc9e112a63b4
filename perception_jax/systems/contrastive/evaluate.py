"""Evaluators of a contrastive model: zero-shot naming and image-text retrieval.

Letters: N images, S image side, M texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from perception_jax.data import images as image_files
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record, Source
from perception_jax.errors import DataError
from perception_jax.evals.baselines import nearest_labels, nearest_pixel_top
from perception_jax.evals.retrieval import RetrievalScores, retrieval
from perception_jax.evals.zero_shot import ZeroShotScores, class_embeddings, zero_shot
from perception_jax.systems.contrastive.encode import Encoder

TEMPLATES = ("a drawing of a {}", "a picture of a {}", "a {}")
"""Prompts whose embeddings are averaged into one class vector (arXiv 2103.00020, §3.1.4)."""


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledImages:
    """Processed images with a class each.

    Attributes:
      pixels: processed images.
      labels: index into `names` of each image.
      names: the candidates.
    """

    pixels: UInt8[np.ndarray, "N S S 3"]
    labels: Int[np.ndarray, " N"]
    names: tuple[str, ...]

    @classmethod
    def from_source(
        cls, source: Source, processor: ImageProcessor, names: Sequence[str]
    ) -> LabelledImages:
        """The images of a source, each labelled by the name of its first object.

        Raises:
          DataError: a record without an object, or with a name that is no candidate.
        """
        index = {name: k for k, name in enumerate(names)}
        pixels, labels = [], []
        for k in range(len(source)):
            record = source[k]
            name = record.objects[0].name if record.objects else None
            if name not in index:
                raise DataError(
                    f"record {record.id!r}: expected an object whose name is a candidate, found "
                    f"{name!r}. Give all class names, or leave the record out."
                )
            pixels.append(processor(image_files.decode(record.image, name=record.id)).pixels)
            labels.append(index[name])
        return cls(np.stack(pixels), np.asarray(labels), tuple(names))


class Naming:
    """Names each image by the nearest of the candidates' text embeddings."""

    def __init__(self, encoder: Encoder, images: LabelledImages):
        self.encoder = encoder
        self.images = images

    def scores(self, model: nnx.Module, mesh: Mesh | None = None) -> ZeroShotScores:
        """With predictions and ranks of every image."""
        names = class_embeddings(
            lambda texts: self.encoder.texts(model, texts, mesh), self.images.names, TEMPLATES
        )
        found = self.encoder.images(model, self.images.pixels, mesh)
        return zero_shot(found, names, self.images.labels)

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> Mapping[str, float]:
        """Top-1 and top-5 rates."""
        scores = self.scores(model, mesh)
        return {"top1": scores.top1, "top5": scores.top5}


class Matching:
    """Recognises each image by the closest picture of a gallery: no text takes part.

    So it also measures names that the text tower never read.
    """

    def __init__(self, encoder: Encoder, images: LabelledImages, gallery: LabelledImages):
        """Both share one list of names."""
        self.encoder = encoder
        self.images = images
        self.gallery = gallery

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> Mapping[str, float]:
        """Top-1 and top-5 rates by the model's embeddings."""
        gallery, queries = (
            self.encoder.images(model, part.pixels, mesh) for part in (self.gallery, self.images)
        )
        return self._rates(nearest_labels(gallery, self.gallery.labels, queries, k=5))

    def by_pixels(self) -> Mapping[str, float]:
        """The baseline: the same by shrunken pixels."""
        return self._rates(
            nearest_pixel_top(self.gallery.pixels, self.gallery.labels, self.images.pixels, k=5)
        )

    def _rates(self, best: Int[np.ndarray, "N 5"]) -> dict[str, float]:
        hit = best == self.images.labels[:, None]
        return {"top1": float(hit[:, 0].mean()), "top5": float(hit.any(axis=1).mean())}


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedImages:
    """Images with one caption each; equal captions count as right for each other.

    Attributes:
      pixels: processed images.
      captions: one of each image.
    """

    pixels: UInt8[np.ndarray, "N S S 3"]
    captions: tuple[str, ...]

    @classmethod
    def from_source(cls, source: Source, processor: ImageProcessor) -> CaptionedImages:
        """The images of a source with their first captions.

        Raises:
          DataError: a record without a caption.
        """
        pixels, captions = [], []
        for k in range(len(source)):
            record = source[k]
            captions.append(first_caption(record))
            pixels.append(processor(image_files.decode(record.image, name=record.id)).pixels)
        return cls(np.stack(pixels), tuple(captions))

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


class Retrieval:
    """Finds the caption of an image and the image of a caption."""

    def __init__(self, encoder: Encoder, images: CaptionedImages):
        self.encoder = encoder
        self.images = images

    def embeddings(
        self, model: nnx.Module, mesh: Mesh | None = None
    ) -> tuple[Float[np.ndarray, "N E"], Float[np.ndarray, "M E"]]:
        """Unit vectors of the images and of the distinct captions."""
        images = self.encoder.images(model, self.images.pixels, mesh)
        return images, self.encoder.texts(model, self.images.texts, mesh)

    def scores(self, model: nnx.Module, mesh: Mesh | None = None) -> RetrievalScores:
        """Both directions, with ranks."""
        return retrieval(*self.embeddings(model, mesh), self.images.pairs)

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> Mapping[str, float]:
        """Recall at 1 and 5 in both directions."""
        scores = self.scores(model, mesh)
        directions = {"image_to_text": scores.image_to_text, "text_to_image": scores.text_to_image}
        return {f"{name}_r{k}": one.recall[k] for name, one in directions.items() for k in (1, 5)}
