"""Conversations about images as training batches of a LLaVA-like model (arXiv 2310.03744).

A row is one conversation. Its placeholders "<image>" become as many ids `IMAGE` as an image has
tokens, after the text has been cut: an image counts as one token of the text's limit. Every record
is tokenized once at the start, for its length; from the lengths follow all batches (`grouping`).

Letters: B rows, M images of a row, H W image, S tokens of a row, t tokens of a conversation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, Int32

from perception_jax.data import conversation, records
from perception_jax.data.conversation import (
    IGNORE,
    IMAGE,
    EncodedConversation,
    Template,
    TextTokenizer,
    images_first,
)
from perception_jax.data.grouping import Division, GroupedPlanner, Order, RowShape
from perception_jax.data.kept_features import KeptFeatures
from perception_jax.data.loader import RecordExamples, make_eval_loader
from perception_jax.data.planned import PlannedData, Row
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record, Source
from perception_jax.data.skipping import MAX_BAD_FRACTION
from perception_jax.errors import ConfigError, DataError

KEYS = ("ids", "id_mask", "label", "group")
"""Arrays of every row: tokens, int32[S], with `IMAGE` in the places of an image's tokens; which of
them are no padding, bool[S]; what is predicted, int32[S] (`IGNORE` elsewhere); the device of the
recipe that the row belongs to, int32[]."""
IMAGES = "image"
"""Array of the images of a row, uint8[M, H, W, 3], in the order of their placeholders; black where
there is none. Batches of text alone lack it."""
FEATURES = ("features", "second_features")
"""Arrays of a row in the place of its images, where their features are kept: of each image tower,
float16[M, P, C]."""

_COUNTED = 512
"""Records of a batch while lengths are counted."""
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Read:
    """What all rows of a record share."""

    text: EncodedConversation
    images: Mapping[str, Iterable[np.ndarray]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageChatTransform:
    """Arrays of conversations; a `data.planned.RowTransform`.

    Attributes:
      processor: of images, to squares.
      template: of conversations.
      vocab_size: of the model.
      max_length: tokens of a text at most, an image counted as one; what is longer is cut.
      image_tokens: of one image.
      max_images: of a row.
      features: kept ones of each image tower, which rows have instead of images.
    """

    tokenizer: TextTokenizer
    processor: ImageProcessor
    template: Template
    vocab_size: int
    max_length: int
    image_tokens: int
    max_images: int = 1
    features: tuple[KeptFeatures, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest row that there can be."""
        return self.max_length + self.max_images * (self.image_tokens - 1)

    def encode(self, record: Record) -> EncodedConversation:
        """Tokens and labels, images as single placeholders; not cut where there are images.

        Raises:
          DataError: no conversation, turns that the template does not take, another number of
            placeholders than of images, too many images, or tokens that the model lacks.
        """
        turns, count = record.conversation, len(record.images)
        if not turns:
            raise DataError("expected a conversation, found none.")
        if count > self.max_images:
            raise DataError(
                f"expected at most {self.max_images} images in a row, found {count}. Raise "
                "`max_images`, the most images of a row."
            )
        if count == 1:
            turns = images_first(turns)
        found = conversation.encode(
            self.tokenizer, turns, self.template, images=count > 0, max_length=self.max_length
        )
        places = int((found.ids == IMAGE).sum())
        if places != count:
            raise DataError(
                f"expected {count} turns with <image>, one for each image, found {places}. Put "
                "<image> where each image belongs, or correct the row's images."
            )
        if found.ids.max() >= self.vocab_size:
            raise DataError(
                f"expected tokens below {self.vocab_size}, the model's vocabulary, found "
                f"{found.ids.max()}. Is it the tokenizer of another model?"
            )
        return found

    def size(self, text: EncodedConversation) -> int:
        """Tokens of a row with this conversation."""
        kept = text.ids[: self.max_length]
        return len(kept) + int((kept == IMAGE).sum()) * (self.image_tokens - 1)

    def read(self, record: Record, shape: Hashable = None) -> _Read:
        """Tokens, and processed images or their features.

        Raises `DataError` as `encode`, and where an image cannot be read or has no features.
        """
        del shape
        text = self.encode(record)
        if not self.features:
            pixels = [self.processor.read(one, name=record.id).pixels for one in record.images]
            return _Read(text, {IMAGES: pixels})
        count = len(record.images)
        found = [kept[record.id] if count else () for kept in self.features]
        if any(len(own) != count for own in found):
            raise DataError(
                f"record {record.id!r}: expected features of {count} images, found "
                f"{', '.join(str(len(own)) for own in found)}."
            )
        return _Read(text, dict(zip(FEATURES, found, strict=False)))

    def __call__(self, read: _Read, row: Row) -> dict[str, np.ndarray]:
        """The arrays of a row of `RowShape`: see `KEYS` and `IMAGES`."""
        arrays = self.row(read.text, row.shape.length)
        arrays["group"] = np.int32(row.group)
        if row.shape.images:
            for key, (shape, dtype) in self.image_arrays.items():
                arrays[key] = np.zeros((self.max_images, *shape), dtype)
                for place, one in enumerate(read.images[key]):
                    arrays[key][place] = one
        return arrays

    @property
    def image_arrays(self) -> dict[str, tuple[tuple[int, ...], np.typing.DTypeLike]]:
        """Shape and dtype of an image in each array of a row that has to do with images."""
        if self.features:
            shapes = (kept.shape for kept in self.features)
            return {k: (shape, np.float16) for k, shape in zip(FEATURES, shapes, strict=False)}
        return {IMAGES: ((self.processor.size, self.processor.size, 3), np.uint8)}

    def row(self, text: EncodedConversation, length: int) -> dict[str, np.ndarray]:
        """A conversation, cut, with its images' tokens, filled up to a length."""
        ids, labels = text.ids[: self.max_length], text.labels[: self.max_length]
        times = np.where(ids == IMAGE, self.image_tokens, 1)
        labels = np.where(ids == IMAGE, IGNORE, labels)
        ids, labels = np.repeat(ids, times), np.repeat(labels, times)
        padding = (0, length - len(ids))
        return {
            "ids": np.pad(ids, padding, constant_values=self.tokenizer.pad_id or 0),
            "id_mask": np.arange(length) < len(ids),
            "label": np.pad(labels, padding, constant_values=IGNORE),
        }

    def described(self, record: Record, row: Row) -> Record:
        """The record itself."""
        del row
        return record


def signed_words(record: Record) -> int:
    """Words of a conversation, at least 1, negative if it has no image: by them LLaVA groups."""
    words = max(1, sum(len(turn.text.split()) for turn in record.conversation))
    return words if record.images else -words


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatCounts:
    """Numbers of the conversations that train.

    Attributes:
      records: that can be used.
      text_only: of these, without an image.
      silent: of these, in which nothing is predicted: the label mask does not fit, or all answers
        are cut.
      cut: of these, that lost their end.
      skipped: that cannot be used.
      tokens: of all rows, without padding.
    """

    records: int
    text_only: int
    silent: int
    cut: int
    skipped: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.records:,} conversations of {self.tokens:,} tokens, {self.text_only:,} of them "
            f"without an image; {self.cut:,} are cut, in {self.silent:,} nothing is predicted, "
            f"{self.skipped:,} cannot be used"
        )


class ImageChats:
    """Conversations as training batches.

    Attributes:
      tokenizer: of the texts.
      transform: of the records.
    """

    def __init__(
        self,
        source: Source,
        transform: ImageChatTransform,
        *,
        lengths: Sequence[int],
        division: Division,
        order: Order = "random",
        seed: int = 0,
        workers: int = 0,
        in_memory: bool = False,
        max_bad_fraction: float = MAX_BAD_FRACTION,
    ) -> None:
        """Reads nothing yet.

        Args:
          lengths: of rows in tokens, image tokens included, ascending. Each is compiled.
          division: of the records into updates.
          order: of an epoch.
          workers: processes that load; 0 loads in threads.
          in_memory: keeps tokens and pixels of each record.
          max_bad_fraction: of records that may be unusable; see `data.skipping`.

        Raises:
          ConfigError: lengths that are not ascending, or too short for the longest text.
        """
        check_lengths(lengths, transform.longest)
        self.tokenizer, self.transform = transform.tokenizer, transform
        self._source, self._lengths, self._division = source, tuple(lengths), division
        self._order, self._seed, self._workers = order, seed, workers
        self._in_memory, self._max_bad_fraction = in_memory, max_bad_fraction

    @property
    def counts(self) -> ChatCounts:
        """Numbers of records and tokens. Raises as `loader`."""
        return self._planned[1]

    @property
    def planner(self) -> GroupedPlanner:
        """Of the batches. Raises as `loader`."""
        return self._planned[0]

    def examples(self, seed: int) -> RecordExamples:
        """The records, each with its own tokens, labels and images."""
        return RecordExamples(self._source, _Shown(self.transform), seed)

    def loader(self, *, host: tuple[int, int] | None = None) -> grain.IterDataset:
        """This host's part of each batch, without end.

        Args:
          host: index and number of hosts; None asks JAX.

        Raises:
          DataError: too many records cannot be used, there are none, or nothing is predicted in
            more than half of them.
        """
        data = PlannedData(
            self._source,
            self.planner,
            self.transform,
            in_memory=self._in_memory,
            max_bad_fraction=self._max_bad_fraction,
        )
        return data.loader(num_workers=self._workers, host=host)

    def parts(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """All conversations in order, `size` at a time, in rows of the last of the lengths.

        Rows in which nothing is predicted fill up the last part, and take the place of a record
        that cannot be read. Raises as `loader`.
        """
        shape = RowShape(self._lengths[-1], True)
        loader = make_eval_loader(
            self._source,
            _InShape(self.transform, shape),
            batch_size=size,
            num_workers=self._workers,
            host=(0, 1),  # each host needs all rows
            max_bad_fraction=self._max_bad_fraction,
        )
        with contextlib.closing(iter(loader)) as batches:
            for batch in batches:
                batch["label"][~batch.pop("valid")] = IGNORE
                yield {key: batch[key] for key in (*KEYS, *self.transform.image_arrays)}

    @functools.cached_property
    def _planned(self) -> tuple[GroupedPlanner, ChatCounts]:
        found = self._measured()
        usable = np.flatnonzero(found["tokens"])
        tokens, words = found["tokens"][usable], found["words"][usable]
        counts = ChatCounts(
            records=len(usable),
            text_only=int((words < 0).sum()),
            silent=int(found["silent"][usable].sum()),
            cut=int(found["cut"][usable].sum()),
            skipped=len(found["tokens"]) - len(usable),
            tokens=int(tokens.sum()),
        )
        _log.info("%s", counts)
        if 2 * counts.silent > counts.records:
            raise DataError(
                f"expected answers to learn, found none in {counts.silent} of {counts.records} "
                "conversations. Does the template fit the tokenizer (see the warnings), and is "
                "there room for the answers?"
            )
        planner = GroupedPlanner(
            records=usable,
            words=words,
            tokens=tokens,
            lengths=self._lengths,
            division=self._division,
            order=self._order,
            seed=self._seed,
        )
        return planner, counts

    def _measured(self) -> dict[str, Int[np.ndarray, " N"]]:
        """Numbers of each record; 0 tokens for one that cannot be used."""
        count = len(self._source)
        loader = make_eval_loader(
            self._source,
            _Measure(self.transform),
            batch_size=min(_COUNTED, max(count, 1)),
            num_workers=self._workers,
            host=(0, 1),  # each host needs the lengths of all records
            max_bad_fraction=self._max_bad_fraction,
        )
        with contextlib.closing(iter(loader)) as batches:
            parts = [
                {key: np.where(batch["valid"], batch[key], 0) for key in _MEASURED}
                for batch in batches
            ]
        return {key: np.concatenate([part[key] for part in parts])[:count] for key in _MEASURED}


def check_lengths(lengths: Sequence[int], longest: int) -> None:
    """Raises `ConfigError` if lengths of rows do not ascend, or are too short for a row."""
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        raise ConfigError(f"lengths: expected ascending numbers of tokens, found {lengths}.")
    if lengths[-1] < longest:
        raise ConfigError(
            f"lengths: expected the last to be at least {longest} tokens, the longest text with "
            f"its images, found {lengths[-1]}. Raise it, or lower the most tokens of a text."
        )


_MEASURED = ("tokens", "words", "cut", "silent")


@dataclasses.dataclass(frozen=True, slots=True)
class _Measure:
    """Numbers of a record; see `ChatCounts`."""

    transform: ImageChatTransform

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        del rng
        text, longest = self.transform.encode(record), self.transform.max_length
        numbers = {
            "tokens": self.transform.size(text),
            "words": signed_words(record),
            "cut": text.cut or len(text.ids) > longest,
            "silent": not (text.labels[1:longest] != IGNORE).any(),
        }
        return {key: np.array(value, np.int32) for key, value in numbers.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class _InShape:
    """The row of a record in a given shape."""

    transform: ImageChatTransform
    shape: RowShape

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        del rng
        row = Row(record=0, group=0, seed=(0,), shape=self.shape)
        return self.transform(self.transform.read(record), row)


@dataclasses.dataclass(frozen=True, slots=True)
class _Shown:
    """What the model gets of a record, in its own length."""

    transform: ImageChatTransform

    def __call__(self, record: records.Record, rng: np.random.Generator) -> dict[str, Any]:
        del rng
        read = self.transform.read(record)
        arrays = self.transform.row(read.text, self.transform.size(read.text))
        images: dict[str, Int32[np.ndarray, "..."] | np.ndarray] = {
            f"{key} {place}": one
            for key, images in read.images.items()
            for place, one in enumerate(images)
        }
        return {**arrays, **images}


def row_shapes(lengths: Sequence[int], order: Order) -> list[RowShape]:
    """The shapes of all batches."""
    with_images = [RowShape(length, True) for length in lengths]
    if order != "modality":
        return with_images
    return [*with_images, *(RowShape(length, False) for length in lengths)]
