"""`decode`: the loop that chooses a token, appends it and computes the next logits.

Letters: B batch, S steps, V vocabulary, L layers, N heads, K places of the cache.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from perception_jax.errors import ConfigError
from perception_jax.generate.model import LanguageModel
from perception_jax.generate.sampling import Chosen, Sampling, choose
from perception_jax.generate.state import State
from perception_jax.nn.taps import Taps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """Tokens that were appended to each text.

    Attributes:
      state: with all of them.
      ids: `Sampling.pad_id` behind the end of a text.
      counts: how many were appended, an end token included.
      log_probs: of the tokens under the model's own distribution; 0 behind the end.
      attention: recorded rows of each new token over the cache, meaningless behind the end of a
        text; None if not requested.
    """

    state: State
    ids: Int[Array, "B S"]
    counts: Int[Array, " B"]
    log_probs: Float[Array, "B S"]
    attention: Float[Array, "S L B N 1 K"] | None = None


def decode(
    model: LanguageModel,
    state: State,
    limit: Int[Array, ""] | int | None = None,
    *,
    steps: int,
    sampling: Sampling | None = None,
    keys: Key[Array, " B"] | None = None,
    taps: Taps | None = None,
) -> Decoded:
    """Continues each text until one of its end tokens, the end of the cache, or `limit` tokens.

    Any number of calls gives the same tokens as one: what is drawn depends on a text's key and on
    the token's position alone.

    Args:
      limit: most tokens; None is `steps`.
      steps: size of the output (static); the loop ends before it once all texts have ended, unless
        attention is recorded.
      sampling: how tokens are chosen (static); None is greedy without end tokens.
      keys: one for each text, unless greedy.
      taps: layers whose attention is recorded, and probes of these, the same in each step.

    Raises:
      ConfigError: sampling without keys, or taps on anything but attention.
    """
    sampling = sampling or Sampling()
    limit = jnp.asarray(steps if limit is None else limit)
    batch = state.done.shape[0]
    ids = jnp.full((batch, steps), sampling.pad_id, jnp.int32)
    start = Decoded(
        state=state,
        ids=ids,
        counts=jnp.zeros((batch,), jnp.int32),
        log_probs=jnp.zeros((batch, steps), jnp.float32),
    )

    def step(i: Int[Array, ""] | int, sofar: Decoded) -> tuple[Decoded, Array | None]:
        active = ~sofar.state.done & (sofar.state.cache.lengths < sofar.state.cache.capacity)
        active &= i < limit
        chosen = choose(sofar.state.logits, sofar.state.seen, sampling, _keys_at(keys, sofar.state))
        after, rows = _appended(model, sofar.state, chosen, active, sampling, taps)
        return (
            Decoded(
                state=after,
                ids=sofar.ids.at[:, i].set(jnp.where(active, chosen.ids, sampling.pad_id)),
                counts=sofar.counts + active,
                log_probs=sofar.log_probs.at[:, i].set(jnp.where(active, chosen.log_probs, 0.0)),
            ),
            rows,
        )

    if taps is not None:
        _check(taps)
        out, rows = jax.lax.scan(lambda sofar, i: step(i, sofar), start, jnp.arange(steps))
        return dataclasses.replace(out, attention=rows)

    def more(carry: tuple) -> Array:
        i, sofar = carry
        room = sofar.state.cache.lengths < sofar.state.cache.capacity
        return (i < jnp.minimum(limit, steps)) & (~sofar.state.done & room).any()

    _, out = jax.lax.while_loop(
        more, lambda carry: (carry[0] + 1, step(*carry)[0]), (jnp.zeros((), jnp.int32), start)
    )
    return out


def _appended(
    model: LanguageModel,
    state: State,
    chosen: Chosen,
    active: Array,
    sampling: Sampling,
    taps: Taps | None,
) -> tuple[State, Array | None]:
    """The state with a token more for each active text, and the recorded rows.

    The places of other texts in the cache are written too, but behind their lengths.
    """
    ids = jnp.where(active, chosen.ids, sampling.pad_id)
    out = model(model.embed(ids[:, None]), cache=state.cache, taps=taps, head=False)
    logits = model.logits(out.tokens[:, 0])
    ends = (ids[:, None] == jnp.asarray(sampling.end_ids, jnp.int32)).any(axis=1)
    place = (jnp.arange(len(ids)), jnp.where(active, ids, model.vocab_size))
    after = State(
        cache=out.cache.with_lengths(state.cache.lengths + active),
        logits=jnp.where(active[:, None], logits, state.logits),
        seen=state.seen.at[place].set(True, mode="drop"),
        done=state.done | (active & ends),
    )
    return after, out.attention


def _keys_at(keys: Key[Array, " B"] | None, state: State) -> Key[Array, " B"] | None:
    """The keys of the next token, from each text's key and length."""
    return None if keys is None else jax.vmap(jax.random.fold_in)(keys, state.cache.lengths)


def _check(taps: Taps) -> None:
    if not taps.attention or taps.hidden or taps.cross or taps.inserts:
        raise ConfigError(
            "decode: expected taps on attention alone; other values of generated tokens come from "
            "`extend` with them."
        )
