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
from perception_jax.data.records import Image
from perception_jax.errors import ConfigError
from perception_jax.inference.single_image import ImagePrediction, Viewer, listed
from perception_jax.nn import maps
from perception_jax.nn.towers import TwoTowers
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import unit
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
class EncoderPrediction(ImagePrediction):
    """Maps and text scores of one image.

    Attributes:
      scores: of each text.
      relevance: of each patch for each text, gradient × attention.
      gradient: norm over colours of the gradient of each text's cosine with respect to each pixel.
      components: the three principal components of the patch features, in [0, 1].
    """

    scores: tuple[TextScore, ...]
    relevance: Float[np.ndarray, "T rows columns"]
    gradient: Float[np.ndarray, "T H W"]
    components: Float[np.ndarray, "rows columns 3"]

    def to_json(self) -> dict[str, Any]:
        """As of `ImagePrediction`, with scores and further maps."""
        rows, columns = self.attention.shape
        texts = []
        for score, relevance, gradient in zip(
            self.scores, self.relevance, self.gradient, strict=True
        ):
            patches = gradient.reshape(rows, gradient.shape[0] // rows, columns, -1)
            grids = {"relevance": relevance, "input_gradient": patches.mean(axis=(1, 3))}
            texts.append(dataclasses.asdict(score) | {k: listed(v) for k, v in grids.items()})
        # Not super(): a dataclass with slots is a new class.
        return ImagePrediction.to_json(self) | {"texts": texts}


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
        self._view = Viewer(loaded.processor.image, patch=self._patch, side=PANEL, scale=scale)
        self._attention_of = maps.attention_source(tower, layer=layer)
        self._texts = tuple(texts)
        self._embeddings = _embed(loaded, self._texts)
        self._run = jax.jit(self._compute)

    def __call__(self, image: Image, *, name: str = "") -> EncoderPrediction:
        """Computes maps and scores of one image.

        Args, Raises: as of `Viewer`; besides
          ConfigError: the tower has no such layer.
        """
        view = self._view(image, name=name)
        found = self._run(self._model, jnp.asarray(view.pixels)[None], self._embeddings)
        found = {key: np.asarray(value) for key, value in found.items()}
        rows, columns = found["attention"].shape
        height, width = rows * self._patch, columns * self._patch
        return EncoderPrediction(
            view=view,
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
        processor = self._view.processor
        normal = normalise(pixels, processor.mean, processor.std)
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
        if isinstance(self._model, TwoTowers):
            logits = np.exp(float(self._model.logit_scale[...])) * cosines.astype(np.float64)
            if self._model.logit_bias is not None:
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
    return model.vision if isinstance(model, TwoTowers) else model


def _embed(loaded: Loaded, texts: tuple[str, ...]) -> Float[Array, "T E"]:
    model = loaded.model
    if not texts:
        side = loaded.processor.image.size
        pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        image = jax.eval_shape(lambda m, x: _image_tower(m)(x).embedding, model, pixels)
        return jnp.zeros((0, image.shape[1]))
    if not isinstance(model, TwoTowers):
        raise ConfigError(
            f"texts were given, but this model ({type(model).__name__}) is an image tower alone: "
            "leave the texts out, or take a model with a text tower (CLIP, SigLIP, EVA-CLIP)."
        )
    if not all(text.strip() for text in texts):
        raise ConfigError(f"texts: expected words in each, found {list(texts)}.")
    ids = loaded.processor.texts(texts)
    return jax.jit(lambda model, ids: model.text(ids).embedding)(model, ids).astype(jnp.float32)
