"""Encodes texts, and images with and without instructions.

Letters: n texts, T text tokens, B rows, Q images, S image side, E embedding width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from perception_jax.api import Processor
from perception_jax.errors import CheckpointError
from perception_jax.inference.batches import Batched
from perception_jax.nn.text_tower import TextTower
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import unit
from perception_jax.systems.give.adapter import InstructionFeatures
from perception_jax.systems.give.model import Give, instruct
from perception_jax.systems.give.prediction import CaptionScore

GENERIC = "the image"
"""An instruction that names no object, for ablations and the "plus" profile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionConfig:
    """How instructions condition the adapters; both switches are ablations.

    Attributes:
      masked: whether adapters attend to an instruction only up to its end token, not its padding.
      informed: whether adapters get the instruction, or always `GENERIC` (the OID head gets it in
        both cases).
    """

    masked: bool = True
    informed: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioned:
    """Outputs for images under instructions.

    Attributes:
      embedding: conditioned embeddings of any length.
      presence: logit that the named object is in the image.
    """

    embedding: Float[Array | np.ndarray, "B E"]
    presence: Float[Array | np.ndarray, " B"]


class ConditionedEncoder:
    """Encodes texts, and images with and without instructions.

    `static` and `conditioned` are functions for `inference.Batched` and `inference.BatchedPairs`.

    Attributes:
      processor: mean and standard deviation of the pixels, tokenizer of the texts; images passed in
        already have its size.
      config: see `InstructionConfig`.
      strength: factor on the adapters' output.
      batch_size: texts per device call.
    """

    def __init__(
        self,
        processor: Processor,
        config: InstructionConfig | None = None,
        *,
        strength: float = 1.0,
        batch_size: int = 64,
    ):
        if processor.tokenizer is None:
            raise CheckpointError(
                "GiVE needs the backbone's tokenizer to read instructions, and this checkpoint "
                "came without one that is read here: put its tokenizer files into its folder."
            )
        self.processor = processor
        self.config = config or InstructionConfig()
        self.strength = strength
        self.batch_size = batch_size
        self._instruct = Batched(_instruct, batch_size=batch_size)
        self._embed = Batched(
            lambda model, ids: unit(model.backbone.text(ids).embedding), batch_size=batch_size
        )

    def texts(
        self, model: Give, texts: Sequence[str], mesh: Mesh | None = None
    ) -> Float[np.ndarray, "n E"]:
        """Unit embeddings of captions and prompts; see `Batched` for `mesh`."""
        return self._embed(model, self._ids(texts), mesh)

    def instructions(
        self, model: Give, texts: Sequence[str], mesh: Mesh | None = None
    ) -> InstructionFeatures:
        """`instruction_features` of the model's own text tower."""
        return self.instruction_features(model.backbone.text, texts, mesh)

    def instruction_features(
        self, tower: TextTower, texts: Sequence[str], mesh: Mesh | None = None
    ) -> InstructionFeatures:
        """Features of instructions, one row a text, as long as the longest one (numpy arrays)."""

        def read(texts: Sequence[str]) -> dict[str, np.ndarray]:
            return self._instruct(tower, self._ids(texts), mesh)

        rows = read(texts)
        if not self.config.informed:
            generic = read([GENERIC])
            for name in ("states", "mask"):
                rows[name] = np.repeat(generic[name], len(rows[name]), axis=0)
        longest = int(rows["mask"].sum(axis=1).max(initial=1))
        mask = rows["mask"][:, :longest]
        return InstructionFeatures(
            states=rows["states"][:, :longest],
            mask=mask if self.config.masked else np.ones_like(mask),
            embedding=rows["embedding"],
            strength=np.asarray(self.strength, np.float32),
        )

    def static(self, model: Give, pixels: UInt8[Array, "B S S 3"]) -> Float[Array, "B E"]:
        """Unit embeddings of images without an instruction."""
        return model(self.normalised(pixels)).embedding

    def conditioned(
        self,
        model: Give,
        pixels: UInt8[Array, "Q S S 3"],
        image: Int[Array, " B"],
        instructions: InstructionFeatures,
        instruction: Int[Array, " B"],
    ) -> Conditioned:
        """Row b is image `image[b]` of `pixels` under instruction `instruction[b]`."""
        out = model(self.normalised(pixels)[image], take_rows(instructions, instruction))
        return Conditioned(embedding=out.embedding, presence=out.presence_logit)

    def normalised(self, pixels: UInt8[Array, "B S S 3"]) -> Float[Array, "B S S 3"]:
        """Normalises pixels for the image tower."""
        image = self.processor.image
        return normalise(pixels, image.mean, image.std)

    def _ids(self, texts: Sequence[str]) -> Int[np.ndarray, "n T"]:
        return np.asarray(self.processor.texts(texts))


class CaptionTable:
    """Captions with their embeddings, to list the nearest of an image; may be empty."""

    def __init__(self, model: Give, encoder: ConditionedEncoder, captions: Sequence[str]):
        self._captions = tuple(captions)
        self._rows = encoder.texts(model, self._captions) if self._captions else None

    def nearest(self, embedding: Float[np.ndarray, " E"], count: int) -> tuple[CaptionScore, ...]:
        """The nearest captions, best first."""
        if self._rows is None:
            return ()
        cosines = self._rows @ embedding
        best = np.argsort(-cosines, kind="stable")[:count]
        return tuple(
            CaptionScore(caption=self._captions[k], cosine=float(cosines[k])) for k in best
        )


def take_rows(instructions: InstructionFeatures, index: Int[Array, " B"]) -> InstructionFeatures:
    """Selects rows of instruction features."""
    rows = {name: jnp.asarray(x)[index] for name, x in as_arrays(instructions).items()}
    return dataclasses.replace(instructions, **rows)


def as_arrays(instructions: InstructionFeatures) -> dict[str, Array | np.ndarray]:
    """The arrays of instruction features that have rows."""
    return {name: getattr(instructions, name) for name in ("states", "mask", "embedding")}


def _instruct(tower: TextTower, ids: Int[Array, "n T"]) -> dict[str, Array]:
    return as_arrays(instruct(tower, ids))
