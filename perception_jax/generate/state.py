"""The state of texts that are being continued, and `prefill` and `extend`, which append to it.

A token's place in the cache is its position in the text: padding is left out when tokens are
appended. Which cached tokens count, and the positions of new ones, both follow from
`State.cache.lengths`, so that padding on either side and batch mates change nothing.

All functions are pure and made to be compiled; `generator.Generator` calls them with shapes of a
small set. Letters: B batch, T tokens, D width, V vocabulary, L layers, N heads, Q query rows,
K keys, S recorded states, M images, I tokens of an image.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from perception_jax.errors import ConfigError
from perception_jax.generate.model import LanguageModel
from perception_jax.nn.attention import KvCache
from perception_jax.nn.taps import Taps

Inputs = Int[Array | np.ndarray, "B T"] | Float[Array, "B T D"]
"""Token ids, or embeddings of tokens and images."""
ImageTokens = Float[Array, "B M I D"]
"""I tokens for each of M images of a text."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Texts so far, ready for their next token.

    Attributes:
      cache: keys and values of all tokens; `cache.lengths` are the lengths of the texts.
      logits: float32, of the next token.
      seen: which ids the texts contain, for the repetition penalty. Embeddings have none.
      done: which texts have ended and are not continued by `decode`.
    """

    cache: KvCache
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"]
    done: Bool[Array, " B"]

    def take(self, rows: Int[Array, " R"]) -> State:
        """Returns the state of some texts; a row may be repeated, e.g. to share a prefix."""
        rest = (x[rows] for x in (self.logits, self.seen, self.done))
        logits, seen, done = rest
        return State(cache=self.cache.take(rows), logits=logits, seen=seen, done=done)

    def grown(self, capacity: int) -> State:
        """Returns a state with room for longer texts; see `KvCache.grown`."""
        return dataclasses.replace(self, cache=self.cache.grown(capacity))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Appended:
    """What `prefill` and `extend` return; values that were not requested are None.

    Attributes:
      state: with the new tokens.
      attention: recorded rows, over the new tokens (`prefill`) or the whole cache (`extend`).
      hidden: recorded hidden states of the new tokens, those of each example first.
    """

    state: State
    attention: Float[Array, "L B N Q K"] | None = None
    hidden: Float[Array, "S B T D"] | None = None


def prefill(
    model: LanguageModel,
    inputs: Inputs,
    mask: Bool[Array | np.ndarray, "B T"] | None = None,
    *,
    image_tokens: ImageTokens | None = None,
    capacity: int,
    taps: Taps | None = None,
) -> Appended:
    """Starts texts with their first tokens.

    Args:
      inputs: padded to one length on any side.
      mask: which of them count; None counts all. Each text needs at least one.
      image_tokens: for the places of images (`model.IMAGE`) among the ids; see `models.hosts`.
      capacity: tokens that the cache has room for, at least T (static).
      taps: what to record. Query rows count the tokens of each example without padding.

    Raises:
      ConfigError: a capacity that is too small or larger than the model's context.
    """
    batch, count = inputs.shape[:2]
    if not count <= capacity <= model.context:
        raise ConfigError(
            f"prefill: expected a capacity of at least {count} tokens, the length of the prompts, "
            f"and at most {model.context}, the model's context; found {capacity}."
        )
    empty = State(
        cache=model.empty_cache(batch, capacity, _dtype(inputs)),
        logits=jnp.zeros((batch, model.vocab_size), jnp.float32),
        seen=jnp.zeros((batch, model.vocab_size), bool),
        done=jnp.zeros((batch,), bool),
    )
    return extend(model, empty, inputs, mask, image_tokens=image_tokens, taps=taps)


def extend(
    model: LanguageModel,
    state: State,
    inputs: Inputs,
    mask: Bool[Array | np.ndarray, "B T"] | None = None,
    *,
    image_tokens: ImageTokens | None = None,
    taps: Taps | None = None,
) -> Appended:
    """Appends any number of tokens to each text.

    The result is that of one `prefill` with all tokens. A text without new tokens stays as it is,
    others are not done any more.

    Args:
      inputs, mask, image_tokens, taps: as of `prefill`; the images are those of the new tokens. The
        caller sees to it that all fit the cache: texts that become too long have NaN as logits.
    """
    batch, count = inputs.shape[:2]
    mask = jnp.ones((batch, count), bool) if mask is None else jnp.asarray(mask)
    inputs, mask = _in_front(jnp.asarray(inputs), mask)
    counts = mask.sum(axis=1)
    seen = state.seen
    embeddings = inputs
    if inputs.ndim == 2:
        images = () if image_tokens is None else (image_tokens,)
        embeddings = model.embed(inputs, *images)
        seen = marked(seen, inputs, mask & (inputs >= 0))
    out = model(embeddings, cache=state.cache, taps=taps, head=False)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    logits = model.logits(jnp.take_along_axis(out.tokens, last, axis=1)[:, 0])
    some = counts > 0
    state = State(
        cache=out.cache.with_lengths(state.cache.lengths + counts),
        logits=jnp.where(some[:, None], logits, state.logits),
        seen=seen,
        done=state.done & ~some,
    )
    return Appended(state=state, attention=out.attention, hidden=out.hidden)


def marked(
    seen: Bool[Array, "B V"], ids: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Bool[Array, "B V"]:
    """Marks the ids of a mask as seen.

    Written for one text and mapped, so that chips that split the batch exchange no ids.
    """
    ids = jnp.where(mask, ids, seen.shape[1])
    return jax.vmap(lambda row, places: row.at[places].set(True, mode="drop"))(seen, ids)


def _in_front(inputs: Inputs, mask: Bool[Array, "B T"]) -> tuple[Inputs, Bool[Array, "B T"]]:
    """Moves padding behind the tokens of each example."""
    order = jnp.argsort(~mask, axis=1, stable=True)
    places = order if inputs.ndim == 2 else order[..., None]
    return jnp.take_along_axis(inputs, places, axis=1), jnp.take_along_axis(mask, order, axis=1)


def _dtype(inputs: Inputs) -> np.typing.DTypeLike | None:
    """The dtype of the cache: that of embeddings, else the model's own."""
    return inputs.dtype if inputs.ndim == 3 else None
