"""Configurations of the Llama family: published sizes, Hugging Face and GGUF settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.models.towers import HF_FILE
from perception_jax.nn.mlp import ACTIVATIONS
from perception_jax.nn.rope import RopeScaling
from perception_jax.settings import Choice, Either, Integer, Number, Optional, Settings, Several

_ID = Integer(0, 2**31 - 1)
_THETA = Number(low=1.0, high=1e12)
_FACTOR = Number(low=1.0, high=1024.0)
_KINDS = {
    "width": settings.WIDTH,
    "depth": settings.DEPTH,
    "heads": settings.HEADS,
    "kv_heads": settings.HEADS,
    "head_width": settings.WIDTH,
    "mlp_dim": settings.WIDTH,
    "eps": settings.EPS,
    "vocab_size": settings.VOCABULARY,
    "context": settings.CONTEXT,
    "act": Choice(tuple(ACTIVATIONS)),
    "rope_theta": _THETA,
    "attention_bias": settings.FLAG,
    "mlp_bias": settings.FLAG,
    "tied": settings.FLAG,
    "start_id": Optional(_ID),
    "end_ids": Several(_ID, 0, 64),
    "pad_id": Optional(_ID),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Configuration of a language model of the Llama family.

    Attributes:
      kv_heads: key-value heads, a divisor of `heads`.
      head_width: of one head; even.
      context: most tokens of a text.
      rope_theta, rope_scaling: base and scaling of the wavelengths of the rotary positions.
      attention_bias: of all four projections.
      mlp_bias: of the three layers of the MLP.
      tied: the head is the transposed embedding table.
      start_id, end_ids, pad_id: special tokens, where the settings say them; the model does not
        use them.

    Raises:
      ConfigError: a field of another type or out of range, or sizes that do not fit together.
    """

    vocab_size: int
    context: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_dim: int
    act: str = "silu"
    eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    start_id: int | None = 1
    end_ids: tuple[int, ...] = (2,)
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            settings.check(getattr(self, name), kind, f"LlamaConfig.{name}")
        if self.heads % self.kv_heads or self.head_width % 2:
            raise ConfigError(
                f"LlamaConfig: expected key-value heads that divide the {self.heads} heads and an "
                f"even head width, found {self.kv_heads} and {self.head_width}."
            )

    @classmethod
    def vicuna_7b(cls, version: str = "1.5") -> LlamaConfig:
        """Vicuna 7B, "1.1", "1.3" (both LLaMA) or "1.5" (Llama 2)."""
        return _vicuna(version, width=4096, depth=32, heads=32, mlp_dim=11008)

    @classmethod
    def vicuna_13b(cls, version: str = "1.5") -> LlamaConfig:
        """Vicuna 13B, "1.1", "1.3" (both LLaMA) or "1.5" (Llama 2)."""
        return _vicuna(version, width=5120, depth=40, heads=40, mlp_dim=13824)

    @classmethod
    def smollm2_135m(cls) -> LlamaConfig:
        """SmolLM2-135M; its instruct version has other special tokens."""
        return _smollm2(width=576, depth=30, heads=9, kv_heads=3, mlp_dim=1536)

    @classmethod
    def smollm2_360m(cls) -> LlamaConfig:
        """SmolLM2-360M."""
        return _smollm2(width=960, depth=32, heads=15, kv_heads=5, mlp_dim=2560)

    @classmethod
    def smollm2_1_7b(cls) -> LlamaConfig:
        """SmolLM2-1.7B."""
        return _smollm2(width=2048, depth=24, heads=32, kv_heads=32, mlp_dim=8192, theta=130000.0)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Reads the `config.json` of a Hugging Face Llama folder.

        Keys that are left out take the defaults of `transformers.LlamaConfig`.

        Raises:
          ConfigError: a setting of another type or out of range, scaled rotary positions of
            another kind than "linear" and "llama3", or sliding windows.
        """
        model = Settings(config, HF_FILE)
        _refuse_windows(model)
        width = model.get("hidden_size", settings.WIDTH, 4096)
        heads = model.get("num_attention_heads", settings.HEADS, 32)
        kv_heads = model.get("num_key_value_heads", Optional(settings.HEADS), None)
        head_width = model.get("head_dim", Optional(settings.WIDTH), None)
        end = model.get("eos_token_id", Optional(Either(_ID, Several(_ID, 0, 64))), 2)
        pad = model.get("pad_token_id", Optional(Integer(-1, 2**31 - 1)), None)
        theta, scaling = _rotary(model)
        return cls(
            vocab_size=model.get("vocab_size", settings.VOCABULARY, 32000),
            context=model.get("max_position_embeddings", settings.CONTEXT, 2048),
            width=width,
            depth=model.get("num_hidden_layers", settings.DEPTH, 32),
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_width=width // heads if head_width is None else head_width,
            mlp_dim=model.get("intermediate_size", settings.WIDTH, 11008),
            act=model.get("hidden_act", Choice(tuple(ACTIVATIONS)), "silu"),
            eps=model.get("rms_norm_eps", settings.EPS, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            attention_bias=model.get("attention_bias", settings.FLAG, False),
            mlp_bias=model.get("mlp_bias", settings.FLAG, False),
            tied=model.get("tie_word_embeddings", settings.FLAG, False),
            start_id=model.get("bos_token_id", Optional(_ID), 1),
            end_ids=() if end is None else end if isinstance(end, tuple) else (end,),
            pad_id=None if pad == -1 else pad,
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `transformers.LlamaForCausalLM` loads."""
        ends = list(self.end_ids)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context,
            "hidden_size": self.width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_width,
            "intermediate_size": self.mlp_dim,
            "hidden_act": self.act,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": _written(self.rope_scaling),
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.start_id,
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": self.pad_id,
        }

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> LlamaConfig:
        """Reads the metadata of a GGUF file of the architecture "llama"; see `with_tensors`.

        Raises:
          ConfigError: a value that is missing, of another type or out of range, or scaled rotary
            positions.
        """
        file = Settings(metadata, "GGUF metadata")
        llama = "llama"
        file.get("general.architecture", Choice((llama,)))
        scaling = file.get(f"{llama}.rope.scaling.type", settings.TEXT, "none")
        if scaling != "none":
            raise ConfigError(
                f"GGUF: expected a model without scaled rotary positions, found {scaling!r}: load "
                "the Hugging Face folder of this model instead."
            )
        width = file.get(f"{llama}.embedding_length", settings.WIDTH)
        heads = file.get(f"{llama}.attention.head_count", settings.HEADS)
        end = file.get("tokenizer.ggml.eos_token_id", Optional(_ID), None)
        return cls(
            vocab_size=file.get(f"{llama}.vocab_size", settings.VOCABULARY, 1),
            context=file.get(f"{llama}.context_length", settings.CONTEXT),
            width=width,
            depth=file.get(f"{llama}.block_count", settings.DEPTH),
            heads=heads,
            kv_heads=file.get(f"{llama}.attention.head_count_kv", settings.HEADS, heads),
            head_width=file.get(f"{llama}.attention.key_length", settings.WIDTH, width // heads),
            mlp_dim=file.get(f"{llama}.feed_forward_length", settings.WIDTH),
            eps=file.get(f"{llama}.attention.layer_norm_rms_epsilon", settings.EPS),
            rope_theta=file.get(f"{llama}.rope.freq_base", _THETA, 10000.0),
            start_id=file.get("tokenizer.ggml.bos_token_id", Optional(_ID), None),
            end_ids=() if end is None else (end,),
            pad_id=file.get("tokenizer.ggml.padding_token_id", Optional(_ID), None),
        )

    def with_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> LlamaConfig:
        """Returns the configuration with what only the tensors of a GGUF file tell: the size of the
        vocabulary, and whether the head is tied."""
        table = shapes.get("token_embd.weight", ())
        if len(table) != 2:
            return self
        tied = "output.weight" not in shapes
        return dataclasses.replace(self, vocab_size=table[0], tied=tied)


def _refuse_windows(model: Settings) -> None:
    """Refuses sliding windows, which the plain causal mask would silently leave out."""
    window = model.content.get("sliding_window")
    kinds = model.content.get("layer_types") or ()
    used = window is not None and model.content.get("use_sliding_window", True)
    if used or "sliding_attention" in kinds:
        raise ConfigError(
            f"{HF_FILE}: expected a model in which every token attends to all before it, found a "
            f"sliding window of {settings.shown(window)} tokens; such models are not supported."
        )


def _rotary(model: Settings) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, as transformers 4 or 5 write them."""
    both = model.section("rope_parameters", optional=True)
    rope = both if both.content else model.section("rope_scaling", optional=True)
    theta = rope.get("rope_theta", _THETA, model.get("rope_theta", _THETA, 10000.0))
    kind = rope.content.get("rope_type", rope.content.get("type", "default"))
    if kind in ("default", None):
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(factor=rope.get("factor", _FACTOR))
    if kind != "llama3":
        raise ConfigError(
            f"{rope.where}: expected rotary positions of the kind 'default', 'linear' or 'llama3', "
            f"found {settings.shown(kind)}, which is not supported."
        )
    scaling = RopeScaling(
        factor=rope.get("factor", _FACTOR),
        context=rope.get("original_max_position_embeddings", settings.CONTEXT),
        low=rope.get("low_freq_factor", settings.RATIO),
        high=rope.get("high_freq_factor", settings.RATIO),
    )
    if scaling.low >= scaling.high:
        raise ConfigError(
            f"{rope.where}: expected low_freq_factor below high_freq_factor, found {scaling.low} "
            f"and {scaling.high}."
        )
    return theta, scaling


def _written(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The inverse of `_rotary`, as transformers 4 writes it and 5 reads it."""
    if scaling is None:
        return None
    if scaling.context is None:
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.context,
    }


def _vicuna(version: str, *, width: int, depth: int, heads: int, mlp_dim: int) -> LlamaConfig:
    known = {"1.1": (2048, 1e-6), "1.3": (2048, 1e-6), "1.5": (4096, 1e-5)}
    if version not in known:
        raise ConfigError(
            f"Vicuna: expected one of the versions {', '.join(known)}, found {version!r}."
        )
    context, eps = known[version]
    return LlamaConfig(
        vocab_size=32000,
        context=context,
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_dim=mlp_dim,
        eps=eps,
    )


def _smollm2(
    *, width: int, depth: int, heads: int, kv_heads: int, mlp_dim: int, theta: float = 100000.0
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152,
        context=8192,
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        head_width=width // heads,
        mlp_dim=mlp_dim,
        eps=1e-5,
        rope_theta=theta,
        tied=True,
        start_id=0,
        end_ids=(0,),
    )
