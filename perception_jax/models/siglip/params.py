"""SigLIP's parameter names: Hugging Face ("hf") and open_clip with a timm trunk ("reference")."""

from __future__ import annotations

import dataclasses

from perception_jax.interop.rules import (
    DATA_PARALLEL,
    SPLIT_LINEAR,
    ExtraAxes,
    Ignore,
    Rename,
    Rule,
    RuleTable,
    Split,
    conv,
    linear,
    norm,
)
from perception_jax.models.names import (
    BARE_TEXT,
    hf_blocks,
    hf_text,
    open_clip_text,
    packed_qkv,
    packed_qkv_bias,
    timm_blocks,
)

_HEAD = "vision/head"


def hf_table() -> RuleTable:
    """The names of `transformers.SiglipModel`."""
    vision = "vision_model"
    head = f"{vision}.head"
    rules = (
        *conv(f"{vision}.embeddings.patch_embedding", "vision/patch_embed"),
        Rule(f"{vision}.embeddings.position_embedding.weight", "vision/position_embedding"),
        *hf_blocks(f"{vision}.encoder.layers.{{i}}", "vision/blocks"),
        *norm(f"{vision}.post_layernorm", "vision/norm_post"),
        Rule(f"{head}.probe", f"{_HEAD}/probe", ExtraAxes((0, 1))),
        *packed_qkv(f"{head}.attention.in_proj_weight", _HEAD),
        *packed_qkv_bias(f"{head}.attention.in_proj_bias", _HEAD),
        *linear(f"{head}.attention.out_proj", f"{_HEAD}/out_proj"),
        *norm(f"{head}.layernorm", f"{_HEAD}/norm"),
        *linear(f"{head}.mlp.fc1", f"{_HEAD}/mlp/fc1"),
        *linear(f"{head}.mlp.fc2", f"{_HEAD}/mlp/fc2"),
        *hf_text("text_model."),
        *linear("text_model.head", "text/projection"),
        Rule("logit_scale", "logit_scale", ExtraAxes((0,))),
        Rule("logit_bias", "logit_bias", ExtraAxes((0,))),
    )
    ignored = (Ignore("*.position_ids", "0, 1, 2, …: a buffer of older transformers"),)
    return RuleTable(rules=rules, ignored=ignored)


def reference_table() -> RuleTable:
    """The names of open_clip's `CustomTextCLIP` around timm's SigLIP trunk."""
    trunk = "visual.trunk"
    pool = f"{trunk}.attn_pool"
    keys = tuple(f"{_HEAD}/{name}_proj" for name in "kv")
    rules = (
        *conv(f"{trunk}.patch_embed.proj", "vision/patch_embed"),
        Rule(f"{trunk}.pos_embed", "vision/position_embedding", ExtraAxes((0,))),
        *timm_blocks(f"{trunk}.blocks.{{i}}", "vision/blocks"),
        *linear(f"{trunk}.blocks.{{i}}.mlp.fc1", "vision/blocks/mlp/fc1"),
        *linear(f"{trunk}.blocks.{{i}}.mlp.fc2", "vision/blocks/mlp/fc2"),
        *norm(f"{trunk}.norm", "vision/norm_post"),
        Rule(f"{pool}.latent", f"{_HEAD}/probe", ExtraAxes((0, 1))),
        *linear(f"{pool}.q", f"{_HEAD}/q_proj"),
        Rule(f"{pool}.kv.weight", tuple(f"{key}/kernel" for key in keys), SPLIT_LINEAR),
        Rule(f"{pool}.kv.bias", tuple(f"{key}/bias" for key in keys), Split(0)),
        *linear(f"{pool}.proj", f"{_HEAD}/out_proj"),
        *norm(f"{pool}.norm", f"{_HEAD}/norm"),
        *linear(f"{pool}.mlp.fc1", f"{_HEAD}/mlp/fc1"),
        *linear(f"{pool}.mlp.fc2", f"{_HEAD}/mlp/fc2"),
        *open_clip_text("text."),
        *linear("text.text_projection", "text/projection"),
        Rule("logit_scale", "logit_scale"),
        Rule("logit_bias", "logit_bias"),
    )
    return RuleTable(rules=rules, renames=(DATA_PARALLEL, BARE_TEXT))


def _hf_tower_table() -> RuleTable:
    """The names of `transformers.SiglipVisionModel`, also where their first word was cut off."""
    table = hf_table().part("", "vision/")
    bare = r"^(embeddings|encoder|post_layernorm|head)\."
    return dataclasses.replace(table, renames=(*table.renames, Rename(bare, r"vision_model.\1.")))


def _timm_tower_table() -> RuleTable:
    """The names of timm's VisionTransformer, also as open_clip's trunk."""
    table = reference_table().part("visual.trunk.", "vision/")
    return dataclasses.replace(table, renames=(DATA_PARALLEL, Rename(r"^trunk\.", "")))


TABLES = {"hf": lambda _: hf_table(), "reference": lambda _: reference_table()}
"""Rule tables by layout."""
TOWER_TABLES = {
    "hf": lambda _: _hf_tower_table(),
    "reference": lambda _: _timm_tower_table(),
    "timm": lambda _: _timm_tower_table(),
}
"""Rule tables of the image tower alone by layout."""
