"""The encoder passes of an evaluation, in blocks, and the memory that they take.

A block is a set of instructions whose galleries are made in one pass over the images; only its
conditioned embeddings are in memory at that time. Letters: p passes of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from perception_jax.errors import ConfigError
from perception_jax.evals.conditioned.accumulate import Needs
from perception_jax.evals.conditioned.annotations import Annotations
from perception_jax.inference.pairs import ImageTextPairs

_FLOAT = 4
_CELL = 6 * 4 + 6
"""Bytes per image and class: three scores, three copies in the order that is ranked, masks."""
_RANKING = 40
"""Bytes per score of a block while it is ranked: the score, its keys and masks."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What an evaluation costs before it starts.

    Attributes:
      blocks: instructions of each block.
      batch_size: rows of a call.
      images_per_call: images of a call, which its rows share.
      images, classes, instructions: numbers of them; instructions that need a gallery.
      conditioned_passes: encoder passes with an instruction, one of each on the blank image.
      padded_passes: rows that fill up the last call of a block.
      image_reads: how often an image is read, over all blocks.
      gallery_bytes: conditioned embeddings of the largest block.
      scoring_bytes: what is held while the largest gallery is scored.
      held_bytes: embeddings without instruction, of the pairs and of texts.
      score_bytes: matrices of images by classes.
      whole_bytes: what conditioned embeddings of all passes at once would take.
    """

    blocks: tuple[tuple[int, ...], ...]
    batch_size: int
    images_per_call: int
    images: int
    classes: int
    instructions: int
    conditioned_passes: int
    padded_passes: int
    image_reads: int
    gallery_bytes: int
    scoring_bytes: int
    held_bytes: int
    score_bytes: int
    whole_bytes: int

    def describe(self) -> str:
        """A few lines to read before paying."""
        parts = (self.gallery_bytes, self.scoring_bytes, self.held_bytes, self.score_bytes)
        galleries, scoring, other, scores = map(_size, parts)
        return "\n".join(
            (
                f"evaluation  {self.images:,} images x {self.classes:,} classes, "
                f"{self.instructions:,} instructions",
                f"passes      {self.images:,} static, {self.conditioned_passes:,} "
                f"conditioned ({self.instructions:,} of them blank), {self.padded_passes:,} "
                f"padding; {self.batch_size} a step, from up to {self.images_per_call} images",
                f"blocks      {len(self.blocks):,}, so {self.image_reads:,} images read",
                f"memory      {_size(sum(parts))} on the host: galleries {galleries}, scoring "
                f"{scoring}, other embeddings {other}, scores {scores} "
                f"(all galleries at once: {_size(self.whole_bytes)})",
            )
        )


def block_pairs(needs: Needs, instructions: Sequence[int], blank: int) -> ImageTextPairs:
    """Passes of a block: what each instruction needs and the blank image, sorted by image.

    Args:
      blank: the image number that stands for the blank image, above all others.
    """
    galleries = [np.append(needs.images[number], blank) for number in instructions]
    image = np.concatenate(galleries)
    owner = np.repeat(np.asarray(instructions, np.int64), [len(part) for part in galleries])
    order = np.argsort(image, kind="stable")
    return ImageTextPairs(image[order], owner[order])


def make_plan(
    annotations: Annotations,
    needs: Needs,
    *,
    width: int,
    batch_size: int,
    block_bytes: int,
) -> Plan:
    """Fills each block up to a budget.

    Args:
      needs: which images each instruction needs.
      width: of an embedding.
      batch_size: rows of a call.
      block_bytes: for the conditioned embeddings of a block; one gallery always fits.

    Raises:
      ConfigError: sizes below 1.
    """
    if batch_size < 1 or block_bytes < 1:
        raise ConfigError(
            f"expected batch_size and block_bytes of at least 1, found {batch_size} and "
            f"{block_bytes}"
        )
    row = (width + 1) * _FLOAT  # and the presence logit
    images, classes = annotations.labels.shape
    blocks = _blocks(needs, block_bytes // row)
    pairs = [block_pairs(needs, block, images) for block in blocks]
    passes = [len(part.image) for part in pairs]
    texts = len(annotations.captions.texts)
    largest = max((len(part) for part in needs.images), default=0)
    vectors = 2 * (images + classes + texts) + len(annotations.pairs.image) + len(needs.images)
    return Plan(
        blocks=blocks,
        batch_size=batch_size,
        images_per_call=max((part.images_per_call(batch_size) for part in pairs), default=1),
        images=images,
        classes=classes,
        instructions=len(needs.made),
        conditioned_passes=sum(passes),
        padded_passes=sum(-count % batch_size for count in (*passes, images)),
        image_reads=images + sum(len(part.images()) - 1 for part in pairs),
        gallery_bytes=max(passes, default=0) * row,
        scoring_bytes=5 * largest * width * _FLOAT
        + _RANKING * min(1 << 22, largest * max(texts, largest)),
        held_bytes=vectors * width * _FLOAT,
        score_bytes=images * classes * _CELL,
        whole_bytes=sum(passes) * row,
    )


def _blocks(needs: Needs, limit: int) -> tuple[tuple[int, ...], ...]:
    """Instructions with a gallery in blocks of at most `limit` passes, or of one gallery."""
    blocks: list[list[int]] = []
    passes = 0
    for number in needs.made.tolist():
        gallery = len(needs.images[number]) + 1  # and the blank image
        if not blocks or passes + gallery > limit:
            blocks.append([])
            passes = 0
        blocks[-1].append(number)
        passes += gallery
    return tuple(tuple(block) for block in blocks)


def _size(count: int) -> str:
    unit, shown = "bytes", f"{count:,}"
    for power, name in enumerate(("kB", "MB", "GB", "TB"), start=1):
        if count >= 1000**power:
            unit, shown = name, f"{count / 1000**power:,.1f}"
    return f"{shown} {unit}"
