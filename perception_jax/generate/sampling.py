"""How the next token is chosen: greedy, or at random from a reshaped distribution.

The order of the steps is that of `transformers`: repetition penalty, temperature, top-k, top-p.
Letters: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.settings import Either, Integer, Number, Optional, Settings, Several

FILE = "generation_config.json"
"""File name of the settings of generation in a Hugging Face folder."""
_ID = Integer(0, 2**31 - 1)
_KINDS = {
    "temperature": Number(low=0.0, high=1e4),
    "top_k": Optional(Integer(1, 2**24)),
    "top_p": Optional(Number(above=0.0, high=1.0)),
    "repetition_penalty": Number(above=0.0, high=100.0),
    "end_ids": Several(_ID, 0, 64),
    "pad_id": _ID,
}
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "min_p": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1,
    "bad_words_ids": [],
    "force_words_ids": [],
    "sequence_bias": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
"""Settings that are not supported, and the value (besides null) at which they do nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and which end a text (static: another one compiles anew).

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_k: only so many of the likeliest tokens, and those that are as likely; None is all.
      top_p: only the fewest likeliest tokens whose probabilities sum up to it; None is all.
      repetition_penalty: divides positive logits of ids that the text contains, and multiplies
        negative ones (CTRL, arXiv 1909.05858, §4.1).
      end_ids: tokens that end a text; they belong to it.
      pad_id: what stands behind the end.

    Raises:
      ConfigError: a field of another type or out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    end_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            settings.check(getattr(self, name), kind, f"Sampling.{name}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = FILE) -> Sampling:
        """Reads a `generation_config.json`.

        Keys that are left out take the defaults of transformers, whose top-k is 50.

        Raises:
          ConfigError: a setting of another type or out of range, or one that is not supported, such
            as beam search.
        """
        file = Settings(config, where)
        for key, neutral in _NEUTRAL.items():
            found = file.content.get(key)
            if found not in (None, neutral):
                raise ConfigError(
                    f"{where}: {key} {settings.shown(found)} is not supported; expected "
                    f"{neutral!r} or null. Remove it, or set the sampling by hand."
                )
        end = file.get("eos_token_id", Optional(Either(_ID, Several(_ID, 0, 64))), None)
        pad = file.get("pad_token_id", Optional(Integer(-1, 2**31 - 1)), None)
        ends = () if end is None else end if isinstance(end, tuple) else (end,)
        kept = {
            "repetition_penalty": _or(file, "repetition_penalty", 1.0),
            "end_ids": ends,
            "pad_id": max(ends[0] if pad is None and ends else pad or 0, 0),
        }
        if not _or(file, "do_sample", False, settings.FLAG):
            return cls(**kept)
        top_k = _or(file, "top_k", 50, Integer(0, 2**24))
        return cls(
            temperature=_or(file, "temperature", 1.0),
            top_k=top_k or None,
            top_p=_or(file, "top_p", 1.0),
            **kept,
        )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Sampling:
        """Reads the `generation_config.json` of a folder; without one it is greedy.

        Raises:
          ConfigError: see `from_hf`.
        """
        path = pathlib.Path(folder) / FILE
        if not path.is_file():
            return cls()
        return cls.from_hf(settings.read_json(path), str(path))


def _or(file: Settings, key: str, default: Any, kind: Any = None) -> Any:
    """A setting, or its default where it is left out or null."""
    found = file.get(key, Optional(_KINDS[key] if kind is None else kind), None)
    return default if found is None else found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """Tokens that were chosen.

    Attributes:
      ids: one for each text.
      log_probs: of these under the model's own distribution, before any setting reshapes it.
    """

    ids: Int[Array, " B"]
    log_probs: Float[Array, " B"]


def choose(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    sampling: Sampling,
    keys: Key[Array, " B"] | None,
) -> Chosen:
    """Chooses the next token of each text.

    Args:
      logits: float32.
      seen: ids that the text contains.
      keys: one for each text, so that batch mates change nothing; None if greedy.

    Raises:
      ConfigError: sampling without keys.
    """
    scores = reshaped(logits, seen, sampling)
    if sampling.temperature == 0:
        ids = jnp.argmax(scores, axis=-1)
    elif keys is None:
        raise ConfigError("sampling with a temperature: expected a random key for each text.")
    else:
        ids = jax.vmap(jax.random.categorical)(keys, scores)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], axis=1)[:, 0]
    return Chosen(ids=ids.astype(jnp.int32), log_probs=log_probs)


def reshaped(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: Sampling
) -> Float[Array, "B V"]:
    """Applies penalty, temperature, top-k and top-p; ids that are left out are -inf."""
    scores = logits
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        less_likely = jnp.where(scores > 0, scores / penalty, scores * penalty)
        scores = jnp.where(seen, less_likely, scores)
    if sampling.temperature == 0:
        return scores
    scores = scores / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        lowest = jax.lax.top_k(scores, sampling.top_k)[0][:, -1:]
        scores = jnp.where(scores < lowest, -jnp.inf, scores)
    if sampling.top_p is not None and sampling.top_p < 1:
        scores = _nucleus(scores, sampling.top_p)
    return scores


def _nucleus(scores: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """Keeps a token if those before it, the likeliest first, sum up to less than `top_p`."""
    order = jnp.argsort(scores, axis=-1, descending=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.zeros(scores.shape, bool)
    kept = kept.at[jnp.arange(scores.shape[0])[:, None], order].set(before < top_p)
    return jnp.where(kept, scores, -jnp.inf)
