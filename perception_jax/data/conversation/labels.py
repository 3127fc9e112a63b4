"""Ids and label masks of conversations, with every quirk of the reference that trained on them.

| rule | template | mask |
| --- | --- | --- |
| `v1` | vicuna_v1, llava_v1 | LLaVA's `preprocess_v1`: counts the tokens of each round |
| `v0` | llava_v0 | LLaVA's `preprocess` with "### " before each turn |
| `plain` | plain | LLaVA's `preprocess_plain`: an image and its caption, no roles |
| `separated` | groma | answers between separators, which are then removed |
| `spans` | chatml | our own: the tokens of what the assistant wrote, with the end of its turn |

Letters: T tokens, B conversations, I images.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from perception_jax.data.conversation.templates import (
    IMAGE_TEXT,
    SEPARATOR,
    Template,
    repeat_images,
)
from perception_jax.data.records import Turn
from perception_jax.data.tokenization.protocol import Encoding
from perception_jax.errors import ConfigError, DataError

IGNORE = -100
"""Label of a token that is not supervised."""
IMAGE = -200
"""Id of an image's placeholder; no row of an embedding table."""

_LOG = logging.getLogger(__name__)
_Ids = Int32[np.ndarray, "T"]


@runtime_checkable
class TextTokenizer(Protocol):
    """What label masks need of a tokenizer; `LanguageTokenizer` has it."""

    @property
    def start_id(self) -> int | None:
        """Id of the token that begins a text."""

    @property
    def end_id(self) -> int:
        """Id of the token that ends a text."""

    @property
    def pad_id(self) -> int | None:
        """Id that fills up rows."""

    def __call__(self, text: str) -> Int32[np.ndarray, "T"]:
        """Ids of a text with the start token."""

    def encode(self, text: str) -> Encoding:
        """Ids of a text without the start token, with their places."""

    def token_id(self, text: str) -> int | None:
        """Id of one token by its text."""


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedConversation:
    """A conversation as a model trains on it.

    Attributes:
      ids: tokens; `IMAGE` where an image stands.
      labels: the same, `IGNORE` where nothing is supervised; not shifted.
      warning: why the reference leaves the whole conversation out of the loss, or "".
      cut: whether it was longer than `max_length`.
    """

    ids: Int32[np.ndarray, "T"]
    labels: Int32[np.ndarray, "T"]
    warning: str = ""
    cut: bool = False


def tokenize(tokenizer: TextTokenizer, text: str) -> _Ids:
    """Ids of a text with images, as LLaVA's `tokenizer_image_token`.

    The passages between placeholders are texts of their own (with a start token, which only the
    first one keeps), and `IMAGE` stands between them.
    """
    passages = [tokenizer(passage) for passage in text.split(IMAGE_TEXT)]
    first = passages[0]
    start = int(len(first) > 0 and first[0] == tokenizer.start_id)
    parts = [first[:start]]
    for index, passage in enumerate(passages):
        parts += [np.array([IMAGE], np.int32)] if index else []
        parts.append(passage[start:])
    return np.concatenate(parts)


def tokenize_images(
    tokenizer: TextTokenizer, text: str, counts: Sequence[int], *, image_id: int | None = None
) -> _Ids:
    """Ids of a text with `IMAGE` for each token of each image, as models take them.

    Args:
      tokenizer: of the model.
      text: with `IMAGE_TEXT` for each image.
      counts: of tokens, by image.
      image_id: of the placeholder in the tokenizer, as llava-hf has it; None for the authors'
        tokenizer, which has none: the passages between images are then texts of their own.

    Raises:
      DataError: another number of placeholders than of images.
    """
    repeated = repeat_images(text, counts)
    if image_id is None:
        ids = tokenize(tokenizer, text)
        times = np.ones(len(ids), int)
        times[ids == IMAGE] = counts
        return np.repeat(ids, times)
    ids = tokenizer(repeated)
    ids = np.where(ids == image_id, IMAGE, ids).astype(np.int32)
    image_spans(ids, counts=counts)  # raises where the tokenizer has another token
    return ids


def encode(
    tokenizer: TextTokenizer,
    turns: Sequence[Turn],
    template: Template,
    *,
    images: bool,
    max_length: int | None = None,
) -> EncodedConversation:
    """Ids and labels of a conversation by its template's rule.

    Args:
      tokenizer: with the padding id that the reference sets (`v1`: the unknown token's, whose
        occurrences are not counted).
      turns: of the conversation; for `v1`, `v0` and `plain` after `images_first`.
      template: text and rule.
      images: whether placeholders are split out (`tokenize`). Such a conversation is not cut here,
        but when it is padded.
      max_length: of a conversation without images; "separated" cuts all.

    Raises:
      DataError: turns that the template or the rule does not take.
      ConfigError: the tokenizer lacks a token of the rule.
    """
    if template.rule == "separated":
        return _separated(tokenizer, turns, template, max_length)

    rule = {"v1": _v1, "v0": _v0, "plain": _plain, "spans": _spans}[template.rule]
    source = _Source(tokenizer, turns, template, images, max_length)
    text, mask = rule(source)
    whole = source.ids(text)
    ids = whole[: None if images else max_length]
    labels = ids.copy()
    warning = mask(labels)
    if warning:
        _LOG.warning("%s", warning)
    return EncodedConversation(ids, labels, warning, cut=len(ids) < len(whole))


def image_spans(
    ids: _Ids, placeholder: int = IMAGE, counts: Sequence[int] | None = None
) -> Int32[np.ndarray, "I 2"]:
    """First position of each image's placeholders, and the one behind its last.

    Args:
      ids: of a conversation.
      placeholder: the id that stands for an image or, repeated, for its tokens.
      counts: of tokens, by image; None for one each.

    Raises:
      DataError: another number of placeholders.
    """
    places = np.flatnonzero(ids == placeholder)
    sizes = np.ones(len(places), int) if counts is None else np.array(counts, int)
    if sizes.sum() != len(places):
        raise DataError(
            f"ids: expected {sizes.sum()} placeholders for {len(sizes)} images, found "
            f"{len(places)}. Was the prompt cut, or `repeat_images` left out?"
        )
    last = np.cumsum(sizes)
    return np.stack([places[last - sizes], places[last - 1] + 1], axis=1).astype(np.int32)


def pad(
    conversations: Sequence[EncodedConversation],
    pad_id: int,
    *,
    max_length: int,
    length: int | None = None,
    side: str = "right",
) -> dict[str, Int32[np.ndarray, "B T"] | Bool[np.ndarray, "B T"]]:
    """Rows of one length under the keys of a batch: "ids", "label" and "id_mask".

    Args:
      conversations: cut at `max_length`, as LLaVA's collator does.
      pad_id: fills up "ids"; as in the reference every token that equals it is masked.
      max_length: of a row.
      length: of all rows; None for that of the longest.
      side: "right" or "left" of the tokens.

    Raises:
      ConfigError: an unknown side, or a conversation longer than `length`.
    """
    if side not in ("right", "left"):
        raise ConfigError(f"side: expected 'right' or 'left', found {side!r}.")
    sizes = [min(len(row.ids), max_length) for row in conversations]
    longest = max(sizes, default=0)
    length = longest if length is None else length
    if longest > length:
        raise ConfigError(f"length: expected at least {longest} tokens, found {length}.")
    ids = np.full((len(sizes), length), pad_id, np.int32)
    label = np.full_like(ids, IGNORE)
    for row, size, conversation in zip(range(len(sizes)), sizes, conversations, strict=True):
        place = slice(0, size) if side == "right" else slice(length - size, length)
        ids[row, place] = conversation.ids[:size]
        label[row, place] = conversation.labels[:size]
    return {"ids": ids, "label": label, "id_mask": ids != pad_id}


_Mask = Callable[[_Ids], str]
"""Sets labels to `IGNORE` in place; why all of them were, or ""."""


@dataclasses.dataclass(frozen=True)
class _Source:
    """Arguments of `encode`."""

    tokenizer: TextTokenizer
    turns: Sequence[Turn]
    template: Template
    images: bool
    max_length: int | None

    def ids(self, text: str) -> _Ids:
        return tokenize(self.tokenizer, text) if self.images else self.tokenizer(text)


def _v1(source: _Source) -> tuple[str, _Mask]:
    """A round is what `after_assistant` ends. Its text lacks that end token and has a start token
    instead, so its own length is that of its tokens in the whole. Its question ends with a space,
    which is a token of its own here and a part of the answer's first one in the whole: together
    with the start token two less."""
    template, longest = source.template, source.max_length
    text = template.prompt(source.turns)

    def mask(labels: _Ids) -> str:
        whole = int((labels != source.tokenizer.pad_id).sum())
        at = 1
        labels[:1] = IGNORE
        for part in text.split(template.after_assistant):
            halves = part.split(template.after_user + template.assistant)
            if len(halves) != 2:
                break
            question = halves[0] + template.after_user + template.assistant
            labels[at : at + len(source.ids(question)) - 2] = IGNORE
            at += len(source.ids(part))
        labels[at:] = IGNORE
        if at == whole or (longest is not None and at >= longest):
            return ""
        labels[:] = IGNORE
        return f"WARNING: tokenization mismatch: {at} vs. {whole}. (ignored)"

    return text, mask


def _v0(source: _Source) -> tuple[str, _Mask]:
    """Lengths count a start token for each turn, which the whole lacks: the mask is one further off
    after each, as it was when the published models were trained. Turns come in any order."""
    said = [turn.text for turn in source.turns if turn.role == "system"]
    system = (said or [source.template.system])[0]
    turns = [turn for turn in source.turns if turn.role != "system"]
    names = {"user": source.template.user, "assistant": source.template.assistant}
    parts = [f"{system}\n\n", *(f"### {names[turn.role]}{turn.text}\n" for turn in turns)]

    def size_of(part: str) -> int:
        if source.images:
            return len(source.ids(part))
        return int((source.ids(part)[: source.max_length] != source.tokenizer.pad_id).sum())

    def mask(labels: _Ids) -> str:
        sizes = [size_of(part) for part in parts]
        at = sizes[0]
        labels[:at] = IGNORE
        for turn, size in zip(turns, sizes[1:], strict=True):
            if turn.role == "user":
                labels[at + 2 : at + size] = IGNORE
            at += size
        return ""

    return "".join([*parts, "### "]), mask


def _plain(source: _Source) -> tuple[str, _Mask]:
    """The question is thrown away: image, caption, line end."""
    _, turns = source.template.split(source.turns)
    if len(turns) != 2 or IMAGE_TEXT not in turns[0].text:
        raise DataError(
            f"conversation: expected a question with {IMAGE_TEXT} and a caption, found "
            f"{len(turns)} turns. Use another template than plain for text and for dialogues."
        )

    def mask(labels: _Ids) -> str:
        labels[: len(source.ids(IMAGE_TEXT))] = IGNORE
        return ""

    return IMAGE_TEXT + turns[1].text + source.template.after_assistant, mask


def _spans(source: _Source) -> tuple[str, _Mask]:
    """Tokens that begin in what the assistant wrote, up to the end of its turn."""
    parts = source.template.parts(source.turns)
    text = "".join(part for part, _ in parts)

    def mask(labels: _Ids) -> str:
        own = np.zeros(len(text) + 1, bool)
        at = 0
        for part, answered in parts:
            own[at : at + len(part.rstrip("\n"))] = answered
            at += len(part)
        passages = text.split(IMAGE_TEXT) if source.images else [text]
        encoded = [source.tokenizer.encode(passage) for passage in passages]
        count = sum(len(one.ids) for one in encoded) + len(encoded) - 1
        kept, at = [np.zeros(len(source.ids(text)) - count, bool)], 0
        for passage, encoding in zip(passages, encoded, strict=True):
            kept += [np.zeros(int(at > 0), bool), own[at + encoding.offsets[:, 0]]]
            at += len(passage) + len(IMAGE_TEXT)
        labels[~np.concatenate(kept)[: len(labels)]] = IGNORE
        return ""

    return text, mask


def _separated(
    tokenizer: TextTokenizer, turns: Sequence[Turn], template: Template, max_length: int | None
) -> EncodedConversation:
    """Answers between two separators, and all end tokens but the first, are supervised."""
    separator, end = tokenizer.token_id(SEPARATOR), tokenizer.end_id
    if separator is None:
        raise ConfigError(f"tokenizer: expected the token {SEPARATOR}, found none.")
    marked = [
        dataclasses.replace(turn, text=f"{SEPARATOR}{turn.text}{SEPARATOR}")
        if turn.role == "assistant" and turn.text
        else turn
        for turn in turns
    ]
    whole = tokenizer(template.prompt(marked))
    ids = whole[:max_length]
    places = np.flatnonzero(ids == separator)
    if len(places) % 2:
        raise DataError(
            f"conversation: expected answers within {max_length} tokens, found one that goes on "
            "behind. Shorten the conversation or raise the maximum."
        )
    labels = ids.copy()
    closed = 0
    for first, last in places.reshape(-1, 2):
        labels[closed:first] = IGNORE
        closed = last
    labels[np.flatnonzero(ids == end)[1:]] = end
    kept = ids != separator
    return EncodedConversation(ids[kept], labels[kept], cut=len(ids) < len(whole))
