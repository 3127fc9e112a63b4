"""Steps of a `tokenizer.json` before the model: normalisers and pre-tokenizers of known kinds.

`tokenizers` trusts its files: a normaliser's table that points outside of itself ends the process,
and a regular expression can take exponential time. So only steps that are checked here go to it.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

from perception_jax.data.tokenization.files import ForeignVocabularyError, guarded
from perception_jax.errors import CheckpointError
from perception_jax.settings import FLAG, Choice, Settings, Text, shown

SPACE = "▁"
"""SentencePiece's symbol of a space."""
_MAX_STEPS = 16
_PATTERNS = (" {2,}", r"\s+", " +", "▁{2,}")
"""Regular expressions in use; others can take exponential time."""
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLITS = {
    "qwen2": _CONTRACTIONS + _LETTERS + r"|\p{N}" + _AFTER_NUMBERS,
    "llama-bpe": _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _AFTER_NUMBERS,
}
"""Regular expressions that split words, by the names that llama.cpp has for them."""
_SPLIT = Choice(tuple(SPLITS.values()))
_SCHEMES = Choice(("always", "never", "first"))
_BEHAVIOURS = Choice(("Isolated", "Removed"))


def install(backend: Tokenizer, content: Settings) -> None:
    """Gives a backend the normaliser and the pre-tokenizer of a `tokenizer.json`.

    Raises:
      CheckpointError: damaged.
      ForeignVocabularyError: steps that are not known here.
    """
    normalizer = [_normalizer(x) for x in _steps(content, "normalizer", "normalizers")]
    splits = [_pre_tokenizer(x) for x in _steps(content, "pre_tokenizer", "pretokenizers")]
    if sum(step["type"] == "Precompiled" for step in normalizer) > 1:
        raise CheckpointError(f"{content.where}: expected one table of the normaliser.")
    whole = json.loads(Tokenizer(models.WordLevel({}, unk_token="")).to_str()) | {
        "normalizer": {"type": "Sequence", "normalizers": normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
    }
    what = f"{content.where}: the steps before the model do not work"
    parts = guarded(lambda: Tokenizer.from_str(json.dumps(whole)), what)
    backend.normalizer = parts.normalizer
    backend.pre_tokenizer = parts.pre_tokenizer


def check_charsmap(content: bytes) -> None:
    """Refuses a normaliser's table that would read outside of itself.

    The table is a double array (Aoe, 1989, as in darts-clone): a unit at position i with a label
    goes on to node n = i ^ offset, whose children are at n ^ byte, and whose value, if it has one,
    is at n; the value is a position in the texts behind the array.

    Raises:
      CheckpointError: a damaged table.
    """
    size = int.from_bytes(content[:4], "little")
    if len(content) < 8 or size % 4 or not 4 <= size <= len(content) - 4:
        raise CheckpointError(
            f"the normaliser's table: expected an array within {len(content)} bytes, found one of "
            f"{size} bytes."
        )
    units = np.frombuffer(content, "<u4", size // 4, 4).astype(np.int64)
    texts = np.frombuffer(content, np.uint8, offset=4 + size)
    nodes = np.arange(len(units)) ^ ((units >> 10) << ((units & 0x200) >> 6))
    used = units < 2**31  # the others are values
    used[0] = True
    leaves = nodes[used & (units >> 8 & 1 == 1)]
    inside = bool(((nodes[used] | 0xFF) < len(units)).all())
    if inside:
        values = units[leaves] & 0x7FFFFFFF
        inside = bool((values < len(texts)).all() and ((texts[values] & 0xC0) != 0x80).all())
    try:
        texts.tobytes().decode("utf-8")
    except UnicodeDecodeError:
        inside = False
    if not inside:
        raise CheckpointError(
            "the normaliser's table: expected an array that stays within itself, found one that "
            "points outside. Fetch the file again."
        )


def _steps(content: Settings, key: str, inner: str) -> Iterator[Settings]:
    """The steps of a pipeline, without the sequences around them."""
    pending, count = [content.content.get(key)], 0
    while pending:
        value = pending.pop(0)
        if value is None:
            continue
        step = Settings(value, f"{content.where}: {key}", error=CheckpointError)
        if step.content.get("type") == "Sequence":
            items = step.content.get(inner)
            if not isinstance(items, list):
                raise CheckpointError(f"{step.where}: {inner}: expected a list.")
            pending = [*items, *pending]
        else:
            yield step
        count += 1
        if count + len(pending) > _MAX_STEPS:
            raise CheckpointError(f"{step.where}: expected at most {_MAX_STEPS} steps, found more.")


def _normalizer(step: Settings) -> dict[str, Any]:
    kind = step.get("type", Text(64))
    if kind in ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents"):
        return {"type": kind}
    if kind == "Strip":
        sides = ("strip_left", "strip_right")
        return {"type": kind} | {side: step.get(side, FLAG, default=True) for side in sides}
    if kind == "Prepend":
        return {"type": kind, "prepend": step.get("prepend", Text(1))}
    if kind == "Precompiled":
        text = step.get("precompiled_charsmap", Text(1 << 24))
        try:
            check_charsmap(base64.b64decode(text, validate=True))
        except binascii.Error as error:
            raise CheckpointError(f"{step.where}: expected base64: {error}.") from error
        return {"type": kind, "precompiled_charsmap": text}
    if kind == "Replace":
        return {"type": kind, **_replacement(step)}
    raise _unknown(step, kind)


def _replacement(step: Settings) -> dict[str, Any]:
    """A pattern and what replaces it, which is no longer: steps must not let texts grow."""
    pattern, content = step.section("pattern").content, step.get("content", Text(64))
    if pattern.keys() == {"Regex"} and pattern["Regex"] in _PATTERNS and len(content) <= 1:
        return {"pattern": dict(pattern), "content": content}
    text = pattern.get("String")
    if pattern.keys() == {"String"} and isinstance(text, str) and len(content) <= len(text) <= 64:
        return {"pattern": {"String": text}, "content": content}
    raise _unknown(step, "Replace")


def _pre_tokenizer(step: Settings) -> dict[str, Any]:
    kind = step.get("type", Text(64))
    if kind in ("WhitespaceSplit", "Whitespace"):
        return {"type": kind}
    if kind == "Metaspace":
        prefix = step.get("add_prefix_space", FLAG, default=True)
        replacement = step.get("replacement", Choice((SPACE,)))
        scheme = step.get("prepend_scheme", _SCHEMES, default="always" if prefix else "never")
        split = step.get("split", FLAG, default=True)
        return {
            "type": kind,
            "replacement": replacement,
            "prepend_scheme": scheme,
            "split": split,
        }
    if kind == "ByteLevel":
        flags = ("add_prefix_space", "trim_offsets", "use_regex")
        return {"type": kind} | {flag: step.get(flag, FLAG, default=True) for flag in flags}
    if kind == "Digits":
        return {"type": kind, "individual_digits": step.get("individual_digits", FLAG)}
    if kind == "Split":
        pattern = step.section("pattern").get("Regex", _SPLIT)
        behaviour, invert = step.get("behavior", _BEHAVIOURS), step.get("invert", FLAG)
        return {"type": kind, "pattern": {"Regex": pattern}} | {
            "behavior": behaviour,
            "invert": invert,
        }
    raise _unknown(step, kind)


def _unknown(step: Settings, kind: str) -> ForeignVocabularyError:
    found: Mapping[str, Any] = step.content
    return ForeignVocabularyError(
        f"{step.where}: expected a supported step, found {kind}: {shown(found)}."
    )
