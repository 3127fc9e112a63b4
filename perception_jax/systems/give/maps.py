"""Maps over the patches of an image under an instruction: attention, relevance, places.

Letters: E embedding width, I adapters, A their heads, N image tokens, T text tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from perception_jax.nn import maps
from perception_jax.nn.taps import Taps
from perception_jax.nn.text_tower import SIGLIP_END, text_mask
from perception_jax.nn.towers import TowerOutput
from perception_jax.systems.give.adapter import InstructionFeatures
from perception_jax.systems.give.encode import ConditionedEncoder, take_rows
from perception_jax.systems.give.model import ConditionedTower, Give, GiveOutput


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionedMaps:
    """Outputs and maps of one image under one instruction, on the device or on the host.

    Attributes:
      embedding: the conditioned image embedding, a unit vector.
      presence_logit: see `GiveOutput`.
      attention: `nn.maps.class_attention` of the conditioned tower.
      relevance: relevance of each patch for the score (gradient × attention), up to a factor of the
        whole map.
      words: share of each patch's attention in the adapters that goes to the words of the
        instruction and not to its start and end tokens, mean over adapters and heads.
      places: softmax over patches of the dense head: the share of the object, if it is there, that
        each patch shows. None without that head.
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

    The cosine of that with `PRESENT` rises with the logit and with nothing else, so the relevance
    maps of `nn.maps` for it are those of presence.
    """

    conditioned: ConditionedTower

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.conditioned.prefix

    def __call__(self, pixels: Float[Array, "B H W 3"], *, taps: Taps | None = None) -> TowerOutput:
        """The conditioned tower's output with another embedding."""
        out = self.conditioned(pixels, taps=taps)
        logit = self.conditioned.give.oid_head(out.pooled, self.conditioned.instruction.embedding)
        return dataclasses.replace(out, embedding=jnp.stack([logit, jnp.ones_like(logit)], axis=1))


PRESENT = (1.0, 0.0)
"""Target embedding of `PresenceTower` for which relevance is computed."""


class MapComputer:
    """Computes maps of images under the instructions of a table; compiles once.

    Attributes:
      features: of all instructions, numpy arrays.
    """

    def __init__(
        self,
        model: Give,
        encoder: ConditionedEncoder,
        instructions: Sequence[str],
        *,
        presence: bool = True,
    ):
        """Args: presence: see `conditioned_maps`."""
        self._model, self._encoder = model, encoder
        self.features = encoder.instructions(model, instructions)
        ids = encoder.processor.texts(instructions)
        self._words = word_mask(model, ids)[:, : self.features.mask.shape[1]]

        def conditioned(
            model: Give, pixels: Array, instruction: InstructionFeatures, words: Array
        ) -> ConditionedMaps:
            normal = encoder.normalised(pixels)
            return conditioned_maps(model, normal, instruction, words, presence=presence)

        def static(model: Give, pixels: Array) -> tuple[Array, Array]:
            normal = encoder.normalised(pixels)
            attention = maps.class_attention(model.backbone.vision, normal)[0]
            return attention, model(normal).embedding[0]

        self._conditioned, self._static = jax.jit(conditioned), jax.jit(static)

    def conditioned(self, pixels: UInt8[np.ndarray, "H W 3"], number: int) -> ConditionedMaps:
        """Maps of an image under one of the instructions, on the host."""
        instruction, words = self.instruction(number), self._words[jnp.array([number])]
        found = self._conditioned(self._model, pixels[None], instruction, words)
        return jax.device_get(found)

    def static(
        self, pixels: UInt8[np.ndarray, "H W 3"]
    ) -> tuple[Float[np.ndarray, "rows columns"], Float[np.ndarray, " E"]]:
        """Attention and embedding without an instruction, on the host."""
        return jax.device_get(self._static(self._model, pixels[None]))

    def instruction(self, number: int) -> InstructionFeatures:
        """Features of one instruction."""
        return take_rows(self.features, jnp.array([number]))


def word_mask(model: Give, ids: Int[Array, "n T"]) -> Bool[Array, "n T"]:
    """Mask of the tokens of each instruction that are words, not its start or end token."""
    tower = model.backbone.text
    mask = text_mask(ids, tower.pool, tower.end_id)
    inner = jnp.arange(ids.shape[1]) < mask.sum(axis=1, keepdims=True) - 1
    return inner.at[:, 0].set(False) if tower.pool == "end" else mask & (ids != SIGLIP_END)


def conditioned_maps(
    model: Give,
    pixels: Float[Array, "1 H W 3"],
    instruction: InstructionFeatures,
    word_mask: Bool[Array, "1 T"],
    *,
    presence: bool = True,
) -> ConditionedMaps:
    """Encodes one image under one instruction and computes its maps.

    Args:
      word_mask: True for tokens of the instruction that are words.
      presence: whether `relevance` is of the presence logit, or of the cosine with the instruction.
    """
    tower, target = ConditionedTower(model, instruction), instruction.embedding
    if presence:
        tower, target = PresenceTower(tower), jnp.array([PRESENT])
    found = maps.text_maps(tower, pixels, target)
    out = model(pixels, instruction, taps=Taps(inserts=model.backbone.vision.blocks.layers))
    return ConditionedMaps(
        embedding=out.embedding[0],
        presence_logit=out.presence_logit[0],
        attention=found.attention[0],
        relevance=found.relevance[0, 0],
        words=_word_share(out.tower, word_mask),
        places=_places(out),
    )


def _places(out: GiveOutput) -> Float[Array, "rows columns"] | None:
    if out.place_logits is None:
        return None
    return jax.nn.softmax(out.place_logits[0]).reshape(out.tower.grid)


def _word_share(out: TowerOutput, word_mask: Bool[Array, "1 T"]) -> Float[Array, "rows columns"]:
    """Share of the adapters' attention, `out.inserts` [I, 1, A, N, T], to words; of each patch."""
    share = jnp.sum(out.inserts, axis=-1, where=word_mask[:, None, None]).mean(axis=(0, 1, 2))
    return share[out.prefix :].reshape(out.grid)
