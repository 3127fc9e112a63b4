"""CLIP's parameter names: Hugging Face ("hf"), OpenAI and open_clip ("reference"), and timm's for
the image tower alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from perception_jax.interop.rules import (
    DATA_PARALLEL,
    ExtraAxes,
    Ignore,
    Rename,
    Rule,
    RuleTable,
    conv,
    linear,
    norm,
)
from perception_jax.models.names import (
    hf_blocks,
    hf_text,
    open_clip_blocks,
    open_clip_text,
    timm_blocks,
)
from perception_jax.models.towers import TowerConfig


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
        Ignore("input_resolution", "a scalar that OpenAI's archives carry next to the weights"),
        Ignore("context_length", "a scalar that OpenAI's archives carry next to the weights"),
        Ignore("vocab_size", "a scalar that OpenAI's archives carry next to the weights"),
        Ignore("attn_mask", "the causal mask, a buffer"),
    )
    # Training checkpoints (MetaCLIP's among them) wrap the dict, and DataParallel the names; with
    # `custom_text` open_clip keeps the same text tower under a prefix.
    renames = (Rename(r"^state_dict\.", ""), DATA_PARALLEL, Rename(r"^text\.", ""))
    return RuleTable(rules=rules, ignored=ignored, renames=renames)


def text_table() -> RuleTable:
    """The text tower and the temperature of `transformers.CLIPModel`, without the image tower."""
    table = hf_table()
    rules = tuple(rule for rule in table.rules if not rule.targets[0].startswith("vision/"))
    aside = tuple(Ignore(name, "of the image tower") for name in ("vision_model.*", "visual_*"))
    return dataclasses.replace(table, rules=rules, ignored=(*table.ignored, *aside))


def timm_tower_table(config: TowerConfig) -> RuleTable:
    """The names of timm's VisionTransformer: the image tower alone, the projection as its head."""
    rules = (
        *conv("patch_embed.proj", "patch_embed", bias=False),
        Rule("cls_token", "class_embedding", ExtraAxes((0, 1))),
        Rule("pos_embed", "position_embedding", ExtraAxes((0,))),
        *norm("norm_pre", "norm_pre"),
        *timm_blocks("blocks.{i}", "blocks"),
        *linear("blocks.{i}.mlp.fc1", "blocks/mlp/fc1"),
        *linear("blocks.{i}.mlp.fc2", "blocks/mlp/fc2"),
        *norm("norm", "norm_post"),
        *linear("head", "projection", bias=False),
    )
    # CLIP's projection has no bias, timm's head always has one.
    width = config.embed_dim
    buffers = {"head.bias": np.zeros(width, np.float32)} if width else {}
    return RuleTable(rules=rules, buffers=buffers)


def _hf_tower_table() -> RuleTable:
    """The names of `transformers.CLIPVisionModel`, also where their first word was cut off."""
    table = hf_table().part("", "vision/")
    bare = r"^(embeddings|encoder|pre_layrnorm|post_layernorm)\."
    return dataclasses.replace(table, renames=(*table.renames, Rename(bare, r"vision_model.\1.")))


def _reference_tower_table() -> RuleTable:
    """The names of open_clip below `visual.`."""
    table = reference_table().part("visual.", "vision/")
    return dataclasses.replace(table, renames=(*table.renames, Rename(r"^visual\.", "")))


TABLES = {"hf": lambda _: hf_table(), "reference": lambda _: reference_table()}
"""Rule tables by layout."""
TOWER_TABLES = {
    "hf": lambda _: _hf_tower_table(),
    "reference": lambda _: _reference_tower_table(),
    "timm": timm_tower_table,
}
"""Rule tables of the image tower alone by layout."""
