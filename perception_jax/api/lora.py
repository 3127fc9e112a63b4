"""LoRA of a loaded model, from and to folders of PEFT."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Collection
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from perception_jax.api.loaded import Loaded
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop import adapters, peft
from perception_jax.interop.dtypes import floating_dtype
from perception_jax.interop.export import export_params
from perception_jax.interop.fingerprint import fingerprint
from perception_jax.interop.load import load_params
from perception_jax.interop.rules import RuleTable
from perception_jax.interop.safetensors_io import SafetensorsFile
from perception_jax.interop.writer import write_checkpoint
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import architecture_of
from perception_jax.nn.lora import LoraConfig, add_lora, linear_layers
from perception_jax.shard.mesh import mesh_of
from perception_jax.shard.rules import shardings

LORA = "/lora/"
"""Part of the paths of LoRA's leaves."""

_log = logging.getLogger(__name__)


def load_lora(
    loaded: Loaded, folder: str | os.PathLike[str], *, dtype: np.typing.DTypeLike | None = None
) -> Loaded:
    """Puts the LoRA of a PEFT folder on a model. `nn.lora.merge_lora` then merges it.

    Args:
      loaded: the base model; its leaves are shared with the result.
      folder: with `adapter_config.json` and `adapter_model.safetensors` or `.bin`.
      dtype: of the matrices; None keeps what the file stores.

    Raises:
      CheckpointError: the folder is damaged, of another model, or of a variant of LoRA that is not
        read; or it says that it was trained on other weights (only folders written here do).
      ConfigError: the model has LoRA already.
    """
    _check_loaded(loaded)
    config, files = peft.read_config(folder), peft.open_weights(folder)
    table, layers = _adapted(loaded, files.specs)
    _check_base(loaded, config, files, folder)
    lora = LoraConfig(
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        rank_stabilized=config.rank_stabilized,
    )
    patterns = [re.escape(path) for path in layers]
    abstract = nnx.eval_shape(
        lambda model: add_lora(model, lora, patterns, rngs=nnx.Rngs(params=0)), loaded.model
    )
    leaves = {path: leaf for path, leaf in flatten(abstract).items() if LORA in path}
    mesh = mesh_of(loaded.model)
    rules = architecture_of(loaded.config).shardings
    read = load_params(
        peft.lora_table(table, layers),
        files,
        leaves,
        dtype=None if dtype is None else floating_dtype(dtype),
        shardings=None if mesh is None else shardings(leaves, rules, mesh),
    )
    model = unflatten(abstract, {**flatten(loaded.model), **read.params})
    return dataclasses.replace(loaded, model=model)


def save_lora(
    loaded: Loaded,
    folder: str | os.PathLike[str],
    *,
    base: str = "",
    layout: Literal["hf", "reference"] = "hf",
    overwrite: bool = False,
) -> None:
    """Writes the LoRA of a model to a folder that PEFT loads (`PeftModel.from_pretrained`).

    The folder also holds a fingerprint of the base model's weights, which `load_lora` compares.

    Args:
      loaded: a model with LoRA on linear layers, of one rank and scale.
      folder: new or empty, unless `overwrite`.
      base: the base model for `adapter_config.json`; empty is what it was loaded from.
      layout: whose names the layers have; "reference" is the authors', of a LLaVA.

    Raises:
      ConfigError: no layer has LoRA, or layers differ in rank, scale or dropout.
      CheckpointError: the folder cannot be written, or a layer has no name in the layout "hf".
    """
    _check_loaded(loaded)
    found = {path: x.lora for path, x in linear_layers(loaded.model).items() if x.lora is not None}
    if not found:
        raise ConfigError("save_lora: expected a model with LoRA, found none on any linear layer.")
    kinds = {(lora.a.shape[-1], lora.scale, lora.dropout) for lora in found.values()}
    if len(kinds) > 1:
        raise ConfigError(
            "save_lora: expected one rank, scale and dropout for all layers, found "
            f"{sorted(kinds)}: PEFT's folders of several are not written here."
        )
    ((rank, scale, rate),) = kinds
    name = base or loaded.name
    config = peft.PeftConfig(rank=rank, alpha=scale * rank, dropout=rate, base=name)
    leaves = flatten(loaded.model)
    arch = architecture_of(loaded.config)
    table = _hf_table(loaded) if layout == "hf" else arch.table(layout, loaded.config, leaves)
    own = {path: leaf for path, leaf in leaves.items() if LORA in path}
    tensors = list(export_params(peft.lora_table(table, found), own))
    modules = peft.target_modules(table, found, [tensor.name for tensor in tensors])
    weights = {path: leaf for path, leaf in leaves.items() if LORA not in path}
    write_checkpoint(
        folder,
        tensors,
        extras={peft.CONFIG: config.to_json(modules)},
        weights=peft.WEIGHTS[0],
        max_shard_bytes=2**63,
        metadata={adapters.BACKBONE: name, adapters.FINGERPRINT: fingerprint(weights)},
        overwrite=overwrite,
    )


def _check_base(
    loaded: Loaded, config: peft.PeftConfig, files: Any, folder: str | os.PathLike[str]
) -> None:
    """Compares the base model with what a folder says about its own."""
    metadata = files.metadata if isinstance(files, SafetensorsFile) else {}
    expected = metadata.get(adapters.FINGERPRINT, "")
    if not expected:
        if config.base and config.base != loaded.name:
            _log.warning(
                "%s was trained on %s and is put on %s; PEFT's folders have no fingerprint, so "
                "whether the weights are the same was not checked.",
                folder,
                config.base,
                loaded.name or "a model",
            )
        return
    found = fingerprint(flatten(loaded.model))
    if found != expected:
        raise CheckpointError(
            f"{folder}: expected the model that this LoRA was trained on ({config.base}, "
            f"fingerprint {expected}), found {loaded.name} with fingerprint {found}: its weights "
            "are others."
        )


def _check_loaded(loaded: Any) -> None:
    if not isinstance(loaded, Loaded):
        raise ConfigError(f"LoRA: expected what `load` gives, found a {type(loaded).__name__}.")
    leaves = jax.tree.leaves(loaded.model)
    if loaded.weights is not None or not all(isinstance(leaf, jax.Array) for leaf in leaves):
        raise ConfigError("LoRA: expected a model with weights; call its `load_weights()` first.")


def _adapted(loaded: Loaded, names: Collection[str]) -> tuple[RuleTable, tuple[str, ...]]:
    """The table whose names a file has, Hugging Face's or the authors', and the adapted layers."""
    table = _hf_table(loaded)
    try:
        return table, peft.adapted_layers(table, names)
    except CheckpointError:
        arch = architecture_of(loaded.config)
        if arch.layout_of is None:
            raise
        table = arch.tables["reference"](loaded.config)
        return table, peft.adapted_layers(table, names)


def _hf_table(loaded: Loaded) -> RuleTable:
    """The names of the code that PEFT adapts: Hugging Face's, and the authors' for a LLaVA that
    Hugging Face's cannot hold."""
    arch = architecture_of(loaded.config)
    if "hf" not in arch.tables:
        raise ConfigError(f"{arch.name} has no names of Hugging Face, which PEFT's folders use.")
    layout = "hf"
    if arch.layout_of is not None:
        try:
            arch.write_config["hf"](loaded.config)
        except ConfigError:
            layout = "reference"
    return arch.tables[layout](loaded.config)
