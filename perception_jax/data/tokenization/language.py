"""Tokenizers of language models: Llama's in the three ways that published systems use it, and
byte-level BPE.

One `tokenizer.model` gives different ids, depending on how `transformers` was asked to read it:

| mode | as | text behind a special token | used by |
| --- | --- | --- | --- |
| `slow_legacy` | `LlamaTokenizer(legacy=True)` 4.31 | a new SentencePiece text, with a "▁" of its own | LLaVA |
| `slow` | `LlamaTokenizer(legacy=False)` 4.32 | goes on without "▁" | the model of arXiv 2404.13013 |
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
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, Int32

from perception_jax.data.tokenization import files
from perception_jax.data.tokenization.decoding import TextStream
from perception_jax.data.tokenization.pipelines import PIECES, read_fast, read_slow
from perception_jax.data.tokenization.protocol import Encoding
from perception_jax.errors import CheckpointError, DataError
from perception_jax.files import write_whole
from perception_jax.settings import Choice, check

MODES = ("slow_legacy", "slow", "fast")
"""Ways to read a language model's tokenizer; see the module."""
GENERATION = "generation_config.json"
"""File name of the settings of generation, among them the tokens that end a text."""
TEMPLATE = "chat_template.jinja"
"""File name of the chat template, where the settings do not hold it."""
_FILES = (
    *(files.VOCABULARY, PIECES, files.SETTINGS, files.SPECIALS, files.ADDED),
    *(GENERATION, TEMPLATE),
)
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
        _ = self.max_length  # raises where the setting is damaged
        if self.mode == "fast":
            parts = read_fast(self.files)
        else:
            parts = read_slow(self.files, legacy=self.mode == "slow_legacy")
        object.__setattr__(self, "_parts", parts)

    def __reduce__(self) -> tuple[type, tuple[Mapping[str, bytes], str]]:
        return LanguageTokenizer, (self.files, self.mode)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding table: the largest id plus one."""
        return self._parts.size

    @property
    def start_id(self) -> int | None:
        """Id of the token that begins a text; None where the files name none and add none."""
        first = [*self._parts.around[0], None][0]
        return self._parts.named.get("bos_token", first)

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

    @property
    def chat_template(self) -> str | None:
        """The chat template in the language Jinja, which is not run here; None without one.

        See `data.conversation.from_jinja`.
        """
        if TEMPLATE in self.files:
            return self.files[TEMPLATE].decode(errors="replace")
        found = files.read_object(self.files, files.SETTINGS).content.get("chat_template")
        if isinstance(found, list):  # several by name
            named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
            found = named[0].get("template") if named else None
        return found if isinstance(found, str) else None

    def token_id(self, text: str) -> int | None:
        """The id of one token by its text, e.g. "<image>"; None if there is none."""
        return self._parts.ids.get(text)

    def with_tokens(self, ids: Mapping[str, int]) -> LanguageTokenizer:
        """Returns a tokenizer with further special tokens, such as "<image>".

        Args:
          ids: by the text of a token.

        Raises:
          CheckpointError: an id or a text that another token has.
        """
        known = self._parts.ids
        for text, number in ids.items():
            if text in known or number in known.values():
                raise CheckpointError(f"expected a new token, found {text!r} with the id {number}.")
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        entries = {n: {"content": text, **flags, "special": True} for text, n in ids.items()}
        settings = dict(files.read_object(self.files, files.SETTINGS).content)
        changed = {**self.files}
        if files.VOCABULARY in self.files:
            whole = dict(files.read_object(self.files, files.VOCABULARY).content)
            more = [{"id": number, **entry} for number, entry in entries.items()]
            whole["added_tokens"] = [*(whole.get("added_tokens") or []), *more]
            changed[files.VOCABULARY] = json.dumps(whole).encode()
        if self.mode != "fast" or files.VOCABULARY not in self.files:
            # With a decoder in the settings the older file of names is no longer read.
            names = files.read_object(self.files, files.SPECIALS).content
            settings |= {key: names[key] for key in files.NAMED if key in names}
            listed = settings.get("added_tokens_decoder") or {}
            settings["added_tokens_decoder"] = listed | {str(n): e for n, e in entries.items()}
        changed[files.SETTINGS] = json.dumps(settings, indent=2).encode()
        return LanguageTokenizer(changed, self.mode)

    def encode(self, text: str) -> Encoding:
        """The tokens of one text with their places in it, without start and end.

        Raises:
          DataError: half of a surrogate pair, which no encoding has.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text: expected characters, found half of a surrogate pair at {error.start}; "
                "decode the source with errors='replace'."
            ) from error
        return self._parts.encode(text)

    def __call__(self, text: str) -> Int32[np.ndarray, "T"]:
        """The ids of one text as the model reads it: between start and end tokens, where the
        settings add them. Raises as `encode`."""
        start, end = self._parts.around
        return np.array([*start, *self.encode(text).ids, *end], np.int32)

    def decode(
        self, ids: Int[np.ndarray, "T"] | Sequence[int | np.integer], *, special: bool = False
    ) -> str:
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
