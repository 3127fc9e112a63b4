"""Sharding rules of transformers: `(path regex, PartitionSpec)`, first match wins.

Stacked leaves have the layer axis first, which stays whole: `lax.scan` walks along it. Widths go
to "fsdp", heads and hidden units to "tensor".
"""

from __future__ import annotations

from jax.sharding import PartitionSpec as P

SHARDINGS = (
    (r"blocks/(base/)?attention/[qkv]_proj/(kernel|lora/b)$", P(None, "fsdp", "tensor")),
    (r"blocks/(base/)?attention/[qkv]_proj/bias$", P(None, "tensor")),
    (r"blocks/(base/)?attention/out_proj/(kernel|lora/a)$", P(None, "tensor", "fsdp")),
    (r"blocks/(base/)?mlp/(fc1|gate|up)/(kernel|lora/b)$", P(None, "fsdp", "tensor")),
    (r"blocks/(base/)?mlp/(fc1|gate|up)/bias$", P(None, "tensor")),
    (r"blocks/(base/)?mlp/(fc2|down)/(kernel|lora/a)$", P(None, "tensor", "fsdp")),
    (r"blocks/.*/lora/a$", P(None, "fsdp")),
    (r"blocks/.*/lora/b$", P(None, None, "fsdp")),
    (r"/lora/a$", P("fsdp")),
    (r"/lora/b$", P(None, "fsdp")),
    (r"head/([qkv]_proj|mlp/fc1)/kernel$", P("fsdp", "tensor")),
    (r"head/([qkv]_proj|mlp/fc1)/bias$", P("tensor")),
    (r"head/(out_proj|mlp/fc2)/kernel$", P("tensor", "fsdp")),
    (r"token_embedding$", P("tensor", "fsdp")),
    (r"lm_head/kernel$", P("fsdp", "tensor")),
    (r"projection/kernel$", P("fsdp", "tensor")),
    (r"patch_embed/kernel$", P(None, None, None, "fsdp")),
    # Norms, biases, special tokens, positions and the temperature are small: a copy per chip.
    (r"(scale[12]?|bias|class_embedding|position_embedding|probe|_tokens?)$", P()),
)
"""Sharding rules of transformers."""
