"""A loaded checkpoint: the model, its configuration and its processor."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from perception_jax.data.inputs import as_images, as_texts
from perception_jax.data.processors import ImageProcessor, Mode
from perception_jax.data.tokenization import LanguageTokenizer
from perception_jax.data.views import at_size
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop.dtypes import floating_dtype
from perception_jax.interop.key_report import KeyReport
from perception_jax.interop.load import Convert, LoadedParams
from perception_jax.models.architecture import Tokenizer
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn.int8 import quantize_linear, quantized
from perception_jax.nn.lora import linear_layers
from perception_jax.ops.image import normalise
from perception_jax.settings import shown
from perception_jax.shard.rules import shardings as make_shardings

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """Converts raw images and texts to model inputs.

    Attributes:
      image: resize and crop on the host, and the mean and standard deviation; None for a model
        that takes no images.
      tokenizer: that of a text tower, or a language model's `LanguageTokenizer`; None if the
        checkpoint carries no vocabulary, or an unsupported one.
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
        """Token ids of one text or several for a text tower, padded to its context length.

        A text that is too long keeps its beginning; the log names the first such text.

        Args:
          texts: a string or a list of strings.

        Raises:
          ConfigError: something else, or a language model, whose texts are of any length.
          CheckpointError: the checkpoint came without a tokenizer.
        """
        items = as_texts(texts)
        if isinstance(self.tokenizer, LanguageTokenizer):
            raise ConfigError(
                "processor.texts: expected a text tower, found a language model, whose texts are "
                "not padded: use processor.tokenizer(text), or generate.Generator."
            )
        if self.tokenizer is None:
            raise CheckpointError(
                "this checkpoint came without a supported tokenizer: expected CLIP's (a "
                "tokenizer.json, or vocab.json and merges.txt) or SigLIP's (tokenizer.json or "
                "spiece.model) in its folder. Add the files and load again, or pass token ids."
            )
        tokens = self.tokenizer(items)
        # Texts that differ behind the cut alone get one embedding.
        full = [items[k] for k in np.flatnonzero(tokens.mask.all(axis=1))]
        cut = [text for text in full if _is_cut(text, self.tokenizer)]
        if cut:
            _log.warning(
                "%d of %d texts are longer than the %d tokens of the text tower and lose their "
                "end, the first of them %s",
                len(cut),
                len(items),
                tokens.ids.shape[1],
                shown(cut[0]),
            )
        return jax.numpy.asarray(tokens.ids)

    def at_size(self, size: int, *, mode: Mode | None = None) -> Processor:
        """Returns a copy that makes images of another size.

        Args:
          size: side of the images, pixels.
          mode: how images become squares; None keeps the processor's.
        """
        image = at_size(self.image, size)
        if mode not in (None, image.mode):
            image = dataclasses.replace(image, mode=mode, resize=None)
        return dataclasses.replace(self, image=image)


@runtime_checkable
class LazyWeights(Protocol):
    """Weights of a checkpoint that has been opened but not read.

    Attributes:
      rules: `(path regex, PartitionSpec)` rows for a mesh.
    """

    rules: tuple[tuple[str, Any], ...]

    def read(
        self,
        *,
        dtype: np.dtype | None = None,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        targets: Mapping[str, jax.ShapeDtypeStruct] | None = None,
        convert: Mapping[str, Convert] | None = None,
    ) -> LoadedParams:
        """Reads leaves by path; arguments and errors as in `interop.load.load_params`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with everything needed to use it and to export it.

    Attributes:
      model: the NNX module; with `weights`, its leaves are `jax.ShapeDtypeStruct`s.
      config: its frozen dataclass, e.g. `ClipConfig`.
      processor: of images and texts.
      name: what it was loaded from: a folder or file, a hub id or a shipped name; "" if it was not.
      report: what happened to each of the checkpoint's keys; None for a model not read from one.
      weights: of a checkpoint that is open and not read (`prepare`, `open_backbone`); else None.
    """

    model: nnx.Module
    config: Any
    processor: Processor
    name: str = ""
    report: KeyReport | None = None
    weights: LazyWeights | None = None

    def load_weights(
        self,
        *,
        dtype: np.typing.DTypeLike | None = None,
        mesh: jax.sharding.Mesh | None = None,
        int8: bool = False,
    ) -> Loaded:
        """Returns a copy with the weights read tensor by tensor straight to their shards.

        Args, Raises: as of `perception_jax.load`.
        """
        if self.weights is None:
            raise CheckpointError(f"{self.name}: its weights have been read already.")
        model = nnx.eval_shape(quantize_linear, self.model) if int8 else self.model
        placed = None
        if mesh is not None:
            placed = make_shardings(flatten(model), self.weights.rules, mesh)
        convert = _quantizers(linear_layers(model), placed) if int8 else None
        dtype = None if dtype is None else floating_dtype(dtype)
        read = self.weights.read(dtype=dtype, shardings=placed, convert=convert)
        return dataclasses.replace(
            self, model=unflatten(model, read.params), report=read.report, weights=None
        )

    def read(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Some leaves by path, with the dtype and sharding of their targets: from `weights`, or
        copies of those of `model`.

        Raises:
          CheckpointError: the files do not fit, or there are no weights.
        """
        if self.weights is not None:
            return self.weights.read(targets=targets).params
        leaves = flatten(self.model)
        if not all(isinstance(leaf, jax.Array) for leaf in leaves.values()):
            raise CheckpointError(f"{self.name}: expected weights, found shapes alone.")

        def copied() -> dict[str, Array]:
            return {
                path: jax.numpy.copy(leaves[path].astype(target.dtype))
                for path, target in targets.items()
            }

        placed = {path: target.sharding for path, target in targets.items()}
        return jax.jit(copied, out_shardings=placed)()

    def part(self, name: str, mesh: jax.sharding.Mesh | None = None) -> nnx.Module:
        """Returns a part of the model ("text"), with its weights read if the model has none yet.

        Args:
          mesh: places each leaf that is read on it.
        """
        part = getattr(self.model, name)
        if self.weights is None:
            return part
        leaves = {f"{name}/{path}": leaf for path, leaf in flatten(part).items()}
        placed = dict.fromkeys(leaves)
        if mesh is not None:
            placed = make_shardings(leaves, self.weights.rules, mesh)
        targets = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[path])
            for path, leaf in leaves.items()
        }
        read = self.read(targets)
        return unflatten(part, {path.removeprefix(f"{name}/"): x for path, x in read.items()})

    def at_size(self, size: int, *, mode: Mode | None = None) -> Loaded:
        """Returns a copy whose processor makes images of another size; the towers accept any.

        Args: as of `Processor.at_size`.
        """
        return dataclasses.replace(self, processor=self.processor.at_size(size, mode=mode))


def _is_cut(text: str, tokenizer: Tokenizer) -> bool:
    """Whether a text that fills its row has further tokens."""
    return bool(tokenizer.encode(text).offsets[-1, 1] > tokenizer.offsets([text])[0, :, 1].max())


def _quantizers(
    layers: Iterable[str], placed: Mapping[str, jax.sharding.Sharding] | None
) -> dict[str, Convert]:
    """For the kernel of each layer the function that replaces it by an int8 one and its scale."""

    def quantizer(layer: str) -> Convert:
        names = ("kernel", "scale")
        shardings = None if placed is None else tuple(placed[f"{layer}/{n}"] for n in names)
        return lambda kernel: dict(zip(names, quantized(layer, kernel, shardings), strict=True))

    return {f"{layer}/kernel": quantizer(layer) for layer in layers}
