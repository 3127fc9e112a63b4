"""Maps of an image encoder for an image, and how well texts fit it.

Letters: H W input that the patches cover, C side of the shown picture, T texts, E embedding width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from perception_jax.api import Loaded
from perception_jax.data import images as image_files
from perception_jax.data import views
from perception_jax.data.records import Image
from perception_jax.errors import ConfigError
from perception_jax.nn import maps, stack
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import unit
from perception_jax.viz.patch_maps import listed
from perception_jax.viz.sheet import PANEL


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """How well a text fits an image.

    Attributes:
      text: as given.
      cosine: of both embeddings.
      probability: with the model's temperature; for a model with a logit bias (SigLIP) of this text
        by itself, for others among all texts given, and then None for a single one.
    """

    text: str
    cosine: float
    probability: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EncoderPrediction:
    """Maps and text scores of one image.

    Attributes:
      picture: the part of the image that the patches cover, scaled from the original.
      image_size: width and height of the original, pixels.
      input_size: width and height of the model's input, pixels.
      region: the part that the patches cover, xyxy in original pixels; extends beyond the image
        where it was padded.
      attention_of: the token or head whose attention is shown, in words.
      scores: of each text.
      attention: to each patch, mean over heads.
      relevance: of each patch for each text, gradient × attention.
      gradient: norm over colours of the gradient of each text's cosine with respect to each pixel.
      components: the three principal components of the patch features, in [0, 1].
    """

    picture: UInt8[np.ndarray, "C C 3"]
    image_size: tuple[int, int]
    input_size: tuple[int, int]
    region: tuple[float, float, float, float]
    attention_of: str
    scores: tuple[TextScore, ...]
    attention: Float[np.ndarray, "rows columns"]
    relevance: Float[np.ndarray, "T rows columns"]
    gradient: Float[np.ndarray, "T H W"]
    components: Float[np.ndarray, "rows columns 3"]

    def to_json(self) -> dict[str, Any]:
        """Sizes, scores and the maps on the patch grid, rows from the top."""
        rows, columns = self.attention.shape
        texts = []
        for score, relevance, gradient in zip(
            self.scores, self.relevance, self.gradient, strict=True
        ):
            patches = gradient.reshape(rows, gradient.shape[0] // rows, columns, -1)
            grids = {"relevance": relevance, "input_gradient": patches.mean(axis=(1, 3))}
            texts.append(dataclasses.asdict(score) | {k: listed(v) for k, v in grids.items()})
        return {
            "image_size": list(self.image_size),
            "input_size": list(self.input_size),
            "region": list(self.region),
            "grid": [rows, columns],
            "attention_of": self.attention_of,
            "attention": listed(self.attention),
            "texts": texts,
        }


class Explainer:
    """Computes the maps of images for one model and fixed texts; compiles once."""

    def __init__(
        self,
        loaded: Loaded,
        texts: Sequence[str] = (),
        *,
        layer: int = maps.LAST_LAYER,
        scale: float = 1.0,
    ):
        """
        Args:
          loaded: a model with an image tower.
          texts: to compare the images with; none is fine.
          layer: whose attention is shown; negative counts from the end.
          scale: the input's side as a multiple of the model's own, rounded to whole patches.

        Raises:
          ConfigError: texts for a model without a text tower, or a scale that is not positive.
          CheckpointError: texts for a checkpoint without a tokenizer.
        """
        self._model, self._layer = loaded.model, layer
        tower = _image_tower(loaded.model)
        self._patch = tower.patch_embed.patch
        self._processor = views.scaled(loaded.processor.image, scale, self._patch)
        depth = stack.depth_of(tower.blocks)
        self._attention_of = (
            f"class token, layer {layer % depth + 1} of {depth}" if tower.prefix else "pooling head"
        )
        self._texts = tuple(texts)
        self._embeddings = _embed(loaded, self._texts)
        self._run = jax.jit(self._compute)

    def __call__(self, image: Image, *, name: str = "") -> EncoderPrediction:
        """Computes maps and scores of one image.

        Args:
          image: uint8[height, width, 3], an encoded file's bytes, or a path.
          name: what to call it in an error; a path names itself.

        Raises:
          ImageError: the image cannot be decoded.
          ConfigError: the tower has no such layer.
        """
        original = image_files.decode(image, name=name)
        view = views.view(self._processor, original, patch=self._patch, side=PANEL)
        pixels = view.pixels
        found = self._run(self._model, jnp.asarray(pixels)[None], self._embeddings)
        found = {key: np.asarray(value) for key, value in found.items()}
        rows, columns = found["attention"].shape
        height, width = rows * self._patch, columns * self._patch
        return EncoderPrediction(
            picture=view.picture,
            image_size=view.original_size,
            input_size=(pixels.shape[1], pixels.shape[0]),
            region=view.region,
            attention_of=self._attention_of,
            scores=self._scores(found["cosines"]),
            attention=found["attention"],
            relevance=found["relevance"],
            gradient=found["gradient"][:, :height, :width],
            components=found["components"],
        )

    def _compute(
        self, model: nnx.Module, pixels: UInt8[Array, "1 S S 3"], texts: Float[Array, "T E"]
    ) -> dict[str, Array]:
        normal = normalise(pixels, self._processor.mean, self._processor.std)
        found = maps.text_maps(_image_tower(model), normal, texts, layer=self._layer)
        out = found.output
        return {
            "attention": found.attention[0],
            "relevance": found.relevance[:, 0],
            "gradient": found.gradient[:, 0],
            "components": maps.patch_pca(out.patches, out.grid)[0],
            "cosines": unit(texts) @ unit(out.embedding)[0],
        }

    def _scores(self, cosines: Float[np.ndarray, "T"]) -> tuple[TextScore, ...]:
        probabilities: Sequence[float | None] = [None] * len(cosines)
        if hasattr(self._model, "logit_scale"):
            logits = np.exp(float(self._model.logit_scale[...])) * cosines.astype(np.float64)
            if hasattr(self._model, "logit_bias"):
                logits = logits + float(self._model.logit_bias[...])
                probabilities = 1 / (1 + np.exp(-logits))
            elif len(logits) > 1:
                weights = np.exp(logits - logits.max())
                probabilities = weights / weights.sum()
        return tuple(
            TextScore(text=text, cosine=float(c), probability=None if p is None else float(p))
            for text, c, p in zip(self._texts, cosines, probabilities, strict=True)
        )


def _image_tower(model: nnx.Module) -> nnx.Module:
    """The image tower: `vision` of a model with two towers, or the model itself (DINOv2)."""
    return getattr(model, "vision", model)


def _embed(loaded: Loaded, texts: tuple[str, ...]) -> Float[Array, "T E"]:
    model = loaded.model
    if not texts:
        side = loaded.processor.image.size
        pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        image = jax.eval_shape(lambda m, x: _image_tower(m)(x).embedding, model, pixels)
        return jnp.zeros((0, image.shape[1]))
    if not hasattr(model, "text"):
        raise ConfigError(
            f"texts were given, but this model ({type(model).__name__}) is an image tower alone: "
            "leave the texts out, or take a model with a text tower (CLIP, SigLIP, EVA-CLIP)."
        )
    if not all(text.strip() for text in texts):
        raise ConfigError(f"texts: expected words in each, found {list(texts)}.")
    ids = loaded.processor.texts(texts)
    return jax.jit(lambda model, ids: model.text(ids).embedding)(model, ids).astype(jnp.float32)
