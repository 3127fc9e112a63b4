"""Folders of PEFT with LoRA: `adapter_config.json` beside the low-rank matrices.

Matrices are named after the linear layer that they adapt: `base_model.model.NAME.lora_A.weight`
[rank, in] and `….lora_B.weight` [out, rank], where `NAME.weight` is a name of the model's layout
"hf". So their rules follow from the model's own rule table.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from perception_jax import settings
from perception_jax.errors import CheckpointError
from perception_jax.interop.checkpoint_dir import open_checkpoint, read_json
from perception_jax.interop.rules import LINEAR, Rule, RuleTable, matcher
from perception_jax.interop.tensors import TensorFiles
from perception_jax.settings import shown

CONFIG = "adapter_config.json"
"""File of the settings."""
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Files of the matrices, in order of preference."""

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PARTS = {_A: "a", _B: "b"}
_KERNEL, _WEIGHT = "/kernel", ".weight"
_REFUSED = {
    "use_dora": (False,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "megatron_config": (None,),
}
"""Settings that change what the matrices mean, and the values under which they do not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What `adapter_config.json` says about LoRA.

    Attributes:
      rank, alpha, dropout, rank_stabilized: see `nn.lora.LoraConfig`.
      base: the model that the matrices were trained on, as its trainer called it; "" if not said.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_stabilized: bool = False
    base: str = ""

    def to_json(self, modules: Collection[str]) -> dict[str, Any]:
        """Returns the contents of the file. Args: modules: what PEFT puts the matrices on."""
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": self.base or None,
            "r": self.rank,
            # An integer where it is one, as in PEFT's own files.
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilized,
            "target_modules": sorted(modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }


def read_config(folder: str | os.PathLike[str]) -> PeftConfig:
    """Reads a folder's settings.

    Raises:
      CheckpointError: the file is missing, makes no sense, is not of LoRA, or has a variant of it
        that is not read here (DoRA, trained biases, ranks that differ between layers).
    """
    path = pathlib.Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"Expected a folder of PEFT with {CONFIG}, found none in {folder}.")
    content = settings.Settings(read_json(path), str(path), error=CheckpointError)
    kind = content.get("peft_type", settings.TEXT)
    if kind != "LORA":
        raise CheckpointError(f"{path}: expected the peft_type LORA, found {shown(kind)}.")
    for key, allowed in _REFUSED.items():
        value = content.content.get(key, allowed[0])
        if value is not None and value not in allowed:
            raise CheckpointError(
                f"{path}: {key} = {shown(value)} is not supported; expected {allowed[0]!r}. "
                "Merge the matrices into the model with PEFT and load the merged model."
            )
    return PeftConfig(
        rank=content.get("r", settings.Integer(1, 2**14)),
        alpha=content.get("lora_alpha", settings.Number(above=0.0, high=1e6), 8),
        dropout=content.get("lora_dropout", settings.Number(low=0.0, high=0.99), 0.0),
        rank_stabilized=content.get("use_rslora", settings.FLAG, False),
        base=content.get("base_model_name_or_path", settings.Optional(settings.TEXT), None) or "",
    )


def open_weights(folder: str | os.PathLike[str]) -> TensorFiles:
    """Opens the matrices of a folder.

    Raises:
      CheckpointError: there are none, or the file is damaged or refused.
    """
    folder = pathlib.Path(folder)
    for name in WEIGHTS:
        if (folder / name).is_file():
            return open_checkpoint(folder / name)
    raise CheckpointError(f"Expected {' or '.join(WEIGHTS)} in {folder}, found neither.")


def lora_table(table: RuleTable, layers: Collection[str]) -> RuleTable:
    """Returns the rules of the matrices on some linear layers.

    Args:
      table: of the model in the layout "hf".
      layers: paths of the layers.

    Raises:
      CheckpointError: a layer that is no linear layer of its own in that layout.
    """
    known = _linear_rules(table)
    if missing := [path for path in layers if path not in known]:
        raise CheckpointError(
            f"LoRA on {', '.join(sorted(missing)[:8])} has no name in the layout hf: expected "
            f"linear layers that it stores on their own: {', '.join(list(known)[:8])}, …"
        )
    rules = tuple(
        Rule(f"{_PREFIX}{_module(rule)}{suffix}", f"{path}/lora/{part}", LINEAR)
        for path, rule in known.items()
        if path in layers
        for suffix, part in _PARTS.items()
    )
    renames = (dataclasses.replace(item, under=_PREFIX + item.under) for item in table.renames)
    return RuleTable(rules=rules, renames=tuple(renames))


def adapted_layers(table: RuleTable, names: Collection[str]) -> tuple[str, ...]:
    """Returns the paths of the linear layers that a file's matrices are for.

    Args:
      table: of the model in the layout "hf".
      names: of the file's tensors.

    Raises:
      CheckpointError: other tensors, or layers that the model lacks.
    """
    known = _linear_rules(table)
    patterns = {path: matcher(rule.sources[0]) for path, rule in known.items()}
    found: dict[str, None] = {}
    others = []
    for name in names:
        module = next((name.removesuffix(suffix) for suffix in _PARTS if name.endswith(suffix)), "")
        source = table.rename(module.removeprefix(_PREFIX)) + _WEIGHT
        path = next((path for path, fits in patterns.items() if fits.fullmatch(source)), None)
        if path is None or not module.startswith(_PREFIX):
            others.append(name)
        else:
            found[path] = None
    if others or not found:
        raise CheckpointError(
            f"Expected names such as {_PREFIX}{_module(next(iter(known.values())))}.lora_A.weight "
            f"for linear layers of the model, found {len(others)} of {len(names)} others: "
            f"{', '.join(sorted(others)[:4]) or 'no tensors'}. Is this LoRA of another model?"
        )
    return tuple(found)


def target_modules(
    table: RuleTable, layers: Collection[str], names: Collection[str]
) -> tuple[str, ...]:
    """Returns the names by which PEFT finds the adapted layers.

    They are the last parts of the layers' names, or the whole names where other layers of the
    model end in the same.

    Args:
      table: of the model in the layout "hf".
      layers: paths of the adapted layers.
      names: of the tensors of their matrices.
    """
    known = _linear_rules(table)
    ends = {path: _module(rule).rsplit(".", 1)[-1] for path, rule in known.items()}
    inside = {end for path, end in ends.items() if path in layers}
    if inside.isdisjoint(end for path, end in ends.items() if path not in layers):
        return tuple(sorted(inside))
    whole = {name.removesuffix(suffix) for suffix in _PARTS for name in names}
    return tuple(sorted(name.removeprefix(_PREFIX) for name in whole if name + _A in names))


def _linear_rules(table: RuleTable) -> Mapping[str, Rule]:
    """The rules of linear layers that are stored on their own, by the layers' paths."""
    return {
        rule.targets[0].removesuffix(_KERNEL): rule
        for rule in table.rules
        if len(rule.targets) == len(rule.sources) == 1
        and rule.targets[0].endswith(_KERNEL)
        and rule.sources[0].endswith(_WEIGHT)
        and rule.transform == LINEAR
    }


def _module(rule: Rule) -> str:
    return rule.sources[0].removesuffix(_WEIGHT)
