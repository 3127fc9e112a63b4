"""Where a steered tower looks: one image under one instruction, as maps over its patches.

Letters: E embedding width, I adapters, A their heads, N image tokens, T text tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from perception_jax.nn import maps
from perception_jax.nn.taps import Taps
from perception_jax.nn.towers import TowerOutput
from perception_jax.systems.give.adapter import Instruction
from perception_jax.systems.give.model import Give, GiveOutput, Steered


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """On the device or on the host.

    Attributes:
      embedding: of the image as steered, unit length.
      presence_logit: as of `GiveOutput`.
      attention: as `nn.maps.class_attention` of the steered tower.
      relevance: which patches speak for what was asked (gradient times attention), up to a factor
        of the whole map.
      words: the share of each patch's attention in the adapters, mean over all of them and their
        heads, that goes to the words of the instruction and not to its start and end.
      places: share of the object, if it is there, that each patch shows: a softmax over patches, as
        the head for it is trained; None without that head.
    """

    embedding: Float[Array | np.ndarray, " E"]
    presence_logit: Float[Array | np.ndarray, ""]
    attention: Float[Array | np.ndarray, "rows columns"]
    relevance: Float[Array | np.ndarray, "rows columns"]
    words: Float[Array | np.ndarray, "rows columns"]
    places: Float[Array | np.ndarray, "rows columns"] | None


@dataclasses.dataclass(frozen=True)
class PresenceTower:
    """An image tower whose embedding is (presence logit, 1).

    The cosine of that with `PRESENT` rises with the logit and with nothing else, so what `nn.maps`
    finds to speak for it speaks for presence.
    """

    steered: Steered

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.steered.prefix

    def __call__(self, pixels: Float[Array, "B H W 3"], *, taps: Taps | None = None) -> TowerOutput:
        """As of the steered tower, but for the embedding."""
        out = self.steered(pixels, taps=taps)
        told = self.steered.instruction.embedding
        logit = self.steered.give.oid_head(out.pooled, told)
        return dataclasses.replace(out, embedding=jnp.stack([logit, jnp.ones_like(logit)], axis=1))


PRESENT = (1.0, 0.0)
"""See `PresenceTower`."""


def look(
    model: Give,
    pixels: Float[Array, "1 H W 3"],
    told: Instruction,
    words: Bool[Array, "1 T"],
    *,
    presence: bool = True,
) -> Look:
    """One image under one instruction.

    Args:
      words: which of the instruction's tokens are words.
      presence: whether `relevance` is of the presence logit, or of the cosine with the instruction.
    """
    steered = Steered(model, told)
    tower, towards = steered, told.embedding
    if presence:
        tower, towards = PresenceTower(steered), jnp.array([PRESENT])
    seen = maps.text_maps(tower, pixels, towards)
    out = model(pixels, told, taps=Taps(inserts=model.backbone.vision.blocks.layers))
    return Look(
        embedding=out.embedding[0],
        presence_logit=out.presence_logit[0],
        attention=seen.attention[0],
        relevance=seen.relevance[0, 0],
        words=_word_share(out.tower, words),
        places=_places(out),
    )


def _places(out: GiveOutput) -> Float[Array, "rows columns"] | None:
    if out.place_logits is None:
        return None
    return jax.nn.softmax(out.place_logits[0]).reshape(out.tower.grid)


def _word_share(out: TowerOutput, words: Bool[Array, "1 T"]) -> Float[Array, "rows columns"]:
    """What of the inserts' attention, float[I, 1, A, N, T], goes to some tokens; patches alone."""
    share = jnp.sum(out.inserts, axis=-1, where=words[:, None, None]).mean(axis=(0, 1, 2))
    return share[out.prefix :].reshape(out.grid)
