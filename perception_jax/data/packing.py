"""Texts and conversations as rows of one length, several of them in a row.

Every record is tokenized once at the start, for its length; from the lengths alone follows which
records share a row, so that the rows do not depend on hosts, workers or batches. A row keeps its
records in every epoch, and the order of the rows is new in each.

Letters: N records, M rows, T tokens of a row, t tokens of a record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Bool, Int, Int64

from perception_jax.data import conversation
from perception_jax.data.conversation import IGNORE, EncodedConversation, Template
from perception_jax.data.loader import RecordExamples, make_eval_loader, make_loader
from perception_jax.data.ragged import RaggedRows
from perception_jax.data.records import Record, Source
from perception_jax.data.skipping import MAX_BAD_FRACTION
from perception_jax.data.tokenization import LanguageTokenizer
from perception_jax.errors import DataError

KEYS = ("ids", "label", "segment", "position")
"""Arrays of a row, int32[T]: tokens, what is predicted (`IGNORE` elsewhere), the number of the
record in the row from 1 on (0 is padding), and the place in the record."""

_COUNTED = 512
"""Records of a batch while lengths are counted."""
_log = logging.getLogger(__name__)


def pack(lengths: Int[np.ndarray, " N"], room: int, *, seed: int = 0) -> Int64[np.ndarray, " N"]:
    """Assigns texts to rows: the longest first, each to the row in which it leaves least room.

    Args:
      lengths: of the texts in tokens, 1 to `room`.
      room: tokens of a row.
      seed: of the order of texts of one length.

    Returns:
      The number of each text's row.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows = np.zeros(len(lengths), np.int64)
    by_room: list[list[int]] = [[] for _ in range(room + 1)]
    free, count = 0, 0  # bit r of `free`: a row has room for r tokens
    for number, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = free >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = by_room[left].pop()
            free ^= 0 if by_room[left] else 1 << left
        else:
            left, row, count = room, count, count + 1
        rows[number] = row
        left -= length
        if left:
            by_room[left].append(row)
            free |= 1 << left
    return rows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TextTransform:
    """Tokens of a text or a conversation: "ids" and "label", int32[t].

    All of a text is predicted, and the end token that is put behind it; of a conversation what its
    template's rule says (see `data.conversation`). What does not fit is cut.

    Attributes:
      template: of conversations.
      length: at most so many tokens.
      vocab_size: of the model.
    """

    tokenizer: LanguageTokenizer
    template: Template
    length: int
    vocab_size: int

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The arrays; deterministic. Raises as `encode`."""
        del rng
        found = self.encode(record)
        return {"ids": found.ids, "label": found.labels}

    def encode(self, record: Record) -> EncodedConversation:
        """Tokens and labels of a record.

        Raises:
          DataError: images, neither text nor conversation, turns that the template does not take,
            nothing to predict, or tokens that the model lacks.
        """
        if record.images:
            raise DataError(f"expected text alone, found {len(record.images)} images.")
        if record.conversation:
            found = conversation.encode(
                self.tokenizer,
                record.conversation,
                self.template,
                images=False,
                max_length=self.length,
            )
        else:
            found = self._text(record.text)
        if not (found.labels[1:] != IGNORE).any():
            why = f" ({found.warning})" if found.warning else ""
            raise DataError(
                f"expected something to predict within {self.length} tokens, found nothing{why}."
            )
        if found.ids.max() >= self.vocab_size:
            raise DataError(
                f"expected tokens below {self.vocab_size}, the model's vocabulary, found "
                f"{found.ids.max()}. Is it the tokenizer of another model?"
            )
        return found

    def _text(self, text: str) -> EncodedConversation:
        if not text.strip():
            raise DataError('expected a "text" or a "conversation", found neither.')
        ids, end = self.tokenizer(text), self.tokenizer.end_id
        if ids[-1] != end:
            ids = np.append(ids, np.int32(end))
        kept = ids[: self.length]
        return EncodedConversation(kept, kept.copy(), cut=len(kept) < len(ids))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedCounts:
    """Numbers of packed texts.

    Attributes:
      records: that are used.
      skipped: that cannot be used.
      cut: that lost their end, as they are longer than a row.
      tokens: of all rows, without padding.
      rows: of `length` tokens.
    """

    records: int
    skipped: int
    cut: int
    tokens: int
    rows: int
    length: int

    @property
    def padding(self) -> float:
        """Share of padding in the rows."""
        return 1 - self.tokens / (self.rows * self.length)

    def __str__(self) -> str:
        return (
            f"{self.records:,} texts of {self.tokens:,} tokens in {self.rows:,} rows of "
            f"{self.length:,}: {self.padding:.1%} padding; {self.cut:,} texts are cut, "
            f"{self.skipped:,} cannot be used"
        )


class PackedTexts:
    """Rows of texts and conversations, as training batches or in order.

    Attributes:
      tokenizer: of the texts.
    """

    def __init__(
        self,
        source: Source,
        transform: TextTransform,
        *,
        batch_size: int,
        seed: int = 0,
        packed: bool = True,
        workers: int = 0,
        max_bad_fraction: float = MAX_BAD_FRACTION,
    ) -> None:
        """Reads nothing yet.

        Args:
          transform: its `length` is that of the rows.
          batch_size: rows of the global batch.
          seed: of the packing and of the order.
          packed: whether several records share a row.
          workers: processes that load; 0 loads in threads.
          max_bad_fraction: of records that may be unusable; see `data.skipping`.
        """
        self.tokenizer = transform.tokenizer
        self._source, self._transform, self._batch_size = source, transform, batch_size
        self._seed, self._packed, self._workers = seed, packed, workers
        self._max_bad_fraction = max_bad_fraction

    @property
    def counts(self) -> PackedCounts:
        """Numbers of records, rows and tokens. Raises as `loader`."""
        return self._rows[1]

    def examples(self, seed: int) -> RecordExamples:
        """The records, each with its own tokens and labels."""
        return RecordExamples(self._source, self._transform, seed)

    def loader(self, *, host: tuple[int, int] | None = None) -> grain.IterDataset:
        """This host's part of each batch, without end: `KEYS`, and "id", the ids of the records.

        Args:
          host: index and number of hosts; None asks JAX.

        Raises:
          DataError: too many records cannot be used, or there are none.
        """
        return make_loader(
            self._rows[0],
            _RowTransform(self._transform),
            batch_size=self._batch_size,
            seed=self._seed,
            num_workers=self._workers,
            host=host,
            max_bad_fraction=self._max_bad_fraction,
        )

    def parts(self, size: int) -> Iterator[Int[np.ndarray, "B 4 T"]]:
        """All rows in order, `size` at a time, with `KEYS` along the second axis; the last part is
        filled with rows in which nothing is predicted. Raises as `loader`."""
        rows, make = self._rows[0], _RowTransform(self._transform)
        for start in range(0, len(rows), size):
            part = np.zeros((size, len(KEYS), self._transform.length), np.int32)
            part[:, KEYS.index("label")] = IGNORE
            for place, number in enumerate(range(start, min(start + size, len(rows)))):
                arrays = make(rows[number], None)
                part[place] = [arrays[key] for key in KEYS]
            yield part

    @functools.cached_property
    def _rows(self) -> tuple[_Rows, PackedCounts]:
        """The rows, for which every record is tokenized once."""
        lengths, cut = self._lengths()
        usable = np.flatnonzero(lengths)
        used, room = lengths[usable], self._transform.length
        where = pack(used, room, seed=self._seed) if self._packed else np.arange(len(used))
        rows = RaggedRows.build(where, usable, int(where.max()) + 1)
        counts = PackedCounts(
            records=len(usable),
            skipped=len(lengths) - len(usable),
            cut=int(cut.sum()),
            tokens=int(used.sum()),
            rows=len(rows),
            length=room,
        )
        _log.info("%s", counts)
        return _Rows(self._source, rows), counts

    def _lengths(self) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
        """Length of each record in tokens, 0 for one that cannot be used, and whether it is cut."""
        count = len(self._source)
        loader = make_eval_loader(
            self._source,
            _Length(self._transform),
            batch_size=min(_COUNTED, max(count, 1)),
            num_workers=self._workers,
            host=(0, 1),  # each host needs the lengths of all records
            max_bad_fraction=self._max_bad_fraction,
        )
        with contextlib.closing(iter(loader)) as batches:
            found = [np.where(batch["valid"], batch["length"], 0) for batch in batches]
        both = np.concatenate(found)[:count]
        return np.abs(both), both < 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    """The records of a row, under an id of all of theirs."""

    id: str
    records: tuple[Record, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Rows:
    """Random access to rows; the loader takes from a record no more than its id."""

    source: Source
    records: RaggedRows

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> _Row:
        found = tuple(self.source[number] for number in self.records.of(index).tolist())
        return _Row(" ".join(record.id for record in found), found)


@dataclasses.dataclass(frozen=True, slots=True)
class _Length:
    """A record's tokens, negative if it is cut."""

    transform: TextTransform

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        del rng
        found = self.transform.encode(record)
        return {"length": np.array(-len(found.ids) if found.cut else len(found.ids))}


@dataclasses.dataclass(frozen=True, slots=True)
class _RowTransform:
    """The arrays of a row; see `KEYS`."""

    transform: TextTransform

    def __call__(self, row: _Row, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        del rng
        arrays = {key: np.zeros(self.transform.length, np.int32) for key in KEYS}
        arrays["label"][:] = IGNORE
        at = 0
        for number, record in enumerate(row.records, 1):
            found = self.transform.encode(record)
            place = slice(at, at + len(found.ids))
            arrays["ids"][place] = found.ids
            arrays["label"][place] = found.labels
            arrays["label"][at] = IGNORE  # the token before it is another record's
            arrays["segment"][place] = number
            arrays["position"][place] = np.arange(len(found.ids))
            at = place.stop
        return arrays
