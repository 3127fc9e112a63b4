"""Predicts with GiVE: maps and presence under each instruction, ranked candidates, captions.

Letters: E embedding width, n different instructions, k captions, c candidates, T text tokens,
S input side.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from perception_jax.data.instructions import instruction_for
from perception_jax.data.records import Image
from perception_jax.errors import ConfigError
from perception_jax.evals.conditioned import prompts
from perception_jax.inference.pairs import BatchedPairs, ImageTextPairs
from perception_jax.inference.pixels import PixelsInMemory, blank_image
from perception_jax.inference.single_image import Viewer
from perception_jax.nn import maps
from perception_jax.nn.text_tower import SIGLIP_END, text_mask
from perception_jax.systems.give.adapter import AdapterConfig, InstructionFeatures
from perception_jax.systems.give.encode import Conditioned, ConditionedEncoder, take_rows
from perception_jax.systems.give.maps import ConditionedMaps, conditioned_maps
from perception_jax.systems.give.model import Give, GiveConfig
from perception_jax.systems.give.prediction import (
    Candidate,
    CaptionScore,
    GivePrediction,
    InstructionPrediction,
)
from perception_jax.systems.give.pretrained import GiveEncoder, find_adapters
from perception_jax.viz.sheet import PANEL

BATCH = 64
"""Most instructions per device call."""
SHOWN = 3
"""Candidates whose maps are made, the most likely ones; captions that are named."""


def load_encoder(
    source: str | os.PathLike[str], *, backbone: str | os.PathLike[str] | None = None
) -> GiveEncoder:
    """Loads adapters (see `GiveEncoder.from_pretrained`), or a backbone with fresh adapters.

    Raises:
      PerceptionError: as `GiveEncoder.from_pretrained`.
    """
    is_file = os.fspath(source).endswith(".safetensors") or find_adapters(source).is_file()
    if is_file or backbone is not None:
        return GiveEncoder.from_pretrained(source, backbone=backbone)
    config = GiveConfig(adapter=AdapterConfig(heads=1))  # fits any width
    return GiveEncoder.from_pretrained(backbone=source, config=config)


class Predictor:
    """Predicts for images with fixed instructions and candidates; compiles once."""

    def __init__(
        self,
        encoder: GiveEncoder,
        instructions: Sequence[str] = (),
        *,
        candidates: Sequence[str] = (),
        captions: Sequence[str] = (),
        alpha: float = 1.0,
        scale: float = 1.0,
    ):
        """
        Args:
          instructions: on which each image is conditioned, used verbatim.
          candidates: names of objects to rank; each instruction is made of the name.
          captions: of which the nearest are listed.
          alpha: strength of the conditioning; 1 is as trained, 0 the backbone alone.
          scale: the input's side as a multiple of the model's own, rounded to whole patches.

        Raises:
          ConfigError: neither instructions nor candidates, an empty text, an invalid scale or
            strength; for fresh adapters, a strength above 0 or candidates.
        """
        self._model = encoder.model
        self._trained = is_trained(encoder.model)
        self._instructions, self._names = tuple(instructions), tuple(candidates)
        self._captions, self._alpha = tuple(captions), float(alpha)
        self._check()
        tower, processor = encoder.model.backbone.vision, encoder.processor
        self._attention_of = maps.attention_source(tower)
        patch = tower.patch_embed.patch
        self._view = Viewer(processor.image, patch=patch, side=PANEL, scale=scale)
        processor = dataclasses.replace(processor, image=self._view.processor)
        self._encoder = ConditionedEncoder(processor, strength=self._alpha)
        self._texts = tuple(
            dict.fromkeys([*self._instructions, *map(instruction_for, self._names)])
        )
        self._features = self._encoder.instructions(self._model, self._texts)
        self._word_mask = _word_mask(self._encoder, self._model, self._texts, self._features)
        self._maps, self._static = jax.jit(self._compute_maps), jax.jit(self._compute_static)
        size = min(BATCH, len(self._texts))
        self._pairs = BatchedPairs(self._encoder.conditioned, batch_size=size)
        self._blank = self._conditioned(
            blank_image(processor.image), range(len(self._texts))
        ).embedding
        self._prototypes = prompts.prototypes(self._embed, self._names) if self._names else None
        self._caption_rows = self._embed(self._captions) if self._captions else None

    def __call__(self, image: Image, *, name: str = "") -> GivePrediction:
        """Predicts for one image. Args, Raises: as of `Viewer`."""
        view = self._view(image, name=name)
        attention, static = jax.device_get(self._static(self._model, view.pixels[None]))
        candidates = self._ranked(view.pixels)
        best = [one.instruction for one in candidates[:SHOWN]]
        return GivePrediction(
            view=view,
            alpha=self._alpha,
            attention_of=self._attention_of,
            attention=attention,
            instructions=tuple(
                self._under(text, view.pixels, static)
                for text in dict.fromkeys([*self._instructions, *best])
            ),
            candidates=candidates,
        )

    def _check(self) -> None:
        texts = (*self._instructions, *self._names, *self._captions)
        if not all(text.strip() for text in texts):
            raise ConfigError(f"expected words in each instruction and name, found {list(texts)}.")
        if not 0 <= self._alpha < float("inf"):
            raise ConfigError(f"alpha: expected a number from 0 upwards, found {self._alpha}.")
        if not (self._instructions or self._names):
            raise ConfigError("nothing to predict: give an instruction, or candidates.")
        if not self._trained and (self._alpha > 0 or self._names):
            raise ConfigError(
                "this is a backbone with fresh adapters: they change nothing, and the presence "
                "head is untrained. Give trained adapters (their file, or the folder that it lies "
                "in), or run the backbone alone with instructions at alpha 0."
            )

    def _embed(self, texts: Sequence[str]) -> Float[np.ndarray, "k E"]:
        return self._encoder.texts(self._model, texts)

    def _compute_maps(
        self,
        model: Give,
        pixels: UInt8[Array, "1 S S 3"],
        instruction: InstructionFeatures,
        word_mask: Bool[Array, "1 T"],
    ) -> ConditionedMaps:
        normal = self._encoder.normalised(pixels)
        return conditioned_maps(model, normal, instruction, word_mask, presence=self._trained)

    def _compute_static(
        self, model: Give, pixels: UInt8[Array, "1 S S 3"]
    ) -> tuple[Float[Array, "rows columns"], Float[Array, " E"]]:
        """Attention and embedding without an instruction."""
        normal = self._encoder.normalised(pixels)
        attention = maps.class_attention(model.backbone.vision, normal)[0]
        return attention, model(normal).embedding[0]

    def _conditioned(
        self, pixels: UInt8[np.ndarray, "S S 3"], numbers: Iterable[int]
    ) -> Conditioned:
        """Encodes one image under some of the instructions."""
        chosen = np.fromiter(numbers, np.int32)
        pairs = ImageTextPairs(np.zeros_like(chosen), chosen)
        image = PixelsInMemory(pixels[None])
        return self._pairs(self._model, image, self._features, pairs, images_per_call=1)

    def _under(
        self, text: str, pixels: UInt8[np.ndarray, "S S 3"], static: Float[np.ndarray, " E"]
    ) -> InstructionPrediction:
        number = self._texts.index(text)
        row = jnp.array([number])
        instruction = take_rows(self._features, row)
        found = jax.device_get(
            self._maps(self._model, pixels[None], instruction, self._word_mask[row])
        )
        embedding = self._features.embedding[number]
        return InstructionPrediction(
            instruction=text,
            presence_logit=float(found.presence_logit) if self._trained else None,
            cosine=float(embedding @ found.embedding),
            cosine_blank=float(embedding @ self._blank[number]),
            cosine_static=float(embedding @ static),
            captions=self._nearest(found.embedding),
            attention=found.attention,
            relevance=found.relevance,
            places=found.places if self._trained else None,
            words=found.words if self._alpha > 0 else None,
        )

    def _nearest(self, embedding: Float[np.ndarray, " E"]) -> tuple[CaptionScore, ...]:
        if self._caption_rows is None:
            return ()
        cosines = self._caption_rows @ embedding
        best = np.argsort(-cosines, kind="stable")[:SHOWN]
        return tuple(
            CaptionScore(caption=self._captions[k], cosine=float(cosines[k])) for k in best
        )

    def _ranked(self, pixels: UInt8[np.ndarray, "S S 3"]) -> tuple[Candidate, ...]:
        """All candidates, the most likely first; ties in the given order."""
        if not self._names:
            return ()
        numbers = [self._texts.index(instruction_for(name)) for name in self._names]
        out = self._conditioned(pixels, numbers)
        gained = np.sum((out.embedding - self._blank[numbers]) * self._prototypes, axis=1)
        return tuple(
            Candidate(
                name=self._names[k],
                instruction=self._texts[numbers[k]],
                presence_logit=float(out.presence[k]),
                calibrated_cosine=float(gained[k]),
            )
            for k in np.argsort(-out.presence, kind="stable")
        )


def is_trained(model: Give) -> bool:
    """Whether the adapters change the output; fresh ones do not, at any strength."""
    adapters = model.backbone.vision.blocks.inserts
    last = adapters.to_out.kernel if adapters.gate is None else adapters.gate
    return bool(jnp.any(last[...] != 0))


def _word_mask(
    encoder: ConditionedEncoder, model: Give, texts: Sequence[str], features: InstructionFeatures
) -> Bool[Array, "n T"]:
    """Mask of the tokens of each instruction that are words, not its start or end token."""
    ids = encoder.processor.texts(texts)
    tower = model.backbone.text
    mask = text_mask(ids, tower.pool, tower.end_id)
    inner = jnp.arange(ids.shape[1]) < mask.sum(axis=1, keepdims=True) - 1
    words = inner.at[:, 0].set(False) if tower.pool == "end" else mask & (ids != SIGLIP_END)
    return words[:, : features.mask.shape[1]]
