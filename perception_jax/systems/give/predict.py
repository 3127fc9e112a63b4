"""Looks at images as GiVE does: where under each instruction, what is there, what fits.

Letters: E embedding width, n different instructions, k captions, c candidates, T text tokens,
S input side.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from perception_jax.api import Processor
from perception_jax.data import images as image_files
from perception_jax.data import views
from perception_jax.data.records import Image
from perception_jax.errors import ConfigError
from perception_jax.evals.conditioned import prompts
from perception_jax.nn import maps, stack
from perception_jax.systems.give.adapter import AdapterConfig, Instruction
from perception_jax.systems.give.data.instructions import instruction_for
from perception_jax.systems.give.encoding.encode import Encoder, pick
from perception_jax.systems.give.encoding.galleries import (
    Galleries,
    PixelsInMemory,
    Steered,
    blank_image,
)
from perception_jax.systems.give.encoding.plan import Rows
from perception_jax.systems.give.model import SIGLIP_END, Give, GiveConfig, instruction_mask
from perception_jax.systems.give.pretrained import GiveEncoder, find_adapters
from perception_jax.systems.give.showing.looking import Look, look
from perception_jax.systems.give.showing.prediction import Candidate, CaptionScore, Prediction, Told
from perception_jax.viz.sheet import PANEL

BATCH = 64
"""Most instructions per device call."""
SHOWN = 3
"""Candidates whose maps are made, the most likely ones; captions that are named."""


def load_encoder(
    source: str | os.PathLike[str], *, backbone: str | os.PathLike[str] | None = None
) -> GiveEncoder:
    """Adapters as `GiveEncoder.from_pretrained` finds them, or else a backbone with fresh ones.

    Raises:
      PerceptionError: as `GiveEncoder.from_pretrained`.
    """
    is_file = os.fspath(source).endswith(".safetensors") or find_adapters(source).is_file()
    if is_file or backbone is not None:
        return GiveEncoder.from_pretrained(source, backbone=backbone)
    config = GiveConfig(adapter=AdapterConfig(heads=1))  # fits any width
    return GiveEncoder.from_pretrained(backbone=source, config=config)


class Predictor:
    """One model, some instructions and candidates, for any number of images; compiles once."""

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
          instructions: to look at each image under, taken as they stand.
          candidates: names of objects to rank; the instruction of each is made of its name.
          captions: to find the nearest of.
          alpha: strength of the steering; 1 is as trained, 0 the backbone alone.
          scale: the input's side as a multiple of the model's own, rounded to whole patches.

        Raises:
          ConfigError: neither instructions nor candidates, a text without words, a scale or
            strength that is no such number; of fresh adapters a strength above 0, or candidates.
        """
        self._model = encoder.model
        self._trained = is_trained(encoder.model)
        self._instructions, self._names = tuple(instructions), tuple(candidates)
        self._captions, self._alpha = tuple(captions), float(alpha)
        self._check()
        tower = encoder.model.backbone.vision
        self._patch, depth = tower.patch_embed.patch, stack.depth_of(tower.blocks)
        self._attention_of = (
            f"class token, layer {depth} of {depth}" if tower.prefix else "pooling head"
        )
        image = views.scaled(encoder.processor.image, scale, self._patch)
        processor = Processor(image=image, tokenizer=encoder.processor.tokenizer)
        self._encoder = Encoder(processor, strength=self._alpha)
        self._texts = tuple(dict.fromkeys([*self._instructions, *map(_named, self._names)]))
        self._told = self._encoder.instructions(self._model, self._texts)
        self._words = _words(self._encoder, self._model, self._texts, self._told)
        self._look, self._static = jax.jit(self._see), jax.jit(self._see_static)
        self._galleries = Galleries(self._encoder, batch_size=min(BATCH, len(self._texts)))
        self._blank = self._steered(blank_image(image), range(len(self._texts))).embedding
        self._prototypes = prompts.prototypes(self._embed, self._names) if self._names else None
        self._caption_rows = self._embed(self._captions) if self._captions else None

    def __call__(self, image: Image, *, name: str = "") -> Prediction:
        """Looks at one image.

        Args:
          image: uint8[height, width, 3], an encoded file's bytes, or a path.
          name: what to call it in an error; a path names itself.

        Raises:
          ImageError: the image cannot be decoded.
        """
        original = image_files.decode(image, name=name)
        processor = self._encoder.processor.image
        seen = views.view(processor, original, patch=self._patch, side=PANEL)
        attention, static = jax.device_get(self._static(self._model, seen.pixels[None]))
        candidates = self._ranked(seen.pixels)
        best = [one.instruction for one in candidates[:SHOWN]]
        return Prediction(
            picture=seen.picture,
            image_size=seen.original_size,
            input_size=(processor.size, processor.size),
            region=seen.region,
            alpha=self._alpha,
            attention_of=self._attention_of,
            attention=attention,
            told=tuple(
                self._under(text, seen.pixels, static)
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
            raise ConfigError("nothing to look for: give an instruction, or candidates.")
        if not self._trained and (self._alpha > 0 or self._names):
            raise ConfigError(
                "this is a backbone with fresh adapters: they change nothing and know of no "
                "presence, so there is nothing to see. Give trained ones (a file of adapters, or "
                "a folder that it lies in), or look at the backbone alone with instructions at "
                "alpha 0."
            )

    def _embed(self, texts: Sequence[str]) -> Float[np.ndarray, "k E"]:
        return self._encoder.texts(self._model, texts)

    def _see(
        self,
        model: Give,
        pixels: UInt8[Array, "1 S S 3"],
        told: Instruction,
        words: Bool[Array, "1 T"],
    ) -> Look:
        normal = self._encoder.normalised(pixels)
        return look(model, normal, told, words, presence=self._trained)

    def _see_static(
        self, model: Give, pixels: UInt8[Array, "1 S S 3"]
    ) -> tuple[Float[Array, "rows columns"], Float[Array, " E"]]:
        """Attention and embedding without an instruction."""
        normal = self._encoder.normalised(pixels)
        attention = maps.class_attention(model.backbone.vision, normal)[0]
        return attention, model(normal).embedding[0]

    def _steered(self, pixels: UInt8[np.ndarray, "S S 3"], numbers: Iterable[int]) -> Steered:
        """One image under some of the instructions."""
        chosen = np.fromiter(numbers, np.int32)
        return self._galleries.steered(
            self._model,
            PixelsInMemory(pixels[None]),
            self._told,
            Rows(np.zeros_like(chosen), chosen),
            images_per_step=1,
        )

    def _under(
        self, text: str, pixels: UInt8[np.ndarray, "S S 3"], static: Float[np.ndarray, " E"]
    ) -> Told:
        number = self._texts.index(text)
        row = jnp.array([number])
        told = pick(self._told, row)
        seen = jax.device_get(self._look(self._model, pixels[None], told, self._words[row]))
        meaning = self._told.embedding[number]
        return Told(
            instruction=text,
            presence_logit=float(seen.presence_logit) if self._trained else None,
            cosine=float(meaning @ seen.embedding),
            cosine_blank=float(meaning @ self._blank[number]),
            cosine_static=float(meaning @ static),
            captions=self._nearest(seen.embedding),
            attention=seen.attention,
            relevance=seen.relevance,
            places=seen.places if self._trained else None,
            words=seen.words if self._alpha > 0 else None,
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
        """All candidates, the most likely first; equal ones as they were given."""
        if not self._names:
            return ()
        numbers = [self._texts.index(_named(name)) for name in self._names]
        out = self._steered(pixels, numbers)
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
    """Whether the adapters change anything; fresh ones do not, whatever the strength."""
    adapters = model.backbone.vision.blocks.inserts
    last = adapters.to_out.kernel if adapters.gate is None else adapters.gate
    return bool(jnp.any(last[...] != 0))


def _named(name: str) -> str:
    return instruction_for(name)


def _words(
    encoder: Encoder, model: Give, texts: Sequence[str], told: Instruction
) -> Bool[Array, "n T"]:
    """Which tokens of each instruction are words, not its start or end."""
    ids = encoder.processor.texts(texts)
    tower = model.backbone.text
    mask = instruction_mask(ids, tower.pool, tower.end_id)
    inner = jnp.arange(ids.shape[1]) < mask.sum(axis=1, keepdims=True) - 1
    words = inner.at[:, 0].set(False) if tower.pool == "end" else mask & (ids != SIGLIP_END)
    return words[:, : told.mask.shape[1]]
