"""CLIP's parameter names: Hugging Face ("hf") and OpenAI / open_clip ("reference")."""

from __future__ import annotations

from perception_jax.interop.rules import (
    DATA_PARALLEL,
    Ignore,
    Rename,
    Rule,
    RuleTable,
    conv,
    linear,
    norm,
)
from perception_jax.models.names import hf_blocks, hf_text, open_clip_blocks, open_clip_text


def hf_table() -> RuleTable:
    """The names of `transformers.CLIPModel`, `pre_layrnorm` included."""
    vision = "vision_model"
    rules = (
        *conv(f"{vision}.embeddings.patch_embedding", "vision/patch_embed", bias=False),
        Rule(f"{vision}.embeddings.class_embedding", "vision/class_embedding"),
        Rule(f"{vision}.embeddings.position_embedding.weight", "vision/position_embedding"),
        *norm(f"{vision}.pre_layrnorm", "vision/norm_pre"),
        *hf_blocks(f"{vision}.encoder.layers.{{i}}", "vision/blocks"),
        *norm(f"{vision}.post_layernorm", "vision/norm_post"),
        *linear("visual_projection", "vision/projection", bias=False),
        *hf_text("text_model."),
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
        *open_clip_blocks("visual.transformer.resblocks.{i}", "vision/blocks"),
        *norm("visual.ln_post", "vision/norm_post"),
        Rule("visual.proj", "vision/projection/kernel"),
        *open_clip_text(""),
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


TABLES = {"hf": lambda _: hf_table(), "reference": lambda _: reference_table()}
"""By layout; the names depend on no setting."""
