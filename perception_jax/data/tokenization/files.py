"""Reads tokenizer files of other libraries: bounded in size, and checked before use.

`tokenizers` is compiled code that aborts the process, hangs or takes gigabytes on some malformed
files, so nothing of a file goes to it that was not checked here.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from tokenizers import AddedToken as BackendToken
from tokenizers import Tokenizer as Backend

from perception_jax.errors import CheckpointError
from perception_jax.settings import FLAG, Integer, Settings, Text, check, parse_json, shown

MAX_BYTES = 1 << 26
"""Largest tokenizer file in bytes; the largest vocabularies in use take half of it."""
MAX_ADDED = 1 << 16
"""Largest number of tokens outside of the model's vocabulary."""
ID = Integer(0, 2**31 - 1)
"""Setting type of a token id."""
SETTINGS, VOCABULARY, SPECIALS, ADDED = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
)
"""File names of a tokenizer: settings, vocabulary, special tokens, added tokens."""
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Keys of named special tokens."""

_TOKEN = Text(512)
_LENGTH = Integer(2, 2**20)
_T = TypeVar("_T")


class ForeignVocabularyError(CheckpointError):
    """A valid vocabulary of an unsupported kind."""


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole before a text is split.

    Attributes:
      content: the text that it stands for.
      id: its own; also the row of the embedding table.
      special: left out of decoded texts.
      normalized: looked for in the cleaned text instead of the text as it is.
      single_word: only where no word goes on before or behind it.
      lstrip, rstrip: takes the white space before or behind it along.
    """

    content: str
    id: int
    special: bool = False
    normalized: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False

    def flags(self) -> dict[str, Any]:
        """The fields without the id, as in Hugging Face's files."""
        fields = dataclasses.asdict(self)
        del fields["id"]
        return fields


def read_files(folder: pathlib.Path, names: Iterable[str]) -> dict[str, bytes]:
    """Reads the files that exist.

    Raises:
      CheckpointError: one is too large, or cannot be read.
    """
    found = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                found[name] = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise CheckpointError(f"Expected a readable file at {path}: {error}.") from error
        if len(found[name]) > MAX_BYTES:
            raise CheckpointError(
                f"{path}: expected a tokenizer's file of at most {MAX_BYTES} bytes, found more."
            )
    return found


def read_object(files: Mapping[str, bytes], name: str) -> Settings:
    """A JSON object; an empty one if the file is not there."""
    content = parse_json(files[name], name, error=CheckpointError) if name in files else {}
    return Settings(content, name, error=CheckpointError)


def read_context(settings: Settings, default: int) -> int:
    """`model_max_length`; Hugging Face writes a huge number for "no limit"."""
    length = settings.content.get("model_max_length")
    if isinstance(length, int | float) and not isinstance(length, bool) and length >= 1_000_000:
        return default
    return default if length is None else settings.get("model_max_length", _LENGTH)


def named_tokens(files: Mapping[str, bytes]) -> dict[str, AddedToken | None]:
    """The tokens that the settings name, e.g. `eos_token`; None for one that is switched off. Their
    ids are those of the vocabulary, and -1 here.

    Raises:
      CheckpointError: settings of another type.
    """
    sources = [read_object(files, SPECIALS), read_object(files, SETTINGS)]
    if "added_tokens_decoder" in sources[1]:  # the older file is no longer read then
        del sources[0]
    elif SPECIALS in files:
        sources.reverse()
    found: dict[str, AddedToken | None] = {}
    for source in sources:
        for key in NAMED:
            if key in source:
                value, where = source.content[key], f"{source.where}: {key}"
                found[key] = None if value is None else _token(value, -1, where, special=True)
    return found


def additional_tokens(files: Mapping[str, bytes]) -> list[tuple[AddedToken, bool]]:
    """Special tokens without a name of their own (`additional_special_tokens`), with the id -1, and
    whether the files give their text alone.

    Raises:
      CheckpointError: settings of another type.
    """
    found = []
    for source in (read_object(files, SPECIALS), read_object(files, SETTINGS)):
        where = f"{source.where}: additional_special_tokens"
        values = source.content.get("additional_special_tokens") or []
        if not isinstance(values, list) or len(values) > MAX_ADDED:
            raise CheckpointError(f"{where}: expected a list of tokens, found {shown(values)}.")
        found += [(_token(v, -1, where, special=True), isinstance(v, str)) for v in values]
    return found


def added_tokens(files: Mapping[str, bytes]) -> tuple[AddedToken, ...]:
    """The tokens that the files list besides the vocabulary, in order of their ids.

    `added_tokens_decoder` of the settings comes before `tokenizer.json`, and that before the old
    `added_tokens.json`.

    Raises:
      CheckpointError: a damaged entry, two ids for one token or two tokens with one id.
    """
    settings = read_object(files, SETTINGS)
    listed: list[tuple[str, Any, Any]] = []
    decoder = settings.section("added_tokens_decoder", optional=True)
    for key, value in decoder.content.items():
        listed.append((f"{decoder.where}: {key}", value, int(key) if key.isdecimal() else key))
    entries = read_object(files, VOCABULARY).content.get("added_tokens") or []
    if not isinstance(entries, list):
        raise CheckpointError(f"{VOCABULARY}: added_tokens: expected a list, found another.")
    for index, value in enumerate(entries):
        where = f"{VOCABULARY}: added_tokens[{index}]"
        listed.append((where, value, value.get("id") if isinstance(value, Mapping) else None))
    for content, number in read_object(files, ADDED).content.items():
        listed.append((f"{ADDED}: {shown(content)}", content, number))
    if len(listed) > 2 * MAX_ADDED:
        raise CheckpointError(f"expected at most {MAX_ADDED} added tokens, found {len(listed)}.")
    found: dict[str, AddedToken] = {}
    for where, value, number in listed:
        token = _token(value, check(number, ID, f"{where}: id", error=CheckpointError), where)
        other = found.setdefault(token.content, token)
        if other.id != token.id:
            raise CheckpointError(
                f"{where}: expected {shown(token.content)} with the id {other.id}, as in another "
                f"of the tokenizer's files, found {token.id}."
            )
    return tuple(sorted(found.values(), key=lambda token: token.id))


def check_ids(vocab: Mapping[str, Any], added: Sequence[AddedToken], where: str) -> dict[str, int]:
    """Ids of all tokens.

    Raises:
      CheckpointError: an id that is none, or shared by two tokens.
    """
    ids: dict[str, int] = {}
    for token, number in vocab.items():
        if type(number) is not int or not ID.low <= number <= ID.high:
            name = f"{where}: the id of {shown(token)}"
            check(number, ID, name, error=CheckpointError)
        ids[token] = int(number)
    for item in added:
        if ids.setdefault(item.content, item.id) != item.id:
            raise CheckpointError(
                f"{where}: expected the added token {shown(item.content)} with its id in the "
                f"vocabulary, {ids[item.content]}, found {item.id}."
            )
    if len(set(ids.values())) != len(ids):
        seen: dict[int, str] = {}
        for token, number in ids.items():
            if number in seen:
                raise CheckpointError(
                    f"{where}: expected one token for each id, found {shown(seen[number])} and "
                    f"{shown(token)} for {number}."
                )
            seen[number] = token
    return ids


def guarded(make: Callable[[], _T], what: str) -> _T:
    """The result of compiled code; what it raises, a panic among it, becomes one error.

    Raises:
      CheckpointError: `what`, and what is wrong.
    """
    try:
        return make()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {error!s:.300}.") from error


def add_to(backend: Backend, tokens: Iterable[AddedToken]) -> None:
    """Lets a backend find tokens whole; those that its model has keep their ids."""
    ordered = sorted(tokens, key=lambda token: token.id)
    backend.add_tokens([BackendToken(**token.flags()) for token in ordered])


def _token(value: Any, number: int, where: str, *, special: bool = False) -> AddedToken:
    if isinstance(value, str):
        content = check(value, _TOKEN, where, error=CheckpointError)
        token = AddedToken(content, number, special, normalized=not special)
    else:
        entry = Settings(value, where, error=CheckpointError)
        content = entry.get("content", _TOKEN)
        flags = {key: entry.get(key, FLAG, default=False) for key in _FLAGS}
        flags["special"] = flags["special"] or special
        normalized = entry.get("normalized", FLAG, default=not flags["special"])
        token = AddedToken(content, number, normalized=normalized, **flags)
    if not content:
        raise CheckpointError(f"{where}: expected a token's text, found an empty string.")
    return token


_FLAGS = ("special", "single_word", "lstrip", "rstrip")
