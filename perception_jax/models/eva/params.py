"""EVA-CLIP's parameter names: open_clip's `CustomTextCLIP` around timm's `Eva` trunks."""

from __future__ import annotations

import dataclasses

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
from perception_jax.models.names import BARE_TEXT, open_clip_text, packed_qkv
from perception_jax.models.towers import TowerConfig

_TRUNK = "visual.trunk"


def _reference_table(kind: str) -> RuleTable:
    """The names of a model with this kind of trunk."""
    blocks = _rope_blocks if kind == "eva02_rope" else _plain_blocks
    rules = (
        *conv(f"{_TRUNK}.patch_embed.proj", "vision/patch_embed"),
        Rule(f"{_TRUNK}.cls_token", "vision/class_embedding", ExtraAxes((0, 1))),
        Rule(f"{_TRUNK}.pos_embed", "vision/position_embedding", ExtraAxes((0,))),
        *blocks(f"{_TRUNK}.blocks.{{i}}", "vision/blocks"),
        *norm(f"{_TRUNK}.norm", "vision/norm_post"),
        *linear(f"{_TRUNK}.head", "vision/projection"),
        *open_clip_text("text."),
        Rule("text.text_projection", "text/projection/kernel"),
        Rule("logit_scale", "logit_scale"),
    )
    ignored = (
        Ignore("*rope*", "tables that follow from the configuration"),
        Ignore("*.k_bias", "zeros: EVA's keys have no bias"),
        Ignore("*.attn_mask", "the causal mask, a buffer"),
    )
    return RuleTable(rules=rules, ignored=ignored, renames=(DATA_PARALLEL, BARE_TEXT))


def _timm_tower_table(config: TowerConfig) -> RuleTable:
    """The names of timm's `Eva`, also as open_clip's trunk."""
    table = _reference_table(config.vision.kind).part(f"{_TRUNK}.", "vision/")
    return dataclasses.replace(table, renames=(DATA_PARALLEL, Rename(r"^trunk\.", "")))


def _plain_blocks(source: str, target: str) -> tuple[Rule, ...]:
    """EVA01 and EVA02-E: fused q, k, v without a key bias."""
    attention = f"{target}/attention"
    return (
        *norm(f"{source}.norm1", f"{target}/norm1"),
        *packed_qkv(f"{source}.attn.qkv.weight", attention),
        Rule(f"{source}.attn.q_bias", f"{attention}/q_proj/bias"),
        Rule(f"{source}.attn.v_bias", f"{attention}/v_proj/bias"),
        *linear(f"{source}.attn.proj", f"{attention}/out_proj"),
        *norm(f"{source}.norm2", f"{target}/norm2"),
        *linear(f"{source}.mlp.fc1", f"{target}/mlp/fc1"),
        *linear(f"{source}.mlp.fc2", f"{target}/mlp/fc2"),
    )


def _rope_blocks(source: str, target: str) -> tuple[Rule, ...]:
    """EVA02-B and -L: separate projections, inner norms, SwiGLU."""
    attention = f"{target}/attention"
    return (
        *norm(f"{source}.norm1", f"{target}/norm1"),
        *linear(f"{source}.attn.q_proj", f"{attention}/q_proj"),
        *linear(f"{source}.attn.k_proj", f"{attention}/k_proj", bias=False),
        *linear(f"{source}.attn.v_proj", f"{attention}/v_proj"),
        *norm(f"{source}.attn.norm", f"{attention}/inner_norm"),
        *linear(f"{source}.attn.proj", f"{attention}/out_proj"),
        *norm(f"{source}.norm2", f"{target}/norm2"),
        *linear(f"{source}.mlp.fc1_g", f"{target}/mlp/gate"),
        *linear(f"{source}.mlp.fc1_x", f"{target}/mlp/up"),
        *norm(f"{source}.mlp.norm", f"{target}/mlp/inner_norm"),
        *linear(f"{source}.mlp.fc2", f"{target}/mlp/down"),
    )


TABLES = {"reference": lambda config: _reference_table(config.vision.kind)}
"""Rule tables by layout."""
TOWER_TABLES = {"reference": _timm_tower_table, "timm": _timm_tower_table}
"""Rule tables of the image tower alone by layout."""
