"""CLIP's parameter names: Hugging Face ("hf") and OpenAI / open_clip ("reference")."""

from __future__ import annotations

from perception_jax.interop.rules import (
    DATA_PARALLEL,
    SPLIT_LINEAR,
    Ignore,
    Rename,
    Rule,
    RuleTable,
    Split,
    conv,
    linear,
    norm,
)


def hf_table() -> RuleTable:
    """The names of `transformers.CLIPModel`, `pre_layrnorm` included."""
    vision, text = "vision_model", "text_model"
    rules = (
        *conv(f"{vision}.embeddings.patch_embedding", "vision/patch_embed", bias=False),
        Rule(f"{vision}.embeddings.class_embedding", "vision/class_embedding"),
        Rule(f"{vision}.embeddings.position_embedding.weight", "vision/position_embedding"),
        *norm(f"{vision}.pre_layrnorm", "vision/norm_pre"),
        *_hf_blocks(f"{vision}.encoder.layers.{{i}}", "vision/blocks"),
        *norm(f"{vision}.post_layernorm", "vision/norm_post"),
        *linear("visual_projection", "vision/projection", bias=False),
        Rule(f"{text}.embeddings.token_embedding.weight", "text/token_embedding"),
        Rule(f"{text}.embeddings.position_embedding.weight", "text/position_embedding"),
        *_hf_blocks(f"{text}.encoder.layers.{{i}}", "text/blocks"),
        *norm(f"{text}.final_layer_norm", "text/norm_final"),
        *linear("text_projection", "text/projection", bias=False),
        Rule("logit_scale", "logit_scale"),
    )
    ignored = (Ignore("*.position_ids", "0, 1, 2, …: a buffer of older transformers"),)
    return RuleTable(rules=rules, ignored=ignored)


def reference_table() -> RuleTable:
    """The names of OpenAI's `clip` and of open_clip's `CLIP` (also MetaCLIP, DFN, LAION)."""
    rules = (
        *conv("visual.conv1", "vision/patch_embed", bias=False),
        Rule("visual.class_embedding", "vision/class_embedding"),
        Rule("visual.positional_embedding", "vision/position_embedding"),
        *norm("visual.ln_pre", "vision/norm_pre"),
        *_reference_blocks("visual.transformer.resblocks.{i}", "vision/blocks"),
        *norm("visual.ln_post", "vision/norm_post"),
        Rule("visual.proj", "vision/projection/kernel"),
        Rule("token_embedding.weight", "text/token_embedding"),
        Rule("positional_embedding", "text/position_embedding"),
        *_reference_blocks("transformer.resblocks.{i}", "text/blocks"),
        *norm("ln_final", "text/norm_final"),
        Rule("text_projection", "text/projection/kernel"),
        Rule("logit_scale", "logit_scale"),
    )
    ignored = (
        Ignore("input_resolution", "a scalar that OpenAI's archives carry beside the weights"),
        Ignore("context_length", "a scalar that OpenAI's archives carry beside the weights"),
        Ignore("vocab_size", "a scalar that OpenAI's archives carry beside the weights"),
        Ignore("attn_mask", "the causal mask, a buffer"),
    )
    # Training checkpoints (MetaCLIP's among them) wrap the dict, and DataParallel the names.
    renames = (Rename(r"^state_dict\.", ""), DATA_PARALLEL)
    return RuleTable(rules=rules, ignored=ignored, renames=renames)


TABLES = {"hf": hf_table, "reference": reference_table}
"""By layout."""


def _hf_blocks(source: str, target: str) -> tuple[Rule, ...]:
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


def _reference_blocks(source: str, target: str) -> tuple[Rule, ...]:
    attention = f"{target}/attention"
    kernels = tuple(f"{attention}/{name}_proj/kernel" for name in "qkv")
    biases = tuple(f"{attention}/{name}_proj/bias" for name in "qkv")
    return (
        *norm(f"{source}.ln_1", f"{target}/norm1"),
        Rule(f"{source}.attn.in_proj_weight", kernels, SPLIT_LINEAR),
        Rule(f"{source}.attn.in_proj_bias", biases, Split(0)),
        *linear(f"{source}.attn.out_proj", f"{attention}/out_proj"),
        *norm(f"{source}.ln_2", f"{target}/norm2"),
        *linear(f"{source}.mlp.c_fc", f"{target}/mlp/fc1"),
        *linear(f"{source}.mlp.c_proj", f"{target}/mlp/fc2"),
    )
