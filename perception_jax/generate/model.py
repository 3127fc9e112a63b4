"""The protocol of the language models that text is generated with, and their output.

Letters: B batch, T tokens, D width, V vocabulary, L layers, N heads, Q query rows, K keys,
S recorded states.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from perception_jax.errors import ConfigError
from perception_jax.nn.attention import KvCache
from perception_jax.nn.taps import Taps

IMAGE = -200
"""Id that stands for one token of an image; it is no row of an embedding table."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageOutput:
    """Output of a language model; values that were not requested are None.

    Attributes:
      tokens: hidden states after the final norm.
      logits: float32, of the token after each.
      hidden: recorded hidden states, before the final norm, in layer order.
      attention: recorded attention rows, in layer order.
      cache: with the keys and values of the new tokens.
    """

    tokens: Float[Array, "B T D"]
    logits: Float[Array, "B T V"] | None = None
    hidden: Float[Array, "S B T D"] | None = None
    attention: Float[Array, "L B N Q K"] | None = None
    cache: KvCache | None = None


@runtime_checkable
class LanguageModel(Protocol):
    """Protocol of a causal language model, e.g. `models.llama.Llama`.

    Attributes:
      vocab_size: number of token ids.
      context: most tokens of a text.
    """

    vocab_size: int
    context: int

    def embed(
        self, ids: Int[Array | np.ndarray, "B T"], dtype: np.typing.DTypeLike | None = None
    ) -> Float[Array, "B T D"]:
        """Looks up the embeddings of token ids."""

    def logits(self, tokens: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Computes float32 logits of the next token from tokens after the final norm."""

    def with_whole_head(self) -> LanguageModel:
        """Returns the model with a head that no batch axis splits, for many calls of `logits`."""

    def empty_cache(
        self, batch: int, capacity: int, dtype: np.typing.DTypeLike | None = None
    ) -> KvCache:
        """Allocates a cache for `capacity` tokens of each example."""

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        cache: KvCache | None = None,
        taps: Taps | None = None,
        head: bool = True,
    ) -> LanguageOutput:
        """Runs the model.

        Args:
          embeddings: of the tokens.
          mask: which of them count; with a cache these are the first of each example.
          cache: with the tokens before.
          taps: what to record.
          head: whether logits are computed.
        """


def check_places(ids: Int[Array | np.ndarray, "B S"], images: int, tokens: int) -> None:
    """Checks the places of images outside of compiled functions, where ids are known.

    Args:
      images: most of a row.
      tokens: of an image.

    Raises:
      ConfigError: a row whose places are not those of whole images, or of too many.
    """
    if isinstance(ids, jax.core.Tracer):
        return
    if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        return
    counts = (np.asarray(ids) == IMAGE).sum(axis=1)
    wrong = np.flatnonzero((counts % tokens != 0) | (counts > images * tokens))
    if wrong.size:
        raise ConfigError(
            f"ids: expected {tokens} places (id {IMAGE}) for each of at most {images} images of "
            f"a row, found {counts[wrong[0]]} in row {wrong[0]}. Was the text cut inside of an "
            "image, or are placeholders not repeated?"
        )
