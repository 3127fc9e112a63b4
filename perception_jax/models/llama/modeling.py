"""Llama: a causal decoder with RMS norms, rotary positions and gated MLPs (arXiv 2302.13971).

Serves LLaMA, Llama 2 and 3, Vicuna and SmolLM2. Letters: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from perception_jax.errors import ConfigError
from perception_jax.generate.model import LanguageOutput
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.nn import stack
from perception_jax.nn.attention import Attention, AttentionMask, KvCache
from perception_jax.nn.linear import Linear, check_ids, lookup, product
from perception_jax.nn.mlp import GatedMlp
from perception_jax.nn.norms import RmsNorm
from perception_jax.nn.rope import rotary
from perception_jax.nn.taps import Taps, refuse_pool
from perception_jax.nn.transformer import Block
from perception_jax.ops.sharding import constrain


class Llama(nnx.Module):
    """A causal language model; see `generate.model.LanguageModel`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, vocab_size = config.width, config.vocab_size
        self.token_embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (vocab_size, width))
        )

        def block(rngs: nnx.Rngs) -> Block:
            attention = Attention(
                width,
                config.heads,
                head_width=config.head_width,
                kv_heads=config.kv_heads,
                bias=config.attention_bias,
                rngs=rngs,
            )
            mlp = GatedMlp(width, config.mlp_dim, act=config.act, bias=config.mlp_bias, rngs=rngs)
            return Block(width, attention, mlp, eps=config.eps, norm_type=RmsNorm)

        self.blocks = stack.init(block, config.depth, rngs=rngs)
        self.norm_final = RmsNorm(width, eps=config.eps)
        self.lm_head = None if config.tied else Linear(width, vocab_size, bias=False, rngs=rngs)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    @property
    def context(self) -> int:
        """Most tokens of a text."""
        return self.config.context

    def embed(
        self, ids: Int[Array | np.ndarray, "B T"], dtype: np.typing.DTypeLike | None = None
    ) -> Float[Array, "B T D"]:
        """Looks up the embeddings of token ids.

        Args:
          dtype: in which the model then computes; None is that of the table.

        Raises:
          ConfigError: outside of a compiled function, an id that the vocabulary lacks; inside, its
            embedding is NaN.
        """
        check_ids(ids, self.vocab_size, "language model")
        table = self.token_embedding[...]
        return lookup(table, jnp.asarray(ids), table.dtype if dtype is None else dtype)

    def logits(self, tokens: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Computes float32 logits of the next token from tokens after the final norm."""
        if self.lm_head is None:
            table = self.token_embedding[...].astype(tokens.dtype)
            return product(tokens, table.T, jnp.float32)
        return self.lm_head(tokens, dtype=jnp.float32)

    def with_whole_head(self) -> Llama:
        """Returns the model with a head that only "tensor" splits, for many calls of `logits` in a
        loop: inside of it the compiler would gather what "fsdp" splits for each of them."""
        model = jax.tree.map(lambda leaf: leaf, self)
        if model.lm_head is None:
            table = constrain(model.token_embedding[...], "tensor")
            model.token_embedding = nnx.Param(table)
        else:
            kernel = constrain(model.lm_head.kernel[...], None, "tensor")
            model.lm_head.kernel = nnx.Param(kernel)
        return model

    def empty_cache(
        self, batch: int, capacity: int, dtype: np.typing.DTypeLike | None = None
    ) -> KvCache:
        """Allocates a cache for `capacity` tokens of each example.

        Args:
          dtype: None is that of the embedding table.
        """
        return KvCache.empty(
            depth=self.config.depth,
            batch=batch,
            capacity=capacity,
            kv_heads=self.config.kv_heads,
            head_width=self.config.head_width,
            dtype=self.token_embedding[...].dtype if dtype is None else dtype,
        )

    def __call__(
        self,
        inputs: Int[Array | np.ndarray, "B T"] | Float[Array, "B T D"],
        *,
        mask: Bool[Array | np.ndarray, "B T"] | None = None,
        segments: Int[Array | np.ndarray, "B T"] | None = None,
        positions: Int[Array | np.ndarray, "B T"] | None = None,
        cache: KvCache | None = None,
        taps: Taps | None = None,
        dtype: np.typing.DTypeLike | None = None,
        head: bool = True,
        remat: stack.Remat = False,
        key: Array | None = None,
    ) -> LanguageOutput:
        """Runs the model on token ids or embeddings.

        Positions count the tokens of `mask`, so that padding on either side changes nothing.

        Args:
          inputs: token ids, or embeddings of tokens and images.
          mask: which tokens count; None counts all. With a cache there is none: padding comes after
            the tokens, and the caller sets the lengths of the cache that is returned.
          segments: ids of documents packed into one row; a token attends within its own.
          positions: None counts from 0, or from the cached tokens on. Packed documents need them.
          cache: with the tokens before.
          taps: what to record.
          dtype: of embeddings that are looked up; see `embed`.
          head: whether logits are computed.
          remat: what the backward pass recomputes; see `nn.stack`.
          key: for the dropout of LoRA; None drops nothing.

        Raises:
          ConfigError: an unknown id, more tokens than the context, or a mask beside a cache.
        """
        refuse_pool(taps)
        x = self.embed(inputs, dtype) if inputs.ndim == 2 else constrain(inputs, "batch")
        count = x.shape[1]
        if count > self.context:
            raise ConfigError(
                f"language model: expected at most {self.context} tokens, found {count}."
            )
        if cache is not None and mask is not None:
            raise ConfigError(
                "language model: expected no mask beside a cache. Put padding after the tokens, as "
                "`generate.extend` does."
            )
        if positions is None:
            positions = _positions(count, mask, cache)
        rope = rotary(
            jnp.asarray(positions),
            self.config.head_width,
            theta=self.config.rope_theta,
            scaling=self.config.rope_scaling,
        )
        visible = AttentionMask(
            array=None if mask is None else jnp.asarray(mask)[:, None, None],
            segments=None if segments is None else jnp.asarray(segments),
            causal=True,
        )
        out = stack.run(
            self.blocks, x, mask=visible, rope=rope, taps=taps, cache=cache, key=key, remat=remat
        )
        tokens = constrain(self.norm_final(out.x), "batch")
        return LanguageOutput(
            tokens=tokens,
            logits=constrain(self.logits(tokens), "batch", None, "tensor") if head else None,
            hidden=out.hidden,
            attention=out.attention,
            cache=out.cache,
        )


def _positions(
    count: int, mask: Bool[Array | np.ndarray, "B T"] | None, cache: KvCache | None
) -> Int[Array, "*B T"]:
    if cache is not None:
        return cache.lengths[:, None] + jnp.arange(count)
    if mask is None:
        return jnp.arange(count)
    return jnp.maximum(jnp.cumsum(jnp.asarray(mask), axis=1) - 1, 0)
