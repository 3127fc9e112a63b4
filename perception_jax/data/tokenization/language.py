"""Tokenizers of language models: Llama's in the three ways that published systems use it, and
byte-level BPE.

One `tokenizer.model` gives different ids, depending on how `transformers` was asked to read it:

| mode | as | text behind a special token | used by |
| --- | --- | --- | --- |
| `slow_legacy` | `LlamaTokenizer(legacy=True)` 4.31 | a new SentencePiece text, with a "▁" of its own | LLaVA |
| `slow` | `LlamaTokenizer(legacy=False)` 4.32 | goes on without "▁" | Groma |
| `fast` | `tokenizer.json` | as its normaliser says, in Llama's a "▁" of its own | llava-hf, SmolLM2, Qwen2 |

In the slow modes an added token that no file gives flags takes the white space on both sides along.

Letters: T tokens.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int, Int32
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
from perception_jax.files import write_whole
from perception_jax.settings import FLAG, Choice, Settings, check, shown

MODES = ("slow_legacy", "slow", "fast")
"""Ways to read a language model's tokenizer; see the module."""
PIECES = "tokenizer.model"
"""File name of a SentencePiece model."""
GENERATION = "generation_config.json"
"""File name of the settings of generation, among them the tokens that end a text."""
_FILES = (
    *(files.VOCABULARY, PIECES, files.SETTINGS, files.SPECIALS, files.ADDED, GENERATION),
)  # fmt: skip
_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""Named tokens of a Llama tokenizer whose files name none."""
_OUR_MODE = "perception_jax_mode"
"""Key of a `tokenizer_config.json` for what Hugging Face's own keys cannot express."""


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageTokenizer:
    """Tokenizer of a language model: texts to ids and back; picklable.

    Attributes:
      files: the tokenizer's files by name, as they were found. Exports write them unchanged.
      mode: one of `MODES`; see the module.

    Raises:
      CheckpointError: the files are damaged, or lack what the mode reads.
      ForeignVocabularyError: the vocabulary is of another kind.
      ConfigError: an unknown mode.
    """

    files: Mapping[str, bytes]
    mode: str

    def __post_init__(self) -> None:
        check(self.mode, Choice(MODES), "mode")
        needed = {PIECES} if self.mode != "fast" else {PIECES, files.VOCABULARY}
        if not needed & self.files.keys():
            names = " or ".join(sorted(needed))
            raise CheckpointError(f"mode {self.mode!r}: expected {names}, found neither.")
        read = _read_fast if self.mode == "fast" else _read_slow
        object.__setattr__(self, "_parts", read(self.files, self.mode))

    def __reduce__(self) -> tuple[type, tuple[Mapping[str, bytes], str]]:
        return LanguageTokenizer, (self.files, self.mode)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding table: the largest id plus one."""
        return self._parts.size

    @property
    def start_id(self) -> int | None:
        """Id of the token that begins a text; None where the files name none."""
        return self._parts.named.get("bos_token")

    @property
    def end_id(self) -> int:
        """Id of the token that ends a text.

        Raises:
          CheckpointError: the files name none.
        """
        if self._parts.named.get("eos_token") is None:
            raise CheckpointError(f"expected an eos_token in {files.SETTINGS}, found none.")
        return self._parts.named["eos_token"]

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a generated text: those of `generation_config.json`, else `end_id`."""
        settings = files.read_object(self.files, GENERATION)
        value = settings.content.get("eos_token_id")
        if value is None:
            return (self.end_id,)
        values = value if isinstance(value, list) else [value]
        where = f"{GENERATION}: eos_token_id"
        return tuple(check(number, files.ID, where, error=CheckpointError) for number in values)

    @property
    def pad_id(self) -> int | None:
        """Id that fills up rows; None where the files name none."""
        return self._parts.named.get("pad_token")

    @property
    def unknown_id(self) -> int | None:
        """Id of what no token spells; None where the files name none."""
        return self._parts.named.get("unk_token")

    @property
    def max_length(self) -> int | None:
        """`model_max_length` of the settings; None where they set no limit."""
        length = files.read_context(files.read_object(self.files, files.SETTINGS), -1)
        return None if length < 0 else length

    def token_id(self, text: str) -> int | None:
        """The id of one token by its text, e.g. "<image>"; None if there is none."""
        return self._parts.ids.get(text)

    def encode(self, text: str) -> Encoding:
        """The tokens of one text with their places in it, without start and end."""
        return self._parts.encode(text)

    def __call__(self, text: str) -> Int32[np.ndarray, "T"]:
        """The ids of one text as the model reads it: between start and end tokens, where the
        settings add them."""
        start, end = self._parts.around
        return np.array([*start, *self.encode(text).ids, *end], np.int32)

    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int], *, special: bool = False) -> str:
        """The text of ids.

        Args:
          ids: those that no token has decode to nothing.
          special: whether special tokens are spelt out; otherwise they are left out.
        """
        return self._parts.decode([int(number) for number in ids], special=special)

    def stream(self) -> TextStream:
        """A decoder of ids that arrive one after the other, without special tokens."""
        return self._parts.stream()

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files that `transformers` and `read_tokenizer` read."""
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = dict(files.read_object(self.files, files.SETTINGS).content)
        settings[_OUR_MODE] = self.mode
        content = {**self.files, files.SETTINGS: json.dumps(settings, indent=2).encode()}
        for name, data in content.items():
            write_whole(folder / name, data)


def read_tokenizer(directory: str | os.PathLike, mode: str | None = None) -> LanguageTokenizer:
    """Reads the tokenizer of a language model from a checkpoint folder.

    Args:
      directory: holds `tokenizer.json` or `tokenizer.model`, and the settings next to them.
      mode: one of `MODES`. None takes what the folder says: the mode that `save` wrote, "fast" with
        a `tokenizer.json`, else one of the slow modes by the setting `legacy`.

    Raises:
      CheckpointError: the files are missing or damaged.
      ForeignVocabularyError: the vocabulary is of another kind.
      ConfigError: an unknown mode.
    """
    folder = pathlib.Path(directory)
    found = files.read_files(folder, _FILES)
    if not {files.VOCABULARY, PIECES} & found.keys():
        raise CheckpointError(f"{folder}: expected {files.VOCABULARY} or {PIECES}; found neither.")
    try:
        settings = files.read_object(found, files.SETTINGS)
        if mode is None:
            legacy = settings.get("legacy", Choice((True, False, None)), default=None)
            slow = "slow" if legacy is False else "slow_legacy"
            default = "fast" if files.VOCABULARY in found else slow
            mode = settings.get(_OUR_MODE, Choice(MODES), default=default)
        return LanguageTokenizer(found, mode)
    except CheckpointError as error:
        raise type(error)(f"{folder}: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What both kinds of tokenizers have.

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
    around: tuple[tuple[int, ...], tuple[int, ...]]
    backend: Tokenizer

    @functools.cached_property
    def size(self) -> int:
        return 1 + max(self.ids.values())

    @functools.cached_property
    def special(self) -> frozenset[int]:
        """Ids that are left out of texts."""
        return frozenset(self.named.values()) | {t.id for t in self.added if t.special}


@dataclasses.dataclass(frozen=True)
class _Fast(_Parts):
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

    def stream(self, skip: Sequence[int] | frozenset[int] | None = None) -> TextStream:
        skip = self.special if skip is None else skip
        if self.fallback:
            return FallbackStream(self._token, skip, strip=self.strip)
        return ByteLevelStream(self._token, skip)

    def _token(self, number: int) -> str | None:
        return self.backend.id_to_token(number) if 0 <= number < self.size else None


@dataclasses.dataclass(frozen=True)
class _Slow(_Parts):
    """What `transformers`' slow Llama tokenizers do around SentencePiece.

    Attributes:
      model: the pieces.
      legacy: see the module.
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
        kept = slice(1 if lone and ids[1] in self._named else 0, None)
        return Encoding(np.array(ids, np.int32)[kept], spans[kept])

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        if special:
            return self._decoder.decode(ids)
        stream = self._decoder.stream()
        return stream.push(ids) + stream.close()

    def stream(self) -> TextStream:
        return self._decoder.stream()

    @functools.cached_property
    def _named(self) -> frozenset[int]:
        return frozenset(self.named.values())

    @functools.cached_property
    def _decoder(self) -> SlowPieces:
        pieces = len(self.model.pieces)
        texts = {number: text for text, number in self.ids.items()}
        return SlowPieces(
            self.model,
            {k: texts[k] for k in self._named if k < pieces},
            {token.id: token.content for token in self.added if token.id >= pieces},
            self._named,
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


def _read_slow(found: Mapping[str, bytes], mode: str) -> _Slow:
    model = read_sentencepiece(PIECES, found[PIECES], BPE)
    vocab = {text: number for number, (text, _) in enumerate(model.pieces)}
    added, named = _with_named(found, vocab, files.added_tokens(found), _DEFAULTS)
    added = _stripping(found, added)
    return _Slow(
        ids=files.check_ids(vocab, added, PIECES),
        added=added,
        named=named,
        around=_around(found, named, (True, False)),
        backend=bpe.from_sentencepiece(model),
        model=model,
        legacy=mode == "slow_legacy",
    )


def _read_fast(found: Mapping[str, bytes], mode: str) -> _Fast:
    added = files.added_tokens(found)
    if files.VOCABULARY not in found:
        model = read_sentencepiece(PIECES, found[PIECES], BPE)
        vocab = {text: number for number, (text, _) in enumerate(model.pieces)}
        added, named = _with_named(found, vocab, added, _DEFAULTS)
        backend = bpe.from_sentencepiece(model, added)
        prefix = [normalizers.Prepend(SPACE)] if model.dummy_prefix else []
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
        files.add_to(backend, added)
        fallback, strip, default = True, model.dummy_prefix, (True, False)
    else:
        content = files.read_object(found, files.VOCABULARY)
        vocab = content.section("model").section("vocab").content
        added, named = _with_named(found, vocab, added, {})
        backend = bpe.from_json(content, added)
        fallback, strip = _decoder(content)
        default = _added_around(content, named)
    around = _around(found, named, default)
    ids = files.check_ids(vocab, added, files.VOCABULARY)
    return _Fast(ids, added, named, around, backend, fallback, strip)


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
        whole.setdefault(token.content, dataclasses.replace(token, id=int(number)))
    return tuple(sorted(whole.values(), key=lambda token: token.id)), named


def _stripping(found: Mapping[str, bytes], added: Sequence[AddedToken]) -> tuple[AddedToken, ...]:
    """Tokens for which the files have no flags take the white space on both sides along: those of
    `added_tokens.json`, and those that `special_tokens_map.json` names by their text alone."""
    content = files.read_object(found, files.SPECIALS).content
    named = {key: content[key] for key in files.NAMED if key in content}
    plain = files.read_object(found, files.ADDED).content.keys()
    plain |= {value for value in named.values() if isinstance(value, str)}
    plain -= {value.get("content") for value in named.values() if isinstance(value, Mapping)}
    return tuple(
        dataclasses.replace(token, lstrip=True, rstrip=True) if token.content in plain else token
        for token in added
    )


def _around(
    found: Mapping[str, bytes], named: Mapping[str, int], default: tuple[bool, bool]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and behind a text: as the settings say, or as `default`."""
    settings = files.read_object(found, files.SETTINGS)
    result = []
    for flag, key, otherwise in zip(
        ("add_bos_token", "add_eos_token"), ("bos_token", "eos_token"), default, strict=True
    ):
        wanted = settings.get(flag, FLAG, default=otherwise)
        if wanted and key not in named:
            raise CheckpointError(f"{settings.where}: {flag}: expected a {key}, found none.")
        result.append((named[key],) if wanted else ())
    return result[0], result[1]


def _added_around(content: Settings, named: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether the post-processor of a `tokenizer.json` puts tokens before and behind a text."""
    steps = content.content.get("post_processor") or {}
    steps = steps.get("processors", [steps]) if isinstance(steps, Mapping) else [steps]
    before = behind = False
    for step in steps:
        template = Settings(step, f"{content.where}: post_processor", error=CheckpointError)
        if template.content.get("type") != "TemplateProcessing":
            continue
        single = template.content.get("single")
        parts = single if isinstance(single, list) else []
        kinds = ["".join(part) for part in parts if isinstance(part, Mapping)]
        if kinds.count("Sequence") != 1 or len(kinds) != 1 + kinds.count("SpecialToken"):
            raise ForeignVocabularyError(
                f"{template.where}: expected special tokens around one text, found {shown(single)}."
            )
        before, behind = kinds[0] != "Sequence", kinds[-1] != "Sequence"
    return before, behind


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
