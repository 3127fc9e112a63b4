"""Contrastive image-text training on records: the task behind the small CLIP of scenes.

Softmax loss after CLIP (arXiv 2103.00020), sigmoid loss after SigLIP (arXiv 2303.15343), both over
the global batch; with `optim.accumulate`, over each micro-batch: another loss, of fewer negatives.
Letters: B batch, H W image, T text tokens, E embedding width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from perception_jax.api import Loaded
from perception_jax.errors import ConfigError
from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.params import flatten
from perception_jax.models.resized import resized_kernel
from perception_jax.models.shardings import SHARDINGS
from perception_jax.models.siglip.config import SiglipConfig
from perception_jax.models.siglip.modeling import Siglip
from perception_jax.nn import position
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import sigmoid_contrastive, softmax_contrastive, unit
from perception_jax.ops.sharding import constrain, in_parts
from perception_jax.systems.contrastive.benchmark import Benchmark
from perception_jax.systems.contrastive.data import ContrastiveData
from perception_jax.train.task import Batch, Evaluator, Metrics

MAX_LOG_SCALE = 4.6052
"""ln 100: CLIP's cap on the temperature (arXiv 2103.00020, §2.5)."""

Model = TypeVar("Model", ClipConfig, SiglipConfig)
"""Type of a model's configuration."""

Features = Mapping[str, Any]
"""Arrays with the rows of a batch first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerRemat:
    """Names of what the backward pass recomputes in each tower; see `nn.stack.REMAT`."""

    vision: str = "none"
    text: str = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Settings of the loss.

    Attributes:
      loss: "softmax" (CLIP) or "sigmoid" (SigLIP).
      remat: what is recomputed instead of kept.
      parts: into which the towers divide a batch, one after another: activations of one block then
        stay in memory for a part only. The loss is that of the whole batch.
    """

    loss: Literal["softmax", "sigmoid"] = "softmax"
    remat: TowerRemat = TowerRemat()
    parts: int = 1


class ContrastiveTask:
    """Trains every parameter of a CLIP or SigLIP on the captions of a source."""

    trainable = nnx.Param
    shardings = SHARDINGS

    def __init__(
        self,
        config: ContrastiveConfig,
        model: ClipConfig | SiglipConfig,
        *,
        data: ContrastiveData,
        benchmark: Callable[[], Benchmark] | None = None,
        start: Loaded | None = None,
    ):
        """Reads no weights.

        Args:
          benchmark: makes what is measured; called when it is first needed.
          start: a checkpoint to start from, without it from fresh parameters. Images and patches
            may have another size than its own.

        Raises:
          ConfigError: altered captions for the sigmoid loss, or a start that is another model.
        """
        if start is not None:
            _check_start(start, model, config.loss)
        if data.altered and config.loss != "softmax":
            raise ConfigError(
                f"data.altered: the loss {config.loss!r} takes no further texts as negatives; "
                'set loss = "softmax" or data.altered = False.'
            )
        self.config = config
        self.model = model
        self.data = data
        self.processor = data.processor
        self._make_benchmark, self._start = benchmark, start

    @functools.cached_property
    def benchmark(self) -> Benchmark | None:
        """What is measured, or None."""
        return None if self._make_benchmark is None else self._make_benchmark()

    def init(self, key: jax.Array) -> nnx.Module:
        """The model with fresh parameters; the sigmoid loss adds a logit bias to a CLIP
        (`SigmoidClip`)."""
        rngs = nnx.Rngs(params=key)
        if isinstance(self.model, SiglipConfig):
            return Siglip(self.model, rngs=rngs)
        return (Clip if self.config.loss == "softmax" else SigmoidClip)(self.model, rngs=rngs)

    def pretrained(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, Any]:
        """The weights of `start`, read from their files to their shards."""
        if self._start is None:
            return {}
        shapes = {path: leaf.shape for path, leaf in flatten(self._start.model).items()}
        changed = {path: one for path, one in targets.items() if one.shape != shapes[path]}
        read = self._start.read({path: one for path, one in targets.items() if path not in changed})
        for path, target in changed.items():
            stored = jax.ShapeDtypeStruct(shapes[path], jnp.float32)
            leaf = self._resized(path, self._start.read({path: stored})[path])
            read[path] = jax.device_put(leaf.astype(target.dtype), target.sharding)
        return read

    def _resized(self, path: str, leaf: jax.Array) -> jax.Array:
        """A leaf of the start's image tower for images or patches of another size."""
        vision = self.model.vision
        if path == "vision/patch_embed/kernel":
            return resized_kernel(leaf, vision.patch_size)
        if path != "vision/position_embedding":
            raise ConfigError(f"start: {path} has another shape than the model's.")
        side = vision.image_size // vision.patch_size
        prefix = 0 if isinstance(self.model, SiglipConfig) else 1
        return position.resample(leaf, (side, side), prefix=prefix, antialias=True)

    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """The contrastive loss, and how often the own text ranks first within the batch."""
        return self.loss_of(model, self.features(model, batch, key))

    def features(self, model: nnx.Module, batch: Batch, key: jax.Array) -> Features:
        """Unit embeddings of images and texts, and the texts' tokens."""
        del key  # no dropout
        dtype = model.logit_scale.dtype  # the trainer's compute dtype
        remat, parts, processor = self.config.remat, self.config.parts, self.processor.image

        def encode_images(pixels: Array) -> Array:
            pixels = normalise(pixels, processor.mean, processor.std, dtype)
            return unit(model.vision(pixels, remat=remat.vision).embedding)

        def encode_texts(ids: Array) -> Array:
            return unit(model.text(ids, dtype=dtype, remat=remat.text).embedding)

        image = in_parts(encode_images, batch["image"], parts)
        text = in_parts(encode_texts, batch["ids"], parts)
        features = {"image": image, "text": text, "ids": batch["ids"]}
        if self.data.altered:
            other = in_parts(encode_texts, batch["altered_ids"], parts)
            cosine = jnp.sum(image * other, axis=1)
            features["altered"] = jnp.where(batch["altered"], cosine, -jnp.inf)
        return features

    def loss_of(self, model: nnx.Module, features: Features) -> tuple[jax.Array, Metrics]:
        """See `loss`."""
        image, text = features["image"], features["text"]
        log_scale = model.logit_scale[...].astype(jnp.float32)
        scale = jnp.exp(jnp.minimum(log_scale, MAX_LOG_SCALE))
        same = equal_rows(features["ids"])
        if self.config.loss == "softmax":
            altered = features.get("altered")
            harder = None if altered is None else altered[:, None]
            loss = softmax_contrastive(image, text, scale, ignore=same, harder=harder)
        else:
            loss = sigmoid_contrastive(image, text, scale, model.logit_bias[...], ignore=same)
        return loss, {"batch_accuracy": batch_accuracy(image, text, same), "scale": scale}

    def datasets(self) -> Mapping[str, Iterable[Batch]]:
        """ "train": endless batches of the data."""
        return {"train": self.data.loader()}

    def batch_shapes(self) -> Sequence[Batch]:
        """The one shape of all batches."""
        rows, side = self.data.batch_size, self.model.vision.image_size
        ids = jax.ShapeDtypeStruct((rows, self.model.text.context), jnp.int32)
        shapes = {"image": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8), "ids": ids}
        if self.data.altered:
            shapes["altered_ids"] = ids
            shapes["altered"] = jax.ShapeDtypeStruct((rows,), jnp.bool_)
        return [shapes]

    def evaluators(self) -> Mapping[str, Evaluator]:
        """The benchmark's, if one was given."""
        return {} if self.benchmark is None else self.benchmark.evaluators()


def _check_start(start: Loaded, model: ClipConfig | SiglipConfig, loss: str) -> None:
    """Raises `ConfigError` unless the checkpoint is such a model, but for sizes of images."""
    if isinstance(model, ClipConfig) and loss == "sigmoid":
        raise ConfigError(
            f"start: {start.name} is a CLIP, which has no logit bias and the temperature of the "
            'softmax loss. Set loss = "softmax", or start from a SigLIP.'
        )
    if (own := with_patches(start.config, model)) != model:
        raise ConfigError(f"start: {start.name} is {own}, expected {model}.")


def with_patches(config: Model, like: Model) -> Model:
    """A configuration with the size of images and patches of another one."""
    sizes = {name: getattr(like.vision, name) for name in ("image_size", "patch_size")}
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **sizes))


class SigmoidClip(Clip):
    """CLIP with SigLIP's learned logit bias and starting temperature (arXiv 2303.15343, §3.1)."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.asarray(10.0, jnp.float32)))
        self.logit_bias = nnx.Param(jnp.asarray(-10.0, jnp.float32))


def equal_rows(ids: Int[Array, "B T"]) -> Bool[Array, "B B"]:
    """True for pairs of *different* rows with the same text: no negatives of each other."""
    # Token by token: the whole comparison would be [B, B, T], over the global batch.
    same, _ = jax.lax.scan(
        lambda same, token: (same & (token[:, None] == token[None]), None),
        constrain(~jnp.eye(ids.shape[0], dtype=bool), "batch"),
        ids.T,
    )
    return same


def batch_accuracy(
    image: Float[Array, "B E"], text: Float[Array, "B E"], same: Bool[Array, "B B"]
) -> Float[Array, ""]:
    """Share of images whose own text, or an equal one, is the most similar of the batch."""
    best = jnp.argmax(constrain(image @ text.T, "batch"), axis=1)
    own = jnp.eye(image.shape[0], dtype=bool)
    right = (own | same) & (best[:, None] == jnp.arange(image.shape[0]))
    return jnp.mean(jnp.any(right, axis=1), dtype=jnp.float32)
