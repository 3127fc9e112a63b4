"""Generation of text on the host: prompts of any length on a small set of compiled programs.

Prompts are padded to the next of a few lengths (buckets), caches have one of the same lengths as
capacity, and the decode loop runs a fixed number of steps at a time: each shape is compiled once.
Nothing is called back from the device; between two parts of the loop the host looks at the tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from perception_jax.errors import ConfigError
from perception_jax.generate.loop import Decoded, decode
from perception_jax.generate.model import IMAGE, LanguageModel, check_places
from perception_jax.generate.sampling import Sampling
from perception_jax.generate.state import Appended, ImageTokens, State, extend, prefill
from perception_jax.generate.stopping import StopStrings
from perception_jax.nn.linear import check_ids
from perception_jax.nn.taps import Taps

SMALLEST = 16
"""The smallest bucket, tokens; the others are powers of two up to the model's context."""
CHUNK = 16
"""Steps of the decode loop between two looks of the host."""

Prompts = Sequence[Sequence[int] | Int[np.ndarray, "_"]]
"""Token ids of each prompt, without padding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """One generated text.

    Attributes:
      ids: new tokens, with the end token or those of the stop string, if any.
      log_probs: of each under the model's own distribution.
      ended: "end": by an end token; "stop": by a stop string; "length": by the requested number of
        tokens or the end of the cache.
      text: decoded up to the stop string; None without `StopStrings`.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    ended: Literal["end", "stop", "length"]
    text: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one part of the loop has appended to each text.

    Attributes:
      ids, log_probs: of the new tokens of each text; of a text that has ended, none.
      state: after the last part, with all tokens; None before. Texts that a stop string ended have
        what is after it taken back, and need new tokens (`Generator.extend`) before they can be
        continued.
    """

    ids: tuple[tuple[int, ...], ...]
    log_probs: tuple[tuple[float, ...], ...]
    state: State | None = None


class Generator:
    """Generates text with a model.

    On CPU, give it `nn.stack.separate(model)`: inside the loop XLA copies the weights of each layer
    out of a stack, once for every token.

    Args:
      model: with its weights.
      buckets: lengths, ascending; None is `SMALLEST` and powers of two up to the context.
      chunk: steps between two looks of the host.

    Raises:
      ConfigError: buckets that are not ascending or larger than the model's context.
    """

    def __init__(
        self, model: LanguageModel, *, buckets: Sequence[int] | None = None, chunk: int = CHUNK
    ):
        self.model = model
        self.chunk = chunk
        self.buckets = _doubled(model.context) if buckets is None else tuple(buckets)
        ascending = sorted(set(self.buckets)) == list(self.buckets)
        if not self.buckets or not ascending or not 0 < self.buckets[-1] <= model.context:
            raise ConfigError(
                f"generator: expected ascending buckets of at most {model.context} tokens, the "
                f"model's context, found {list(self.buckets)}."
            )

    def prefill(
        self,
        prompts: Prompts,
        *,
        image_tokens: ImageTokens | None = None,
        room: int = 0,
        taps: Taps | None = None,
    ) -> Appended:
        """Starts texts with prompts of any lengths.

        Args:
          image_tokens: of each prompt, from the model's `image_tokens`; the prompts have the id
            `model.IMAGE` for each of them.
          room: tokens that each text shall have room for after its prompt, as far as the largest
            bucket allows; `extend` and `stream` make more when it is needed.
          taps: what to record; see `state.prefill`.

        Raises:
          ConfigError: no prompt, an empty one, one that is longer than the largest bucket, or an
            unknown id.
        """
        ids, mask = self._padded(prompts, image_tokens)
        if not mask.any(axis=1).all():
            raise ConfigError("prompts: expected at least one token in each, found an empty one.")
        capacity = self._capacity(int(mask.sum(axis=1).max()) + room)
        return _prefill(self.model, ids, mask, image_tokens, taps, capacity=capacity)

    def extend(
        self,
        state: State,
        prompts: Prompts,
        *,
        image_tokens: ImageTokens | None = None,
        room: int = 0,
        taps: Taps | None = None,
    ) -> Appended:
        """Appends tokens to texts; those with none stay as they are.

        Args:
          state: stays usable.
          prompts, image_tokens, room, taps: as of `prefill`.

        Raises:
          ConfigError: a text that becomes longer than the largest bucket, an unknown id, or another
            number of prompts than texts.
        """
        ids, mask = self._padded(prompts, image_tokens)
        if len(ids) != len(state.done):
            raise ConfigError(f"expected tokens for {len(state.done)} texts, found {len(ids)}.")
        longest = int((np.asarray(state.cache.lengths) + mask.sum(axis=1)).max())
        state = self._with_room(state, longest, room)
        return _extend(self.model, state, ids, mask, image_tokens, taps)

    def stream(
        self,
        state: State,
        *,
        tokens: int,
        sampling: Sampling | None = None,
        seed: int | None = None,
        stop: StopStrings | None = None,
    ) -> Iterator[Part]:
        """Continues texts and yields what each part of the loop has appended.

        Args:
          state: stays usable.
          tokens: at most so many for each text.
          sampling: None is greedy without end tokens.
          seed: of what is drawn; text `i` draws the same whatever the others are.
          stop: strings that end a text.

        Raises:
          ConfigError: sampling without a seed.
        """
        state = self._with_room(state, int(np.asarray(state.cache.lengths).max()), tokens)
        yield from self._parts(jax.tree.map(jnp.copy, state), tokens, sampling, seed, stop)

    def generate(
        self,
        prompts: Prompts,
        *,
        image_tokens: ImageTokens | None = None,
        tokens: int,
        sampling: Sampling | None = None,
        seed: int | None = None,
        stop: StopStrings | None = None,
        first: int = 0,
    ) -> list[Generated]:
        """Generates a text for each prompt.

        Args, Raises: as of `prefill` and `stream`.
          first: number of the first prompt, where these are a part of a longer list: each draws as
            in one call with all of them.
        """
        state = self.prefill(prompts, image_tokens=image_tokens, room=tokens).state
        ids: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        for part in self._parts(state, tokens, sampling, seed, stop, first):
            for row in range(len(prompts)):
                ids[row] += part.ids[row]
                log_probs[row] += part.log_probs[row]
        ends = () if sampling is None else sampling.end_ids
        return [
            Generated(
                ids=tuple(one),
                log_probs=tuple(those),
                ended=reason_ended(one, ends, stop),
                text=None if stop is None else stop.text(one),
            )
            for one, those in zip(ids, log_probs, strict=True)
        ]

    def _parts(
        self,
        state: State,
        tokens: int,
        sampling: Sampling | None,
        seed: int | None,
        stop: StopStrings | None,
        first: int = 0,
    ) -> Iterator[Part]:
        """`stream`, which takes over the memory of the state."""
        sampling = sampling or Sampling()
        keys = None if seed is None else _keys(seed, first, len(state.done))
        texts: list[list[int]] = [[] for _ in range(len(state.done))]
        while tokens > 0:
            limit = min(tokens, self.chunk)
            out = _decode(
                self.model, state, jnp.asarray(limit), keys, steps=self.chunk, sampling=sampling
            )
            part, state = _part(out), out.state
            if stop is not None:
                part, state = _stopped(part, state, texts, stop)
            for text, ids in zip(texts, part.ids, strict=True):
                text += ids
            tokens -= limit
            if not tokens or not any(part.ids) or bool(np.asarray(state.done).all()):
                yield dataclasses.replace(part, state=state)
                return
            yield part

    def _padded(
        self, prompts: Prompts, image_tokens: ImageTokens | None
    ) -> tuple[Int[np.ndarray, "B T"], Any]:
        """Prompts and mask, padded to a bucket."""
        if not len(prompts):
            raise ConfigError("prompts: expected at least one, found none.")
        rows = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), self._bucket(longest)), np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, prompt in enumerate(rows):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
        texts = ids
        if image_tokens is not None:
            check_places(ids, *image_tokens.shape[1:3])
            texts = np.where(ids == IMAGE, 0, ids)
        check_ids(texts, self.model.vocab_size, "prompts")
        return ids, mask

    def _bucket(self, longest: int) -> int:
        fitting = [size for size in self.buckets if size >= longest]
        if not fitting:
            largest = self.buckets[-1]
            what = "the model's context" if largest == self.model.context else "the largest bucket"
            raise ConfigError(
                f"expected texts of at most {largest} tokens, {what}; found one of {longest}. "
                "Shorten it, or leave out its beginning."
            )
        return fitting[0]

    def _capacity(self, wanted: int) -> int:
        return self._bucket(min(wanted, self.buckets[-1]))

    def _with_room(self, state: State, longest: int, room: int) -> State:
        self._bucket(longest)
        capacity = self._capacity(longest + room)
        return state if capacity <= state.cache.capacity else state.grown(capacity)


@functools.partial(jax.jit, static_argnames="capacity")
def _prefill(
    model: LanguageModel, ids: Any, mask: Any, images: Any, taps: Taps | None, *, capacity: int
) -> Appended:
    return prefill(model, ids, mask, image_tokens=images, capacity=capacity, taps=taps)


@jax.jit
def _extend(
    model: LanguageModel, state: State, ids: Any, mask: Any, images: Any, taps: Taps | None
) -> Appended:
    return extend(model, state, ids, mask, image_tokens=images, taps=taps)


@functools.partial(jax.jit, static_argnames=("steps", "sampling"), donate_argnames="state")
def _decode(
    model: LanguageModel, state: State, limit: Any, keys: Any, *, steps: int, sampling: Sampling
) -> Decoded:
    return decode(model, state, limit, steps=steps, sampling=sampling, keys=keys)


def _doubled(context: int) -> tuple[int, ...]:
    sizes = [min(SMALLEST, context)]
    while sizes[-1] < context:
        sizes.append(min(2 * sizes[-1], context))
    return tuple(sizes)


def _keys(seed: int, first: int, batch: int) -> jax.Array:
    numbers = jnp.arange(first, first + batch)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)


def _part(out: Decoded) -> Part:
    counts, ids, log_probs = (np.asarray(x) for x in (out.counts, out.ids, out.log_probs))
    return Part(
        ids=tuple(tuple(row[:n].tolist()) for row, n in zip(ids, counts, strict=True)),
        log_probs=tuple(tuple(row[:n].tolist()) for row, n in zip(log_probs, counts, strict=True)),
    )


def _stopped(
    part: Part, state: State, texts: Sequence[Sequence[int]], stop: StopStrings
) -> tuple[Part, State]:
    """Cuts what follows a stop string off, and ends these texts."""
    kept = []
    for text, new in zip(texts, part.ids, strict=True):
        end = stop.end([*text, *new], known=len(text)) if new else None
        kept.append(None if end is None else end - len(text))
    counts = [len(new) if n is None else n for new, n in zip(part.ids, kept, strict=True)]
    over = [len(new) - n for new, n in zip(part.ids, counts, strict=True)]
    state = dataclasses.replace(
        state,
        cache=state.cache.with_lengths(state.cache.lengths - jnp.asarray(over, jnp.int32)),
        done=state.done | jnp.asarray([n is not None for n in kept]),
    )
    ids, log_probs = (
        tuple(row[:n] for row, n in zip(rows, counts, strict=True))
        for rows in (part.ids, part.log_probs)
    )
    return Part(ids=ids, log_probs=log_probs), state


def reason_ended(
    ids: Sequence[int], ends: Sequence[int], stop: StopStrings | None
) -> Literal["end", "stop", "length"]:
    """Why a text of generated tokens ended; see `Generated.ended`."""
    if ids and ids[-1] in ends:
        return "end"
    return "stop" if stop is not None and stop.end(ids) is not None else "length"
