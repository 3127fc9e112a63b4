"""`export`: writes a model and its processor to a folder that other libraries load."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from perception_jax.api.loaded import Loaded
from perception_jax.api.lora import LORA
from perception_jax.data import processor_formats
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.tokenization import ClipTokenizer, SiglipTokenizer
from perception_jax.errors import ConfigError
from perception_jax.interop.checkpoint_dir import OPEN_CLIP_SINGLE, SINGLE
from perception_jax.interop.checkpoint_source import OPEN_CLIP_CONFIG, Layout
from perception_jax.interop.export import export_params
from perception_jax.interop.rules import RuleTable
from perception_jax.interop.writer import MAX_SHARD, write_checkpoint
from perception_jax.models import open_clip
from perception_jax.models.architecture import Architecture, Tokenizer
from perception_jax.models.params import flatten
from perception_jax.models.registry import architecture_of


def export(
    loaded: Any,
    directory: str | os.PathLike[str],
    *,
    layout: Layout = "hf",
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder atomically.

    Args:
      loaded: from `load`, or built around a model of your own.
      directory: new or empty, unless `overwrite`.
      layout: see the module.

    Raises:
      CheckpointError: the folder is not empty, the disk is full, or the layout has no place for
        one of the leaves.
      ConfigError: the layout cannot express the configuration.
    """
    if not isinstance(loaded, Loaded):
        raise ConfigError(
            f"export: expected what `load` gives, a `Loaded` around model, configuration and "
            f"processor, found a {type(loaded).__name__}."
        )
    if loaded.weights is not None:
        raise ConfigError(
            "export: expected a model with weights, found one whose weights have not been read: "
            "load it, or call its `load_weights()`."
        )
    params = flatten(loaded.model)
    _check_plain(params)
    arch = architecture_of(loaded.config)
    write = arch.write_config.get(arch.settings_layout(layout))
    if write is None:
        known = [*arch.write_config, *(["jax"] if "hf" in arch.write_config else [])]
        raise ConfigError(
            f"{arch.name} has no configuration file in the layout {layout!r}; it has: "
            f"{', '.join(dict.fromkeys(known))}. Use one of these."
        )
    tokenizer = loaded.processor.tokenizer
    config = loaded.config
    if tokenizer is not None and arch.with_tokenizer is not None:
        config = arch.with_tokenizer(config, tokenizer)
    settings = write(config)
    if _of_open_clip(layout, settings) and not _brought(tokenizer):
        settings["text_cfg"]["hf_tokenizer_name"] = open_clip.IN_FOLDER
    if layout == "hf":
        settings = settings | _mixed_dtype(params)
    files = _settings_files(arch, layout, settings, loaded)
    write_checkpoint(
        directory,
        export_params(arch.table(layout, loaded.config, params), params),
        extras=files | _tokenizer_files(tokenizer),
        # open_clip and timm read no shards, and open_clip looks for a name of its own.
        weights=OPEN_CLIP_SINGLE if OPEN_CLIP_CONFIG in files else SINGLE,
        max_shard_bytes=MAX_SHARD if layout in ("hf", "jax") or arch.layout_of else 2**63,
        overwrite=overwrite,
    )


def _check_plain(params: Mapping[str, Any]) -> None:
    """Refuses leaves for which no layout has names."""
    if adapted := [path for path in params if LORA in path]:
        raise ConfigError(
            f"export: expected a model without LoRA, found it on {len(adapted) // 2} layers, e.g. "
            f"{adapted[0].partition(LORA)[0]}. Write it with `api.save_lora`, or merge it first "
            "(`nn.merge_lora`)."
        )
    if any(leaf.dtype == jnp.int8 for leaf in params.values()):
        raise ConfigError(
            "export: expected floating weights, found int8 ones, which no layout stores: export "
            "the model from before `quantize_linear`."
        )


def table_of(loaded: Loaded, layout: Layout) -> RuleTable:
    """Returns the name rules by which `export` writes a model in a layout."""
    arch = architecture_of(loaded.config)
    return arch.table(layout, loaded.config, flatten(loaded.model))


def _mixed_dtype(params: Mapping[str, Any]) -> dict[str, str]:
    """The dtype that holds all leaves, where they differ: transformers loads every leaf as the
    first one in the file unless the settings say otherwise."""
    dtypes = {x.dtype for x in params.values() if jnp.issubdtype(x.dtype, jnp.floating)}
    return {"torch_dtype": jnp.result_type(*dtypes).name} if len(dtypes) > 1 else {}


def _settings_files(
    arch: Architecture, layout: Layout, settings: dict[str, Any] | None, loaded: Loaded
) -> dict[str, Any]:
    image = loaded.processor.image
    if settings is None:
        return {}
    of_open_clip = _of_open_clip(layout, settings)
    if image is None:
        settings = {"model_cfg": settings} if of_open_clip else settings
    elif of_open_clip or layout == "timm":
        usual = ImageProcessor(**arch.image_settings(loaded.config, layout))
        note = processor_formats.decoding_note(image, usual)
        if of_open_clip:
            preprocess = processor_formats.to_open_clip(image)
            settings = {"model_cfg": settings, "preprocess_cfg": preprocess} | note
        else:
            weights = settings["pretrained_cfg"] | processor_formats.to_timm(image)
            settings = settings | {"pretrained_cfg": weights} | note
    if of_open_clip:
        return {OPEN_CLIP_CONFIG: settings}
    if layout == "jax":
        settings = settings | {"perception_jax_layout": "jax", "model_type": arch.name}
    if layout == "timm" or image is None:
        return {"config.json": settings}
    preprocessor = image.to_hf(ours=layout == "jax")
    return {"config.json": settings, "preprocessor_config.json": preprocessor}


def _of_open_clip(layout: Layout, settings: dict[str, Any] | None) -> bool:
    """Whether settings are those of open_clip, which have no `model_type`."""
    return layout == "reference" and settings is not None and "model_type" not in settings


def _brought(tokenizer: Tokenizer | None) -> bool:
    """Whether open_clip has the tokenizer without its files."""
    if isinstance(tokenizer, ClipTokenizer):
        return tokenizer.is_openai
    return not (isinstance(tokenizer, SiglipTokenizer) and tokenizer.has_added)


def _tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {item.name: item.read_bytes() for item in pathlib.Path(folder).iterdir()}
