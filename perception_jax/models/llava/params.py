"""LLaVA's parameter names: llava-hf ("hf") and the authors' ("reference").

llava-hf has had two spellings: `language_model.model.layers…` and, since transformers 4.52,
`model.language_model.layers…`; both are read, the first, which all versions load, is written.
"""

from __future__ import annotations

from typing import Any

from perception_jax.interop.rules import Ignore, Rename, Rule, RuleTable, linear
from perception_jax.models import registry
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.llama.params import hf_table as language_table
from perception_jax.models.llava.config import LlavaConfig

PROJECTOR, SECOND_PROJECTOR = "model.mm_projector.", "model.dino_mm_projector."
"""Where the authors' names of both projectors begin."""
TOWER, SECOND_TOWER = "model.vision_tower.vision_tower.", "model.dino_tower.vision_tower."
"""Where the authors' names of both image towers begin."""

_NEW_SPELLING = (
    Rename(r"^model\.language_model\.", "language_model.model."),
    Rename(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    Rename(r"^lm_head\.", "language_model.lm_head."),
)


def hf_table(config: LlavaConfig) -> RuleTable:
    """The names of `transformers.LlavaForConditionalGeneration`, in both spellings."""
    projector = tuple(
        rule
        for k in range(config.projector_depth)
        for rule in linear(f"multi_modal_projector.linear_{k + 1}", f"projector/fc{k + 1}")
    )
    return (
        RuleTable(rules=projector, renames=_NEW_SPELLING)
        + _tower_table(config.towers[0]).under("vision_tower.", "vision/")
        + language_table(config.language).under("language_model.", "language/")
    )


def reference_table(config: LlavaConfig) -> RuleTable:
    """The names of the authors' `LlavaLlamaForCausalLM`, with the second tower of
    arXiv 2401.06209."""
    table = (
        language_table(config.language).under("", "language/")
        + projector_table(config)
        + _tower_table(config.towers[0]).under(TOWER, "vision/")
    )
    if len(config.towers) == 1:
        return table
    own = config.towers[1]
    found = _tower_table(own, "reference" if isinstance(own, Dinov2Config) else "hf")
    copy = Ignore(
        "model.dino_tower.clip_vision_tower.vision_model.*",
        "a second CLIP that the authors' code does not use",
    )
    return table + found.under(SECOND_TOWER, "second_vision/") + RuleTable((), (copy,), ())


def projector_table(config: LlavaConfig) -> RuleTable:
    """The authors' names of the projectors alone, as in their `mm_projector.bin`."""
    places = [(PROJECTOR, "projector"), (SECOND_PROJECTOR, "second_projector")]
    rules: list[Rule] = []
    for name, path in places if config.mixing == "interleaved" else places[:1]:
        if config.projector == "linear":
            rules += linear(name[:-1], f"{path}/fc1")
        else:
            for k in range(config.projector_depth):
                rules += linear(f"{name}{2 * k}", f"{path}/fc{k + 1}")
    return RuleTable(rules=tuple(rules))


def _tower_table(config: Any, layout: str = "hf") -> RuleTable:
    """The names of an image tower in a layout, or in the first that it has."""
    tables = registry.architecture_of(config).tables
    return tables.get(layout, next(iter(tables.values())))(config)


TABLES = {"hf": hf_table, "reference": reference_table}
"""Rule tables by layout."""
