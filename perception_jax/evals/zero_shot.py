"""Zero-shot classification: name an image by the nearest class name's text embedding.

The protocol of CLIP (arXiv 2103.00020, §3.1): each class is the mean of the unit embeddings of its
name in several templates, scaled to length 1. Letters: n images, c classes, d width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from perception_jax.data.inputs import as_texts
from perception_jax.errors import DataError
from perception_jax.evals import ranking
from perception_jax.evals.baselines import chance_top_k
from perception_jax.evals.intervals import wilson_interval

EncodeTexts = Callable[[list[str]], np.ndarray]
"""Texts to float[len(texts), d]; their lengths do not matter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShotScores:
    """Scores of one split; all rates are fractions.

    Attributes:
      top1, top5: share of images whose class is first, or among the first five.
      top1_interval, top5_interval: 95 % Wilson intervals.
      chance_top1, chance_top5: expected rates of guessing uniformly.
      per_class: top-1 rate of each class; NaN for a class without images.
      class_counts: images of each class.
      predictions: the best class of each image.
      ranks: rank of the right class, 1 is best; ties go against the model, so with a tie at the
        top `predictions` may name the right class while `correct` is False.
    """

    top1: float
    top5: float
    top1_interval: tuple[float, float]
    top5_interval: tuple[float, float]
    chance_top1: float
    chance_top5: float
    per_class: Float[np.ndarray, " c"]
    class_counts: Int[np.ndarray, " c"]
    predictions: Int[np.ndarray, " n"]
    ranks: Int[np.ndarray, " n"]

    @property
    def correct(self) -> Bool[np.ndarray, " n"]:
        """Which images count as right in `top1`."""
        return self.ranks == 1

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.ranks)


def class_embeddings(
    encode_texts: EncodeTexts,
    names: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    batch_size: int = 256,
) -> Float[np.ndarray, "c d"]:
    """One unit embedding per class name: the renormalised mean over templates.

    Args:
      encode_texts: gets at most `batch_size` texts at a time.
      names: distinct class names.
      templates: texts with one "{}" where the name goes, e.g. "a drawing of a {}".
      batch_size: the largest number of texts in one call.

    Raises:
      ConfigError: names or templates that are no strings.
      DataError: names repeat, a template lacks its "{}", or an embedding is zero or not finite.
    """
    names, templates = as_texts(names, "names"), as_texts(templates, "templates")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not names:
        raise DataError(
            f"expected distinct class names, found {repeated or 'none'} "
            f"{'more than once ' if repeated else ''}in class_embeddings"
        )
    unfit = [template for template in templates if template.count("{}") != 1]
    if unfit or not templates:
        raise DataError(
            f"expected templates with one '{{}}' for the class name, found {unfit or 'none'} in "
            "class_embeddings; write e.g. 'a photo of a {}'"
        )
    # `replace`, not `format`: a template is data and must not reach into objects.
    texts = [template.replace("{}", name) for name in names for template in templates]
    parts = []
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        part = np.asarray(encode_texts(chunk))
        if part.ndim != 2 or len(part) != len(chunk):
            raise DataError(
                f"expected encode_texts to give one row for each of {len(chunk)} texts, found "
                f"shape {part.shape}"
            )
        parts.append(ranking.unit_rows(part, "text embeddings"))
    each = np.concatenate(parts).reshape(len(names), len(templates), -1)
    return ranking.unit_rows(each.mean(axis=1), "class embeddings")


def zero_shot(
    image_embeddings: Float[np.ndarray, "n d"],
    class_embeddings: Float[np.ndarray, "c d"],
    labels: Integer[np.ndarray, " n"],
) -> ZeroShotScores:
    """Classifies images by cosine similarity to the classes.

    Never holds all n x c scores. Ties go against the model: see `ranking.positive_ranks`.

    Args:
      image_embeddings: any lengths.
      class_embeddings: any lengths, e.g. from `class_embeddings`.
      labels: the right class of each image, in [0, c).

    Raises:
      DataError: an embedding is zero or not finite, shapes do not fit, or a label is out of range.
    """
    ranking.check_widths(image_embeddings, class_embeddings, "image and class")
    images = ranking.unit_rows(image_embeddings, "image embeddings")
    classes = ranking.unit_rows(class_embeddings, "class embeddings")
    check_labels(labels, len(images), len(classes))
    labels = labels.astype(np.int64)
    ranks = ranking.positive_ranks(
        images, classes, np.stack([np.arange(len(labels)), labels], axis=1)
    )
    predictions = np.concatenate(
        [
            np.argmax(images[block] @ classes.T, axis=1)
            for block in ranking.blocks(len(images), len(classes))
        ]
    )
    first, among_five = int((ranks == 1).sum()), int((ranks <= 5).sum())
    counts = np.bincount(labels, minlength=len(classes))
    hits = np.bincount(labels, weights=ranks == 1, minlength=len(classes))
    with np.errstate(invalid="ignore"):
        per_class = hits / counts
    return ZeroShotScores(
        top1=first / len(ranks),
        top5=among_five / len(ranks),
        top1_interval=wilson_interval(first, len(ranks)),
        top5_interval=wilson_interval(among_five, len(ranks)),
        chance_top1=chance_top_k(len(classes), 1),
        chance_top5=chance_top_k(len(classes), 5),
        per_class=per_class,
        class_counts=counts,
        predictions=predictions,
        ranks=ranks,
    )


def check_labels(labels: np.ndarray, images: int, classes: int) -> None:
    """Raises `DataError` unless there is one label in [0, classes) for each image."""
    if labels.shape != (images,):
        raise DataError(
            f"expected one label for each of {images} images, found labels of shape {labels.shape}"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"expected labels as integers, found an array of {labels.dtype}")
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        index = int(np.argmax(outside))
        raise DataError(
            f"expected labels in [0, {classes}), found {int(labels[index])} at image {index}; "
            "check that labels index the class names that were embedded"
        )
