"""Pipelines of language models' tokenizers: that of a `tokenizer.json`, and SentencePiece with what
the slow tokenizers of `transformers` do around it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer, normalizers

from perception_jax.data.tokenization import bpe, files
from perception_jax.data.tokenization.decoding import (
    ByteLevelStream,
    FallbackStream,
    SlowPieces,
    TextStream,
)
from perception_jax.data.tokenization.files import AddedToken, ForeignVocabularyError
from perception_jax.data.tokenization.protocol import Encoding
from perception_jax.data.tokenization.sentencepiece import (
    BPE,
    SentencePieceModel,
    read_sentencepiece,
)
from perception_jax.data.tokenization.steps import SPACE
from perception_jax.errors import CheckpointError
from perception_jax.settings import FLAG, Optional, Settings, Several, Text, shown

PIECES = "tokenizer.model"
"""File name of a SentencePiece model."""
_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""Named tokens of a Llama tokenizer whose files name none."""
_FLAGS = (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token"))
"""Settings of what is added to a text, and the named tokens that they add."""
_Around = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids before and behind a text."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Base of both kinds of pipelines.

    Attributes:
      ids: of all tokens, by text.
      added: tokens that are found whole.
      named: ids of named special tokens.
      around: ids before and behind a text.
      backend: encodes a text without special tokens.
    """

    ids: Mapping[str, int]
    added: tuple[AddedToken, ...]
    named: Mapping[str, int]
    around: _Around
    backend: Tokenizer

    @functools.cached_property
    def size(self) -> int:
        return 1 + max(self.ids.values())

    @functools.cached_property
    def texts(self) -> Mapping[int, str]:
        """Texts of all tokens, by id."""
        return {number: text for text, number in self.ids.items()}

    @functools.cached_property
    def special(self) -> frozenset[int]:
        """Ids that are left out of texts."""
        return frozenset(self.named.values()) | {t.id for t in self.added if t.special}


@dataclasses.dataclass(frozen=True)
class FastPipeline(Pipeline):
    """A `tokenizers` pipeline.

    Attributes:
      fallback: whether byte pieces spell unknown characters; otherwise all tokens spell bytes.
      strip: whether decoded texts lose one space at their beginning.
    """

    fallback: bool
    strip: bool

    def encode(self, text: str) -> Encoding:
        found = self.backend.encode(text, add_special_tokens=False)
        offsets = np.array(found.offsets, np.int32).reshape(-1, 2)
        return Encoding(np.array(found.ids, np.int32), offsets)

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        stream = self.stream(() if special else self.special)
        return stream.push(ids) + stream.close()

    def stream(self, skip: Collection[int] | None = None) -> TextStream:
        skip = self.special if skip is None else skip
        if self.fallback:
            return FallbackStream(self.texts.get, skip, strip=self.strip)
        return ByteLevelStream(self.texts.get, skip)


@dataclasses.dataclass(frozen=True)
class SlowPipeline(Pipeline):
    """What `transformers`' slow Llama tokenizers do around SentencePiece.

    Attributes:
      model: the pieces.
      legacy: as `legacy=True`.
    """

    model: SentencePieceModel
    legacy: bool

    def encode(self, text: str) -> Encoding:
        before = "" if self.legacy or not text else SPACE
        whole = before + (text if self.legacy else text.replace(SPACE, " "))
        ids: list[int] = []
        offsets = [np.zeros((0, 2), np.int32)]
        for token, first, last in self._segments(whole):
            if token is None:
                numbers, spans = self._pieces(whole[first:last])
                ids += numbers
                offsets.append(spans + first)
            else:
                ids.append(token)
                offsets.append(np.array([[first, last]], np.int32))
        spans = np.maximum(np.concatenate(offsets) - len(before), 0)
        lone = len(ids) > 1 and bool(before) and ids[0] == self.ids.get(SPACE)
        kept = slice(1 if lone and ids[1] in self.special else 0, None)
        return Encoding(np.array(ids, np.int32)[kept], spans[kept])

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        if special:
            return self._decoder.decode(ids)
        stream = self._decoder.stream()
        return stream.push(ids) + stream.close()

    def stream(self) -> TextStream:
        return self._decoder.stream()

    @functools.cached_property
    def _decoder(self) -> SlowPieces:
        pieces = len(self.model.pieces)
        return SlowPieces(
            self.model,
            {k: self.texts[k] for k in self.special if k < pieces},
            {token.id: token.content for token in self.added if token.id >= pieces},
            self.special,
            self.legacy,
        )

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted((token.content for token in self.added), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @functools.cached_property
    def _by_text(self) -> Mapping[str, AddedToken]:
        return {token.content: token for token in self.added}

    @functools.cached_property
    def _unknown(self) -> tuple[str, int]:
        """The unknown token's text, and how many pieces spell it."""
        text = self.model.pieces[self.model.unknown][0]
        return text, len(self.backend.encode(text).ids)

    def _segments(self, text: str) -> Iterator[tuple[int | None, int, int]]:
        """Tokens found whole and the passages between, with their places; passages have None."""
        at, strip = 0, False
        for match in [*self._pattern.finditer(text), None]:
            token = None if match is None else self._by_text[match[0]]
            first, last = at, len(text) if match is None else match.start()
            passage = text[first:last]
            if strip:
                first += len(passage) - len(passage.lstrip())
            if token is not None and token.lstrip:
                last = first + len(text[first:last].rstrip())
            if first < last:
                yield None, first, last
            if match is not None:
                yield token.id, match.start(), match.end()
                at, strip = match.end(), token.rstrip

    def _pieces(self, text: str) -> tuple[list[int], Int32[np.ndarray, "T 2"]]:
        """Ids of a passage and the characters that each stands for."""
        unknown, pieces = ("", 0) if self.legacy else self._unknown
        before = SPACE if self.legacy and self.model.dummy_prefix else unknown
        found = self.backend.encode(before + text.replace(" ", SPACE))
        spans = np.array(found.offsets, np.int32).reshape(-1, 2)[pieces:]
        return found.ids[pieces:], np.maximum(spans - len(before), 0)


def read_slow(found: Mapping[str, bytes], *, legacy: bool) -> SlowPipeline:
    """A slow tokenizer; a `tokenizer.json` next to its files is not read, as in the references."""
    found = {name: content for name, content in found.items() if name != files.VOCABULARY}
    model = read_sentencepiece(PIECES, found[PIECES], BPE)
    vocab = {text: number for number, (text, _) in enumerate(model.pieces)}
    added, named = _with_named(found, vocab, files.added_tokens(found), _DEFAULTS)
    added = _stripping(found, added)
    return SlowPipeline(
        ids=files.check_ids(vocab, added, PIECES),
        added=added,
        named=named,
        around=_around(found, named, _start_of(named)),
        backend=bpe.from_sentencepiece(model),
        model=model,
        legacy=legacy,
    )


def read_fast(found: Mapping[str, bytes]) -> FastPipeline:
    """A `tokenizers` pipeline from `tokenizer.json`, or what `transformers` makes of the pieces."""
    added = files.added_tokens(found)
    if files.VOCABULARY not in found:
        pieces = read_sentencepiece(PIECES, found[PIECES], BPE)
        vocab = {text: number for number, (text, _) in enumerate(pieces.pieces)}
        added, named = _with_named(found, vocab, added, _DEFAULTS)
        backend = bpe.from_sentencepiece(pieces, added)
        prefix = [normalizers.Prepend(SPACE)] if pieces.dummy_prefix else []
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
        files.add_to(backend, added)
        fallback, strip, default = True, pieces.dummy_prefix, _start_of(named)
    else:
        content = files.read_object(found, files.VOCABULARY)
        model = content.section("model")
        vocab = files.check_ids(model.section("vocab").content, (), model.where)
        added, named = _with_named(found, vocab, added, {})
        backend = bpe.from_json(content, added)
        fallback, strip = _decoder(content)
        default = _added_around(content)
    around = _around(found, named, default)
    ids = files.check_ids(vocab, added, files.VOCABULARY)
    return FastPipeline(ids, added, named, around, backend, fallback, strip)


def _with_named(
    found: Mapping[str, bytes],
    vocab: Mapping[str, int],
    added: Sequence[AddedToken],
    defaults: Mapping[str, str],
) -> tuple[tuple[AddedToken, ...], dict[str, int]]:
    """All tokens that are found whole, and the ids of the named special tokens."""
    whole = {token.content: token for token in added}
    named: dict[str, int] = {}
    chosen = {
        key: AddedToken(text, -1, special=True, normalized=False)
        for key, text in defaults.items()
        if text in vocab
    }
    chosen |= {k: token for k, token in files.named_tokens(found).items() if token is not None}
    for key, token in chosen.items():
        number = whole[token.content].id if token.content in whole else vocab.get(token.content)
        if number is None:
            raise CheckpointError(
                f"the settings' {key} {shown(token.content)} is not in the vocabulary."
            )
        named[key] = int(number)
        if token.content not in whole or not whole[token.content].special:
            whole[token.content] = dataclasses.replace(token, id=int(number))
    for token, _ in files.additional_tokens(found):
        if token.content in whole and not whole[token.content].special:
            whole[token.content] = dataclasses.replace(token, id=whole[token.content].id)
    return tuple(sorted(whole.values(), key=lambda token: token.id)), named


def _stripping(found: Mapping[str, bytes], added: Sequence[AddedToken]) -> tuple[AddedToken, ...]:
    """Tokens for which the files have no flags take the white space on both sides along: those of
    `added_tokens.json`, and those that `special_tokens_map.json` names by their text alone."""
    content = files.read_object(found, files.SPECIALS).content
    named = [content.get(key) for key in files.NAMED]
    others = files.additional_tokens(found)
    plain = {text for text in named if isinstance(text, str)}
    plain |= {token.content for token, alone in others if alone}
    plain |= files.read_object(found, files.ADDED).content.keys()
    flagged = [token.content for token, alone in others if not alone]
    flagged += [value.get("content") for value in named if isinstance(value, Mapping)]
    plain = {text for text in plain if text not in flagged}
    return tuple(
        dataclasses.replace(token, lstrip=True, rstrip=True) if token.content in plain else token
        for token in added
    )


def _start_of(named: Mapping[str, int]) -> _Around:
    """What a Llama tokenizer adds whose files say nothing."""
    return ((named["bos_token"],) if "bos_token" in named else (), ())


def _around(found: Mapping[str, bytes], named: Mapping[str, int], default: _Around) -> _Around:
    """Ids before and behind a text: as the settings say, or as `default`."""
    settings = files.read_object(found, files.SETTINGS)
    result = list(default)
    for place, (flag, key) in enumerate(_FLAGS):
        wanted = settings.get(flag, Optional(FLAG), default=None)
        if wanted and key not in named:
            raise CheckpointError(f"{settings.where}: {flag}: expected a {key}, found none.")
        if wanted is not None:
            result[place] = (named[key],) if wanted else ()
    return result[0], result[1]


def _added_around(content: Settings) -> _Around:
    """Ids that the post-processor of a `tokenizer.json` puts before and behind a text."""
    step = content.section("post_processor", optional=True)
    steps = step.content.get("processors", [step.content])
    around: _Around = ((), ())
    for part in steps if isinstance(steps, list) else []:
        template = Settings(part, step.where, error=CheckpointError)
        if template.content.get("type") != "TemplateProcessing":
            continue
        single = template.content.get("single")
        sides: list[tuple[int, ...]] = [()]
        for entry in single if isinstance(single, list) else []:
            item = Settings(entry, f"{step.where}: single", error=CheckpointError)
            if "Sequence" in item:
                sides.append(())
                continue
            name = item.section("SpecialToken").get("id", Text(512))
            special = template.section("special_tokens").section(name)
            sides[-1] += special.get("ids", Several(files.ID, 1, 16))
        if len(sides) != 2:
            raise ForeignVocabularyError(
                f"{step.where}: expected tokens around one text, found {shown(single)}."
            )
        around = sides[0], sides[1]
    return around


def _decoder(content: Settings) -> tuple[bool, bool]:
    """Whether a `tokenizer.json` has byte fallback instead of byte-level tokens, and strips."""
    step = content.section("decoder", optional=True)
    steps = step.content.get("decoders", [step.content])
    steps = steps if isinstance(steps, list) else []
    kinds = [part.get("type") for part in steps if isinstance(part, Mapping)]
    if kinds == ["ByteLevel"]:
        return False, False
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        return True, kinds[-1] == "Strip"
    raise ForeignVocabularyError(
        f"{step.where}: expected a decoder of bytes or with byte fallback, found {shown(kinds)}."
    )
