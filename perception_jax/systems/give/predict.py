"""Predicts with GiVE: maps and presence under each instruction, ranked candidates, captions.

Letters: E embedding width, k texts, S input side.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from perception_jax.data.instructions import instruction_for
from perception_jax.data.records import Image
from perception_jax.errors import ConfigError
from perception_jax.evals.conditioned import prompts
from perception_jax.inference.pairs import BatchedPairs, ImageTextPairs
from perception_jax.inference.pixels import PixelsInMemory, blank_image
from perception_jax.inference.single_image import Viewer
from perception_jax.nn.maps import attention_source
from perception_jax.systems.give.adapter import AdapterConfig
from perception_jax.systems.give.encode import CaptionTable, Conditioned, ConditionedEncoder
from perception_jax.systems.give.maps import MapComputer
from perception_jax.systems.give.model import Give, GiveConfig
from perception_jax.systems.give.prediction import (
    Candidate,
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
    named = backbone is not None or os.fspath(source).endswith(".safetensors")
    if named or find_adapters(source, missing_ok=True).is_file():
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
        self._alpha = float(alpha)
        self._check(captions)
        tower, processor = encoder.model.backbone.vision, encoder.processor
        self._attention_of = attention_source(tower)
        patch = tower.patch_embed.patch
        self._view = Viewer(processor.image, patch=patch, side=PANEL, scale=scale)
        processor = dataclasses.replace(processor, image=self._view.processor)
        self._encoder = encoder = ConditionedEncoder(processor, strength=self._alpha)
        self._texts = tuple(
            dict.fromkeys([*self._instructions, *map(instruction_for, self._names)])
        )
        self._maps = MapComputer(self._model, encoder, self._texts, presence=self._trained)
        self._pairs = BatchedPairs(encoder.conditioned, batch_size=min(BATCH, len(self._texts)))
        blank, everything = blank_image(processor.image), range(len(self._texts))
        self._blank = self._conditioned(blank, everything).embedding
        self._prototypes = prompts.prototypes(self._embed, self._names) if self._names else None
        self._captions = CaptionTable(self._model, encoder, captions)

    def __call__(self, image: Image, *, name: str = "") -> GivePrediction:
        """Predicts for one image. Args, Raises: as of `Viewer`."""
        view = self._view(image, name=name)
        attention, static = self._maps.static(view.pixels)
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

    def _check(self, captions: Sequence[str]) -> None:
        texts = (*self._instructions, *self._names, *captions)
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

    def _conditioned(
        self, pixels: UInt8[np.ndarray, "S S 3"], numbers: Iterable[int]
    ) -> Conditioned:
        """Encodes one image under some of the instructions."""
        chosen = np.fromiter(numbers, np.int32)
        pairs = ImageTextPairs(np.zeros_like(chosen), chosen)
        image, features = PixelsInMemory(pixels[None]), self._maps.features
        return self._pairs(self._model, image, features, pairs, images_per_call=1)

    def _under(
        self, text: str, pixels: UInt8[np.ndarray, "S S 3"], static: Float[np.ndarray, " E"]
    ) -> InstructionPrediction:
        number = self._texts.index(text)
        found = self._maps.conditioned(pixels, number)
        embedding = self._maps.features.embedding[number]
        return InstructionPrediction(
            instruction=text,
            presence_logit=float(found.presence_logit) if self._trained else None,
            cosine=float(embedding @ found.embedding),
            cosine_blank=float(embedding @ self._blank[number]),
            cosine_static=float(embedding @ static),
            captions=self._captions.nearest(found.embedding, SHOWN),
            attention=found.attention,
            relevance=found.relevance,
            places=found.places if self._trained else None,
            words=found.words if self._alpha > 0 else None,
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
