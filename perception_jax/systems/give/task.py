"""Training GiVE: adapters and OID head around a frozen backbone.

Each row of a batch is an image with a class that it shows and a class that it lacks; the image is
encoded under the instructions of both. Letters: M rows, S image side, T text tokens, W text width,
E embedding width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from perception_jax import api
from perception_jax.errors import ConfigError
from perception_jax.models.paired import build_backbone
from perception_jax.models.params import flatten
from perception_jax.nn.adapters import AdapterParam
from perception_jax.ops.boxes import patch_coverage
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import unit
from perception_jax.systems.give.adapter import InstructionFeatures
from perception_jax.systems.give.encode import (
    GENERIC,
    ConditionedEncoder,
    InstructionConfig,
    as_arrays,
)
from perception_jax.systems.give.losses import LossConfig, RowLabels, all_losses
from perception_jax.systems.give.model import SHARDINGS, Give, GiveConfig, path_in_give
from perception_jax.systems.give.plus import (
    GENERIC_EVERY,
    PlusConfig,
    dense_loss,
    generic_loss,
)
from perception_jax.systems.give.training_data import TrainingData
from perception_jax.train.task import Batch, Evaluator, Metrics

INSTRUCTION_TOKENS = 16
"""Length of instructions for which a step is planned without data; names of classes are shorter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GiveTaskConfig:
    """Settings of the training task.

    Attributes:
      model: placement and settings of the adapters.
      losses: weights of the three losses.
      instruction: how instructions condition the adapters.
      batch_size: rows of the global batch; each is encoded twice.
      workers: data-loading processes; 0 loads in threads.
      remat: name of what the backward pass recomputes in the image tower; see `nn.stack.REMAT`. The
        text tower is frozen and has no backward pass.
      plus: further losses, none by default.
      share: run the blocks before the first adapter once for both encodings of a row.
    """

    model: GiveConfig = dataclasses.field(default_factory=GiveConfig)
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    instruction: InstructionConfig = dataclasses.field(default_factory=InstructionConfig)
    plus: PlusConfig = dataclasses.field(default_factory=PlusConfig)
    batch_size: int
    workers: int = 0
    remat: str = "none"
    share: bool = True


class GiveTask:
    """Training task of GiVE: `AdapterParam`s train, the backbone is frozen."""

    trainable = AdapterParam
    shardings = SHARDINGS

    def __init__(
        self,
        config: GiveTaskConfig,
        backbone: api.Loaded,
        data: TrainingData | None,
        *,
        evaluators: Callable[[], Mapping[str, Evaluator]] | None = None,
    ):
        """Makes the task; reads no weights and no test records.

        Args:
          data: None for a task whose step is compiled but gets no batches.
          evaluators: makes the evaluators by name; called when they are first needed.

        Raises:
          ConfigError: the dense term is asked for and rows have no boxes.
        """
        if config.plus.dense and data is not None and not data.boxed:
            raise ConfigError(
                "plus.dense reads the objects' boxes, and the data's augmentation moves objects: "
                "set its warp to 0 and its min_area to 1, or plus.dense to 0."
            )
        self.config = config
        self.backbone = backbone
        self.data = data
        self._evaluators = functools.cache(evaluators or dict)

    @functools.cached_property
    def encoder(self) -> ConditionedEncoder:
        """Encoder of instructions, texts and images with the settings of this task."""
        return ConditionedEncoder(self.backbone.processor, self.config.instruction)

    def init(self, key: jax.Array) -> Give:
        """A `Give` around a fresh backbone; `pretrained` then fills the backbone."""
        rngs = nnx.Rngs(params=key)
        backbone = build_backbone(self.backbone.config, rngs=rngs)
        model = dataclasses.replace(self.config.model, dense=self.config.plus.dense > 0)
        return Give(model, backbone, rngs=rngs)

    def pretrained(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, Any]:
        """The backbone's leaves, read from its files to their shards."""
        paths = {path: path_in_give(path) for path in flatten(self.backbone.model)}
        read = self.backbone.read({path: targets[own] for path, own in paths.items()})
        return {paths[path]: leaf for path, leaf in read.items()}

    def loss(self, model: Give, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """The weighted sum of OITC, OIIC and OID; each loss and OID's accuracy as metrics.

        OITC and OIIC compare the rows of the batch; with `optim.accumulate`, those of one
        micro-batch, which should hold whole groups (`sampler`).
        """
        return self.loss_of(model, self.features(model, batch, key))

    def features(self, model: Give, batch: Batch, key: jax.Array) -> Mapping[str, Any]:
        """What the losses compare: images under both instructions, captions, and the rows' labels.

        Where a batch is computed in parts (`train.task.FeatureLoss`), `GENERIC_EVERY` counts the
        rows of a part.
        """
        del key  # no dropout
        dtype = model.backbone.logit_scale.dtype
        image = self.backbone.processor.image
        pixels = normalise(batch["image"], image.mean, image.std, dtype)
        present, absent = self._encode(model, pixels, batch)
        text = unit(model.backbone.text(batch["ids"], dtype=dtype).embedding)
        return {
            "labels": {
                "image": batch["image_index"],
                "label": batch["label"],
                "caption": batch["caption_index"],
            },
            "present": present,
            "absent": absent,
            "text": jax.lax.stop_gradient(text),
            "altered": self._altered_cosines(model, present, batch, dtype),
            "cosine_present": _cosine(present, batch["instruction"]),
            "cosine_absent": _cosine(absent, batch["absent_instruction"]),
            **self._plus_features(model, pixels, present, batch),
        }

    def loss_of(self, model: Give, features: Mapping[str, Any]) -> tuple[jax.Array, Metrics]:
        """See `loss`."""
        present, absent = features["present"], features["absent"]
        found = all_losses(
            self.config.losses,
            RowLabels(**features["labels"]),
            present=present.embedding,
            absent=absent.embedding,
            text=features["text"],
            present_logit=present.logit,
            absent_logit=absent.logit,
            scale=jnp.exp(model.backbone.logit_scale[...].astype(jnp.float32)),
            harder=features["altered"],
        )
        more, further = self._plus(features)
        decided = jnp.concatenate([present.logit > 0, absent.logit < 0])
        return found.total + more, {
            **further,
            "oitc": found.oitc,
            "oiic": found.oiic,
            "oid": found.oid,
            "oid_accuracy": jnp.mean(decided, dtype=jnp.float32),
            "cosine_present": jnp.mean(features["cosine_present"]),
            "cosine_absent": jnp.mean(features["cosine_absent"]),
        }

    def datasets(self) -> Mapping[str, Iterable[Batch]]:
        """ "train": endless batches of `ObjectRows`' arrays, with "instruction" and
        "absent_instruction" (states, mask and embedding of each row) instead of their indices."""
        if self.config.plus.generic:
            self._generic = self._encoded_instructions([GENERIC])
        lookup = _InstructionLookup(self._instructions)
        loader = self.data.loader(
            batch_size=self.config.batch_size, num_workers=self.config.workers
        )
        return {"train": loader.map(lookup)}

    def batch_shapes(self) -> Sequence[Batch]:
        """The one shape of all batches: instructions are as long as the longest of the data, or
        `INSTRUCTION_TOKENS` without data."""
        config, text = self.backbone.config, self.backbone.config.text
        side = self.backbone.processor.image.size

        def rows(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.config.batch_size, *shape), dtype)

        tokens = min(INSTRUCTION_TOKENS, text.context)
        instruction = {
            "states": rows(tokens, text.width),
            "mask": rows(tokens, dtype=jnp.bool_),
            "embedding": rows(config.embed_dim),
        }
        if self.data is not None:
            table = self._instructions
            instruction = {k: rows(*v.shape[1:], dtype=v.dtype) for k, v in table.items()}
        shapes = {
            "image": rows(side, side, 3, dtype=jnp.uint8),
            **dict.fromkeys(("image_index", "label", "caption_index"), rows(dtype=jnp.int32)),
            "ids": rows(text.context, dtype=jnp.int32),
            "instruction": instruction,
            "absent_instruction": instruction,
        }
        if self.config.plus.dense:
            shapes["boxes"] = rows(1, 4)
        if self.config.plus.altered:
            shapes |= {
                "altered_ids": rows(text.context, dtype=jnp.int32),
                "altered": rows(dtype=jnp.bool_),
            }
        return [shapes]

    def evaluators(self) -> Mapping[str, Evaluator]:
        """The evaluators by name, made when they are first needed."""
        return self._evaluators()

    @functools.cached_property
    def _generic(self) -> Mapping[str, np.ndarray]:
        with jax.ensure_compile_time_eval():  # the first to ask is the loss, while it is traced
            return self._encoded_instructions([GENERIC])

    @functools.cached_property
    def _instructions(self) -> Mapping[str, np.ndarray]:
        """A row for each instruction of the data."""
        return self._encoded_instructions(self.data.index.instructions.strings)

    def _encoded_instructions(self, instructions: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Encodes instructions with the backbone's text tower on the current mesh."""
        mesh = jax.sharding.get_mesh()
        tower = self.backbone.part("text", None if mesh.empty else mesh)
        return as_arrays(self.encoder.instruction_features(tower, instructions))

    def _encode(self, model: Give, pixels: Array, batch: Batch) -> tuple[_Encoded, _Encoded]:
        """Every image under both of its instructions."""
        both = jax.tree.map(
            lambda *rows: jnp.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:]),
            batch["instruction"],
            batch["absent_instruction"],
        )
        instructions, repeats = InstructionFeatures(**both, strength=jnp.float32(1.0)), 2
        if not self.config.share:
            pixels, repeats = jnp.repeat(pixels, 2, axis=0), 1
        out = model(pixels, instructions, repeats=repeats, remat=self.config.remat)
        grid = out.tower.grid
        places = (None, None) if out.place_logits is None else _pair(out.place_logits)
        return tuple(
            _Encoded(*rows, grid)
            for rows in zip(_pair(out.embedding), _pair(out.presence_logit), places, strict=True)
        )

    def _altered_cosines(
        self, model: Give, present: _Encoded, batch: Batch, dtype: jnp.dtype
    ) -> Array | None:
        """Cosine of each image with the altered form of its caption; None without such captions."""
        if not self.config.plus.altered:
            return None
        text = unit(model.backbone.text(batch["altered_ids"], dtype=dtype).embedding)
        cosine = jnp.sum(present.embedding * jax.lax.stop_gradient(text), axis=1, keepdims=True)
        return jnp.where(batch["altered"][:, None], cosine, -jnp.inf)

    def _plus_features(
        self, model: Give, pixels: Array, present: _Encoded, batch: Batch
    ) -> Mapping[str, Any]:
        """What the further losses compare, beside the images under both instructions."""
        found: dict[str, Any] = {}
        if self.config.plus.dense:
            found["covered"] = patch_coverage(batch["boxes"][:, 0], present.grid, pixels.shape[1])
        if self.config.plus.generic:
            some = pixels[::GENERIC_EVERY]
            rows = jax.tree.map(
                lambda x: jnp.broadcast_to(x, (len(some), *x.shape[1:])), self._generic
            )
            generic = InstructionFeatures(**rows, strength=jnp.float32(1.0))
            found["generic"] = model(some, generic).embedding, model(some).embedding
        return found

    def _plus(self, features: Mapping[str, Any]) -> tuple[Array, Metrics]:
        """The weighted sum of the further losses, and each of them as metrics."""
        plus, metrics, total = self.config.plus, {}, jnp.float32(0.0)
        if plus.dense:
            places = features["present"].places, features["absent"].places
            metrics["dense"] = dense_loss(*places, features["covered"])
            total += plus.dense * metrics["dense"]
        if plus.generic:
            metrics["generic"] = generic_loss(*features["generic"])
            total += plus.generic * metrics["generic"]
        return total, metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Encoded:
    # Arrays, or their shapes where a step is planned.
    embedding: Any
    logit: Any
    places: Any
    grid: tuple[int, int] = dataclasses.field(metadata={"static": True})


def _pair(rows: Array) -> tuple[Array, Array]:
    """Splits rows into those of the present and those of the absent instruction."""
    return rows[0::2], rows[1::2]


class _InstructionLookup:
    """Replaces the instruction indices of a batch by the rows of a table of features."""

    def __init__(self, table: Mapping[str, np.ndarray]):
        self._table = table

    def __call__(self, batch: Batch) -> Batch:
        made = {
            name: {part: values[batch[f"{name}_index"]] for part, values in self._table.items()}
            for name in ("instruction", "absent_instruction")
        }
        return {k: v for k, v in batch.items() if k.removesuffix("_index") not in made} | made


def _cosine(encoded: _Encoded, instruction: Mapping[str, Array]) -> Float[Array, " M"]:
    """Cosine of each image with its instruction; as high for absent objects if they are copied."""
    return jnp.sum(encoded.embedding * instruction["embedding"], axis=1)
