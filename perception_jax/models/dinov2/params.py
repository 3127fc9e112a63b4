"""DINOv2's parameter names: Hugging Face, the authors' ("reference"), timm."""

from __future__ import annotations

from perception_jax.interop.rules import (
    SPLIT_LINEAR,
    Dropped,
    ExtraAxes,
    FoldedPosition,
    Rename,
    Rule,
    RuleTable,
    Split,
    conv,
    linear,
    norm,
)
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.names import timm_blocks

REFERENCE_RENAMES = (
    Rename(r"^(teacher\.)?backbone\.", ""),
    # With `block_chunks` the authors number blocks as blocks.CHUNK.INDEX.
    Rename(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
)
"""Spellings of the authors' training checkpoints."""


def hf_table(config: Dinov2Config) -> RuleTable:
    """The names of `transformers.Dinov2Model` and `Dinov2WithRegistersModel`."""
    layer, attention = "encoder.layer.{i}", "blocks/attention"
    rules = (
        *_tokens(config, "embeddings.", "position_embeddings"),
        *conv("embeddings.patch_embeddings.projection", "patch_embed"),
        *norm(f"{layer}.norm1", "blocks/norm1"),
        *linear(f"{layer}.attention.attention.query", f"{attention}/q_proj"),
        *linear(f"{layer}.attention.attention.key", f"{attention}/k_proj"),
        *linear(f"{layer}.attention.attention.value", f"{attention}/v_proj"),
        *linear(f"{layer}.attention.output.dense", f"{attention}/out_proj"),
        Rule(f"{layer}.layer_scale1.lambda1", "blocks/scale1"),
        *norm(f"{layer}.norm2", "blocks/norm2"),
        *_mlp(config, f"{layer}.mlp", ("weights_in", "weights_out")),
        Rule(f"{layer}.layer_scale2.lambda1", "blocks/scale2"),
        *norm("layernorm", "norm_post"),
    )
    return RuleTable(rules=rules, renames=(Rename(r"^(dinov2|backbone)\w*\.", ""),))


def reference_table(config: Dinov2Config) -> RuleTable:
    """The names of facebookresearch/dinov2, blocks not chunked."""
    rules = (
        *_tokens(config, "", "pos_embed"),
        *conv("patch_embed.proj", "patch_embed"),
        *timm_blocks("blocks.{i}", "blocks"),
        Rule("blocks.{i}.ls1.gamma", "blocks/scale1"),
        *_mlp(config, "blocks.{i}.mlp", ("w12", "w3")),
        Rule("blocks.{i}.ls2.gamma", "blocks/scale2"),
        *norm("norm", "norm_post"),
    )
    return RuleTable(rules=rules, renames=REFERENCE_RENAMES)


def timm_table(config: Dinov2Config) -> RuleTable:
    """The names of timm's VisionTransformer."""
    rules = (
        *_timm_tokens(config),
        *conv("patch_embed.proj", "patch_embed"),
        *timm_blocks("blocks.{i}", "blocks"),
        Rule("blocks.{i}.ls1.gamma", "blocks/scale1"),
        *_mlp(config, "blocks.{i}.mlp", ("fc1", "fc2")),
        Rule("blocks.{i}.ls2.gamma", "blocks/scale2"),
        *norm("norm", "norm_post"),
    )
    return RuleTable(rules=rules)


def _timm_tokens(config: Dinov2Config) -> tuple[Rule, ...]:
    # The mask token is for training alone, and timm has none; it is lost in an export.
    mask = Rule((), "mask_token", Dropped())
    if not config.registers:
        return (
            mask,
            Rule("cls_token", "class_embedding", ExtraAxes((0, 1))),
            Rule("pos_embed", "position_embedding", ExtraAxes((0,))),
        )
    ours = ("class_embedding", "position_embedding")
    return (
        mask,
        Rule(("cls_token", "pos_embed"), ours, FoldedPosition()),
        Rule("reg_token", "register_tokens", ExtraAxes((0,))),
    )


def _tokens(config: Dinov2Config, prefix: str, positions: str) -> tuple[Rule, ...]:
    rules = (
        Rule(f"{prefix}cls_token", "class_embedding", ExtraAxes((0, 1))),
        Rule(f"{prefix}mask_token", "mask_token", ExtraAxes((0,)), default=0.0),
        Rule(f"{prefix}{positions}", "position_embedding", ExtraAxes((0,))),
    )
    if not config.registers:
        return rules
    return (*rules, Rule(f"{prefix}register_tokens", "register_tokens", ExtraAxes((0,))))


def _mlp(config: Dinov2Config, source: str, names: tuple[str, str]) -> tuple[Rule, ...]:
    if config.mlp == "mlp":
        return (
            *linear(f"{source}.fc1", "blocks/mlp/fc1"),
            *linear(f"{source}.fc2", "blocks/mlp/fc2"),
        )
    packed, out = names
    kernels = ("blocks/mlp/gate/kernel", "blocks/mlp/up/kernel")
    biases = ("blocks/mlp/gate/bias", "blocks/mlp/up/bias")
    return (
        Rule(f"{source}.{packed}.weight", kernels, SPLIT_LINEAR),
        Rule(f"{source}.{packed}.bias", biases, Split(0)),
        *linear(f"{source}.{out}", "blocks/mlp/down"),
    )


TABLES = {"hf": hf_table, "reference": reference_table, "timm": timm_table}
"""Rule tables by layout."""
