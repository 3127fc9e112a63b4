"""GiVE's own parameters as one safetensors file: adapters, OID head, and for a vision-only encoder
its projection. The backbone is not in it; the metadata names it.

The names are this library's resolution; the paper's code could not be had. Other names, should they
turn up, are mapped by `renames` before anything else is looked at.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import typing
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from perception_jax import settings
from perception_jax.data.processors import Mode
from perception_jax.errors import CheckpointError
from perception_jax.interop.export import export_params
from perception_jax.interop.load import load_params
from perception_jax.interop.rules import Rename, Rule, RuleTable, linear, norm
from perception_jax.interop.safetensors_io import SafetensorsFile
from perception_jax.interop.writer import write_file
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn.variables import AdapterParam
from perception_jax.settings import Integer, Settings
from perception_jax.shard.rules import shardings as make_shardings
from perception_jax.systems.give.adapter import AdapterConfig
from perception_jax.systems.give.backbone import LoadedBackbone, build_backbone, leaves_in_give
from perception_jax.systems.give.model import SHARDINGS, Give, GiveConfig

ADAPTERS = "ag_adapters"
INSERTS = "backbone/vision/blocks/inserts"
HEADS_KEY = "adapter_heads"
"""In the metadata: the one setting that no shape tells. Files without it have heads of 64."""
SIZE_KEY, MODE_KEY = "image_size", "image_mode"
"""What images the adapters trained on; a backbone's own processor may make others."""


def adapter_rules(source: str, target: str, config: AdapterConfig) -> tuple[Rule, ...]:
    """Of one `AgAdapter`, or of a stack of them if `source` has a placeholder."""
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


def table(
    adapter: AdapterConfig,
    layers: Sequence[int],
    *,
    joint: bool,
    dense: bool,
    renames: Sequence[tuple[str, str]] = (),
) -> RuleTable:
    """Names of all that trains, adapters numbered by their block.

    Args:
      layers: the blocks with an adapter, ascending.
      joint: whether the backbone has a joint space of its own.
      dense: whether there is a head for places.
      renames: as of `load_give`.
    """
    rules = (
        *adapter_rules(f"{ADAPTERS}.{{i}}", INSERTS, adapter),
        *linear("oid_head.fc1", "oid_head/fc1"),
        *linear("oid_head.fc2", "oid_head/fc2"),
        *(() if joint else linear("visual_proj", "visual_proj", bias=False)),
        *(linear("dense_head", "dense_head") if dense else ()),
    )
    # A stack is numbered 0, 1, 2, …: no number is larger than its block's, so that in this order
    # none is renamed twice.
    numbers = (
        Rename(rf"^{ADAPTERS}\.{layer}\.", f"{ADAPTERS}.{k}.") for k, layer in enumerate(layers)
    )
    return RuleTable(rules=rules, renames=(*_as_renames(renames), *numbers))


def save_give(
    path: str | os.PathLike[str],
    give: Give,
    backbone: LoadedBackbone,
    *,
    variant: str = "",
    dtype: np.typing.DTypeLike | None = None,
) -> None:
    """Writes what trains, whole or not at all; an older file of that name is replaced.

    Args:
      backbone: its name and how it makes images, for the metadata.
      variant: a name for its kind, e.g. "clip_b16".
      dtype: of the file; None keeps that of each leaf.

    Raises:
      CheckpointError: the file cannot be written.
    """
    blocks = give.backbone.vision.blocks
    names = table(
        blocks.inserts.config,
        blocks.layers,
        joint=give.visual_proj is None,
        dense=give.dense_head is not None,
    )
    leaves = trained_leaves(give)
    if dtype is not None:
        leaves = {name: leaf.astype(dtype) for name, leaf in leaves.items()}
    tensors = [
        dataclasses.replace(tensor, name=_by_block(tensor.name, blocks.layers))
        for tensor in export_params(names, leaves)
    ]
    metadata = {
        "format": "pt",
        "backbone": backbone.name,
        "variant": variant,
        HEADS_KEY: str(blocks.inserts.heads),
        SIZE_KEY: str(backbone.processor.image.size),
        MODE_KEY: backbone.processor.image.mode,
    }
    write_file(pathlib.Path(path), tensors, metadata)


def load_give(
    path: str | os.PathLike[str],
    backbone: LoadedBackbone,
    *,
    renames: Sequence[tuple[str, str]] = (),
    heads: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Give:
    """A GiVE around a loaded backbone, with the adapters of a file.

    Args:
      renames: (regular expression, replacement) pairs, applied in order to every name of the file
        before it is looked at.
      heads: of an adapter, for files that do not say; None has one per 64 of the image width.
      mesh: places each leaf on it.

    Raises:
      CheckpointError: unknown or missing names, or shapes of another backbone.
    """
    file = SafetensorsFile(path)
    config = read_config(file, renames, heads)
    give = nnx.eval_shape(
        lambda: Give(
            config,
            build_backbone(backbone.config, rngs=nnx.Rngs(params=0)),
            rngs=nnx.Rngs(params=0),
        )
    )
    abstract = trained_leaves(give)
    names = table(
        config.adapter,
        config.layers,
        joint=give.visual_proj is None,
        dense=config.dense,
        renames=renames,
    )
    placed = None if mesh is None else make_shardings(abstract, SHARDINGS, mesh)
    trained = load_params(names, file, abstract, shardings=placed).params
    return unflatten(give, leaves_in_give(backbone.model) | trained)


def trained_on(path: str | os.PathLike[str], backbone: LoadedBackbone) -> LoadedBackbone:
    """The backbone with the images that the adapters of a file trained on, if it says so.

    Raises:
      CheckpointError: the file is missing or damaged, or says nonsense.
    """
    file = SafetensorsFile(path)
    size = _number(file, SIZE_KEY, settings.IMAGE_SIZE)
    if size is None:
        return backbone
    mode = _metadata(file).get(MODE_KEY, settings.Choice(typing.get_args(Mode)), None)
    return backbone.at_size(size, mode=mode)


def read_config(
    file: SafetensorsFile, renames: Sequence[tuple[str, str]] = (), heads: int | None = None
) -> GiveConfig:
    """The settings that a file's names and metadata tell.

    Raises:
      CheckpointError: it holds no adapters, or the number of heads is none.
    """
    names = [_rename(name, renames) for name in file]
    numbers = {int(found[1]) for name in names if (found := _NUMBER.match(name))}
    if not numbers:
        raise CheckpointError(
            f"Expected names such as {ADAPTERS}.1.to_q.weight in {file.path}, found "
            f"{', '.join(sorted(names)[:3])}, …: is this a checkpoint of GiVE's adapters? Other "
            "names can be mapped with `renames`."
        )
    stored = _number(file, HEADS_KEY, settings.HEADS)
    last, blocks = max(numbers), settings.Integer(0, settings.DEPTH.high - 1)
    settings.check(last, blocks, f"adapters in {file.path}: block", error=CheckpointError)
    return GiveConfig(
        layers=tuple(sorted(numbers)),
        dense=any(name.startswith("dense_head.") for name in names),
        adapter=AdapterConfig(
            heads=heads if stored is None else stored,
            gate="tanh" if any(name.endswith(".gate") for name in names) else "none",
            connector="mlp" if any(".mlp.fc2." in name for name in names) else "linear",
        ),
    )


def trained_leaves(give: Give) -> dict[str, Any]:
    """Every leaf that trains, by its path."""
    return flatten(give, AdapterParam)


_NUMBER = re.compile(rf"{ADAPTERS}\.(0|[1-9][0-9]*)\.")


def _metadata(file: SafetensorsFile) -> Settings:
    return Settings(file.metadata, f"metadata of {file.path}", error=CheckpointError)


def _number(file: SafetensorsFile, key: str, kind: Integer) -> int | None:
    """A number that stands in the metadata, which holds strings; None if it does not."""
    text = _metadata(file).get(key, settings.Text(longest=32), None)
    if text is None:
        return None
    value = int(text) if re.fullmatch("[0-9]+", text) else text
    return settings.check(value, kind, f"metadata of {file.path}: {key}", error=CheckpointError)


def _as_renames(renames: Sequence[tuple[str, str]]) -> tuple[Rename, ...]:
    return tuple(Rename(pattern, replacement) for pattern, replacement in renames)


def _rename(name: str, renames: Sequence[tuple[str, str]]) -> str:
    for item in _as_renames(renames):
        name = item.apply(name)
    return name


def _by_block(name: str, layers: Sequence[int]) -> str:
    return _NUMBER.sub(lambda found: f"{ADAPTERS}.{layers[int(found[1])]}.", name)
