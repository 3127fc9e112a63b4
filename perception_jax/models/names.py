"""Rules that several architectures share: names of transformers in PyTorch code bases.

Our side is always `nn.transformer.Block`: norm1, attention, norm2, mlp.
"""

from __future__ import annotations

from perception_jax.interop.rules import SPLIT_LINEAR, Rename, Rule, Split, linear, norm

BARE_TEXT = Rename(
    r"^(text_projection|positional_embedding|token_embedding|transformer|ln_final)(?=\.|$)",
    r"text.\1",
)
"""open_clip models with a separate text tower also take files that name it as CLIP does."""


def hf_blocks(source: str, target: str) -> tuple[Rule, ...]:
    """Hugging Face's CLIP and SigLIP: `layer_norm1`, `self_attn.q_proj`, `mlp.fc1`."""
    attention = [
        rule
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        for rule in linear(f"{source}.self_attn.{name}", f"{target}/attention/{name}")
    ]
    return (
        *norm(f"{source}.layer_norm1", f"{target}/norm1"),
        *attention,
        *norm(f"{source}.layer_norm2", f"{target}/norm2"),
        *linear(f"{source}.mlp.fc1", f"{target}/mlp/fc1"),
        *linear(f"{source}.mlp.fc2", f"{target}/mlp/fc2"),
    )


def open_clip_blocks(source: str, target: str) -> tuple[Rule, ...]:
    """OpenAI's CLIP and open_clip: `ln_1`, `attn.in_proj_weight`, `mlp.c_fc`."""
    return (
        *norm(f"{source}.ln_1", f"{target}/norm1"),
        *packed_qkv(f"{source}.attn.in_proj_weight", f"{target}/attention"),
        *packed_qkv_bias(f"{source}.attn.in_proj_bias", f"{target}/attention"),
        *linear(f"{source}.attn.out_proj", f"{target}/attention/out_proj"),
        *norm(f"{source}.ln_2", f"{target}/norm2"),
        *linear(f"{source}.mlp.c_fc", f"{target}/mlp/fc1"),
        *linear(f"{source}.mlp.c_proj", f"{target}/mlp/fc2"),
    )


def timm_blocks(source: str, target: str) -> tuple[Rule, ...]:
    """timm's VisionTransformer and DINOv2: `norm1`, `attn.qkv`, `attn.proj`, `mlp.fc1`."""
    return (
        *norm(f"{source}.norm1", f"{target}/norm1"),
        *packed_qkv(f"{source}.attn.qkv.weight", f"{target}/attention"),
        *packed_qkv_bias(f"{source}.attn.qkv.bias", f"{target}/attention"),
        *linear(f"{source}.attn.proj", f"{target}/attention/out_proj"),
        *norm(f"{source}.norm2", f"{target}/norm2"),
    )


def packed_qkv(source: str, target: str) -> tuple[Rule, ...]:
    """Rule of one [3 D, D] matrix of q, k and v."""
    kernels = tuple(f"{target}/{name}_proj/kernel" for name in "qkv")
    return (Rule(source, kernels, SPLIT_LINEAR),)


def packed_qkv_bias(source: str, target: str) -> tuple[Rule, ...]:
    """Rule of one [3 D] bias of q, k and v."""
    return (Rule(source, tuple(f"{target}/{name}_proj/bias" for name in "qkv"), Split(0)),)


def open_clip_text(prefix: str) -> tuple[Rule, ...]:
    """The text tower of open_clip, without its projection; `prefix` is "" or "text."."""
    return (
        Rule(f"{prefix}token_embedding.weight", "text/token_embedding"),
        Rule(f"{prefix}positional_embedding", "text/position_embedding"),
        *open_clip_blocks(f"{prefix}transformer.resblocks.{{i}}", "text/blocks"),
        *norm(f"{prefix}ln_final", "text/norm_final"),
    )


def hf_text(prefix: str) -> tuple[Rule, ...]:
    """The text tower of Hugging Face's CLIP and SigLIP, without its projection."""
    return (
        Rule(f"{prefix}embeddings.token_embedding.weight", "text/token_embedding"),
        Rule(f"{prefix}embeddings.position_embedding.weight", "text/position_embedding"),
        *hf_blocks(f"{prefix}encoder.layers.{{i}}", "text/blocks"),
        *norm(f"{prefix}final_layer_norm", "text/norm_final"),
    )
