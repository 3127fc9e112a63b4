"""Llama's parameter names: Hugging Face ("hf") and GGUF files ("gguf", read only)."""

from __future__ import annotations

from perception_jax.interop.rules import (
    DATA_PARALLEL,
    LINEAR,
    Ignore,
    Rename,
    RopePermute,
    Rule,
    RuleTable,
    chain,
    linear,
    norm,
)
from perception_jax.models.llama.config import LlamaConfig


def hf_table(config: LlamaConfig) -> RuleTable:
    """The names of `transformers.LlamaForCausalLM`, also without their first word.

    A tied head may be stored beside the embedding; it then has to be equal.
    """
    layer, block = "model.layers.{i}", "blocks"
    projections = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}
    rules = (
        Rule(
            "model.embed_tokens.weight",
            "token_embedding",
            copies=("lm_head.weight",) if config.tied else (),
        ),
        *norm(f"{layer}.input_layernorm", f"{block}/norm1", bias=False),
        *(
            rule
            for theirs, ours in projections.items()
            for rule in linear(f"{layer}.self_attn.{theirs}", f"{block}/attention/{ours}")
        ),
        *norm(f"{layer}.post_attention_layernorm", f"{block}/norm2", bias=False),
        *(
            rule
            for name in ("gate", "up", "down")
            for rule in linear(f"{layer}.mlp.{name}_proj", f"{block}/mlp/{name}")
        ),
        *norm("model.norm", "norm_final", bias=False),
        *linear("lm_head", "lm_head", bias=False),
    )
    computed = "follows from the settings: a buffer of older transformers"
    ignored = (
        Ignore("model.layers.*.self_attn.rotary_emb.inv_freq", computed),
        Ignore("model.rotary_emb.inv_freq", computed),
    )
    bare = Rename(r"^(embed_tokens|layers|norm)\.", r"model.\1.")
    return RuleTable(rules=rules, ignored=ignored, renames=(DATA_PARALLEL, bare))


def gguf_table(config: LlamaConfig) -> RuleTable:
    """The names of GGUF files, in which the rows of queries and keys are in another order."""
    layer, block = "blk.{i}", "blocks"

    def turned(theirs: str, ours: str, heads: int) -> tuple[Rule, ...]:
        source, target = f"{layer}.attn_{theirs}", f"{block}/attention/{ours}"
        order = RopePermute(heads)
        return (
            Rule(f"{source}.weight", f"{target}/kernel", chain(order, LINEAR)),
            Rule(f"{source}.bias", f"{target}/bias", order),
        )

    rules = (
        Rule("token_embd.weight", "token_embedding"),
        *norm(f"{layer}.attn_norm", f"{block}/norm1", bias=False),
        *turned("q", "q_proj", config.heads),
        *turned("k", "k_proj", config.kv_heads),
        *linear(f"{layer}.attn_v", f"{block}/attention/v_proj"),
        *linear(f"{layer}.attn_output", f"{block}/attention/out_proj"),
        *norm(f"{layer}.ffn_norm", f"{block}/norm2", bias=False),
        *(
            rule
            for name in ("gate", "up", "down")
            for rule in linear(f"{layer}.ffn_{name}", f"{block}/mlp/{name}")
        ),
        *norm("output_norm", "norm_final", bias=False),
        *linear("output", "lm_head", bias=False),
    )
    return RuleTable(rules=rules, renames=())


TABLES = {"hf": hf_table, "gguf": gguf_table}
"""Rule tables by layout."""
