"""How CLIP's parameters lie on a mesh: `(path regex, PartitionSpec)`, first match wins.

Stacked leaves have the layer axis first, which stays whole: `lax.scan` walks along it. Widths go
to "fsdp", heads and hidden units to "tensor".
"""

from __future__ import annotations

from jax.sharding import PartitionSpec as P

SHARDINGS = (
    (r"blocks/attention/[qkv]_proj/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/attention/[qkv]_proj/bias$", P(None, "tensor")),
    (r"blocks/attention/out_proj/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/mlp/fc1/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/mlp/fc1/bias$", P(None, "tensor")),
    (r"blocks/mlp/fc2/kernel$", P(None, "tensor", "fsdp")),
    (r"text/token_embedding$", P("tensor", "fsdp")),
    (r"projection/kernel$", P("fsdp", "tensor")),
    (r"patch_embed/kernel$", P(None, None, None, "fsdp")),
    # Norms, biases, class token, positions and the temperature are small: a copy per chip.
    (r"(scale|bias|class_embedding|position_embedding|logit_scale)$", P()),
)
