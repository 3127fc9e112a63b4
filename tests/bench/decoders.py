"""Sizes of the decoders that the benchmarks use."""

from __future__ import annotations

from perception_jax.models.llama.config import LlamaConfig

SIZES = {
    "160m": LlamaConfig(
        vocab_size=32000,
        context=2048,
        width=768,
        depth=12,
        heads=12,
        kv_heads=12,
        head_width=64,
        mlp_dim=3072,
    ),
    "1b": LlamaConfig(
        vocab_size=32000,
        context=2048,
        width=2048,
        depth=22,
        heads=32,
        kv_heads=4,
        head_width=64,
        mlp_dim=5632,
    ),
}
"""Sizes of JackFram/llama-160m and TinyLlama-1.1B."""
