"""The front door: `load` a checkpoint from a folder, the hub or the package, `export` one.

Three layouts are read and written:

- "hf": `config.json`, safetensors, `preprocessor_config.json`, tokenizer files; `transformers`
  loads the folder unchanged;
- "reference": the authors' names with an `open_clip_config.json`; open_clip loads it;
- "jax": our own leaf paths (`vision/blocks/attention/q_proj/kernel`) beside the "hf" settings.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from perception_jax.data import images as image_files
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Image
from perception_jax.data.tokenizers import ClipTokenizer
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop.checkpoint_dir import open_checkpoint, read_json
from perception_jax.interop.export import export_params
from perception_jax.interop.load import load_params
from perception_jax.interop.report import KeyReport
from perception_jax.interop.rules import RuleTable, identity_table
from perception_jax.interop.writer import write_checkpoint
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import (
    Architecture,
    architecture,
    architecture_of,
    open_clip_architecture,
)
from perception_jax.ops.image import normalise
from perception_jax.shard.rules import shardings as make_shardings

Layout = Literal["hf", "reference", "jax"]

SHIPPED = ("scenes-clip",)
"""Weights inside the package, by name."""

_OPEN_CLIP_CONFIG = "open_clip_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """Raw images and texts to what the model takes.

    Attributes:
      image: resize and crop on the host, and the mean and standard deviation.
      tokenizer: None if the checkpoint carries no vocabulary.
    """

    image: ImageProcessor
    tokenizer: ClipTokenizer | None

    def images(self, images: Sequence[Image]) -> Float[Array, "B S S 3"]:
        """Decodes (arrays, bytes or paths), processes and normalises.

        Raises:
          ImageError: an image cannot be decoded.
        """
        pixels = np.stack([self.image(image_files.decode(image)).pixels for image in images])
        return normalise(jax.numpy.asarray(pixels), self.image.mean, self.image.std)

    def texts(self, texts: Sequence[str]) -> Int[Array, "B T"]:
        """Token ids, padded to the context length.

        Raises:
          CheckpointError: the checkpoint came without a tokenizer.
        """
        if self.tokenizer is None:
            raise CheckpointError(
                "this checkpoint came without tokenizer files: expected tokenizer.json, or "
                "vocab.json and merges.txt, in its folder. Add them and load again."
            )
        return jax.numpy.asarray(self.tokenizer(texts).ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with all that is needed to use it and to write it again.

    Attributes:
      model: the NNX module.
      config: its frozen dataclass, e.g. `ClipConfig`.
      processor: of images and texts.
      report: what happened to each of the checkpoint's keys; None for a model not read from one.
    """

    model: nnx.Module
    config: Any
    processor: Processor
    report: KeyReport | None = None


def load(
    source: str | os.PathLike[str],
    *,
    dtype: np.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Loaded:
    """Loads a checkpoint.

    Args:
      source: a folder, the name of weights in the package (`SHIPPED`), or a hub id
        ("openai/clip-vit-base-patch16"; needs the extra [hub] and a connection).
      dtype: of the floating leaves; None keeps what the file stores.
      mesh: places each leaf on it by the model's sharding rules, tensor by tensor.

    Raises:
      CheckpointError: nothing to load there, damaged files, or names and shapes that do not fit.
      ConfigError: an architecture that is not built here.
    """
    folder = _find(source)
    layout, settings = _read_settings(folder)
    arch = (
        open_clip_architecture(settings)
        if layout == "reference"
        else architecture(settings.get("model_type", "clip"))
    )
    _check_layout(arch, layout, arch.read_config)
    config = arch.read_config["hf" if layout == "jax" else layout](settings)
    model = nnx.eval_shape(lambda: arch.build(config, rngs=nnx.Rngs(params=0)))
    abstract = flatten(model)
    loaded = load_params(
        _table(arch, layout, config, abstract),
        open_checkpoint(folder),
        abstract,
        dtype=dtype,
        shardings=None if mesh is None else make_shardings(abstract, arch.shardings, mesh),
    )
    return Loaded(
        model=unflatten(model, loaded.params),
        config=config,
        processor=_read_processor(folder, arch, config, layout, settings),
        report=loaded.report,
    )


def export(
    loaded: Loaded,
    directory: str | os.PathLike[str],
    *,
    layout: Layout = "hf",
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Args:
      loaded: from `load`, or built around a model of your own.
      directory: new or empty, unless `overwrite`.
      layout: see the module.

    Raises:
      CheckpointError: the folder is not empty, the disk is full, or the layout has no place for
        one of the leaves.
      ConfigError: the layout cannot express the configuration.
    """
    if layout not in ("hf", "reference", "jax"):
        raise ConfigError(f"layout: expected 'hf', 'reference' or 'jax', found {layout!r}.")
    arch = architecture_of(loaded.config)
    _check_layout(arch, layout, arch.write_config)
    params = flatten(loaded.model)
    extras: dict[str, Any] = {}
    if layout == "reference":
        mean, std = loaded.processor.image.mean, loaded.processor.image.std
        extras[_OPEN_CLIP_CONFIG] = {
            "model_cfg": arch.write_config["reference"](loaded.config),
            "preprocess_cfg": {"mean": list(mean), "std": list(std)},
        }
        settings = None
    else:
        settings = arch.write_config["hf"](loaded.config)
        settings |= {"perception_jax_layout": "jax"} if layout == "jax" else {}
        extras["preprocessor_config.json"] = loaded.processor.image.to_hf()
    write_checkpoint(
        directory,
        export_params(_table(arch, layout, loaded.config, params), params),
        settings,
        extras | _tokenizer_files(loaded.processor.tokenizer),
        overwrite=overwrite,
    )


def _find(source: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(source)
    if path.is_dir():
        return path
    name = os.fspath(source)
    if name in SHIPPED:
        return pathlib.Path(str(importlib.resources.files("perception_jax") / "weights" / name))
    if path.exists():
        raise CheckpointError(
            f"expected a folder with config.json and weights, found the file {path}: put it into "
            "a folder with its configuration and load that."
        )
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise CheckpointError(
            f"{name!r} is neither a folder, nor shipped weights ({', '.join(SHIPPED)}), nor a hub "
            "id of the form owner/name."
        )
    return _download(name)


def _download(name: str) -> pathlib.Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{name!r} is no local folder; to fetch it from the hub: "
            "pip install 'perception_jax[hub]'"
        ) from error
    patterns = ["*.json", "*.safetensors", "*.txt"]
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many unrelated types
        raise CheckpointError(
            f"cannot fetch {name!r} from the hub: {error}. Check the name and the connection, or "
            "download the folder elsewhere and give its path."
        ) from error


def _read_settings(folder: pathlib.Path) -> tuple[Layout, dict[str, Any]]:
    if (folder / "config.json").is_file():
        settings = read_json(folder / "config.json")
        return settings.get("perception_jax_layout", "hf"), settings
    if (folder / _OPEN_CLIP_CONFIG).is_file():
        return "reference", read_json(folder / _OPEN_CLIP_CONFIG)
    raise CheckpointError(
        f"expected config.json (Hugging Face) or {_OPEN_CLIP_CONFIG} in {folder}, found "
        f"{sorted(item.name for item in folder.iterdir())[:20]}."
    )


def _check_layout(arch: Architecture, layout: Layout, formats: Mapping[str, Any]) -> None:
    """The "jax" layout keeps its settings in the format of "hf"."""
    if ("hf" if layout == "jax" else layout) not in formats:
        known = [*formats, "jax"] if "hf" in formats else list(formats)
        raise ConfigError(
            f"{arch.name} has no configuration file in the layout {layout!r}; it has: "
            f"{', '.join(known)}. Use one of these."
        )


def _table(arch: Architecture, layout: Layout, config: Any, leaves: Mapping[str, Any]) -> RuleTable:
    return identity_table(leaves) if layout == "jax" else arch.tables[layout](config)


def _read_processor(
    folder: pathlib.Path,
    arch: Architecture,
    config: Any,
    layout: Layout,
    settings: Mapping[str, Any],
) -> Processor:
    size = arch.image_size(config)
    if (folder / "preprocessor_config.json").is_file():
        image = ImageProcessor.from_hf(read_json(folder / "preprocessor_config.json"))
    elif layout == "reference":
        given = settings.get("preprocess_cfg", {})
        named = {"mean": arch.mean, "std": arch.std}
        named |= {key: tuple(given[key]) for key in ("mean", "std") if key in given}
        mode = "squash" if given.get("resize_mode") == "squash" else "tv_crop"
        image = ImageProcessor(size=size, mode=mode, **named)
    else:
        image = ImageProcessor(size=size, mean=arch.mean, std=arch.std)
    context = arch.context(config)
    vocabulary = ("tokenizer.json", "vocab.json")
    if arch.name not in ("clip", "eva"):  # other vocabularies than CLIP's are not read
        tokenizer = None
    elif any((folder / name).is_file() for name in vocabulary):
        tokenizer = ClipTokenizer.from_directory(folder, context)
    elif layout == "reference":
        tokenizer = ClipTokenizer.shipped(context=context, pad_id=0)
    else:
        tokenizer = None
    return Processor(image=image, tokenizer=tokenizer)


def _tokenizer_files(tokenizer: ClipTokenizer | None) -> dict[str, str]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {item.name: item.read_text("utf-8") for item in pathlib.Path(folder).iterdir()}
