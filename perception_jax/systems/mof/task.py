"""Training of a LLaVA with one or two image towers on conversations about images.

Stage 1 trains the projectors, stage 2 the language model too, or LoRA in it; image towers stay
frozen (arXiv 2401.06209, §4; arXiv 2310.03744, §3). Letters: B rows, M images of a row, H W image,
S tokens of a row.
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

from perception_jax.api import Loaded
from perception_jax.api.lora import LORA
from perception_jax.data.grouping import Order, RowShape
from perception_jax.data.image_chats import FEATURES, IMAGES, ImageChats, row_shapes
from perception_jax.errors import ConfigError
from perception_jax.inference.held_out import TokenPredictions
from perception_jax.models.llava.modeling import Llava
from perception_jax.models.registry import architecture_of
from perception_jax.nn.adapters import AdapterParam
from perception_jax.nn.lora import LoraConfig, add_lora
from perception_jax.nn.stack import Remat
from perception_jax.ops.next_token import NextTokenLoss, group_weights, next_token_loss
from perception_jax.train.accumulate import TOKENS
from perception_jax.train.task import Batch, Evaluator, Metrics

PROJECTORS = ("projector", "second_projector")
"""Parts of the model that every stage trains."""
LAYERS = (r"language/blocks/.*",)
"""Paths of the layers with LoRA: all linear ones of the language model's blocks."""

_PROJECTORS = nnx.Any(*map(nnx.PathContains, PROJECTORS))
TRAINS = {
    "projectors": _PROJECTORS,
    "all": nnx.Any(_PROJECTORS, nnx.PathContains("language")),
    "lora": nnx.Any(_PROJECTORS, AdapterParam),
}
"""Filters of what trains, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MofTaskConfig:
    """Settings of the training task.

    Attributes:
      batch_size: rows of the global batch.
      lengths: of rows in tokens, image tokens included; each is compiled.
      max_images: of a row.
      order: of the data; by "modality" there are batches without images.
      trains: "projectors" (stage 1), "all" (the projectors and the language model) or "lora" (the
        projectors and LoRA in the language model).
      lora: needed for "lora" alone.
      device_mean: whether the loss is the mean over the recipe's devices of the means over their
        tokens, as with the Trainer of `transformers` 4.31; otherwise the mean over all tokens.
      remat: what the backward pass recomputes of the language model; see `nn.stack`.
      chunk: tokens of each row whose logits are computed at a time.

    Raises:
      ConfigError: something else to train, or LoRA without settings.
    """

    batch_size: int
    lengths: tuple[int, ...]
    max_images: int = 1
    order: Order = "random"
    trains: str = "projectors"
    lora: LoraConfig | None = None
    device_mean: bool = True
    remat: Remat = "full"
    chunk: int = 256

    def __post_init__(self) -> None:
        if self.trains not in TRAINS:
            raise ConfigError(
                f"trains: expected one of {', '.join(TRAINS)}, found {self.trains!r}."
            )
        if (self.trains == "lora") != (self.lora is not None):
            raise ConfigError(
                f"trains {self.trains!r}: expected settings of LoRA for 'lora' and none otherwise, "
                f"found {self.lora}."
            )


class MofTask:
    """Training task of a LLaVA; a `train.task.Task`.

    Attributes:
      base: the model, its configuration and processor; its weights may be unread.
    """

    def __init__(
        self,
        config: MofTaskConfig,
        base: Loaded,
        data: ImageChats | None,
        *,
        drawn: Sequence[str] = (),
        evaluators: Callable[[], Mapping[str, Evaluator]] | None = None,
    ):
        """Reads no weights and no records.

        Args:
          data: None for a task whose step is compiled but gets no batches.
          drawn: parts of the model ("language") whose weights are drawn instead of read.
          evaluators: makes the evaluators by name; called when they are first needed.

        Raises:
          ConfigError: rows longer than the model's context, or frozen parts that are drawn.
        """
        context = base.config.language.context
        if config.lengths[-1] > context:
            raise ConfigError(
                f"lengths: expected rows of at most {context} tokens, the model's context, found "
                f"{config.lengths[-1]}."
            )
        if config.trains != "all" and "language" in drawn:
            raise ConfigError(
                f"trains {config.trains!r}: expected the weights of a language model, found none."
            )
        self.config, self.base, self.data = config, base, data
        self.shardings = architecture_of(base.config).shardings
        self.trainable = TRAINS[config.trains]
        if not config.device_mean:
            self.mean_over = TOKENS  # see `train.task.MeanLoss`
        self._drawn = tuple(f"{part}/" for part in drawn)
        self._evaluators = functools.cache(evaluators or dict)

    def init(self, key: jax.Array) -> nnx.Module:
        """A fresh model; `pretrained` then fills what is not drawn."""
        rngs = nnx.Rngs(params=key)
        model = architecture_of(self.base.config).build(self.base.config, rngs=rngs)
        if self.config.lora is None:
            return model
        return add_lora(model, self.config.lora, LAYERS, rngs=rngs)

    def pretrained(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, Any]:
        """The weights, read from their files to their shards."""
        return self.base.read(
            {
                path: leaf
                for path, leaf in targets.items()
                if LORA not in path and not path.startswith(self._drawn)
            }
        )

    def loss(self, model: Llava, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """The mean cross-entropy of the predicted tokens, their number, and how many are right."""
        config = self.config
        drops = config.lora is not None and config.lora.dropout > 0
        weights = group_weights(batch["label"], batch["group"]) if config.device_mean else None
        found = chat_loss(
            model,
            batch,
            weights=weights,
            chunk=config.chunk,
            remat=config.remat,
            key=key if drops else None,
        )
        count = jnp.maximum(found.count, 1).astype(jnp.float32)
        loss = found.total if config.device_mean else found.mean()
        return loss, {
            TOKENS: found.count.astype(jnp.float32),
            "accuracy": found.correct / count,
        }

    def datasets(self) -> Mapping[str, Iterable[Batch]]:
        """ "train": endless batches, see `data.image_chats`."""
        return {"train": self.data.loader()}

    def batch_shapes(self) -> Sequence[Batch]:
        """A shape for each length, and of batches by modality one without images."""
        return [self._shapes(shape) for shape in row_shapes(self.config.lengths, self.config.order)]

    def evaluators(self) -> Mapping[str, Evaluator]:
        """The evaluators by name, made when they are first needed."""
        return self._evaluators()

    def _shapes(self, shape: RowShape) -> Batch:
        rows, side = self.config.batch_size, self.base.config.image_size
        of_row = {"ids": jnp.int32, "id_mask": jnp.bool_, "label": jnp.int32}
        found = {
            key: jax.ShapeDtypeStruct((rows, shape.length), dtype) for key, dtype in of_row.items()
        }
        found["group"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
        if shape.images:
            own = {IMAGES: ((side, side, 3), jnp.uint8)}
            own = own if self.data is None else self.data.transform.image_arrays
            for key, (shape_of_one, dtype) in own.items():
                whole = (rows, self.config.max_images, *shape_of_one)
                found[key] = jax.ShapeDtypeStruct(whole, dtype)
        return found


def chat_loss(
    model: Llava, batch: Batch, *, weights: jax.Array | None = None, chunk: int, **options: Any
) -> NextTokenLoss:
    """Cross-entropy of the rows of a batch of `data.image_chats`.

    Args:
      weights: of rows.
      options: of the model, e.g. `remat`.
    """
    kept = tuple(batch[key] for key in FEATURES if key in batch)
    out = model(
        batch["ids"],
        batch["id_mask"],
        batch.get(IMAGES),
        image_tokens=model.project(kept) if kept else None,
        head=False,
        **options,
    )
    return next_token_loss(
        out.tokens, model.with_whole_head().logits, batch["label"], weights=weights, chunk=chunk
    )


def chat_predictions(
    *, batch_size: int, dtype: np.typing.DTypeLike, chunk: int = 256
) -> TokenPredictions:
    """The predictions of a LLaVA on held-out conversations, for evaluators to share.

    Args:
      batch_size: rows of a call.
      dtype: in which the model computes.
      chunk: tokens of each row whose logits are computed at a time.
    """
    loss = functools.partial(chat_loss, dtype=dtype, chunk=chunk)
    return TokenPredictions(loss, batch_size=batch_size)
