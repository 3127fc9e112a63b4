"""Zero-shot classification and image-text retrieval by cosine similarity.

Classification follows CLIP (arXiv 2103.00020, §3.1): each class is the mean of the unit embeddings
of its name in several templates, scaled to length 1. Recall@k is the share of queries with at least
one right item among the first k, as on Flickr30k and COCO (arXiv 1412.2306, §4.1). Ties go against
the model (`ranking.positive_ranks`), so the order of a gallery does not matter. All rates are
fractions. Letters: n i images, c classes, t texts, p pairs, q queries, d width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from perception_jax.data.inputs import as_texts
from perception_jax.errors import DataError
from perception_jax.evals import ranking
from perception_jax.evals.baselines import chance_recall, chance_top_k
from perception_jax.evals.intervals import wilson_interval

EncodeTexts = Callable[[list[str]], np.ndarray]
"""Texts to float[len(texts), d]; their lengths do not matter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankScores:
    """How early the right items of the queries come.

    Attributes:
      ranks: rank of each query's best right item among the wrong ones, 1 is best; 0 for an item
        without a right one, which is no query.
      recall: k to recall@k.
      recall_interval: k to its 95 % Wilson interval.
      chance_recall: k to the expected recall@k of a random order.
    """

    ranks: Int[np.ndarray, " q"]
    recall: Mapping[int, float]
    recall_interval: Mapping[int, tuple[float, float]]
    chance_recall: Mapping[int, float]

    @property
    def counted(self) -> Int[np.ndarray, " n"]:
        """The ranks of the items that are queries."""
        return self.ranks[self.ranks > 0]

    @property
    def queries(self) -> int:
        """Number of queries."""
        return len(self.counted)

    @property
    def correct(self) -> Bool[np.ndarray, " q"]:
        """Which queries have a right item first."""
        return self.ranks == 1

    @property
    def median_rank(self) -> float:
        """Median over the queries."""
        return float(np.median(self.counted))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShotScores(RankScores):
    """Scores of a classification at k = 1 and 5, with the images as queries.

    With a tie at the top, `predictions` may name the right class while `correct` is False.

    Attributes:
      predictions: the best class of each image.
      per_class: top-1 rate of each class; NaN for a class without images.
      class_counts: images of each class.
    """

    predictions: Int[np.ndarray, " n"]
    per_class: Float[np.ndarray, " c"]
    class_counts: Int[np.ndarray, " c"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Both directions of a retrieval benchmark."""

    image_to_text: RankScores
    text_to_image: RankScores


def fill_templates(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The prompts of all classes, name by name.

    Raises:
      ConfigError: names or templates that are no strings.
      DataError: names repeat, or a template lacks its "{}".
    """
    names, templates = as_texts(names, "names"), as_texts(templates, "templates")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not names:
        raise DataError(
            f"expected distinct class names, found {repeated or 'none'} "
            f"{'more than once ' if repeated else ''}to fill into templates"
        )
    unfit = [template for template in templates if template.count("{}") != 1]
    if unfit or not templates:
        raise DataError(
            f"expected templates with one '{{}}' for the class name, found {unfit or 'none'}; "
            "write e.g. 'a photo of a {}'"
        )
    # `replace`, not `format`: a template is data and must not reach into objects.
    return [template.replace("{}", name) for name in names for template in templates]


def class_embeddings(
    encode_texts: EncodeTexts, names: Sequence[str], templates: Sequence[str] = ("{}",)
) -> Float[np.ndarray, "c d"]:
    """One unit embedding per class name: the renormalised mean over templates.

    Args:
      encode_texts: called once with the prompts of all classes.
      names: distinct class names.
      templates: texts with one "{}" where the name goes, e.g. "a drawing of a {}".

    Raises:
      ConfigError: names or templates that are no strings.
      DataError: names repeat, a template lacks its "{}", or an embedding is zero or not finite.
    """
    names, templates = as_texts(names, "names"), as_texts(templates, "templates")
    texts = fill_templates(names, templates)
    each = np.asarray(encode_texts(texts))
    if each.ndim != 2 or len(each) != len(texts):
        raise DataError(
            f"expected encode_texts to give one row for each of {len(texts)} texts, found shape "
            f"{each.shape}"
        )
    each = ranking.unit_rows(each, "text embeddings").reshape(len(names), len(templates), -1)
    return ranking.unit_rows(each.mean(axis=1), "class embeddings")


def zero_shot(
    image_embeddings: Float[np.ndarray, "n d"],
    class_embeddings: Float[np.ndarray, "c d"],
    labels: Integer[np.ndarray, " n"],
) -> ZeroShotScores:
    """Classifies images by cosine similarity to the classes; never holds all n x c scores.

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
    pairs = np.stack([np.arange(len(labels)), labels], axis=1)
    ranks = ranking.positive_ranks(images, classes, pairs)
    predictions = [
        np.argmax(images[block] @ classes.T, axis=1)
        for block in ranking.blocks(len(images), len(classes))
    ]
    counts = np.bincount(labels, minlength=len(classes))
    hits = np.bincount(labels, weights=ranks == 1, minlength=len(classes))
    with np.errstate(invalid="ignore"):
        per_class = hits / counts
    return ZeroShotScores(
        **_recalls(ranks, {k: chance_top_k(len(classes), k) for k in (1, 5)}),
        predictions=np.concatenate(predictions),
        per_class=per_class,
        class_counts=counts,
    )


def retrieval(
    image_embeddings: Float[np.ndarray, "i d"],
    text_embeddings: Float[np.ndarray, "t d"],
    pairs: Integer[np.ndarray, "p 2"],
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> RetrievalScores:
    """Scores image to text and text to image; never holds all i x t scores.

    An image or text without a pair is a distractor: it stays in the gallery of the other direction
    and is no query of its own.

    Args:
      image_embeddings, text_embeddings: any lengths.
      pairs: (image, text) index of each right pair, in any order, many to many.
      ks: cut-offs of recall.

    Raises:
      DataError: an embedding is zero or not finite, widths differ, no pairs, an index that is out
        of range or no integer, or a cut-off below 1.
    """
    ranking.check_widths(image_embeddings, text_embeddings, "image and text")
    images = ranking.unit_rows(image_embeddings, "image embeddings")
    texts = ranking.unit_rows(text_embeddings, "text embeddings")
    check_pairs(pairs, len(images), len(texts))
    if any(k < 1 for k in ks):
        raise DataError(f"expected cut-offs of 1 or more, found ks = {tuple(ks)}")
    pairs = np.unique(pairs.astype(np.int64), axis=0)

    def direction(queries: np.ndarray, gallery: np.ndarray, pairs: np.ndarray) -> RankScores:
        rights = np.bincount(pairs[:, 0])
        chance = {k: chance_recall(rights[rights > 0], len(gallery), k) for k in ks}
        return RankScores(**_recalls(ranking.positive_ranks(queries, gallery, pairs), chance))

    return RetrievalScores(
        image_to_text=direction(images, texts, pairs),
        text_to_image=direction(texts, images, pairs[:, ::-1]),
    )


def _recalls(ranks: np.ndarray, chance: Mapping[int, float]) -> dict[str, Any]:
    """The fields of `RankScores`."""
    counted = ranks[ranks > 0]
    hits = {k: int((counted <= k).sum()) for k in chance}
    return {
        "ranks": ranks,
        "recall": {k: hits[k] / len(counted) for k in chance},
        "recall_interval": {k: wilson_interval(hits[k], len(counted)) for k in chance},
        "chance_recall": chance,
    }


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


def check_pairs(pairs: np.ndarray, images: int, texts: int) -> None:
    """Raises `DataError` unless pairs are (image, text) indices in range, at least one."""
    if pairs.ndim != 2 or pairs.shape[-1] != 2 or len(pairs) == 0:
        raise DataError(
            f"expected at least one (image, text) index pair, found pairs of shape {pairs.shape}"
        )
    if not np.issubdtype(pairs.dtype, np.integer):
        raise DataError(f"expected pairs of integers, found an array of {pairs.dtype}")
    outside = (pairs < 0) | (pairs >= np.array([images, texts]))
    if outside.any():
        row = int(np.argmax(outside.any(axis=1)))
        raise DataError(
            f"expected pairs of indices below ({images}, {texts}), found "
            f"({int(pairs[row, 0])}, {int(pairs[row, 1])}) in row {row} of pairs; the order is "
            "(image, text)"
        )
