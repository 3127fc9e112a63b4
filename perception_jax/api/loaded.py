"""What belongs to a loaded checkpoint: the model, its configuration, its processor."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from perception_jax.data.inputs import as_images, as_texts
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop.report import KeyReport
from perception_jax.models.architecture import Tokenizer
from perception_jax.ops.image import normalise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """Raw images and texts to what the model takes.

    Attributes:
      image: resize and crop on the host, and the mean and standard deviation; None for a model
        that takes no images.
      tokenizer: None if the checkpoint carries no vocabulary, or one that is not read here.
    """

    image: ImageProcessor | None
    tokenizer: Tokenizer | None

    def images(self, images: Any) -> Float[Array, "B H W 3"]:
        """Decodes, processes and normalises one image or several.

        Args:
          images: an image or a list of them: paths, bytes of encoded files, PIL images, or uint8
            arrays [height, width, 3].

        Raises:
          ConfigError: something else, nothing, or images that keep several sizes.
          CheckpointError: the model takes no images.
          ImageError: an image cannot be decoded.
        """
        if self.image is None:
            raise CheckpointError("this model takes no images.")
        items = as_images(images)
        if not items:
            raise ConfigError("images: expected at least one image, found none.")
        pixels = [self.image.read(item).pixels for item in items]
        sizes = {f"{one.shape[1]}×{one.shape[0]}" for one in pixels}
        if len(sizes) > 1:
            raise ConfigError(
                "images: this processor keeps proportions, and these images have several sizes "
                f"({', '.join(sorted(sizes)[:8])}). Give those of one size together, or use "
                'another mode than "whole".'
            )
        return normalise(jax.numpy.asarray(np.stack(pixels)), self.image.mean, self.image.std)

    def texts(self, texts: Any) -> Int[Array, "B T"]:
        """Token ids of one text or several, padded to the context length.

        Args:
          texts: a string or a list of strings.

        Raises:
          ConfigError: something else.
          CheckpointError: the checkpoint came without a tokenizer.
        """
        items = as_texts(texts)
        if self.tokenizer is None:
            raise CheckpointError(
                "this checkpoint came without a tokenizer that is read here: expected CLIP's (a "
                "tokenizer.json, or vocab.json and merges.txt) or SigLIP's (tokenizer.json or "
                "spiece.model) in its folder. Add the files and load again, or pass token ids."
            )
        return jax.numpy.asarray(self.tokenizer(items).ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with all that is needed to use it and to write it again.

    Attributes:
      model: the NNX module.
      config: its frozen dataclass, e.g. `ClipConfig`.
      processor: of images and texts.
      report: what happened to each of the checkpoint's keys; None for a model not read from one.
    """

    model: nnx.Module
    config: Any
    processor: Processor
    report: KeyReport | None = None
