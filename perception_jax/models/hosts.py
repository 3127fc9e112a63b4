"""The protocol of multimodal language models, and the maps of attention over their images.

    tokens = host.image_tokens(images)                               # [B, M, T, D]
    out = generate.prefill(host, ids, mask, image_tokens=tokens, capacity=…, taps=…)
    state = generate.extend(host, out.state, more_ids).state         # a question after the image
    maps = image_attention(host, out.attention, starts)              # [L, B, N, Q, rows, columns]
    answer = generate.decode(host, state, steps=…)

Ids have `generate.IMAGE` for each token of an image; `data.conversation.tokenize_images` makes
them, and `image_spans` says where each image is. Letters: B batch, M images of a row, H W image,
T tokens of an image, S tokens of a row, D width, L layers, N heads, Q query rows, K keys.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from perception_jax.generate.model import LanguageModel


@runtime_checkable
class Host(LanguageModel, Protocol):
    """Protocol of a language model that reads images, e.g. `models.llava.Llava`.

    Attributes:
      tokens_per_image: places of an image in a text.
      grid: rows and columns of an image's map.
    """

    tokens_per_image: int
    grid: tuple[int, int]

    def image_tokens(self, images: Num[Array | np.ndarray, "B M H W 3"]) -> Float[Array, "B M T D"]:
        """Encodes uint8 or normalised images as tokens of the language model."""

    def embed(
        self,
        ids: Int[Array | np.ndarray, "B S"],
        image_tokens: Float[Array, "B M T D"] | None = None,
        dtype: np.typing.DTypeLike | None = None,
    ) -> Float[Array, "B S D"]:
        """Looks up embeddings, and puts the tokens of images in their places, in order."""

    def image_map(self, rows: Float[Array, "*B T"]) -> Float[Array, "*B rows columns"]:
        """Converts values of the tokens of an image to a map of its patches."""


def image_attention(
    host: Host, attention: Float[Array, "L B N Q K"], starts: Int[Array | np.ndarray, " B"]
) -> Float[Array, "L B N Q rows columns"]:
    """Cuts the part of an image out of recorded attention rows.

    Args:
      attention: of `generate.prefill` and `extend`, or (with a step as Q) of `decode`.
      starts: place of the first token of the image in each text.

    Returns:
      Maps that sum up to the attention to the image; see `Host.image_map`.
    """
    count = host.tokens_per_image

    def cut(rows: Float[Array, "L N Q K"], start: Int[Array, ""]) -> Float[Array, "L N Q T"]:
        return jax.lax.dynamic_slice_in_dim(rows, start, count, axis=3)

    spans = jax.vmap(cut, in_axes=(1, 0), out_axes=1)(attention, jnp.asarray(starts))
    return host.image_map(spans)
