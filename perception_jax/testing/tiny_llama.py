"""A language model small enough for tests."""

from __future__ import annotations

from perception_jax.models.llama.config import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=96,
    context=64,
    width=32,
    depth=3,
    heads=4,
    kv_heads=2,
    head_width=8,
    mlp_dim=48,
    start_id=1,
    end_ids=(2,),
    pad_id=0,
)
"""Configuration of the tiny Llama: grouped queries, a head of its own."""
