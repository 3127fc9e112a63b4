"""Files of GiVE's trained parameters: adapters, OID head, and for a vision-only encoder its
projection.

The names are this library's resolution; the paper's code could not be had. Other names, should they
turn up, are mapped by `renames` before anything else is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from perception_jax import api, settings
from perception_jax.errors import CheckpointError
from perception_jax.interop.adapters import AdapterFile, AdapterNames, save_adapters
from perception_jax.interop.rules import Rule, linear, norm
from perception_jax.models.paired import build_backbone
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn import stack
from perception_jax.nn.adapters import AdapterParam
from perception_jax.nn.mlp import ACTIVATIONS
from perception_jax.shard.rules import shardings as make_shardings
from perception_jax.systems.give.adapter import AdapterConfig
from perception_jax.systems.give.model import SHARDINGS, Give, GiveConfig, leaves_in_give

ADAPTERS_FILE = "give.safetensors"
"""Name of the file in the folder of a run."""
ADAPTERS = "ag_adapters"
"""Prefix of the adapters' names in the file."""
_INSERTS = "backbone/vision/blocks/inserts"
_ACT = settings.Choice(tuple(ACTIVATIONS))


def adapter_rules(source: str, target: str, config: AdapterConfig) -> tuple[Rule, ...]:
    """Name rules of one `AgAdapter`, or of a stack of them if `source` has a placeholder."""
    rules = (
        *norm(f"{source}.norm", f"{target}/norm"),
        *linear(f"{source}.mlp.fc1", f"{target}/fc1"),
        *(linear(f"{source}.mlp.fc2", f"{target}/fc2") if config.connector == "mlp" else ()),
        *(
            rule
            for name in ("to_q", "to_k", "to_v")
            for rule in linear(f"{source}.{name}", f"{target}/{name}", bias=False)
        ),
        *linear(f"{source}.to_out", f"{target}/to_out"),
    )
    gated = config.gate == "tanh"
    return (*rules, Rule(f"{source}.gate", f"{target}/gate")) if gated else rules


def names_of(give: Give) -> AdapterNames:
    """Name rules of all trained parameters, with adapters numbered by their block."""
    blocks = give.backbone.vision.blocks
    rules = (
        *adapter_rules(f"{ADAPTERS}.{{i}}", _INSERTS, blocks.inserts.config),
        *linear("oid_head.fc1", "oid_head/fc1"),
        *linear("oid_head.fc2", "oid_head/fc2"),
        *(() if give.visual_proj is None else linear("visual_proj", "visual_proj", bias=False)),
        *(() if give.dense_head is None else linear("dense_head", "dense_head")),
    )
    return AdapterNames(rules=rules, stack=ADAPTERS, layers=blocks.layers)


def save_give(
    path: str | os.PathLike[str],
    give: Give,
    backbone: api.Loaded,
    *,
    variant: str = "",
    dtype: np.typing.DTypeLike | None = None,
) -> None:
    """Writes the trained parameters, whole or not at all; an older file of that name is replaced.

    Args:
      backbone: its name and how it makes images, for the metadata.
      variant: a name for its kind, e.g. "clip_b16".
      dtype: of the file; None keeps that of each leaf.

    Raises:
      CheckpointError: the file cannot be written.
    """
    inserts = give.backbone.vision.blocks.inserts
    save_adapters(
        path,
        names_of(give),
        flatten(give, AdapterParam),
        backbone=backbone.name,
        weights=flatten(plain_backbone(give.backbone)),
        metadata={
            "variant": variant,
            "adapter_heads": str(inserts.heads),
            "adapter_act": inserts.config.act,
            "adapter_eps": repr(inserts.config.eps),
            "head_act": give.oid_head.act,
            **api.image_metadata(backbone.processor.image),
        },
        dtype=dtype,
    )


def load_give(
    path: str | os.PathLike[str],
    backbone: api.Loaded,
    *,
    renames: Sequence[tuple[str, str]] = (),
    unstated: GiveConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Give:
    """Loads the adapters of a file into a GiVE around a loaded backbone.

    Args:
      renames: (regular expression, replacement) pairs, applied in order to every name of the file
        before it is read.
      unstated: heads, activations and epsilon of adapters whose file does not state them.
      mesh: places each leaf on it.

    Raises:
      CheckpointError: unknown or missing names, or adapters of another backbone.
    """
    file = AdapterFile(path, renames)
    config = read_config(file, unstated or GiveConfig())
    give = nnx.eval_shape(
        lambda: Give(
            config,
            build_backbone(backbone.config, rngs=nnx.Rngs(params=0)),
            rngs=nnx.Rngs(params=0),
        )
    )
    abstract = flatten(give, AdapterParam)
    placed = None if mesh is None else make_shardings(abstract, SHARDINGS, mesh)
    trained = file.load(names_of(give), abstract, shardings=placed)
    file.check_backbone(backbone.name, flatten(backbone.model))
    return unflatten(give, leaves_in_give(backbone.model) | trained)


def read_config(file: AdapterFile, unstated: GiveConfig) -> GiveConfig:
    """Reads the settings of the network from a file's names, shapes and metadata.

    Raises:
      CheckpointError: it holds no adapters, or a setting is invalid.
    """
    layers, names, other = file.layers(ADAPTERS), file.shapes, unstated.adapter
    is_mlp = any(".mlp.fc2." in name for name in names)
    hidden, width = (
        names.get(f"{ADAPTERS}.{layers[0]}.{name}") for name in ("mlp.fc1.bias", "norm.weight")
    )
    mlp_hidden = hidden[0] if is_mlp and hidden and hidden != width else None
    settings.check(
        mlp_hidden,
        settings.Optional(settings.WIDTH),
        f"{file.path}: width of the connector's hidden layer",
        error=CheckpointError,
    )
    adapter = AdapterConfig(
        heads=file.setting("adapter_heads", settings.HEADS, other.heads),
        gate="tanh" if any(name.endswith(".gate") for name in names) else "none",
        connector="mlp" if is_mlp else "linear",
        mlp_hidden=mlp_hidden,
        act=file.setting("adapter_act", _ACT, other.act),
        eps=file.setting("adapter_eps", settings.EPS, other.eps),
    )
    return GiveConfig(
        layers=layers,
        adapter=adapter,
        dense=any(name.startswith("dense_head.") for name in names),
        head_act=file.setting("head_act", _ACT, unstated.head_act),
    )


def plain_backbone(backbone: nnx.Module) -> nnx.Module:
    """The same backbone without adapters in it; leaves are shared."""
    plain = jax.tree.map(lambda leaf: leaf, backbone)
    plain.vision.blocks = stack.base_of(plain.vision.blocks)
    return plain
