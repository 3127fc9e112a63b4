"""Training of a language model on texts and conversations: all of its weights, or LoRA.

The loss is the mean over the predicted tokens of the global batch (as `transformers`' Trainer has
it for one device), in chunks; see `ops.next_token`. Letters: B rows, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from perception_jax.api import Loaded
from perception_jax.api.lora import LORA
from perception_jax.data.packing import KEYS, PackedTexts
from perception_jax.errors import ConfigError
from perception_jax.generate import LanguageModel
from perception_jax.models.registry import architecture_of
from perception_jax.nn.adapters import AdapterParam
from perception_jax.nn.lora import LoraConfig, add_lora
from perception_jax.nn.stack import Remat
from perception_jax.ops.next_token import NextTokenLoss, next_token_loss
from perception_jax.train.accumulate import TOKENS
from perception_jax.train.task import Batch, Evaluator, Metrics

ALL_BLOCKS = (r"blocks/.*",)
"""LoRA on every linear layer of the blocks, as LLaVA's recipe has it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTaskConfig:
    """Settings of the training task.

    Attributes:
      batch_size: rows of the global batch.
      length: tokens of a row.
      lora: None trains all weights.
      layers: paths of the layers with LoRA, as of `nn.add_lora`.
      remat: what the backward pass recomputes; see `nn.stack`.
      chunk: tokens of each row whose logits are computed at a time.
    """

    batch_size: int
    length: int
    lora: LoraConfig | None = None
    layers: tuple[str, ...] = ALL_BLOCKS
    remat: Remat = "full"
    chunk: int = 256


class TextTask:
    """Training task of a language model; with LoRA the model is frozen and `AdapterParam`s train.

    Attributes:
      base: the model, its configuration and tokenizer; its weights may be unread.
    """

    mean_over = TOKENS
    """See `train.task.MeanLoss`."""

    def __init__(
        self,
        config: TextTaskConfig,
        base: Loaded,
        data: PackedTexts | None,
        *,
        scratch: bool = False,
        evaluators: Callable[[], Mapping[str, Evaluator]] | None = None,
    ):
        """Reads no weights and no texts.

        Args:
          data: None for a task whose step is compiled but gets no batches.
          scratch: whether the weights are drawn instead of read.
          evaluators: makes the evaluators by name; called when they are first needed.

        Raises:
          ConfigError: rows longer than the model's context, or LoRA on drawn weights.
        """
        if config.length > base.config.context:
            raise ConfigError(
                f"length: expected rows of at most {base.config.context} tokens, the model's "
                f"context, found {config.length}."
            )
        if scratch and config.lora is not None:
            raise ConfigError("lora: expected the weights of a model to adapt, found none.")
        self.config, self.base, self.data = config, base, data
        self.shardings = architecture_of(base.config).shardings
        self.trainable = nnx.Param if config.lora is None else AdapterParam
        self._scratch = scratch
        self._evaluators = functools.cache(evaluators or dict)

    def init(self, key: jax.Array) -> nnx.Module:
        """A fresh model; `pretrained` then fills all but LoRA."""
        rngs = nnx.Rngs(params=key)
        model = architecture_of(self.base.config).build(self.base.config, rngs=rngs)
        if self.config.lora is None:
            return model
        return add_lora(model, self.config.lora, self.config.layers, rngs=rngs)

    def pretrained(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, Any]:
        """The model's weights, read from their files to their shards."""
        if self._scratch:
            return {}
        return self.base.read({path: leaf for path, leaf in targets.items() if LORA not in path})

    def loss(self, model: LanguageModel, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """The mean cross-entropy of the predicted tokens, their number, and how many are right."""
        lora, config = self.config.lora, self.config
        drops = lora is not None and lora.dropout > 0
        found = row_loss(
            model, batch, chunk=config.chunk, remat=config.remat, key=key if drops else None
        )
        count = jnp.maximum(found.count, 1).astype(jnp.float32)
        return found.mean(), {
            TOKENS: found.count.astype(jnp.float32),
            "accuracy": found.correct / count,
        }

    def datasets(self) -> Mapping[str, Iterable[Batch]]:
        """ "train": endless batches of packed rows, see `data.packing.KEYS`."""
        return {"train": self.data.loader()}

    def batch_shapes(self) -> Sequence[Batch]:
        """The one shape of all batches."""
        shape = (self.config.batch_size, self.config.length)
        return [dict.fromkeys(KEYS, jax.ShapeDtypeStruct(shape, jnp.int32))]

    def evaluators(self) -> Mapping[str, Evaluator]:
        """The evaluators by name, made when they are first needed."""
        return self._evaluators()


def row_loss(model: LanguageModel, batch: Batch, *, chunk: int, **options: Any) -> NextTokenLoss:
    """Cross-entropy of rows of `data.packing.KEYS`, each record by itself.

    Args:
      options: of the model, e.g. `remat`.
    """
    out = model(
        batch["ids"],
        segments=batch["segment"],
        positions=batch["position"],
        head=False,
        **options,
    )
    return next_token_loss(out.tokens, model.with_whole_head().logits, batch["label"], chunk=chunk)
